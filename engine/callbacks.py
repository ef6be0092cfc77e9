"""What happens beside training: progress on the terminal and TensorBoard. One small protocol, open to users."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol


class Callback(Protocol):
    """Called by the trainer. Raising stops the run; the last finished epoch stays on disk."""

    def on_start(self, first_epoch: int, epochs: int, batches: dict[str, int]) -> None:
        """Before the first epoch. `batches`: number of batches an epoch has of each stage."""

    def on_batch(self, stage: str, number: int) -> None:
        """After every batch of "collect", "stage1" or "stage2"."""

    def on_epoch(self, record: dict[str, Any], improved: bool) -> None:
        """After every epoch, with the record written to history.jsonl."""

    def on_end(self) -> None:
        """After the last epoch, also when training failed."""


class ProgressCallback:
    """A live bar over the whole run with the time left, and one line an epoch."""

    def __init__(self, metric: str):
        self.metric = metric

    def on_start(self, first_epoch: int, epochs: int, batches: dict[str, int]) -> None:
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
        self.progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.epochs, self.epoch = epochs, first_epoch
        self.task = self.progress.add_task(f"epoch {first_epoch + 1}/{epochs}", total=total)
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
    """Losses, information terms, estimators (nats) and metrics as scalars, for train, valid and test."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_start(self, first_epoch: int, epochs: int, batches: dict[str, int]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=first_epoch)

    def on_batch(self, stage: str, number: int) -> None:
        pass

    def on_epoch(self, record: dict[str, Any], improved: bool) -> None:
        for split in ("train", "valid", "test"):
            for name, value in record[split].items():
                if isinstance(value, dict):
                    for term, nats in value.items():
                        self.writer.add_scalar(f"{name}/{term}/{split}", nats, record["epoch"])
                else:
                    self.writer.add_scalar(f"{name}/{split}", value, record["epoch"])
        for optimizer in ("main", "estimators"):
            self.writer.add_scalar(f"lr/{optimizer}", record[f"lr_{optimizer}"], record["epoch"])
        self.writer.flush()

    def on_end(self) -> None:
        self.writer.close()
