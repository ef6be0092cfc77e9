"""The cost of saving an epoch, in the second epoch and in the two thousandth: python -m bench.saving [--epochs N]

Two runs on generated data: one of tiny epochs, which shows whether the cost grows with the number of epochs, and a
short one of the preset mosi, which shows what it is for a model of that size. "copy" is what training waits for;
"write" goes on beside the next epoch. All times are those
that the thread computed: a busy machine and a slow disk do not show in them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import machine

NEAR = 15  # epochs on either side, of whose times the median is taken
FILES = ("last.safetensors", "best.safetensors", "history.jsonl", "metrics.json", "checksums.json")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.saving", description=__doc__)
    parser.add_argument("--epochs", type=int, default=2000, help="of the run of tiny epochs (2000)")
    parser.add_argument("--threads", type=int, default=machine.cores())
    a = parser.parse_args(arguments)
    machine.pin_environment(a.threads)
    machine.pin_threads(a.threads)
    print("| run | epoch | copy, ms | write, ms | epoch, ms | " + " | ".join(f"{name}, kB" for name in FILES) + " |")
    print("|---|---|---|---|---|" + "---|" * len(FILES))
    with tempfile.TemporaryDirectory() as folder:
        _print("mosi", _measured(mosi(Path(folder)), Path(folder) / "mosi"), [3])
        _print("tiny", _measured(tiny(Path(folder), a.epochs), Path(folder) / "tiny"), [2, a.epochs])
    return 0


def tiny(folder: Path, epochs: int) -> Any:
    from engine.config import load_config
    from engine.demo.generator import write_demo_files

    data = write_demo_files(folder / "few", n_train=16, n_valid=6, n_test=6)["data"]
    shape = "model.cubemlp.{}=4-2-8=4-2-8"
    return load_config(
        "demo",
        [
            f"data.path={data}", f"epochs={epochs}", "batch_size=8", "data.modalities=[audio,vision]",
            "data.time_len=4", "model.d_common=8", shape.format("d_hiddens"), shape.format("d_outs"),
            "objective.enabled=false", "objective.hidden=16", "objective.embed=8",
            "output.progress=false", "output.report=false", "output.features=false",
        ],
    )  # fmt: skip


def mosi(folder: Path) -> Any:
    from engine.config import load_config
    from engine.demo.generator import write_demo_files

    data = write_demo_files(folder / "more", n_train=96, n_valid=32, n_test=32)["data"]
    return load_config(
        "mosi", [f"data.path={data}", "epochs=4", "output.progress=false", "output.report=false", "data.workers=0"]
    )


def _measured(config: Any, out: Path) -> dict[int, dict[str, float]]:
    """Epoch, from 1 -> milliseconds of "copy", "write" and "epoch", and bytes of each file."""
    from engine import trainer
    from engine.training.saving import RunFiles

    costs: dict[int, dict[str, float]] = {}
    save, ended = RunFiles.save, [time.thread_time()]

    def timed(self: Any, history: list[dict[str, Any]], *rest: Any) -> Callable:
        epoch, start = len(history), time.thread_time()
        write = save(self, history, *rest)
        costs[epoch] = {"copy": 1e3 * (time.thread_time() - start), "epoch": 1e3 * (start - ended[-1])}
        ended.append(time.thread_time())

        def timed_write() -> None:
            start = time.thread_time()
            write()
            costs[epoch]["write"] = 1e3 * (time.thread_time() - start)
            costs[epoch] |= {n: (out / n).stat().st_size for n in FILES if (out / n).exists()}

        return timed_write

    RunFiles.save = timed
    try:
        trainer.train(config, out)
    finally:
        RunFiles.save = save
    return costs


def _print(run: str, costs: dict[int, dict[str, float]], epochs: list[int]) -> None:
    for epoch in epochs:
        near = [costs[e] for e in costs if abs(e - epoch) <= NEAR]
        times = [f"{statistics.median(one[key] for one in near):.1f}" for key in ("copy", "write", "epoch")]
        sizes = [f"{costs[epoch][name] / 1e3:.1f}" for name in FILES]
        print(f"| {run} | {epoch} | {' | '.join(times + sizes)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
