"""The runner on suites made for the test: what is timed, in which order, and that a red gate reports nothing."""

import gc
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import machine, runner
from bench.memory import LEAST, warm_side
from bench.runner import Setting, Work
from bench.table import END, START, describe, readme_table, update_readme


def suite(**changes):
    order: list[str] = []
    costs = {"engine": 1.0, "baseline": 3.0, "other": 2.0}

    def build(side, setting):
        def run():
            order.append(side)
            return costs[side]

        return Work(run, samples=6, returns_number=True)

    parts = {
        "TITLE": "a suite", "GOALS": {"ratio": (2.0, 4.0)}, "SIDES": ("engine", "baseline", "other"), "ROUNDS": 3,
        "build": build, "gate": lambda setting: None, "order": order,
    }  # fmt: skip
    return SimpleNamespace(**(parts | changes))


@pytest.fixture
def use(monkeypatch):
    def use(module):
        monkeypatch.setattr(runner, "load_suite", lambda name: module)
        monkeypatch.setattr(gc, "collect", lambda: 0)  # a made suite's times are not measured
        return module

    return use


def test_the_line_has_what_a_reader_needs(use):
    use(suite())
    result = json.loads(runner.as_line(runner.run("made", Setting(), memory=False)))
    assert result["name"] == "made" and result["ratio"] == 3.0 and result["rounds"] == 3
    assert result["engine"]["median"] == 1.0 and result["engine"]["samples_per_second"] == 6.0
    assert result["baseline"] == {"median": 3.0, "p20": 3.0, "p80": 3.0, "all": [3.0] * 3, "samples_per_second": 2.0}
    assert result["others"]["other"]["ratio"] == 2.0
    assert result["machine"]["cores"] >= 1 and "torch" in result["versions"] and "commit" in result
    assert "value" not in result and "memory_ratio" not in result


def test_sides_are_interleaved_and_the_order_rotates(use):
    module = use(suite())
    runner.run("made", Setting(), memory=False)
    warm, rounds = module.order[:3], module.order[3:]
    assert warm == ["engine", "baseline", "other"]
    assert [rounds[i : i + 3] for i in (0, 3, 6)] == [
        ["engine", "baseline", "other"], ["baseline", "other", "engine"], ["other", "engine", "baseline"],
    ]  # fmt: skip


def test_a_red_gate_reports_nothing(use):
    def gate(setting):
        raise AssertionError("wrong by 3")

    module = use(suite(gate=gate))
    with pytest.raises(runner.RedGateError, match="wrong by 3"):
        runner.run("made", Setting())
    assert module.order == []


def test_a_value_without_a_baseline(use):
    use(suite(SIDES=("engine",), VALUE="share", GOALS={"value": (0.02, 0.005)}))
    result = runner.run("made", Setting(quick=True), rounds=1)
    assert result["value"] == 1.0 and result["unit"] == "share" and "ratio" not in result and "baseline" not in result
    assert "BELOW FLOOR" in describe(result)


def test_memory_ratio_is_of_extra_peaks(use, monkeypatch):
    use(suite(MEMORY=("engine", "baseline")))
    monkeypatch.setattr("bench.memory.extra_peak", lambda name, side, *_: {"engine": 100, "baseline": 900}[side])
    assert runner.run("made", Setting())["memory_ratio"] == 9


def test_short_calls_are_repeated_until_they_can_be_timed():
    calls = []
    work = Work(lambda: calls.append(0))
    repeats = max(runner.warm(work, Setting()) for _ in range(3))  # a busy machine may interrupt one
    assert repeats > 100
    before = len(calls)
    assert runner.measure(work, repeats, Setting()) < 1e-3
    assert len(calls) - before == repeats


def test_quantiles():
    assert runner.quantile([3, 1, 2], 0.5) == 2
    assert runner.quantile([0, 10], 0.2) == pytest.approx(2)
    assert runner.quantile([5], 0.8) == 5


def test_an_epoch_of_real_files(tmp_path, monkeypatch, capsys):
    from bench import __main__, shapes
    from bench.suites import epoch_mosi

    monkeypatch.delenv(epoch_mosi.FILES, raising=False)
    monkeypatch.setattr(runner, "check_gate", lambda *a: None)
    assert __main__.main(["run", "epoch_mosi", "--quick"]) == 2
    assert "ENGINE_MOSI_FILES" in capsys.readouterr().err
    made = shapes.mosi(3)
    shapes.write_store(tmp_path, dict.fromkeys(("train", "valid", "test"), made))
    monkeypatch.setenv(epoch_mosi.FILES, str(tmp_path))
    monkeypatch.setattr("bench.epochs.QUICK_SAMPLES", 2)
    read = epoch_mosi.samples(runner.Setting(quick=True))
    assert read.text == made.text[:2] and [a.shape for a in read.audio] == [a.shape for a in made.audio[:2]]
    assert read.label.shape == (2, 1)


def test_every_suite_is_complete():
    for name in (*runner.NAMES, *runner.MORE_NAMES):
        module = runner.load_suite(name)
        assert module.SIDES[0] == "engine" and module.TITLE and callable(module.build) and callable(module.gate)
        assert set(getattr(module, "MEMORY", ())) <= set(module.SIDES)
        assert ("ratio" in module.GOALS) <= ("baseline" in module.SIDES)
        assert ("value" in module.GOALS) == hasattr(module, "VALUE")


PEAKS = """
import torch
from bench.memory import peak_of_call
torch.ones(1 << 20).sum()  # libraries' pages come with the first call
print(peak_of_call(lambda: torch.ones(8 << 20).sum(), "cpu"), peak_of_call(lambda: None, "cpu"))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's resettable high-water mark")
def test_peak_of_a_call_sees_what_the_call_frees_again():
    """In a process of its own, warmed up, as in a benchmark: this one's allocator may keep memory, and its threads take
    some."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True, cwd=machine.ROOT, env=environment
    )
    tensor, nothing = map(int, done.stdout.split())
    assert tensor == pytest.approx(32 << 20, rel=0.1)
    assert nothing <= LEAST


def test_a_point_of_a_curve_is_warmed_by_a_small_run():
    assert [warm_side(s) for s in ("engine", "engine@4096", "b512", "n16326", "baseline")] == [
        "engine", "engine", "b64", "n64", "baseline",
    ]  # fmt: skip


def test_a_long_point_of_a_curve_is_measured_once(monkeypatch):
    calls = []

    def build(side, setting):
        return Work(lambda: calls.append(side))

    seconds = iter([runner.LONG + 1, 0.1, 1.0, 3.0, 2.0])
    monkeypatch.setattr(runner, "measure", lambda work, count, setting: work.run() or next(seconds))
    monkeypatch.setattr(runner, "warm", lambda work, setting: 1)
    monkeypatch.setattr("bench.memory.extra_peak", lambda name, side, *_, **__: len(side))
    curve = runner.over_batches(SimpleNamespace(build=build), "made", {"engine": (512, 64)}, Setting())
    assert curve == {
        "engine": {
            "512": {"seconds": runner.LONG + 1, "extra_peak_bytes": 10},
            "64": {"seconds": 2.0, "extra_peak_bytes": 9},
        }
    }
    assert calls == ["engine@512", *["engine@64"] * 4]


def test_products_are_counted_by_the_baseline():
    a, b = torch.randn(8, 16), torch.randn(16, 4)
    read = runner.products(Work(lambda: a @ b), 1e-6, Setting())
    assert read["product_flops"] == 2 * 8 * 16 * 4 and read["gemm_fraction"] > 0


def test_threads_are_set_before_libraries_read_them(monkeypatch):
    for name in machine.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    machine.pin_environment(1)
    assert all(os.environ[name] == "1" for name in machine.THREAD_VARIABLES)


def test_the_readme_table_replaces_what_is_between_its_markers(use, tmp_path):
    use(suite())
    result = runner.run("made", Setting(), memory=False)
    table = readme_table({"made": result})
    assert "| a suite | 3× | 2× | 4× | 1 s | 3 s |  | 1 |" in table and table.splitlines()[-1].startswith("1. ")
    compared = result | {"others": {"compile": {"median": 2.5}, "gemm": {"median": 1.0}}}
    assert "| torch.compile of the baseline 2.5× | 1 |" in readme_table({"made": compared})
    aimless = next(row for row in readme_table({"made": result | {"goals": {}}}).splitlines() if "×" in row)
    assert f"| {result['ratio']:.3g}× |  |  | " in aimless
    other = result | {"machine": result["machine"] | {"processor": "another"}}
    rows = readme_table({"made": result, "other": other}).splitlines()
    numbers = [line.split("|")[-2].strip() for line in rows if line.startswith("| a suite")]
    assert sorted(numbers) == ["1", "2"] and "another" in rows[-1] + rows[-2]
    path = tmp_path / "README.md"
    path.write_text(f"before\n{START}\nold\n{END}\nafter\n", encoding="utf-8")
    update_readme(path, table)
    text = path.read_text(encoding="utf-8")
    assert table in text and "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    path.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="bench:start"):
        update_readme(path, table)


def test_plots_are_written(use, tmp_path):
    from bench.plots import draw

    use(suite())
    growth = {f"{k}": {"seconds_per_sample": 0.1, "extra_peak_bytes": 1 << 20} for k in ("n10", "n20", "b2", "b4")}
    result = runner.run("made", Setting(), memory=False)
    curve = {"engine": {"256": {"seconds": 1.0, "extra_peak_bytes": 5}, "512": {"seconds": 2.0, "extra_peak_bytes": 9}}}
    results = {
        "made": result,
        "growth": {"goals": {}, "curve": growth},
        "streaming_infonce": {"goals": {}, "curve": curve},
    }
    made = draw(results, tmp_path)
    assert [p.name for p in made] == ["ratios.svg", "growth.svg", "streaming_infonce.svg"]
    assert all(p.read_text(encoding="utf-8").rstrip().endswith("</svg>") for p in made)


def test_the_command_line_refuses_an_unknown_suite():
    done = subprocess.run([sys.executable, "-m", "bench", "run", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and "epoch_fast" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["epoch_mosei", "epoch_avec", pytest.param("epoch_bert", marks=pytest.mark.slow)])
def test_a_quick_epoch_runs(name):
    """Also what memory is measured after."""
    work = runner.load_suite(name).build("engine", runner.Setting(quick=True))
    try:
        assert work.run() > 0
    finally:
        work.close()


def test_a_result_that_cannot_be_kept_is_said_before_anything_is_measured(tmp_path, capsys):
    from bench import __main__

    assert __main__.main(["run", "knn", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert "found a folder; expected the name of a file" in told.err and not told.out
    assert "gate" not in told.err
