"""Sweeps and tunings of tiny runs in processes of their own, to be killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
QUICK = ("data.modalities=audio-vision", "objective.enabled=false", "output.report=false", "output.tensorboard=false")
SWEEP = ("seeds=0-1", "train.lr=1e-3,1e-2", "epochs=2")
TUNE = ("--trials", "4", "epochs=2", "train.lr=1e-4..1e-1:log", "batch_size=8,16")
PATIENCE_S = 300


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["engine.cli.sweeps", "engine.trainer", "engine.mimrl", "optuna", "pytest"])
"""Commands are forked from a process that has imported what they need: importing takes longer than their runs."""


class Started:
    """`engine COMMAND` on generated data, on one thread, in a process of its own.

    Args:
        hold: (pattern, number): the command stops for good, with its run waiting for an answer, at the first epoch at
            which so many files of `out` match the pattern.
    """

    def __init__(self, command: str, data: Path, out: Path, *words: str, hold: tuple[str, int] | None = None):
        line = [command, "--preset", "mosi", "--data", str(data), "--out", str(out), *QUICK, *words]
        handle, name = tempfile.mkstemp(prefix="output", dir=out.parent)
        os.close(handle)
        self.out, self.output = out, Path(name)
        self.held = Path(f"{name}.held")
        stop = None if hold is None else (str(out), *hold, str(self.held))
        self.process = _FORKS.Process(target=_command, args=(line, name, stop), daemon=True)
        self.process.start()

    def end(self) -> tuple[int | None, str]:
        """Its exit code and its output."""
        self.process.join(PATIENCE_S)
        self.process.kill()
        self.process.join()
        return self.process.exitcode, self.output.read_text(encoding="utf-8")

    def wait(self) -> None:
        """Wait until it has stopped at `hold`; it may not end before."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.held.exists():
            assert self.process.is_alive(), self.end()
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
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        return children


def _command(words: list[str], output: str, hold: tuple[str, str, int, str] | None) -> None:
    """In the process: as a terminal would start it, its output in a file."""
    from engine.cli import main

    if hold is not None:
        _stop_at(*hold)

    file = os.open(output, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, encoding="utf-8") for n in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main(words))


def _stop_at(out: str, pattern: str, number: int, held: str) -> None:
    """Have the pool of runs stop before it answers an epoch, once so many files are there."""
    from engine.sweeps.pool import Pool

    answer = Pool.answer

    def answered(*arguments: Any) -> None:
        if len(list(Path(out).glob(pattern))) >= number:
            Path(held).touch()
            while True:
                time.sleep(1.0)  # until a signal comes
        answer(*arguments)

    Pool.answer = answered


def all_end(processes: list[int], patience_s: float = 120.0) -> bool:
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
