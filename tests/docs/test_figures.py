"""Figures and lists that pages repeat by hand are those of the committed results and of the code."""

import json
import re
from typing import Any

import pytest

from engine.training.same_run import FREE
from tests.docs.blocks import PROJECT


def page(name: str) -> str:
    return re.sub(r"\s+", " ", (PROJECT / name).read_text(encoding="utf-8"))


def result(name: str) -> dict[str, Any]:
    return json.loads((PROJECT / f"bench/results/{name}.json").read_text(encoding="utf-8"))


def _times(name: str, unit: str, scale: float) -> list[str]:
    """What the README's row of a suite says: the engine's time, the baseline's, and their ratio."""
    found = result(name)
    times = [f"{scale * found[side]['median']:.3g} {unit}" for side in ("engine", "baseline")]
    return [*times, f"({found['ratio']:.3g}×)"]


def _memory(name: str) -> list[str]:
    found = result(name)
    return [f"{found[side]['extra_peak_bytes'] / 2**20:.1f} MiB" for side in ("engine", "baseline")]


def _accuracy(name: str, side: str) -> str:
    mae = result(name)["results"][side]["test"]["mae"]
    return f"{mae['mean']:.3f} ± {mae['std']:.3f}"


def _on_a_gpu(side: str, figure: str) -> str:
    """InfoNCE in bf16, B=16,384, d=128; `figure` is graph_ms or ms."""
    where = {"B": 16384, "d": 128, "precision": "bf16", "side": side}
    (entry,) = (e for e in result("gpu/infonce")["entries"] if where.items() <= e.items())
    return f"{entry[figure]:.2f} ms"


ROWS = {
    "real CMU-MOSI, preset": [_accuracy("mosi_accuracy", "fast")],
    "two-stage epoch, MOSI-shaped": _times("epoch_fast", "s", 1),
    "two-stage epoch, 256 samples of real": _times("epoch_mosi", "s", 1),
    "memory of InfoNCE": _memory("streaming_infonce"),
    "six kNN product samples": _times("knn", "ms", 1000),
    "epoch of real CMU-MOSI, one H200": [f"{result('gpu/step_fast')['entries'][0]['seconds']:.3f} s"],
    "InfoNCE in bf16": [
        f"{_on_a_gpu('engine', 'graph_ms')} as a CUDA graph, {_on_a_gpu('engine', 'ms')} without",
        f"{_on_a_gpu('eager', 'graph_ms')} for eager torch, {_on_a_gpu('compile', 'ms')} for torch.compile",
    ],
}


@pytest.mark.parametrize("start", ROWS)
def test_the_readme_has_the_committed_figures(start: str):
    lines = (PROJECT / "README.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in lines if line.startswith(f"| {start}"))
    assert [figure for figure in ROWS[start] if figure not in row] == [], row


def test_the_readme_has_the_errors_of_the_page_on_accuracy():
    table = page("docs/measuring_accuracy.md").partition("### Summary, 2,000 rows")[0]
    errors = [
        re.search(rf"\| {side}, tasks of bmi \|(?: [\d,]+ \|){{2}} 0(\.\d+) \|", table)
        for side in ("engine", "bmi CCA")
    ]
    assert "| {} nats | {} nats for CCA".format(*(found[1] for found in errors if found)) in page("README.md")


def test_figures_in_sentences():
    assert f"reached {_accuracy('mosi_static', 'emulate')}" in page("README.md")
    waits = result("loader_wait")["others"]["dali"]["median"]
    assert f"waits for it for only {100 * waits:.1f} % of its time" in page("docs/benchmarks.md")
    ready, passed = result("loader_throughput"), result("loader_throughput")["dali_passing_seconds"]
    assert f"takes {passed:.2f} s an epoch" in page("docs/benchmarks.md")
    assert f"twentieth of the baseline's time is {ready['baseline']['median'] / 20:.2f} s" in page("docs/benchmarks.md")
    host = json.loads((PROJECT / "bench/guard.json").read_text(encoding="utf-8"))["host"]["launches"]
    assert f"evaluating a split with averaged weights | 871 | {host['evaluate']} |" in page("docs/performance.md")
    runs = result("mosi_accuracy")["results"]["fast"]["runs"].values()
    seconds, peak = sum(run["wall_s"] for run in runs) / len(runs), max(run["peak_memory_mb"] for run in runs)
    assert f"took {seconds:.0f} s on one core of an AMD EPYC and {peak / 1000:.1f} GB of memory" in page("docs/faq.md")


def test_the_settings_that_a_resumed_run_may_change():
    told = page("docs/cli.md").partition("These settings may change: ")[2].partition(". Without")[0]
    assert set(re.findall(r"`([\w.]+)`", told)) == FREE - {"preset"}  # it only names where the settings came from
