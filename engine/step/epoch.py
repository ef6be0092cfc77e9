"""One epoch of `TwoStageStep`: its passes in their order, from the first or from where a checkpoint was taken."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.profile import part
from engine.step.averages import EpochResult, means
from engine.step.bank import FeatureBank
from engine.step.passes import AfterBatch, OnBatch, no_batch, only_looks, passes_of_epoch
from engine.step.position import Position

if TYPE_CHECKING:
    from engine.step import StageOneFeatures, TwoStageStep


@contextlib.contextmanager
def one_at_a_time(step: TwoStageStep) -> Iterator[None]:
    """A context for an epoch of the step.

    Raises:
        ConfigError: the step is within an epoch.
    """
    if step.in_epoch:
        raise ConfigError(
            "TwoStageStep.train_epoch", "a call from within an epoch of the same step", "one epoch after another",
            "Call it after train_epoch has returned, not in on_batch or in a loader.",
        )  # fmt: skip
    step.in_epoch = True
    try:
        yield
    finally:
        step.in_epoch = False


def run_epoch(
    step: TwoStageStep,
    loader: Iterable,
    size: int,
    bank: FeatureBank | None,
    batch_size: int,
    stage1_n: int,
    stage1_features: StageOneFeatures,
    on_batch: OnBatch,
    position: Position,
) -> tuple[EpochResult, FeatureBank]:
    """See `TwoStageStep.train_epoch`."""
    if position.finished:
        raise ConfigError(
            "position", "that of an epoch that is finished", "a new one for every epoch", "Pass Position()."
        )
    passes = step.static or step.eager
    bank, fresh = bank if step.objective is not None else None, stage1_features == "fresh"
    stage1_n = stage1_n if bank is not None else 0
    collects = stage1_n > 0 and stage1_features == "cached"
    if position.resumed and hasattr(loader, "go_to"):
        loader.go_to(*_place_in_loader(position, stage1_n, collects, fresh))

    def count(stage: str, number: int) -> None:
        position.batches = number + 1
        position.total += 1
        on_batch(stage, number)

    done = AfterBatch(count, only_looks(on_batch))
    step.finite.begin(position, getattr(loader, "rows", None))
    position.bank = bank
    if collects and position.enter("collect"):
        with part("collect"):
            bank = position.bank = passes.collect(loader, size, done, position)
        if not bank.rows:
            raise no_batch()
    *of_stage1, of_stage2 = _draw(step, loader, size, bank, batch_size, stage1_n, fresh, position)
    seen = passes.stage1_bank(size, position) if of_stage1 and fresh else bank
    # elsewhere the values of all passes are read at once, so that a GPU does not wait between two of them
    reads_every_pass = step.static is None or fresh or step.finite.policy == "skip"
    if of_stage1:
        with part("stage1"):
            for number, products in enumerate(of_stage1):
                if position.enter("stage1", number):
                    read = passes.stage1(loader, seen, batch_size, fresh, products, done, position)
                    position.estimators.add_later(read)
                    if reads_every_pass:
                        step.finite.read()
    position.enter("stage2")
    with part("stage2"):
        losses, information, next_bank = passes.stage2(loader, size, bank, of_stage2, done, position)
    step.finite.read()
    step.finite.require_a_step(losses)
    if not losses:
        raise no_batch()
    estimators = position.estimators.sums()
    result = EpochResult(**means(losses), information=means(information), estimators=means(estimators))
    result.skipped = position.skipped
    step._check_finite(result)
    if seen is not None:
        result.features = dict((seen if step.static is None else seen.copy()).tensors())
    position.finished = True
    return result, next_bank


def _place_in_loader(position: Position, stage1_n: int, collects: bool, fresh: bool) -> tuple[int, int]:
    """How many passes over the loader the epoch has behind it, and how many batches of the present one."""
    if position.stage == "collect":
        return 0, position.batches
    if position.stage == "stage1":
        return int(collects) + (position.number if fresh else 0), position.batches if fresh else 0
    return int(collects) + (stage1_n if fresh else 0), position.batches


def _draw(
    step: TwoStageStep,
    loader: Iterable,
    size: int,
    bank: FeatureBank | None,
    batch_size: int,
    stage1_n: int,
    fresh: bool,
    position: Position,
) -> list:
    """The product rows of all passes; those of an epoch that was stopped are drawn again."""
    passes, now = step.static or step.eager, step.generator.get_state()
    if position.sizes is not None:
        step.generator.set_state(position.generator.cpu())
        drawn = passes.begin_epoch(bank, position.sizes)
        step.generator.set_state(now)
        return drawn
    position.generator = now
    position.sizes = [None] if bank is None else passes_of_epoch(loader, size, bank, batch_size, stage1_n, fresh)
    return passes.begin_epoch(bank, position.sizes)
