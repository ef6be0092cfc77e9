"""Rows of q(x,y,z) = p(x|z) p(y,z) drawn from a bank of samples of p(x,y,z): the specification, in plain torch.

Isolated sampling (CCMI, Molavipour et al.): m queries are drawn without replacement; each keeps its y and z and takes x
from k rows of like z among the rows that are *not* queries, so that no row serves both roles. "Like z" is the k nearest
neighbours in z for a continuous condition, and an equal value of z for a discrete one.

All chance comes from the queries and one integer key a query, both drawn beforehand (`engine.kernels.knn_product.op`).
What follows from them is the same on every backend and device: which of several tied rows are taken is decided by a
hash of the query's key and the row. T draws are answered at once; a draw isolates its own queries only.
Nothing here waits for a device, except `label_strata`, which is called once for a bank.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import EstimatorError

# Elements of one block of the [queries, bank, width] differences: bounds the working memory at 128 MB of float64.
BLOCK = 1 << 24
MASK = 0xFFFFFFFF


def mix(key: Tensor, number: Tensor) -> Tensor:
    """32 pseudo-random bits for each key and number, int64 >= 0, broadcast (MurmurHash3's finaliser, public domain)."""
    h = ((number * 0x9E3779B1) ^ key) & MASK
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & MASK
    return h ^ (h >> 16)


# -- nearest neighbours -----------------------------------------------------------------------------------------------


def nearest(z: Tensor, query: Tensor, key: Tensor, k: int, first: bool) -> Tensor:
    """Of each query the k non-query rows of least (|z − z_query|², mix(key, row), row), in this order.

    Args:
        z: [N, d], finite.
        query, key: int64 [T, m]; the queries of one draw are distinct.
        first: leave the hash out: of tied rows the lowest are taken.

    Returns:
        int64 [T, m, k].
    """
    row = torch.arange(len(z), device=z.device)
    found = query.new_empty(*query.shape, k)
    wide = _wide(z)
    for t in range(len(query)):
        for block in torch.arange(query.shape[1], device=z.device).split(max(1, BLOCK // max(1, z.numel()))):
            distance = (wide - wide[query[t, block]][:, None]).square().sum(-1)
            distance[:, query[t]] = float("inf")
            order = row.expand_as(distance)
            if not first:
                order = mix(key[t, block][:, None], row).argsort(dim=1, stable=True)
            nearest_first = torch.sort(distance.gather(1, order), dim=1, stable=True).indices[:, :k]
            found[t, block] = order.gather(1, nearest_first)
    return found


def nearest_on_line(ascending: Tensor, order: Tensor, query: Tensor, key: Tensor, k: int) -> Tensor:
    """Of each query the k nearest non-query rows by a scalar, those tied at the k-th distance at random.

    In sorted order the k nearest lie within k places of the query, and rows tied with the k-th form at most two runs.

    Args:
        ascending: float [N], the sorted scalar.
        order: int64 [N], the row of each of its entries.
        query, key: int64 [T, m].

    Returns:
        int64 [T, m, k], nearest first.
    """
    return torch.stack([_nearest_on_line(ascending, order, q, s, k) for q, s in zip(query, key, strict=True)])


def _nearest_on_line(ascending: Tensor, order: Tensor, query: Tensor, key: Tensor, k: int) -> Tensor:
    n, m, device = len(order), len(query), order.device
    rank = torch.empty_like(order)
    rank[order] = torch.arange(n, device=device)
    centre = ascending[rank[query]]
    rest, _ = _without(order, query)
    ascending = ascending[rank[rest]]

    place = torch.searchsorted(ascending, centre)[:, None] + _outwards(k, device)
    outside = (place < 0) | (place >= n - m)
    place = place.clamp(0, n - m - 1)
    distance = (_wide(ascending)[place] - _wide(centre)[:, None]).abs().masked_fill(outside, float("inf"))
    distance, nearest_first = torch.sort(distance, dim=1, stable=True)
    place = place.gather(1, nearest_first)

    # The run of values equal to the k-th on either side; on a side without one the run is empty.
    tied = distance == distance[:, k - 1 : k]
    value = ascending[place]
    low, width = [], []
    for side in (value < centre[:, None], value >= centre[:, None]):
        here = tied & side
        # a run has one value, unless rounding made several distances equal
        least = torch.where(here, value, float("inf")).amin(1)
        most = torch.where(here, value, float("-inf")).amax(1)
        low.append(torch.searchsorted(ascending, least))
        width.append((torch.searchsorted(ascending, most, right=True) - low[-1]).clamp(min=0))
    tied, place = tied[:, :k], place[:, :k]
    needed = tied.sum(1)
    draw = distinct(width[0] + width[1], needed, k, key)
    draw = torch.where(draw < width[0][:, None], low[0][:, None] + draw, low[1][:, None] + draw - width[0][:, None])
    # The j-th draw goes to the j-th of the tied places, which are the last ones of the row.
    turn = (torch.arange(k, device=device) - (k - needed)[:, None]).clamp(min=0)
    return rest[torch.where(tied, draw.gather(1, turn), place)]


def _outwards(k: int, device: torch.device) -> Tensor:
    """Offsets −1, −2 … −k, 0, 1 … k − 1: a stable sort by distance then takes the left, inner ones of equals first."""
    inner = torch.arange(k, device=device)
    return torch.cat([-1 - inner, inner])


def distinct(size: Tensor, count: Tensor, most: int, key: Tensor) -> Tensor:
    """For each row a uniformly random set of `count` distinct integers in [0, size), as [rows, most] padded with -1.

    Floyd's algorithm: `most` steps on all rows at once, whatever the sizes. size >= count, key, all int64 [rows].
    """
    chosen = size.new_full((len(size), most), -1)
    for step in range(most):
        top = size - count + step  # the step-th draw is from [0, top]
        draw = (mix(key, torch.full_like(key, step)) * (top + 1)) >> 32
        taken = (chosen == draw[:, None]).any(1)
        chosen[:, step] = torch.where(step < count, torch.where(taken, top, draw), -1)
    return chosen


def _without(order: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """`order` without the queries, [N - m], and how many of the first i entries of `order` are left, [N + 1]."""
    n = len(order)
    keep = torch.ones(n, dtype=torch.bool, device=order.device)
    keep[query] = False
    keep = keep[order]
    before = torch.zeros(n + 1, dtype=torch.int64, device=order.device)
    torch.cumsum(keep, 0, out=before[1:])
    rest = order.new_empty(n + 1)  # the last slot collects the queries
    rest[torch.where(keep, before[:-1], n)] = order
    return rest[: n - len(query)], before


def _wide(values: Tensor) -> Tensor:
    """Values in the precision that distances are compared in: float64, where the device has it."""
    return values if values.device.type == "mps" else values.double()


# -- strata -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strata:
    """The rows of a bank by stratum of their label.

    Attributes:
        order: int64 [N], rows by ascending label.
        group: int64 [N], stratum of each row.
        start, stop: int64 [S], positions in `order` where each stratum begins and ends.
    """

    order: Tensor
    group: Tensor
    start: Tensor
    stop: Tensor


@torch.no_grad()
def label_strata(label: Tensor, k: int) -> Strata:
    """Strata of equal label, those of <= k members merged with the nearest label until all have more (or one is left).

    Merging starts with the smallest stratum (of equals the lowest label); the distance between merged strata is the gap
    between their nearest members.

    Args:
        label: float [N] or [N, 1].
        k: a stratum needs more members than this.
    """
    label = label.detach().reshape(-1).float()
    if not torch.isfinite(label).all():
        raise EstimatorError(
            "condition", "a label that is NaN or infinite", "finite labels", "Drop or mend these samples."
        )
    ascending, order = torch.sort(label, stable=True)
    value, count = torch.unique_consecutive(ascending, return_counts=True)
    count = _merge_small(value.tolist(), count.tolist(), k)
    size = torch.tensor(count, device=label.device)
    stop = size.cumsum(0)
    group = torch.empty_like(order)
    group[order] = torch.repeat_interleave(size, output_size=len(label))
    return Strata(order, group, stop - size, stop)


def _merge_small(value: list[float], count: list[int], k: int) -> list[int]:
    """Sizes of the strata after merging; value and count of the distinct labels in ascending order."""
    last = len(value) - 1
    high = list(value)  # highest label of the stratum that begins at a position; its lowest is value[position]
    left, right = [i - 1 for i in range(last + 1)], [i + 1 for i in range(last + 1)]
    size = list(count)
    small = [(c, i) for i, c in enumerate(count) if c <= k]
    heapq.heapify(small)
    while small:
        c, i = heapq.heappop(small)
        if size[i] != c:  # merged since it was queued
            continue
        below = value[i] - high[left[i]] if left[i] >= 0 else float("inf")
        above = value[right[i]] - high[i] if right[i] <= last else float("inf")
        if left[i] < 0 and right[i] > last:
            break
        a, b = (left[i], i) if below <= above else (i, right[i])
        size[a], size[b], high[a], right[a] = size[a] + size[b], 0, high[b], right[b]
        if right[b] <= last:
            left[right[b]] = a
        if size[a] <= k:
            heapq.heappush(small, (size[a], a))
    return [c for c in size if c]


def within_strata(
    ascending: Tensor, order: Tensor, group: Tensor, start: Tensor, stop: Tensor, query: Tensor, key: Tensor, k: int
) -> Tensor:
    """For each query k rows drawn without replacement from the non-query rows of its stratum.

    Where the queries leave a stratum fewer than k other rows, its queries take their k nearest by label instead.

    Args:
        ascending: float [N], the sorted label.
        order, group, start, stop: of `Strata`.
        query, key: int64 [T, m].

    Returns:
        int64 [T, m, k].
    """
    found = []
    for q, s in zip(query, key, strict=True):
        rest, before = _without(order, q)
        low, high = before[start[group[q]]], before[stop[group[q]]]
        short = high - low < k
        low, high = torch.where(short, 0, low), torch.where(short, len(rest), high)
        drawn = rest[low[:, None] + distinct(high - low, torch.full_like(low, k), k, s)]
        found.append(torch.where(short[:, None], _nearest_on_line(ascending, order, q, s, k), drawn))
    return torch.stack(found)
