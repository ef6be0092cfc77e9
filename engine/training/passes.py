"""Passes over one split of the data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from engine.loaders.batch import Batch
from engine.loaders.feed import CopyFeed, Feed, ResidentFeed, buckets_of
from engine.loaders.loader import Loader
from engine.profile import part


class Passes:
    """Passes over a split. Each is shuffled anew; its order depends on seed, epoch and pass alone.

    Attributes:
        waited: seconds spent waiting for batches since `set_epoch`.
        prepare: what is done to a batch before it moves to the device.
        exact: whether a static step's batches also tell their widths before rounding up to a bucket.
    """

    PASSES_PER_EPOCH = 1000

    def __init__(self, loader: Loader, device: torch.device, prepare: Callable[[Batch], Batch], exact: bool = False):
        self.loader, self.device, self.prepare, self.exact = loader, device, prepare, exact
        self.epoch, self.passes, self.waited = 0, 0, 0.0
        self._first = 0  # batch at which the next pass begins

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.passes, self.waited, self._first = epoch, 0, 0.0, 0

    def go_to(self, passes: int, batch: int) -> None:
        """Go on after so many passes of the epoch, at a batch of the next one. Earlier batches are not read."""
        self.passes, self._first = passes, batch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = self._plain()
        while True:
            start = time.perf_counter()
            with part("load"):
                batch = next(batches, None)
                if batch is not None:
                    batch = self.prepare(batch).to(self.device, non_blocking=True)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    @property
    def in_order(self) -> bool:
        """Whether every pass gives all samples in file order."""
        return not self.loader.sampler.shuffle and self.loader.sampler.shard[1] == 1

    def batch_sizes(self) -> list[int]:
        """The number of rows of every batch of the next pass."""
        return [len(rows) for rows in self.loader.sampler.batches(self._number())]

    def feed(self) -> Feed:
        """The same passes for a static step. A resident split is gathered in it; others are copied to buffers."""
        if self.loader.kind == "resident" and not self.loader.draws_words:
            return ResidentFeed(self.loader, self._begin, self.exact)
        return CopyFeed(self._plain, self.device, buckets_of(self.loader), self.exact)

    def _number(self) -> int:
        return self.epoch * self.PASSES_PER_EPOCH + self.passes

    def _begin(self) -> tuple[list[Tensor], int, int]:
        number, first = self._number(), self._first
        self.passes, self._first = self.passes + 1, 0
        return self.loader.sampler.batches(number), number, first

    def _plain(self) -> Iterator[Batch]:
        pieces, number, first = self._begin()
        if not first:
            self.loader.set_epoch(number)
        elif first >= len(pieces):
            return iter(())
        else:
            self.loader.load_state_dict({"epoch": number, "batch": first, "sampler": self.loader.sampler.state()})
        return iter(self.loader)
