"""The estimators that are compared, and the processes that run them."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import ROOT, THREAD_VARIABLES
from engine.config import BOUNDS
from engine.errors import EngineError

START = 600  # seconds in which a worker has to import its packages, on a busy machine too
PATIENCE = 100  # a worker may wait for its core this many times as long as it may compute
ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


@dataclass(frozen=True)
class Method:
    """One estimator.

    Attributes:
        family: whose environment runs it; "engine" is this one.
        module: what its interpreter runs, with `argument` where there is one.
        kinds: "mi", "cmi" or both.
        label: head of its column.
    """

    family: str
    module: str
    kinds: tuple[str, ...]
    label: str
    argument: str = ""


METHODS = {
    "engine": Method("engine", "bench.mi.peers.own", ("mi", "cmi"), "engine"),
    **{f"engine-{b}": Method("engine", "bench.mi.peers.own", ("mi",), f"engine, {b}", b) for b in BOUNDS},
    "bmi-ksg": Method("bmi", "bench.mi.peers.bmi_estimators", ("mi",), "bmi KSG", "ksg"),
    "bmi-cca": Method("bmi", "bench.mi.peers.bmi_estimators", ("mi",), "bmi CCA", "cca"),
    "bmi-infonce": Method("bmi", "bench.mi.peers.bmi_estimators", ("mi",), "bmi InfoNCE", "infonce"),
    "bmi-mine": Method("bmi", "bench.mi.peers.bmi_estimators", ("mi",), "bmi MINE", "mine"),
    "bmi-nwj": Method("bmi", "bench.mi.peers.bmi_estimators", ("mi",), "bmi NWJ", "nwj"),
    "bmi-dv": Method("bmi", "bench.mi.peers.bmi_estimators", ("mi",), "bmi DV", "dv"),
    "mist-nwj": Method("mist", "bench.mi.peers.mist_estimators", ("mi",), "torch-mist NWJ", "nwj"),
    "mist-smile": Method("mist", "bench.mi.peers.mist_estimators", ("mi",), "torch-mist SMILE", "smile"),
    "tigramite-knn": Method("tigramite", "bench.mi.peers.tigramite_knn", ("cmi",), "tigramite kNN"),
}


class WorkerError(Exception):
    """A worker did not answer: it ended, or took too long."""


class Worker:
    """A process that estimates one file of samples after another, on one core."""

    def __init__(self, method: str, pythons: Mapping[str, str]) -> None:
        """Start it; `pythons`: {family: interpreter}, for families other than this environment's.

        Raises:
            EngineError: it did not start.
        """
        m = METHODS[method]
        command = [pythons.get(m.family, sys.executable), "-m", m.module, *([m.argument] if m.argument else [])]
        one = dict.fromkeys(THREAD_VARIABLES, "1") | {"XLA_FLAGS": ONE_CORE, "JAX_PLATFORMS": "cpu"}
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")] if m.family == "engine" else [str(ROOT)]
        self._lines: queue.Queue[str] = queue.Queue()
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | one | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)},
            )
            threading.Thread(target=self._read, daemon=True).start()
            self.versions: dict[str, str] = self._next(START, "no answer")["versions"]
        except (OSError, WorkerError) as problem:
            raise EngineError(
                f"--methods {method}",
                f"{' '.join(command)} did not start ({problem})",
                f"an interpreter that has what {m.module} imports",
                f"Name one with --python {m.family}=PYTHON.",
            ) from None

    def ask(self, path: Path, seed: int, limit: float) -> dict[str, Any]:
        """The estimate of a file's samples; WorkerError after `limit` CPU seconds (the worker is of no use then)."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"path": str(path.absolute()), "seed": seed, "limit": limit}) + "\n")
        self.process.stdin.flush()
        return self._next(PATIENCE * limit, f"no answer in {PATIENCE * limit:g} s")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _next(self, limit: float, otherwise: str) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            raise WorkerError(otherwise) from None
        if not line:
            status = self.process.wait()
            late = status == -signal.SIGXCPU
            raise WorkerError("over the limit of CPU seconds" if late else f"the process ended with status {status}")
        return json.loads(line)
