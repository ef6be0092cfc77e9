"""Checkpoints within an epoch: when one is due."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from engine.config.sections import TrainConfig
from engine.ranks import Ranks
from engine.stopping import StopSignals

TOGETHER = 8
"""Several ranks tell each other every so many batches whether a signal came or the time is up."""


class WithinEpochs:
    """Has a checkpoint written after a batch where one is due: after so many batches or minutes, or on a signal.

    Args:
        train: the settings `checkpoint_steps` and `checkpoint_minutes`.
        signals: whose first signal makes a checkpoint due at once.
        save: begins to write a checkpoint.
        wait: waits until it is written.
        ranks: the processes of the run, which save and stop after the same batch.
    """

    def __init__(
        self,
        train: TrainConfig,
        signals: StopSignals,
        save: Callable[[], None],
        wait: Callable[[], None],
        ranks: Ranks | None = None,
    ):
        self._signals, self._save, self._wait = signals, save, wait
        self._ranks = ranks if ranks is not None and ranks.size > 1 else None
        self._exact = train.checkpoint_steps is not None
        self._most = train.checkpoint_steps or math.inf
        self._seconds = math.inf if train.checkpoint_minutes is None else 60 * train.checkpoint_minutes
        self._begin()

    def batch_done(self) -> None:
        """Write a checkpoint if one is due.

        Raises:
            Stopped: a signal asked for the end.
        """
        self._batches += 1
        if self._due():
            self._save()
            self.saved()

    def saved(self) -> None:
        """A checkpoint is being written.

        With `checkpoint_steps` training waits for it, so that no more than that many batches are ever lost. Otherwise
        it is written beside training.
        """
        if self._ranks is not None:
            self._signals.number = self._ranks.largest(self._signals.number)
        if self._exact or self._signals.number:
            self._wait()
        self._signals.check()
        self._begin()

    def _due(self) -> bool:
        due = self._signals.number or time.monotonic() >= self._deadline
        if self._ranks is not None:
            due = self._batches % TOGETHER == 0 and self._ranks.largest(int(due))
        return bool(due) or self._batches >= self._most

    def _begin(self) -> None:
        self._batches, self._deadline = 0, time.monotonic() + self._seconds
