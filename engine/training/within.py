"""Checkpoints within an epoch: when one is due."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from engine.config.sections import TrainConfig
from engine.stopping import StopSignals


class WithinEpochs:
    """Has a checkpoint written after a batch where one is due: after so many batches or minutes, or on a signal.

    Args:
        train: the settings `checkpoint_steps` and `checkpoint_minutes`.
        signals: whose first signal makes a checkpoint due at once.
        save: begins to write a checkpoint.
        wait: waits until it is written.

    Attributes:
        agree: maps whether this process finds a checkpoint due to whether all do; for runs of several processes.
    """

    def __init__(self, train: TrainConfig, signals: StopSignals, save: Callable[[], None], wait: Callable[[], None]):
        self._signals, self._save, self._wait = signals, save, wait
        self._exact = train.checkpoint_steps is not None
        self._most = train.checkpoint_steps or math.inf
        self._seconds = math.inf if train.checkpoint_minutes is None else 60 * train.checkpoint_minutes
        self.agree: Callable[[bool], bool] = lambda due: due
        self._begin()

    def batch_done(self) -> None:
        """Write a checkpoint if one is due.

        Raises:
            Stopped: a signal asked for the end.
        """
        self._batches += 1
        if self.agree(self._batches >= self._most or self._signals.number or time.monotonic() >= self._deadline):
            self._save()
            self.saved()

    def saved(self) -> None:
        """A checkpoint is being written.

        With `checkpoint_steps` training waits for it, so that no more than that many batches are ever lost. Otherwise
        it is written beside training.
        """
        if self._exact or self._signals.number:
            self._wait()
        self._signals.check()
        self._begin()

    def _begin(self) -> None:
        self._batches, self._deadline = 0, time.monotonic() + self._seconds
