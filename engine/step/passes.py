"""The passes of an epoch, one operation after another. `engine.step.static` has the same passes for CUDA graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.errors import DataError
from engine.objective import Rows
from engine.profile import part
from engine.step.averages import Average, EpochResult, Sums, means
from engine.step.bank import FeatureBank
from engine.step.batches import joined
from engine.step.position import Position

if TYPE_CHECKING:
    from engine.step import StepOutput, TwoStageStep

OnBatch = Callable[[str, int], None]
"""Called after every batch with its stage and its number. It may change anything but begin another epoch.

A static step looks after each call whether what its graphs hold has changed. `AfterBatch` can spare the look.
"""


class AfterBatch:
    """An `OnBatch` that says whether it only looks: it then promises to change no parameter, optimiser or setting.

    >>> AfterBatch(lambda stage, number: print(stage, number), only_looks=True)("stage2", 0)
    stage2 0
    """

    def __init__(self, call: OnBatch, only_looks: bool):
        self.call, self.only_looks = call, only_looks

    def __call__(self, stage: str, number: int) -> None:
        self.call(stage, number)


def only_looks(on_batch: OnBatch) -> bool:
    """Whether a callback promises to change nothing: an `AfterBatch`, or any callable with such an attribute."""
    return bool(getattr(on_batch, "only_looks", False))


nothing = AfterBatch(lambda stage, number: None, only_looks=True)
"""What is called after a batch where no one asked for anything."""

TakeProducts = Callable[[int, int], Mapping[str, Any] | None]
"""Maps a batch's number and its number of rows to its product rows."""


def batch_sizes(loader: Iterable, batch_size: int, size: int) -> list[int] | None:
    """Rows of every batch of the loader's next pass over `size` samples; None for a bare iterator.

    A loader may tell them by its own method `batch_sizes()`. For any other loader with a length, all batches are full
    but the last.
    """
    if hasattr(loader, "batch_sizes"):
        return loader.batch_sizes()
    if not isinstance(loader, Sized):
        return None
    rest = size - (len(loader) - 1) * batch_size
    return [*[batch_size] * (len(loader) - 1), rest if 0 < rest < batch_size else batch_size]


def passes_of_epoch(
    loader: Iterable, size: int, bank: FeatureBank, batch_size: int, stage1_n: int, fresh: bool
) -> list[list[int] | None]:
    """Batch sizes of an epoch's passes with product rows: `stage1_n` passes of stage 1, then the pass of stage 2."""
    of_loader, stored = batch_sizes(loader, batch_size, size), int(bank.filled.sum())
    of_bank = [min(batch_size, stored - start) for start in range(0, stored, batch_size)]
    return [of_loader if fresh else of_bank] * stage1_n + [of_loader]


class EagerPasses:
    """The passes of an epoch for a `TwoStageStep`, which makes and uses them."""

    def __init__(self, step: TwoStageStep):
        self.step = step

    def collect(self, loader: Iterable, size: int, on_batch: OnBatch, position: Position | None = None) -> FeatureBank:
        """Features of every sample of `loader` in the model's present state, dropout included as in training."""
        position = position or Position()
        bank = position.filling = position.filling or FeatureBank(size)
        for number, _ in enumerate(self._computed(position.left(loader), bank), position.batches):
            on_batch("collect", number)
        return bank

    def begin_epoch(self, bank: FeatureBank | None, passes: Sequence[list[int] | None]) -> list[TakeProducts]:
        """For each pass a function that gives the product rows of its batches.

        All passes of an epoch draw from one bank. So all rows are drawn at once, and neighbours are found once. A batch
        whose size was not foreseen draws its rows when it comes.

        Args:
            passes: the batch sizes of each pass; None where they are not known.
        """
        step = self.step
        if bank is None or step.objective is None or not step.objective.needs_products:
            return [lambda number, rows: None for _ in passes]
        known = bank.tensors()
        foreseen = [size for sizes in passes for size in sizes or ()]
        with part("products"):
            drawn = step.objective.sample_epoch(known, foreseen, step.generator) if foreseen else None

        def of_pass(sizes: list[int] | None, first: int) -> TakeProducts:
            def take(number: int, rows: int) -> dict[str, Rows]:
                with part("products"):
                    if sizes is None or number >= len(sizes) or rows != sizes[number]:
                        return step.draw_products(known, rows)
                    return drawn.take(first + number)

            return take

        firsts = itertools.accumulate((len(sizes or ()) for sizes in passes[:-1]), initial=0)
        return [of_pass(sizes, first) for sizes, first in zip(passes, firsts, strict=True)]

    def stage1_bank(self, size: int, position: Position) -> FeatureBank:
        """The bank in which stage 1 keeps the features that it computes."""
        position.seen = position.seen or FeatureBank(size)
        return position.seen

    def stage1(
        self,
        loader: Iterable,
        bank: FeatureBank,
        batch_size: int,
        fresh: bool,
        take: TakeProducts,
        on_batch: OnBatch,
        position: Position | None = None,
    ) -> Callable[[], Sums]:
        """One pass of stage 1. Returns what reads the sums of the estimators' values.

        Args:
            bank: where the features come from, or with `fresh` where those that are computed go.
        """
        position = position or Position()
        batches = self._computed(position.left(loader), bank) if fresh else self._shuffled(bank, batch_size, position)
        estimators = position.sums("stage1")
        for number, (index, features) in enumerate(batches, position.batches):
            rows = len(index)
            if rows < self.step.objective.min_batch:
                continue
            products = take(number, rows)
            output = self.step.finite.guarded("stage1", number, index, partial(self.step.stage1, features, products))
            if output is not None:
                self.step.finite.note(output, number)
                estimators.add(output.names, output.stacked_values, rows, self.step.finite.keep(output.loss))
            on_batch("stage1", number)
        self._flush("stage1")
        return estimators.sums

    def stage2(
        self,
        loader: Iterable,
        size: int,
        bank: FeatureBank | None,
        take: TakeProducts,
        on_batch: OnBatch,
        position: Position | None = None,
    ) -> tuple[Sums, Sums, FeatureBank]:
        """The pass of stage 2: sums of the losses, sums of the information terms, and the next bank."""
        position = position or Position()
        next_bank = position.filling = position.filling or FeatureBank(size)
        losses, information = position.sums("losses"), position.sums("information")
        read = self.step.batches(position.left(loader), size)
        for number, (inputs, target, index, rows) in enumerate(read, position.batches):
            use = bank is not None and rows >= self.step.objective.min_batch
            products = take(number, rows) if use else None
            run = partial(self.step.stage2, inputs, target, products, information=use)
            output = self.step.finite.guarded("stage2", number, index, run)
            if output is not None:
                self.step.finite.note(output, number)
                keep = self.step.finite.keep(output.loss)
                if index is not None:
                    next_bank.store(index, output.features, keep)
                _add(output, rows, losses, information, keep)
            on_batch("stage2", number)
        self._flush("stage2")
        return losses.sums(), information.sums(), next_bank

    def evaluate(self, loader: Iterable, bank: FeatureBank | None) -> EpochResult:
        """A pass without training."""
        (take,) = self.begin_epoch(bank, [loader.batch_sizes() if hasattr(loader, "batch_sizes") else None])
        losses, information = Average(), Average()
        outputs, targets = [], []
        for number, (inputs, target, _, rows) in enumerate(self.step.batches(loader)):
            use = bank is not None and rows >= self.step.objective.min_batch
            products = take(number, rows) if use else None
            output = self.step.evaluated(inputs, target, products, use)
            _add(output, rows, losses, information)
            outputs.append(output)
            targets.append(target)
        if not outputs:
            raise no_batch()
        return EpochResult(
            **means(losses.sums()),
            information=means(information.sums()),
            prediction=joined([output.prediction for output in outputs]),
            target=joined(targets),
            features={n: torch.cat([output.features[n] for output in outputs]) for n in outputs[0].features},
        )

    def _flush(self, stage: str) -> None:
        """Update with the last micro-batches of a pass."""
        if any(group.batches for group in self.step.groups.values()):
            self.step.finite.guarded(stage, -1, None, self.step.flush)

    def _computed(self, loader: Iterable, bank: FeatureBank) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Rows and features of every batch in the model's present state, kept in `bank`."""
        for inputs, target, index, _ in self.step.batches(loader, bank.size, by_row=True):
            features, keep = self.step.finite.features(partial(self.step.features, inputs, target))
            bank.store(index, features, keep)
            yield index, features

    def _shuffled(
        self, bank: FeatureBank, batch_size: int, position: Position
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Rows and features of the bank in batches, in a new order."""
        known, whole = bank.tensors(), bool(bank.filled.all())
        stored = None if whole else bank.filled.nonzero()[:, 0].cpu()
        if position.order is None:
            position.order = self.step.shuffled(len(next(iter(known.values()))))
        for rows in position.order.split(batch_size)[position.batches :]:
            yield (
                rows if stored is None else stored[rows.cpu()],
                {name: value[rows.to(value.device)] for name, value in known.items()},
            )


def no_batch() -> DataError:
    return DataError(
        "the loader", "no batch", "batches in every pass",
        "Give a list or a DataLoader: a generator is empty after its first pass.",
    )  # fmt: skip


def _add(output: StepOutput, rows: int, losses: Average, information: Average, keep: Tensor | None = None) -> None:
    losses.add(("loss", "task"), torch.stack([output.loss, output.task]), rows, keep)
    if output.information is not None:
        information.add(output.information.names, output.information.stacked_values, rows, keep)
