"""Compare an example's two versions: the one with the engine and the plain one.

An example defines `train(side, steps)`, where side is "engine" or "plain", and hands it to `main`. Without arguments
`main` runs both sides in fresh processes that take turns, and prints their losses, time and memory:

    python examples/mmim_style.py
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIDES = ("engine", "plain")


@dataclass
class Outcome:
    """The result of a training: the loss of every step, and a score on new data.

    `seconds` of the processor and `peak_mib` are filled where the training ran in other processes, which measured them.
    """

    losses: list[float]
    score: float
    seconds: float | None = None
    peak_mib: float | None = None


class PeakMemory:
    """The most resident memory within a context, in MiB above that at its beginning. None outside Linux."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.mib, self._before = None, None
        if Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self._before = _status("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            self.mib = (_status("VmHWM") - self._before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def run_side(train: Callable[[str, int], Outcome], side: str, steps: int) -> dict[str, Any]:
    """Train one side here: its losses, score, CPU seconds and MiB, after two steps that load libraries."""
    train(side, 2)
    with PeakMemory() as memory:
        start = time.process_time()
        outcome = train(side, steps)
        seconds = time.process_time() - start
    found = {"seconds": seconds, "peak_mib": memory.mib} if outcome.seconds is None else {}
    return {**vars(outcome), **found}


def compare(script: Path, steps: int | None = None, rounds: int = 3) -> dict[str, dict[str, Any]]:
    """Run both sides of an example in fresh processes that take turns: medians of time and memory, and the losses."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            command = [sys.executable, str(script), "--side", side, *(["--steps", str(steps)] if steps else [])]
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # so that freed memory is given back
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode != 0:
                raise SystemExit(f"{script.name} --side {side} failed:\n{done.stderr[-2000:]}")
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    return {side: _median(runs) for side, runs in found.items()}


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    peaks = [run["peak_mib"] for run in runs if run["peak_mib"] is not None]
    return {
        "final_loss": statistics.mean(runs[0]["losses"][-10:]),
        "losses": runs[0]["losses"],
        "score": runs[0]["score"],
        "seconds": statistics.median(run["seconds"] for run in runs),
        "peak_mib": statistics.median(peaks) if peaks else None,
    }


def difference(result: dict[str, dict[str, Any]], steps: int = 10) -> float:
    """The largest difference between both sides' losses in the first steps. Later roundoff has grown."""
    a, b = (result[side]["losses"][:steps] for side in SIDES)
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def main(train: Callable[[str, int], Outcome], steps: int, score: str) -> None:
    """The command line of an example.

    Args:
        steps: the number of steps that a whole training takes.
        score: what the score is, for the table.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=SIDES, help="train one side and print its figures as JSON")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is timed")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run_side(train, arguments.side, arguments.steps)))
        return
    result = compare(Path(sys.argv[0]).resolve(), arguments.steps, arguments.rounds)
    print(f"{'':8}{'final loss':>12}{score:>16}{'CPU s':>10}{'peak MiB':>10}")
    for side, row in result.items():
        peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}"
        print(f"{side:8}{row['final_loss']:12.4f}{row['score']:16.4f}{row['seconds']:10.2f}{peak:>10}")
    print(f"largest difference of the losses in the first 10 steps: {difference(result):.1e}")
