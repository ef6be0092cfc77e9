"""Where an epoch is: what has to be kept so that training can go on in the middle of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from engine.step.averages import Average
from engine.step.bank import FeatureBank

ORDER = ("", "collect", "stage1", "stage2")
"""The stages of an epoch, in the order in which they run; "" before the first."""


class Position:
    """How far an epoch has come. `TwoStageStep.train_epoch` keeps it up to date, and goes on from one that was loaded.

    It holds what the epoch itself has gathered. The weights, the optimisers, the moving average, the random generators
    and `bank` belong into a checkpoint, too.

    Attributes:
        stage: the pass that runs: "collect", "stage1" or "stage2"; "" before the first.
        number: which of the passes of stage 1 it is, from 0.
        batches: how many batches of this pass are done. A batch that was too small to train on counts.
        total: how many batches of the epoch are done.
        bank: what `train_epoch` has to be given as `bank` to go on from here.
        sizes: batch sizes of the passes for which product rows were drawn; None before that.
        generator: state of the step's generator just before these draws.
        order: int64, the order of the bank's rows in this pass of stage 1.
        filling: the bank that this pass fills.
        seen: the bank that fresh passes of stage 1 fill.
        estimators: sums over the passes of stage 1 that are done.
        skipped: steps that were left out because they were not finite; `in_a_row` of them since the last one that was.
        finished: whether `train_epoch` has ended the epoch. The next epoch needs a new position.
        seconds, waited: time that the epoch has taken, and how much of it went into waiting for batches.

    Example:
        >>> position = Position()
        >>> position.enter("stage1", 0), position.enter("stage1", 1)
        (True, True)
        >>> again = Position()
        >>> again.load_state_dict(position.state_dict())
        >>> again.enter("stage1", 0), again.enter("stage1", 1)
        (False, True)
    """

    def __init__(self) -> None:
        self.stage, self.number, self.batches, self.total = "", 0, 0, 0
        self.bank: FeatureBank | None = None
        self.sizes: list[list[int] | None] | None = None
        self.generator: Tensor | None = None
        self.order: Tensor | None = None
        self.filling: FeatureBank | None = None
        self.seen: FeatureBank | None = None
        self.estimators = Average()
        self.skipped = self.in_a_row = 0
        self.finished = False
        self.seconds, self.waited = 0.0, 0.0
        self._sums: dict[str, Average] = {}
        self.noted: Callable[[], tuple[str, int, str] | None] = lambda: None
        self.before_saving: Callable[[], None] = lambda: None
        self.now: Callable[[], Mapping[str, Average]] = lambda: self._sums

    @property
    def resumed(self) -> bool:
        """Whether the epoch has begun."""
        return self.stage != ""

    def enter(self, stage: str, number: int = 0) -> bool:
        """Begin a pass, or go on in it. False where the pass is done already."""
        here, there = (ORDER.index(self.stage), self.number), (ORDER.index(stage), number)
        if there > here:
            self.stage, self.number, self.batches = stage, number, 0
            self.order = self.filling = None
            self._sums = {}
            self.now = lambda: self._sums
        return there >= here

    def left(self, loader: Iterable) -> Iterable:
        """The batches of the loader's next pass without those that are done.

        A loader with a method `go_to` has been told already, and does not read them. Of any other loader they are read
        and dropped.
        """
        if not self.batches or hasattr(loader, "go_to"):
            return loader
        return itertools.islice(loader, self.batches, None)

    def sums(self, name: str) -> Average:
        """The sums `name` of this pass."""
        return self._sums.setdefault(name, Average())

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, without the times. The tensors are not copied: training changes them."""
        self.before_saving()
        banks = {"filling": self.filling, "seen": self.seen}
        return {
            "stage": self.stage, "number": self.number, "batches": self.batches, "total": self.total,
            "skipped": self.skipped, "in_a_row": self.in_a_row,
            "sizes": None if self.sizes is None else [None if s is None else torch.tensor(s) for s in self.sizes],
            "generator": self.generator, "order": self.order,
            "estimators": self.estimators.state_dict(),
            "sums": {name: average.state_dict() for name, average in self.now().items()},
        } | {name: None if bank is None else bank.state_dict() for name, bank in banks.items()}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Take over what `state_dict` gave. Its tensors move to `device`."""
        for name in ("stage", "number", "batches", "total", "skipped", "in_a_row", "generator", "order"):
            setattr(self, name, state[name])
        self.finished = False
        sizes = state["sizes"]
        self.sizes = None if sizes is None else [None if s is None else s.tolist() for s in sizes]
        self.estimators = Average.of(state["estimators"], device)
        self._sums = {name: Average.of(sums, device) for name, sums in state["sums"].items()}
        self.filling, self.seen = (FeatureBank.of(state[name], device) for name in ("filling", "seen"))
