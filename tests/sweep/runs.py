"""Sweeps and tunings of tiny runs in processes of their own, to be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.small_runs import AS_IN_A_TERMINAL

PROJECT = Path(__file__).resolve().parents[2]
QUICK = ("data.modalities=audio-vision", "objective.enabled=false", "output.report=false", "output.tensorboard=false")
SWEEP = ("seeds=0-1", "train.lr=1e-3,1e-2", "epochs=2")
TUNE = ("--trials", "4", "epochs=2", "train.lr=1e-4..1e-1:log", "batch_size=8,16")
PATIENCE_S = 300


class Started:
    """`engine COMMAND` on generated data, on one thread."""

    def __init__(self, command: str, data: Path, out: Path, *words: str):
        line = [sys.executable, "-m", "engine", command, "--preset", "mosi", "--data", str(data), "--out", str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
        self.process = subprocess.Popen(
            [*AS_IN_A_TERMINAL, *line, *QUICK, *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.out = out

    def end(self) -> tuple[int, str]:
        """Its exit code and its output."""
        try:
            output, _ = self.process.communicate(timeout=PATIENCE_S)
        finally:
            self.process.kill()
        return self.process.returncode, output

    def wait_for(self, reached: Callable[[], bool]) -> None:
        """Wait until it is so far; it may not end before."""
        deadline = time.monotonic() + PATIENCE_S
        while not reached():
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def children(self) -> list[int]:
        """Processes that it started and that have not ended."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == self.process.pid and state != "Z":
                    found.append(int(entry.name))
        return found

    def stop(self, number: int = signal.SIGKILL) -> list[int]:
        """Send it a signal. Returns the processes that it had started."""
        children = self.children()
        self.process.send_signal(number)
        return children


def all_end(processes: list[int], patience_s: float = 20.0) -> bool:
    """Whether these processes end soon."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if not any(_lives(process) for process in processes):
            return True
        time.sleep(0.05)
    return False


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
