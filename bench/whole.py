"""python -m bench whole: where the seconds of a whole `engine train` go, from the start of the process to its end.

    python -m bench whole --data data/mosi                 the preset mosi, as a user runs it
    python -m bench whole --data data/mosi --device cuda --rounds 2
    python -m bench whole                                  on random data of MOSI's shape

The command says itself where its time went. "start" is the import of torch and of the engine; "exit" is what the
process does after its last line. The first round also fills caches (compiled kernels, the store of the data, files),
so that the last one is reported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import machine

LINE = re.compile(r"^time: (?P<seconds>\d+\.\d) s \(.*$", re.MULTILINE)


def command(data: Path, out: Path, device: str, settings: Sequence[str]) -> list[str]:
    """The command line that is measured."""
    words = ["train", "--preset", "mosi", "--data", str(data), "--out", str(out), f"device={device}"]
    return [sys.executable, "-m", "engine", *words, "output.progress=false", *settings]


def measure(data: Path, out: Path, device: str, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Run one whole command: its seconds, the seconds of its phases, and the test error.

    Raises:
        RuntimeError: the command failed.
    """
    began = time.perf_counter()
    done = subprocess.run(command(data, out, device, settings), capture_output=True, text=True, cwd=machine.ROOT)
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        raise RuntimeError(f"engine train: {done.stderr.strip()[-500:]}")
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    lines = (out / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "row": "whole", "side": "engine", "device": device, "seconds": seconds,
        "phases": phases(done.stdout, out, seconds), "epochs": [json.loads(line)["seconds"] for line in lines],
        "mae": metrics["test"].get("mae"),
    }  # fmt: skip


def phases(printed: str, out: Path, seconds: float) -> dict[str, float]:
    """Seconds of the phases of an `engine train` that has ended.

    Args:
        printed: what the command printed.
        out: its run folder.
        seconds: from the start of the process to its end.
    """
    timings = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["timings"]
    told = LINE.search(printed)
    start = re.search(r"\bstart (\d+\.\d)", told[0]) if told else None
    found = {"start": float(start[1]) if start else 0.0, **timings}
    if told:
        found["exit"] = seconds - float(told["seconds"])
    return found | {"other": timings["other"] + seconds - sum(found.values())}


def rounds(data: Path | None, device: str, count: int, settings: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """`count` whole commands, one after the other, each in a folder of its own; `data` None: random data."""
    from bench import shapes, stages

    with tempfile.TemporaryDirectory(prefix="bench-whole-") as place:
        data = data or stages.write_data(Path(place) / "data", shapes.mosi(stages.BANK))
        for number in range(count):
            yield measure(data, Path(place) / f"run{number}", device, settings)


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The phases of the last command, in seconds, and how long all of them took."""
    last = entries[-1]
    rows = [f"| {name} | {value:.2f} |" for name, value in last["phases"].items() if value >= 0.005]
    whole = ", ".join(f"{entry['seconds']:.1f}" for entry in entries)
    epochs = ", ".join(f"{value:.2f}" for value in last["epochs"])
    return "\n".join(
        [f"| phase ({last['device']}) | s |", "|---|---|", *rows, f"| **whole** | **{last['seconds']:.2f}** |", "",
         f"every round: {whole} s; epochs of the last: {epochs} s; test MAE {last['mae']}"]
    )  # fmt: skip
