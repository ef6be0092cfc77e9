"""Rows of q(x,y,z) = p(x|z) p(y,z) drawn from a bank of samples of p(x,y,z): the specification, in plain torch.

Isolated sampling (CCMI, Molavipour et al.): m queries are drawn without replacement; each keeps its y and z and takes x
from k rows of like z among the rows that are *not* queries, so that no row serves both roles. "Like z" is the k nearest
neighbours in z for a continuous condition, and an equal value of z for a discrete one.

All randomness is in the queries and in one integer key per query, which are drawn beforehand (`op.py`). What follows
from them is the same on every backend and device: a hash of the query's key and the row decides which of several tied
rows are taken. T draws are answered at once, and a draw isolates its own queries only.
Nothing here waits for a device, except `label_strata`, which is called once for a bank.
"""

from __future__ import annotations

import functools
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


def nearest(z: Tensor, query: Tensor, key: Tensor, k: int, first: bool, isolate: bool = True) -> Tensor:
    """Of each query the k non-query rows of least (|z − z_query|², mix(key, row), row), in this order.

    Args:
        z: [N, d], finite.
        query, key: int64 [T, m]; the queries of one draw are distinct.
        first: leave the hash out: of tied rows the lowest are taken.
        isolate: without it any row may be a neighbour, the query itself included.

    Returns:
        int64 [T, m, k].
    """
    row = torch.arange(len(z), device=z.device)
    neighbours = query.new_empty(*query.shape, k)
    z = wide(z)
    for t in range(len(query)):
        for block in torch.arange(query.shape[1], device=z.device).split(max(1, BLOCK // max(1, z.numel()))):
            distance = (z - z[query[t, block]][:, None]).square().sum(-1)
            if isolate:
                distance[:, query[t]] = float("inf")
            order = row.expand_as(distance)
            if not first:
                order = mix(key[t, block][:, None], row).argsort(dim=1, stable=True)
            nearest_first = torch.sort(distance.gather(1, order), dim=1, stable=True).indices[:, :k]
            neighbours[t, block] = order.gather(1, nearest_first)
    return neighbours


def select(rows: Tensor, distance: Tensor, query: Tensor, key: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `nearest`, from lists of each row's nearest rows.

    A list decides where the k-th distance left after skipping the queries is below the list's last one: every row that
    is not listed is farther away. A list of the whole bank always decides.

    Args:
        rows: int64 [N, L], the L rows nearest to each row, nearest first; the row itself may be among them.
        distance: float [N, L], their squared distances.
        query, key: int64 [T, m].

    Returns:
        int64 [T, m, k], and bool [T]: draws with a query whose list does not decide, to be searched again.
    """
    near, gap = rows[query], distance[query]
    taken = torch.zeros(len(query), len(rows), dtype=torch.bool, device=rows.device).scatter_(1, query, True)
    last = gap[..., -1]
    gap = gap.masked_fill(taken.gather(1, near.flatten(1)).view_as(near), float("inf"))
    by_chance = (mix(key[..., None], near) << 31 | near).argsort(dim=-1)
    gap, nearest_first = torch.sort(gap.gather(-1, by_chance), dim=-1, stable=True)
    neighbours = near.gather(-1, by_chance).gather(-1, nearest_first[..., :k])
    if rows.shape[1] == len(rows):
        return neighbours, torch.zeros_like(taken[:, 0])
    return neighbours, (gap[..., k - 1] >= last).any(1)


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
    place = _places(order)[query]
    return _on_line(ascending, order, place, _Free(place), key, k)


def _on_line(ascending: Tensor, order: Tensor, place: Tensor, free: _Free, key: Tensor, k: int) -> Tensor:
    """As `nearest_on_line`, of queries at these places [T, m] of the sorted bank."""
    last, device = len(order) - place.shape[1], order.device
    centre = ascending[place]
    number = free.before(torch.searchsorted(ascending, centre))[..., None] + _outwards(k, device)
    outside = (number < 0) | (number >= last)
    number = number.clamp(0, last - 1)
    value = ascending[free.place(number)]
    distance = (wide(value) - wide(centre)[..., None]).abs().masked_fill(outside, float("inf"))
    distance, nearest_first = torch.sort(distance, dim=-1, stable=True)
    number, value = number.gather(-1, nearest_first), value.gather(-1, nearest_first)

    # The run of values equal to the k-th on either side; on a side without one the run is empty.
    tied = distance == distance[..., k - 1 : k]
    low, width = [], []
    for side in (value < centre[..., None], value >= centre[..., None]):
        here = tied & side
        # a run has one value, unless rounding made several distances equal
        least = torch.where(here, value, float("inf")).amin(-1)
        most = torch.where(here, value, float("-inf")).amax(-1)
        low.append(free.before(torch.searchsorted(ascending, least)))
        width.append((free.before(torch.searchsorted(ascending, most, right=True)) - low[-1]).clamp(min=0))
    tied, number = tied[..., :k], number[..., :k]
    needed = tied.sum(-1)
    draw = distinct(width[0] + width[1], needed, k, key)
    left = width[0][..., None]
    draw = torch.where(draw < left, low[0][..., None] + draw, low[1][..., None] + draw - left)
    # The j-th draw goes to the j-th of the tied places, which are the last ones of the row.
    turn = (torch.arange(k, device=device) - (k - needed)[..., None]).clamp(min=0)
    return order[free.place(torch.where(tied, draw.gather(-1, turn), number))]


def _outwards(k: int, device: torch.device) -> Tensor:
    """Offsets −1, −2 … −k, 0, 1 … k − 1: a stable sort by distance then takes the left, inner ones of equals first."""
    inner = torch.arange(k, device=device)
    return torch.cat([-1 - inner, inner])


def distinct(size: Tensor, count: Tensor, most: int, key: Tensor) -> Tensor:
    """Uniformly random sets of `count` distinct integers in [0, size), as [..., most] padded with -1.

    Floyd's algorithm: `most` steps on all sets at once, whatever the sizes. size >= count, key, all int64 [...].
    """
    step = torch.arange(most, device=size.device)
    top = (size - count)[..., None] + step  # each draw is from [0, top]
    draw = (mix(key[..., None], step) * (top + 1)) >> 32
    chosen = size.new_full((*size.shape, most), -1)
    for i in range(most):
        taken = (chosen[..., :i] == draw[..., i : i + 1]).any(-1)
        chosen[..., i] = torch.where(taken, top[..., i], draw[..., i]) if i else draw[..., 0]
    return chosen.masked_fill(step >= count[..., None], -1)


class _Free:
    """The places of the sorted bank that no query of a draw holds, numbered in ascending order.

    Args:
        place: int64 [T, m], the places of the queries.
    """

    def __init__(self, place: Tensor):
        self.taken = place.sort(dim=1).values
        # free places below each query
        self.below = self.taken - torch.arange(place.shape[1], device=place.device)

    def before(self, place: Tensor) -> Tensor:
        """How many places below `place` int64 [T, ...] are free."""
        return place - torch.searchsorted(self.taken, place.flatten(1)).view_as(place)

    def place(self, number: Tensor) -> Tensor:
        """The place of each free place's number int64 [T, ...]."""
        return number + torch.searchsorted(self.below, number.flatten(1), right=True).view_as(number)


def _places(order: Tensor) -> Tensor:
    """Where each row stands in `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def wide(values: Tensor) -> Tensor:
    """Values in the precision that distances are compared in: float64, where the device has it."""
    return values if values.device.type == "mps" else values.double()


def narrow(values: Tensor) -> Tensor:
    """`values` [N, ...] in float32 without losing their differences, which are all that a condition is used for.

    Where float32 cannot hold the values themselves (float64 or integers far from 0), each column is first centred at
    its median, in the precision that it came in.
    """
    values = values.detach()
    near = values.float()
    if values.dtype in (torch.float32, torch.float16, torch.bfloat16) or torch.equal(near.to(values.dtype), values):
        return near
    return (values - values.median(0).values).float()


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
    if label.numel() != len(label):
        raise EstimatorError("condition", f"a label {list(label.shape)}", "one column", "Number the joint values.")
    label = narrow(label.reshape(-1))
    if not torch.isfinite(label).all():
        raise EstimatorError(
            "condition", "a label that is NaN or infinite", "finite labels", "Correct or drop these samples."
        )
    ascending, order = torch.sort(label, stable=True)
    value, count = torch.unique_consecutive(ascending, return_counts=True)
    count = _merge_small(tuple(value.tolist()), tuple(count.tolist()), k)
    size = torch.tensor(count, device=label.device)
    stop = size.cumsum(0)
    group = torch.empty_like(order)
    group[order] = torch.repeat_interleave(size, output_size=len(label))
    return Strata(order, group, stop - size, stop)


@functools.lru_cache(4)  # the labels of a split are the same in every epoch
def _merge_small(value: tuple[float, ...], count: tuple[int, ...], k: int) -> tuple[int, ...]:
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
    return tuple(c for c in size if c)


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
    place, stratum = _places(order)[query], group[query]
    free = _Free(place)
    low, high = free.before(start[stratum]), free.before(stop[stratum])
    short = high - low < k
    low, high = torch.where(short, 0, low), torch.where(short, len(order) - query.shape[1], high)
    drawn = low[..., None] + distinct(high - low, torch.full_like(low, k), k, key)
    drawn = order[free.place(drawn)]
    return torch.where(short[..., None], _on_line(ascending, order, place, free, key, k), drawn)


# -- taking rows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One tensor among the product rows of a batch, within the buffer that holds them all.

    Attributes:
        draw: which draw's rows are taken.
        column, width: the columns of the concatenated features.
        offset: where it begins in the buffer, in units of m elements.
        near: rows of the neighbours, m·k of them; else of the queries, m of them.
    """

    draw: int
    column: int
    width: int
    offset: int
    near: bool


def take(
    features: Tensor, query: Tensor, neighbour: Tensor, counter: Tensor, pieces: list[Piece], m: int, size: int
) -> Tensor:
    """The rows of all pieces for one batch, in one buffer.

    Args:
        features: [N, width], concatenated.
        query: int64 [steps, T, M].
        neighbour: int64 [steps, T, M, k].
        counter: int64 0-d, the number of the batch.
        m: queries of the batch, at most M.
        size: elements of the buffer.

    Returns:
        [size]; piece p fills it from p.offset · m on, row by row. What lies between pieces is left unset.
    """
    at = counter.reshape(1)
    query, neighbour = (t.index_select(0, at)[0, :, :m].flatten(1) for t in (query, neighbour))
    out = features.new_empty(size)
    for p in pieces:
        rows = (neighbour if p.near else query)[p.draw]
        part = features[:, p.column : p.column + p.width].index_select(0, rows)
        out[p.offset * m : p.offset * m + part.numel()] = part.flatten()
    return out
