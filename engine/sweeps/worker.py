"""The process that trains the runs of a sweep, one after the other. `pool` starts it and speaks with it.

It ends with the process that started it: Linux kills it then, and elsewhere its closed input ends it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
LOCKED_S = 30.0  # how long a run folder may stay locked by a process that is ending


class Pruned(Exception):
    """The run was told not to go on."""


class Talk:
    """Lines of JSON from and to the process that started this one."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "wb")
        self.inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        source = os.dup(0)
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        os.dup2(nowhere, 1)
        threading.Thread(target=self._listen, args=(source,), daemon=True).start()

    def _listen(self, source: int) -> None:
        rest = b""
        while piece := os.read(source, 1 << 16):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                self.inbox.put(json.loads(line))
        os._exit(0)  # whoever started this process has ended, or has no more to do

    def say(self, **message: Any) -> None:
        self.out.write(json.dumps(message).encode() + b"\n")
        self.out.flush()

    def ask(self, **message: Any) -> dict[str, Any]:
        self.say(**message)
        return self.inbox.get()


def _end_with_parent() -> None:
    """Have Linux kill this process when the one that started it ends."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ["ENGINE_SWEEP_PARENT"]):  # it has ended already
        os._exit(0)


class Reporting:
    """A training callback: tells every epoch's valid metric, and ends the run when the answer says so."""

    def __init__(self, talk: Talk, folder: Path, metric: str):
        self.talk, self.folder, self.metric, self.epochs = talk, folder, metric, 0

    def on_start(self, first_epoch: int, epochs: int, batches: dict[str, int]) -> None:
        self.epochs = epochs
        self.replay(first_epoch)

    def replay(self, first_epoch: int) -> None:
        """Tell of the epochs before: whoever was told of them may have been killed before it took note."""
        from engine.run_folder import HISTORY
        from engine.training.records import parse_line

        if first_epoch:
            for line in (self.folder / HISTORY).read_bytes().splitlines()[:first_epoch]:
                self.on_epoch(parse_line(line), False)

    def on_batch(self, stage: str, number: int) -> None:
        pass

    def on_epoch(self, record: dict[str, Any], improved: bool) -> None:
        last = record["epoch"] + 1 == self.epochs
        answer = self.talk.ask(kind="epoch", epoch=record["epoch"], value=record["valid"][self.metric], last=last)
        if not answer["go_on"]:
            raise Pruned

    def on_end(self) -> None:
        pass


def _log_to(path: Path) -> None:
    """Send what the run prints, and what the system says of its end, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _wait_for(folder: Path) -> None:
    """Wait while another process, which is about to end, holds the run folder."""
    from engine.errors import OutputError
    from engine.run_folder import owned

    deadline = time.monotonic() + LOCKED_S
    while folder.is_dir():
        try:
            with owned(folder):
                return
        except OutputError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _train(talk: Talk, job: dict[str, Any]) -> dict[str, Any]:
    """Begin the run, go on with it, or find it finished. Returns its valid metrics at the best epoch."""
    from engine import trainer
    from engine.config import Config
    from engine.run_folder import MARKS
    from engine.task import find_task, load_task
    from engine.training.applying import own_tokenizer
    from engine.training.resuming import finished_metrics

    if job["task"] is not None:
        load_task(job["task"])
    config, folder = Config(**job["settings"]), Path(job["folder"])
    task, resolved = find_task(config.task), config.resolve()
    _wait_for(folder)
    begun = any((folder / mark).exists() for mark in MARKS)
    tokenizer = own_tokenizer(folder, config) if begun else None
    dataset = task.open_data(resolved, config.data.path, tokenizer=tokenizer)
    reporting = Reporting(talk, folder, task.selection(resolved)[0])
    metrics = finished_metrics(resolved, folder, dataset) if begun else None
    before = metrics is not None
    if metrics is None:
        metrics = trainer.train(config, folder, begun, [reporting], dataset).metrics
    else:
        reporting.epochs = config.epochs
        reporting.replay(config.epochs)
    kept = ("valid", "best_epoch", "wall_s")  # nothing of the test split: it chooses nothing
    return {key: metrics[key] for key in kept} | {"before": before}


def _run(talk: Talk, job: dict[str, Any]) -> None:
    from engine.cli.process import as_engine_error
    from engine.errors import EngineError

    try:
        _log_to(Path(job["log"]))
        done = _train(talk, job)
    except Pruned:
        talk.say(kind="done", pruned=True)
    except (EngineError, OSError, MemoryError) as problem:
        traceback.print_exc()
        talk.say(kind="failed", error=str(as_engine_error(problem)))
    except Exception as problem:
        traceback.print_exc()
        text = " ".join(str(problem).split())[:300]
        talk.say(kind="failed", error=f"{type(problem).__name__}: {text} (see {job['log']})")
    else:
        talk.say(kind="done", pruned=False, **done)


def main() -> None:
    """Train what is asked for until the input ends."""
    _end_with_parent()
    talk = Talk()
    from engine.cli.process import stop_signals

    with contextlib.suppress(KeyboardInterrupt), stop_signals():
        while True:
            _run(talk, talk.inbox.get())
    os._exit(143)
