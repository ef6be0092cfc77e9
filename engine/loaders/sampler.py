"""The order of samples in an epoch: in file order or shuffled, grouped by length, divided among processes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.torchrun import torchrun_shard

__all__ = ["Lengths", "Sampler", "epoch_order", "torchrun_shard"]


def epoch_order(count: int, shuffle: bool, seed: int, epoch: int) -> Tensor:
    """int64 [count]: file order, or a permutation that depends on `seed` and `epoch` alone.

    >>> epoch_order(4, False, 0, 0).tolist()
    [0, 1, 2, 3]
    """
    if not shuffle:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))


@dataclass(frozen=True)
class Lengths:
    """What decides a batch's padding: lengths int64 [N, m] of m sequences per sample, and the width [m] of a row."""

    values: np.ndarray
    widths: np.ndarray

    def waste(self, order: np.ndarray, size: int) -> float:
        """Share of padding in the batches of `size` that `order` gives, in [0, 1)."""
        lengths = self.values[order]
        longest = np.maximum.reduceat(lengths, np.arange(0, len(order), size), axis=0)
        counts = np.full(len(longest), size)
        counts[-1] = len(order) - size * (len(longest) - 1)
        padded = ((longest * counts[:, None]) @ self.widths).sum()
        return 1 - float((lengths @ self.widths).sum() / padded)


@dataclass(frozen=True)
class Sampler:
    """The batches of every epoch. They depend on these settings and the epoch, and on nothing else.

    Attributes:
        count: samples of the split. Every epoch holds each of them once, except for a last batch that is left out.
        batch_size: samples per batch, on each process.
        shuffle: False keeps file order.
        drop_last: leave out a last batch that is shorter than `batch_size`.
        drop_singleton: leave out a last batch of one sample (estimators need two).
        max_padding: upper bound of the share of padding in an epoch's audio and vision. Samples are sorted by length
            within windows of the shuffled order, and the batches are shuffled. The windows are as short as the bound
            allows. If even sorting all samples does not reach it, all samples are sorted. None: no sorting. It has no
            effect without `shuffle`.
        shard: (rank, world size). Batches of world size x batch_size are dealt out sample by sample. All processes take
            the same number of steps, and together they see every sample once. A last batch with fewer samples than
            there are processes takes some from the batch before. Only where that cannot give them some too (a
            batch_size of 1, or a single batch) do some processes end one step earlier.
        lengths: needed for `max_padding`.

    Raises:
        ConfigError: a number is no integer or out of range.

    >>> [batch.tolist() for batch in Sampler(5, 2).batches(epoch=0)]
    [[0, 1], [2, 3], [4]]
    """

    count: int
    batch_size: int
    shuffle: bool = False
    seed: int = 0
    drop_last: bool = False
    drop_singleton: bool = False
    max_padding: float | None = None
    shard: tuple[int, int] = (0, 1)
    lengths: Lengths | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        numbers = {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shard": self.shard[0],
            "shard size": self.shard[1],
        }
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise ConfigError(name, f"{value!r}"[:60], "an integer", "Change the value.")
        if self.batch_size < 1:
            raise ConfigError("batch_size", str(self.batch_size), "1 or more", "Change the value.")
        rank, world = self.shard
        if not 0 <= rank < world:
            raise ConfigError("shard", f"rank {rank} of {world}", "a rank from 0 to the last", "Count ranks from 0.")

    def batches(self, epoch: int) -> list[Tensor]:
        """Rows int64 of every batch of this process in an epoch."""
        rank, world = self.shard
        size = self.batch_size * world
        order = epoch_order(self.count, self.shuffle, self.seed, epoch)
        if self.shuffle and self.max_padding is not None:
            order = self._grouped(order, size)
        pieces = list(order.split(size))
        short = len(pieces[-1]) if pieces else 0
        if pieces and ((self.drop_last and short < size) or (self.drop_singleton and short < min(size, 2 * world))):
            pieces.pop()
        if len(pieces) > 1 and len(pieces[-1]) < world <= size // 2:
            last = torch.cat(pieces[-2:])
            pieces[-2:] = [last[:-world], last[-world:]]
        if self.shuffle and self.max_padding is not None:
            # its own generator, so that batches are not permuted as the first samples were
            generator = torch.Generator().manual_seed(((self.seed + epoch) << 1) ^ 0x5BD1E995)
            pieces = [pieces[i] for i in torch.randperm(len(pieces), generator=generator).tolist()]
        if world > 1:
            pieces = [piece[rank::world] for piece in pieces]
        return [piece for piece in pieces if len(piece)]

    def _grouped(self, order: Tensor, size: int) -> Tensor:
        rows = order.numpy()
        key = (self.lengths.values @ self.lengths.widths)[rows]
        window = size
        while self.lengths.waste(rows, size) > self.max_padding and window < len(order):
            window *= 2
            place = np.arange(len(order)) // window
            rows = order.numpy()[np.lexsort((key, place))]
        return torch.from_numpy(rows)

    def state(self) -> dict[str, Any]:
        """The settings that the batches depend on, as plain values."""
        settings = asdict(self)
        del settings["lengths"]
        return settings | {"shard": list(self.shard)}
