"""Processes that train: each one run at a time, none of which outlives the process that started it."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from engine.config import Config
from engine.errors import ConfigError
from engine.limits import cores

PATIENCE_S = 20.0  # that a run has to write what it must after SIGTERM


@dataclass(frozen=True)
class Job:
    """A run to train: its name in tables, its folder, its settings, and the file for what it prints."""

    name: str
    folder: Path
    config: Config
    log: Path


@dataclass(frozen=True)
class Event:
    """What a process told of its job.

    Attributes:
        kind: "epoch" (and it waits for an answer), "done" or "failed".
        content: "epoch": its number and the valid metric; "done": the valid metrics; "failed": the error in one line.
    """

    job: Job
    kind: str
    content: dict[str, Any] = field(default_factory=dict)


class _Worker:
    """A process that trains. It gets one job after the other as lines of JSON, and answers in lines of JSON."""

    def __init__(self, task: str | None, environment: dict[str, str]):
        # Its path is ours, and not the current folder in front, as -m would have it.
        code = "import sys; sys.path[:] = sys.argv[1:]; from engine.sweeps.worker import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment, "ENGINE_SWEEP_PARENT": str(os.getpid())},
            start_new_session=True,  # Ctrl-C reaches us alone, and we end it in order
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin: IO[bytes] = self.process.stdin
        self.stdout: IO[bytes] = self.process.stdout
        self.task = task
        self.job: Job | None = None
        self.asks = False  # whether it waits for an answer

    def tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, which its output tells
            self.stdin.write(json.dumps(message).encode() + b"\n")
            self.stdin.flush()

    def start(self, job: Job) -> None:
        self.job = job
        config = job.config.model_dump(mode="json")
        self.tell({"settings": config, "folder": str(job.folder), "log": str(job.log), "task": self.task})

    def event(self) -> Event:
        """The next thing that it says of its job."""
        job, line = self.job, self.stdout.readline()
        assert job is not None
        try:
            message = json.loads(line)
        except ValueError:
            return Event(job, "failed", {"error": f"its process ended{_how(self.process.wait())} (see {job.log})"})
        self.asks = message["kind"] == "epoch"
        return Event(job, message.pop("kind"), message)

    def answer(self, go_on: bool) -> None:
        self.asks = False
        self.tell({"go_on": go_on})

    def close(self, patience: float) -> None:
        """End it. A run that was asked to end has `patience` seconds to write what it must."""
        if self.job is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        for stream in (self.stdin, self.stdout):
            with contextlib.suppress(OSError):
                stream.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def _how(code: int) -> str:
    if code >= 0:
        return f" with exit code {code}"
    reason = ", which is what the system does when memory runs out" if code == -signal.SIGKILL else ""
    return f" by {signal.Signals(-code).name}{reason}"


class Pool:
    """Up to `jobs` processes that train beside each other. Leaving the context ends them.

    Args:
        task: "module:attribute" of a task of one's own, which the processes import.
        gpus: names of GPUs for CUDA_VISIBLE_DEVICES, dealt out among the processes; empty: left as it is.
    """

    def __init__(self, jobs: int, task: str | None = None, gpus: Sequence[str] = ()):
        self.places: list[_Worker | None] = [None] * jobs
        self.task, self.gpus = task, gpus
        self.selector = selectors.DefaultSelector()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *problem: Any) -> None:
        workers = [worker for worker in self.places if worker is not None]
        for worker in workers:
            if worker.job is not None:
                worker.process.terminate()
                if worker.asks:  # it ends at its next batch
                    worker.answer(True)
        deadline = time.monotonic() + PATIENCE_S
        for worker in workers:
            worker.close(max(0.0, deadline - time.monotonic()))
        self.selector.close()

    @property
    def free(self) -> bool:
        return any(worker is None or worker.job is None for worker in self.places)

    @property
    def busy(self) -> bool:
        return any(worker is not None and worker.job is not None for worker in self.places)

    def start(self, job: Job) -> None:
        """Give a job to a process that has none."""
        place = next(i for i, worker in enumerate(self.places) if worker is None or worker.job is None)
        worker = self.places[place]
        if worker is None:
            gpu = {"CUDA_VISIBLE_DEVICES": self.gpus[place % len(self.gpus)]} if self.gpus else {}
            worker = self.places[place] = _Worker(self.task, gpu)
            self.selector.register(worker.stdout, selectors.EVENT_READ, place)
        worker.start(job)

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """What the processes say next. Waits for the first event, at most `timeout` seconds."""
        for key, _ in self.selector.select(timeout):
            place = key.data
            worker = self.places[place]
            assert worker is not None
            if worker.job is None:  # it ended while it had nothing to do
                self._discard(place)
                continue
            event = worker.event()
            if event.kind == "failed":  # nothing of a failed run stays in memory
                self._discard(place)
            elif event.kind == "done":
                worker.job = None
            yield event

    def answer(self, job: Job, go_on: bool) -> None:
        """Answer an epoch's event: whether the run goes on. One that does not ends with the event "done"."""
        worker = next(w for w in self.places if w is not None and w.job is job)
        worker.answer(go_on)

    def _discard(self, place: int) -> None:
        worker = self.places[place]
        assert worker is not None
        self.selector.unregister(worker.stdout)
        worker.job, self.places[place] = None, None
        worker.close(0.0)


def resources(config: Config, jobs: int | None) -> tuple[int, int, list[str]]:
    """How many runs train beside each other, the threads of each, and the GPUs that are dealt out among them.

    On GPUs there is one run for each by default. On a CPU each run has `threads`, else OMP_NUM_THREADS, else its share
    of the cores, and at most 4; there are as many runs as the cores allow.
    """
    if jobs is not None and (type(jobs) is not int or not 1 <= jobs <= 1024):
        raise ConfigError("jobs", str(jobs), "a number from 1 to 1024", "Change the number.")
    gpus: list[str] = []
    if config.device in ("auto", "cuda"):
        import torch

        named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        count = torch.cuda.device_count()
        gpus = named[:count] if len(named) >= count else [str(i) for i in range(count)]
    given = os.environ.get("OMP_NUM_THREADS", "")
    share = max(1, cores() // (jobs or 1))
    threads = config.threads or (int(given) if given.isdigit() and int(given) else min(4, share))
    fit = len(gpus) if gpus else 1 if config.device.startswith(("cuda:", "mps")) else max(1, cores() // threads)
    return jobs or fit, min(threads, 1024), gpus
