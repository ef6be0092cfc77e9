"""What happens beside training: progress on the terminal and TensorBoard. One small protocol, open to users."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from engine.vocabulary import SPLITS


class Callback(Protocol):
    """Called by the trainer. Raising stops the run; the last finished epoch stays on disk."""

    def on_start(self, first_epoch: int, epochs: int, batches: dict[str, int]) -> None:
        """Before the first epoch. `batches`: the number of batches per epoch, by stage."""

    def on_batch(self, stage: str, number: int) -> None:
        """After every batch of "collect", "stage1" or "stage2"."""

    def on_epoch(self, record: dict[str, Any], improved: bool) -> None:
        """After every epoch, with the record written to history.jsonl."""

    def on_end(self) -> None:
        """After the last epoch, also when training failed."""


class OpenEnded:
    """A text stream whose reader may close it, as in `engine train | head`.

    What can no longer be written is dropped. A warning says so once.
    """

    def __init__(self, stream: IO[str], name: str):
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *arguments: Any) -> None:
        try:
            getattr(self._stream, method)(*arguments)
        except OSError as cause:
            nowhere = Path(os.devnull).open("w")  # noqa: SIM115  (it stands in for the stream until the end)
            with contextlib.suppress(OSError, ValueError):  # its buffer has to be written somewhere
                os.dup2(nowhere.fileno(), self._stream.fileno())
            self._stream = nowhere
            warnings.warn(f"{self._name}: {cause.strerror}: the rest of it is lost", stacklevel=2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class ProgressCallback:
    """A live bar over the whole run with the time left, and one line per epoch.

    Args:
        metric: what the lines say of the validation split.
        done: batches of the first epoch that were done before the run was stopped.
    """

    def __init__(self, metric: str, done: int = 0):
        self.metric, self.done = metric, done

    def on_start(self, first_epoch: int, epochs: int, batches: dict[str, int]) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        per_epoch = sum(batches.values())
        # The first epoch has no bank, so stage 1 does not run in it.
        total = (epochs - max(first_epoch, 1)) * per_epoch + (batches["stage2"] if first_epoch == 0 else 0)
        console = Console(file=OpenEnded(sys.stdout, "standard output"))
        self.progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self.epochs, self.epoch = epochs, first_epoch
        self.task = self.progress.add_task(f"epoch {first_epoch + 1}/{epochs}", total=total - self.done)
        self.progress.start()

    def on_batch(self, stage: str, number: int) -> None:
        self.progress.update(self.task, advance=1, description=f"epoch {self.epoch + 1}/{self.epochs} {stage}")

    def on_epoch(self, record: dict[str, Any], improved: bool) -> None:
        valid, metric = record["valid"], self.metric
        self.progress.console.print(
            f"epoch {record['epoch']:>3}  {record['seconds']:6.1f} s  train loss {record['train']['loss']:.4f}  "
            f"valid {metric} {valid[metric]:.4f}{'  best' if improved else ''}",
            highlight=False,
        )
        self.epoch = record["epoch"] + 1

    def on_end(self) -> None:
        self.progress.stop()


class TensorBoardCallback:
    """Losses, information terms, estimators (nats) and metrics as scalars, for train, valid and test.

    A resumed run gets a new file with all of its epochs, which replaces the earlier ones. So no point is missing or
    doubled, wherever the run was stopped. If the file cannot be written, training goes on after one warning.

    Args:
        folder: where the event files go. Other files in it stay.
        history: the records of the epochs that are done.
    """

    SUFFIX = ".engine"

    def __init__(self, folder: Path, history: Sequence[dict[str, Any]] = ()):
        self.folder, self.history, self.file = folder, history, None

    def on_start(self, first_epoch: int, epochs: int, batches: dict[str, int]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        name = f"events.out.tfevents.{time.time():.0f}.{os.getpid()}{self.SUFFIX}"
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            earlier = self.event_files(self.folder)
            self.file = (self.folder / name).open("wb")
            # The session's start has TensorBoard forget what other files of the folder hold.
            start = SessionLog(status=SessionLog.START)
            events = [Event(file_version="brain.Event:2"), Event(session_log=start)]
            ended = time.time()
            for record in reversed(self.history):  # as if they had been written one after the other until now
                events[2:2] = self._events(record, ended)
                ended -= record["wall_seconds"]
            self._write(events)
            for path in earlier:
                if path.name != name:
                    path.unlink(missing_ok=True)

    def on_batch(self, stage: str, number: int) -> None:
        pass

    def on_epoch(self, record: dict[str, Any], improved: bool) -> None:
        with self._writing():
            self._write(self._events(record, time.time()))

    def on_end(self) -> None:
        with self._writing():
            if self.file is not None:
                self.file.close()

    @classmethod
    def event_files(cls, folder: Path) -> list[Path]:
        """The files in `folder` that this class wrote."""
        return list(folder.glob(f"events.out.tfevents.*{cls.SUFFIX}"))

    def _events(self, record: dict[str, Any], at: float) -> list[Any]:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [(f"lr/{optimizer}", record[f"lr_{optimizer}"]) for optimizer in ("main", "estimators")]
        for split in SPLITS:
            for name, value in record[split].items():
                of_terms = value.items() if isinstance(value, dict) else [(None, value)]
                values += [(f"{name}/{term}/{split}" if term else f"{name}/{split}", v) for term, v in of_terms]
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values]
        return [Event(wall_time=at, step=record["epoch"], summary=Summary(value=scalars))]

    def _write(self, events: list[Any]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self.file is not None:
            writer = RecordWriter(self.file)
            for event in events:
                writer.write(event.SerializeToString())
            writer.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as cause:
            with contextlib.suppress(OSError):
                self.file.close()
            self.file = None
            warnings.warn(
                f"{self.folder}: {cause.strerror or cause}: TensorBoard's curves end here; they are completed when the "
                "run is resumed",
                stacklevel=2,
            )
