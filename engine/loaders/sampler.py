"""The order of samples in an epoch."""

import torch
from torch import Tensor


def epoch_order(count: int, shuffle: bool, seed: int, epoch: int) -> Tensor:
    """int64 [count]: file order, or a permutation that depends on `seed` and `epoch` alone."""
    if not shuffle:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))


def batches(order: Tensor, batch_size: int, drop_last: bool = False, drop_singleton: bool = False) -> list[Tensor]:
    """Consecutive pieces of `order`.

    Args:
        drop_last: leave out a last piece that is shorter than `batch_size`.
        drop_singleton: leave out a last piece of one sample (estimators need two).
    """
    pieces = list(order.split(batch_size))
    if pieces and ((drop_last and len(pieces[-1]) < batch_size) or (drop_singleton and len(pieces[-1]) == 1)):
        pieces.pop()
    return pieces
