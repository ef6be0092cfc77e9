"""Passes over one split of the data."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.loaders.batch import Batch
from engine.loaders.feed import CopyFeed, Feed, ResidentFeed, buckets_of
from engine.loaders.loader import Loader
from engine.profile import part
from engine.ranks import Ranks, seed_of


@dataclass(frozen=True)
class Share:
    """What one rank computes of a batch: `inputs` are its `rows`, or the whole batch where `rows` is None."""

    inputs: Any
    rows: slice | None


class Passes:
    """Passes over a split. Each is shuffled anew; its order depends on seed, epoch and pass alone.

    Attributes:
        waited: seconds spent waiting for batches since `set_epoch`.
        prepare: what is done to a batch before it moves to the device.
        exact: whether a static step's batches also tell their widths before rounding up to a bucket.
        ranks: the ranks of the run.
        deals: whether each rank gets its own rows of every batch, as (`Share`, all labels, all row numbers). Dropout
            is then seeded anew for every batch and rank. A batch whose rows the number of ranks does not divide is
            given whole to every rank.
    """

    PASSES_PER_EPOCH = 1000

    def __init__(
        self,
        loader: Loader,
        device: torch.device,
        prepare: Callable[[Batch], Batch],
        exact: bool = False,
        ranks: Ranks | None = None,
        deals: bool = False,
    ):
        self.loader, self.device, self.prepare, self.exact = loader, device, prepare, exact
        self.ranks, self.deals = ranks or Ranks(), deals
        self.epoch, self.passes, self.waited = 0, 0, 0.0
        self._first = 0  # batch at which the next pass begins

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.passes, self.waited, self._first = epoch, 0, 0.0, 0

    def go_to(self, passes: int, batch: int) -> None:
        """Go on after so many passes of the epoch, at a batch of the next one. Earlier batches are not read."""
        self.passes, self._first = passes, batch

    def rows(self, batch: int) -> Tensor:
        """The rows of a batch of the present pass."""
        return self.loader.sampler.batches(self._number() - 1)[batch]

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch | tuple[Share, Tensor, Tensor]]:
        deals = self.deals and self.ranks.together
        number, first, batches = self._number(), self._first, self._plain()
        for place in itertools.count(first):
            start = time.perf_counter()
            with part("load"):
                whole = next(batches, None)
                if whole is not None:
                    rows = self._own_rows(len(whole)) if deals else None
                    batch = self._ready(whole if rows is None else whole.rows(rows))
            self.waited += time.perf_counter() - start
            if whole is None:
                return
            if not deals:
                yield batch
                continue
            torch.manual_seed(seed_of(self.loader.sampler.seed, number, place, self.ranks.rank))
            yield Share(batch, rows), whole.label.to(self.device), whole.index.to(self.device)

    def turns(self) -> Iterator[tuple[int, bool, Batch]]:
        """The batches that fall to this rank when the ranks take turns, whole, with their numbers.

        Every rank gets equally many. One that has none left gets the last batch once more, marked False.
        """
        count, ranks = len(self.batch_sizes()), self.ranks
        rest = -count % ranks.size  # ranks that have no batch of the last round
        for number, batch in enumerate(self._plain()):
            own = number % ranks.size == ranks.rank
            again = number == count - 1 and ranks.rank >= ranks.size - rest
            if own or again:
                yield number, own, self._ready(batch)

    def _ready(self, batch: Batch) -> Batch:
        return self.prepare(batch).to(self.device, non_blocking=True)

    def _own_rows(self, count: int) -> slice | None:
        """This rank's rows of a batch; None where the ranks cannot have equally many, so that each takes them all."""
        size, over = divmod(count, self.ranks.size)
        return None if over else slice(self.ranks.rank * size, (self.ranks.rank + 1) * size)

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
