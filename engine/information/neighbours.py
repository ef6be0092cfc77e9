"""Estimates without training: neighbour distances for two continuous columns, counts for two discrete ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = (3, 10)
BLOCK = 10_000  # rows among which neighbours are sought; all of their distances are computed
CHUNK = 500
GROUP_DRAWS = 8


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


def jackknifed_information(x: Tensor, y: Tensor, group: Tensor) -> tuple[Tensor, float, float]:
    """`counted_information` of rows of which only groups are independent.

    Returns:
        The shares as there; and bias and standard error of their mean by leaving out one group at a time (Quenouille
        1956, Tukey 1958), nats.
    """
    count, (a, b) = int(group.max()) + 1, (int(v.max()) + 1 for v in (x, y))
    shares, _ = counted_information(x, y)
    cell = x * b + y
    total = cell.bincount(minlength=a * b).double()
    without = []
    for part in torch.argsort(group, stable=True).split(group.bincount(minlength=count).tolist()):
        joint = (total - cell[part].bincount(minlength=a * b)).view(a, b)
        joint = joint / joint.sum()
        ratio = joint / (joint.sum(1, keepdim=True) * joint.sum(0)).clamp(min=1e-300)
        without.append(torch.special.xlogy(joint, ratio).sum())
    left = torch.stack(without)
    bias = (count - 1) * (left.mean() - shares.mean())
    error = ((count - 1) / count * (left - left.mean()).square().sum()).sqrt()
    return shares, bias.item(), error.item()


@dataclass(frozen=True)
class Column:
    """One column for `mixed_information`: [N] float64, and whether its numbers are names of categories."""

    values: Tensor
    discrete: bool

    def distance(self, rows: Tensor, reference: Tensor) -> Tensor:
        """Of some rows from reference rows; values of other categories are infinitely far."""
        a, b = self.values[rows, None], self.values[reference]
        return torch.where(a == b, 0.0, math.inf).double() if self.discrete else (a - b).abs()


def mixed_information(
    x: Column, y: Column, group: Tensor | None = None, generator: torch.Generator | None = None
) -> dict[int, Tensor]:
    """Information of two columns, either of which may be categories, or hold some values again and again.

    The neighbours of a row are sought among rows of its own category (Ross 2014, "Mutual information between discrete
    and continuous data sets"). Where they coincide with the row, all rows that coincide are counted (Gao, Kannan, Oh
    and Viswanath 2017, "Estimating mutual information for discrete-continuous mixtures").

    Args:
        group: [N] int64 from 0. Neighbours of a row are then sought among one row of each other group, so that no
            group is its own neighbour. That is done several times with rows drawn anew, and averaged.
        generator: draws these rows.

    Returns:
        As `neighbour_information`.
    """
    count = len(x.values)
    if group is None:
        blocks = torch.arange(count).tensor_split(-(-count // BLOCK))
        parts = [_mixed_shares(x, y, b, b, torch.arange(len(b))) for b in blocks]
        return {k: torch.cat([part[k] for part in parts]) for k in NEIGHBOURS}
    sums = {k: torch.zeros(count, dtype=torch.float64) for k in NEIGHBOURS}
    for _ in range(GROUP_DRAWS):
        order = torch.randperm(count, generator=generator)
        drawn = torch.empty(int(group.max()) + 1, dtype=torch.long)
        drawn[group[order]] = order
        for k, shares in _mixed_shares(x, y, torch.arange(count), drawn, group).items():
            sums[k] += shares / GROUP_DRAWS
    return sums


def _mixed_shares(x: Column, y: Column, rows: Tensor, reference: Tensor, own: Tensor) -> dict[int, Tensor]:
    """The share of each of some rows, from its distances to reference rows.

    Args:
        own: for each of the rows, the place in `reference` of the row itself or of its group, which is no neighbour.
    """
    found = []
    for chunk, itself in zip(rows.split(CHUNK), own.split(CHUNK), strict=True):
        dx, dy = x.distance(chunk, reference), y.distance(chunk, reference)
        at = torch.arange(len(chunk))
        dx[at, itself] = dy[at, itself] = math.nan  # compares as false
        distance = torch.maximum(dx, dy)
        distance[at, itself] = math.inf
        nearest = distance.topk(min(max(NEIGHBOURS), len(reference) - 1), 1, largest=False).values
        finite = nearest.isfinite().sum(1)
        shares = []
        for k in NEIGHBOURS:
            used = finite.clamp(max=k)
            radius = nearest.gather(1, (used - 1).clamp(min=0)[:, None])
            tied = radius[:, 0] == 0
            near_x = torch.where(tied, (dx == 0).sum(1), (dx < radius).sum(1)).double()
            near_y = torch.where(tied, (dy == 0).sum(1), (dy < radius).sum(1)).double()
            both = torch.where(tied, (distance == 0).sum(1) + 1, used).double()
            constant = torch.digamma(torch.tensor(float(len(reference)), dtype=torch.float64))
            share = torch.digamma(both) + constant - torch.digamma(near_x + 1) - torch.digamma(near_y + 1)
            shares.append(torch.where(finite > 0, share, 0.0))
        found.append(torch.stack(shares))
    return dict(zip(NEIGHBOURS, torch.cat(found, 1), strict=True))


def merge_rare(codes: Tensor, least: int) -> tuple[Tensor, bool]:
    """Read all categories of fewer than `least` rows as one, and say whether there are any.

    Information can only get less when categories are merged. Where the rare ones have too few rows together, the next
    smallest category joins them.

    Example:
        >>> merge_rare(torch.tensor([0.0, 0, 0, 1, 2, 2, 2, 2]), 2)[0]
        tensor([0., 0., 0., 0., 1., 1., 1., 1.], dtype=torch.float64)
    """
    number = codes.unique(return_inverse=True)[1]
    sizes = number.bincount()
    order = sizes.argsort()
    merged = int((sizes < least).sum())
    while 0 < merged < len(sizes) and int(sizes[order[:merged]].sum()) < least:
        merged += 1
    target = torch.arange(len(sizes))
    target[order[:merged]] = int(order[0])
    return target[number].unique(return_inverse=True)[1].double(), merged > 0
