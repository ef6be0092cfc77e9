"""Estimates without training: neighbour distances for two continuous columns, counts for two discrete ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEIGHBOURS = (3, 10)
BLOCK = 10_000  # rows among which neighbours are sought; all of their distances are computed
CHUNK = 500


def neighbour_information(x: Tensor, y: Tensor) -> dict[int, Tensor]:
    """Information of two continuous columns by neighbour distances (Kraskov, Stögbauer, Grassberger 2004, first form).

    Args:
        x, y: [N] float64 each, with few ties.

    Returns:
        For each number of neighbours in `NEIGHBOURS`, [N] float64: each row's share in nats; the mean is the estimate.
    """
    blocks = -(-len(x) // BLOCK)
    parts = [_block(a, b) for a, b in zip(x.tensor_split(blocks), y.tensor_split(blocks), strict=True)]
    return {k: torch.cat([part[k] for part in parts]) for k in NEIGHBOURS}


def _block(x: Tensor, y: Tensor) -> dict[int, Tensor]:
    x, y = x.contiguous(), y.contiguous()
    largest = max(NEIGHBOURS)
    radius = torch.empty(len(x), len(NEIGHBOURS), dtype=torch.float64)
    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)
        distance = torch.maximum((x[rows, None] - x).abs(), (y[rows, None] - y).abs())
        nearest = distance.topk(largest + 1, 1, largest=False).values  # the first is the row itself
        radius[rows] = nearest[:, list(NEIGHBOURS)]
    return {k: _shares(x, y, radius[:, i], k) for i, k in enumerate(NEIGHBOURS)}


def _shares(x: Tensor, y: Tensor, radius: Tensor, k: int) -> Tensor:
    def nearer(column: Tensor) -> Tensor:
        """How many other rows are strictly nearer than the radius in one column."""
        ordered = column.sort().values
        upper = torch.searchsorted(ordered, column + radius)
        lower = torch.searchsorted(ordered, column - radius, right=True)
        return (upper - lower - 1).clamp(min=0).double()

    constants = torch.digamma(torch.tensor([float(k), float(len(x))], dtype=torch.float64)).sum()
    return constants - torch.digamma(nearer(x) + 1) - torch.digamma(nearer(y) + 1)


def neighbour_ceiling(samples: int) -> float:
    """The most that `neighbour_information` can read, nats: when the nearest rows are nearest in both columns."""
    count = torch.tensor([float(min(samples, BLOCK)), float(NEIGHBOURS[0])], dtype=torch.float64)
    return (torch.digamma(count[0]) - torch.digamma(count[1])).item()


def counted_information(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Information of two discrete variables by counting.

    Args:
        x, y: [N] int64, the number of each row's value, from 0 without gaps.

    Returns:
        The log of each row's joint frequency over the product of its single frequencies, [N] float64, whose mean is the
        information of these frequencies in nats. And the bias of that mean (Miller and Madow 1955).

    Example:
        >>> x = torch.tensor([0, 1, 0, 1])
        >>> shares, bias = counted_information(x, x)  # log 2 and (2 filled cells - 2 - 2 + 1) / 8
        >>> round(shares.mean().item(), 3), bias
        (0.693, -0.125)
    """
    count = len(x)
    joint = torch.zeros(int(x.max()) + 1, int(y.max()) + 1, dtype=torch.float64)
    joint.index_put_((x, y), torch.ones(count, dtype=torch.float64), accumulate=True)
    single_x, single_y = joint.sum(1), joint.sum(0)
    shares = (joint[x, y] * count / (single_x[x] * single_y[y])).log()
    filled = int((joint > 0).sum())
    bias = (filled - joint.shape[0] - joint.shape[1] + 1) / (2 * count)
    return shares, bias


def standard_error(shares: Tensor) -> float:
    return (shares.std() / math.sqrt(len(shares))).item()
