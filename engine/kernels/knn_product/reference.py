"""Rows of q(x,y,z) = p(x|z) p(y,z) drawn from a bank of samples of p(x,y,z).

Isolated sampling (CCMI, Molavipour et al.): m queries are drawn without replacement; each keeps its y and z and takes x
from k rows of like z among the rows that are *not* queries, so that no row serves both roles. "Like z" is the k nearest
neighbours in z for a continuous condition, and an equal value of z for a discrete one.

Everything runs on the bank's device. With a CPU generator the draws are the same on every device.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.errors import EstimatorError

Ties = Literal["random", "first"]
Indices = tuple[Tensor, Tensor]

# Candidates kept beyond k: enough that the certificate of `_nearest_certified` nearly always holds for continuous z.
SPARE = 8
# Elements of one block of the [queries, bank] distance matrix: bounds the working memory at 64 MB.
BLOCK = 1 << 24


@torch.no_grad()
def product_indices(
    z: Tensor,
    m: int,
    k: int,
    generator: torch.Generator | None = None,
    query: Tensor | None = None,
    ties: Ties = "random",
) -> Indices:
    """Queries and their k nearest neighbours in z among the rows that are not queries (Euclidean, exact).

    Args:
        z: the bank's condition, [N, dz] or [N], finite.
        m: number of queries, usually batch size // k. 0 gives empty indices.
        k: neighbours a query.
        generator: source of the queries and of tie-breaking; of any device.
        query: int64 [m], distinct rows to use as queries instead of drawing them.
        ties: which of several rows at the same distance as the k-th are taken: "random" (uniform; a label of seven
            values would otherwise yield the same few rows in every call) or "first" (lowest row, deterministic).

    Returns:
        neighbour int64 [m·k], query-major (row i·k + r belongs to query i), nearest first; query int64 [m].

    Raises:
        EstimatorError: fewer than k rows are left beside the m queries.
    """
    n = len(z)
    _check_bank(n, m, k)
    z = z.detach().reshape(n, -1).float()
    query = _draw_queries(n, m, generator, z.device) if query is None else query.to(z.device)
    if m == 0:
        return query, query
    if z.shape[1] == 1 and ties == "random":
        neighbour = _nearest_on_line(z[:, 0], query, k, generator)
    else:
        neighbour = _nearest(z, query, k, generator, ties)
    return neighbour.reshape(-1), query


@torch.no_grad()
def stratified_product_indices(
    label: Tensor,
    m: int,
    k: int,
    generator: torch.Generator | None = None,
    query: Tensor | None = None,
    strata: Strata | None = None,
) -> Indices:
    """Queries and, for each, k rows drawn uniformly without replacement from the non-query rows of its stratum.

    A stratum is the rows of equal label; one of <= k members is first merged with its nearest label. Where the draw of
    the queries leaves a stratum fewer than k other rows, its queries take their k nearest other rows by label instead,
    ties at random. No neighbour is ever a query.

    Args:
        label: the bank's condition, float [N] or [N, 1], of few distinct values.
        m: number of queries. 0 gives empty indices.
        k: rows drawn for each query.
        generator: source of the queries and of the draws.
        query: int64 [m], distinct rows to use as queries instead of drawing them.
        strata: from `label_strata(label, k)`, to save the sorting while the bank stays the same.

    Returns:
        neighbour int64 [m·k], query-major; query int64 [m].

    Raises:
        EstimatorError: fewer than k rows are left beside the m queries.
    """
    label = label.detach().reshape(len(label), -1)
    if label.shape[1] != 1:
        raise EstimatorError(
            "condition", f"a label of {label.shape[1]} columns", "one column", "Number the joint values or use kNN."
        )  # fmt: skip
    label = label[:, 0].float()
    n = len(label)
    _check_bank(n, m, k)
    query = _draw_queries(n, m, generator, label.device) if query is None else query.to(label.device)
    if m == 0:
        return query, query
    strata = label_strata(label, k) if strata is None else strata
    rest = strata.order.new_empty(n + 1)  # rows in order of label, without the queries; last slot collects the queries
    keep = torch.ones(n, dtype=torch.bool, device=label.device)
    keep[query] = False
    keep = keep[strata.order]
    before = torch.zeros(n + 1, dtype=torch.int64, device=label.device)
    torch.cumsum(keep, 0, out=before[1:])
    rest[torch.where(keep, before[:-1], n)] = strata.order

    group = strata.group[query]
    low, high = before[strata.start[group]], before[strata.stop[group]]
    short = high - low < k
    low, high = torch.where(short, 0, low), torch.where(short, n - m, high)
    neighbour = rest[low[:, None] + _distinct(high - low, torch.full_like(low, k), k, generator)]
    if short.any():
        neighbour[short] = _nearest_on_line(label, query, k, generator)[short]
    return neighbour.reshape(-1), query


def product_rows(
    bank_x: Tensor, bank_y: Tensor, bank_z: Tensor, neighbour: Tensor, query: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The product rows that indices stand for: x of each neighbour, y and z of its query; [m·k, width] each."""
    repeated = query.repeat_interleave(k)
    return bank_x[neighbour], bank_y[repeated], bank_z[repeated]


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


# -- draws ------------------------------------------------------------------------------------------------------------


def _check_bank(n: int, m: int, k: int) -> None:
    if k < 1 or m < 0:
        raise EstimatorError(
            "k_neighbor", f"k_neighbor {k} and {m} queries", "k_neighbor >= 1 and queries >= 0", "Mend them."
        )
    if n - m < k:
        raise EstimatorError(
            "k_neighbor",
            f"k_neighbor {k} with a bank of {n} rows of which {m} are queries",
            f"at least {m + k} rows (queries + k_neighbor)",
            "Lower k_neighbor or the batch size, or use more training samples.",
        )


def _draw_queries(n: int, m: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    source = device if generator is None else generator.device
    return torch.randperm(n, generator=generator, device=source)[:m].to(device)


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    # float64: a float32 has 2^24 steps, too coarse to choose among more than some thousand rows evenly
    source = device if generator is None else generator.device
    dtype = torch.float32 if source.type == "mps" else torch.float64
    return torch.rand(shape, generator=generator, device=source, dtype=dtype).to(device)


def _distinct(size: Tensor, count: Tensor, most: int, generator: torch.Generator | None) -> Tensor:
    """For each row a uniformly random set of `count` distinct integers in [0, size), as [rows, most] padded with -1.

    Floyd's algorithm: `most` steps on all rows at once, whatever the sizes. size >= count, both int64 [rows].
    """
    chosen = size.new_full((len(size), most), -1)
    u = _uniform((len(size), most), generator, size.device)
    for step in range(most):
        top = size - count + step  # the step-th draw is from [0, top]
        draw = (u[:, step] * (top + 1)).long().minimum(top)
        taken = (chosen == draw[:, None]).any(1)
        chosen[:, step] = torch.where(step < count, torch.where(taken, top, draw), -1)
    return chosen


# -- nearest neighbours -----------------------------------------------------------------------------------------------


def _nearest_on_line(z: Tensor, query: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """k nearest non-query rows of each query by a scalar z [N], ties at the k-th distance at random; [m, k].

    In sorted order the k nearest lie within k places of the query, and rows tied with the k-th form at most two runs.
    """
    keep = torch.ones(len(z), dtype=torch.bool, device=z.device)
    keep[query] = False
    row = keep.nonzero()[:, 0]
    ascending, order = torch.sort(z[row])
    row = row[order]
    centre = z[query].contiguous()

    offset = torch.arange(-k, k, device=z.device)
    place = torch.searchsorted(ascending, centre)[:, None] + offset
    outside = (place < 0) | (place >= len(row))
    place = place.clamp(0, len(row) - 1)
    distance = (_wide(ascending)[place] - _wide(centre)[:, None]).abs()
    distance = distance.masked_fill(outside, float("inf"))
    distance, nearest = torch.sort(distance, dim=1, stable=True)
    place = place.gather(1, nearest)

    # The run of values equal to the k-th on either side; on a side without one the run is empty.
    tied = distance == distance[:, k - 1 : k]
    value = ascending[place]
    low, width = [], []
    for side in (value < centre[:, None], value >= centre[:, None]):
        here = tied & side
        # a run has one value, unless rounding made several distances equal
        first = torch.where(here, value, float("inf")).amin(1)
        last = torch.where(here, value, float("-inf")).amax(1)
        low.append(torch.searchsorted(ascending, first))
        width.append((torch.searchsorted(ascending, last, right=True) - low[-1]).clamp(min=0))
    tied, place = tied[:, :k], place[:, :k]
    needed = tied.sum(1)
    draw = _distinct(width[0] + width[1], needed, k, generator)
    draw = torch.where(draw < width[0][:, None], low[0][:, None] + draw, low[1][:, None] + draw - width[0][:, None])
    # The j-th draw goes to the j-th of the tied places, which are the last ones of the row.
    turn = (torch.arange(k, device=z.device) - (k - needed)[:, None]).clamp(min=0)
    return row[torch.where(tied, draw.gather(1, turn), place)]


def _nearest(z: Tensor, query: Tensor, k: int, generator: torch.Generator | None, ties: Ties) -> Tensor:
    """k nearest non-query rows of each query, [m, k]."""
    centred = z - z.mean(0)  # distances do not change, but |q|² + |b|² − 2qb loses less to cancellation
    # The rounding error is below slack · (|q|² + |b|²): that much less, and the GEMM's distances are lower bounds.
    slack = (z.shape[1] + 8) * torch.finfo(z.dtype).eps
    norm = centred.square().sum(1) * (1 - slack)
    neighbour = query.new_empty(len(query), k)
    for block in torch.split(torch.arange(len(query), device=z.device), max(1, BLOCK // len(z))):
        with _full_precision(z.device):
            bound = torch.addmm(norm, centred[query[block]], centred.T, alpha=-2)
        bound += norm[query[block]][:, None]
        bound[:, query] = float("inf")
        neighbour[block] = _nearest_certified(z, query, query[block], bound, k, generator, ties)
    return neighbour


def _nearest_certified(
    z: Tensor, query: Tensor, centre: Tensor, bound: Tensor, k: int, generator: torch.Generator | None, ties: Ties
) -> Tensor:
    """k nearest of each centre from lower bounds of the squared distances [c, N] (+inf: not to be taken).

    The rows of smallest bound are ranked by exact distance. If the k-th exact distance is below the largest of their
    bounds, no other row can be nearer or tied; the centres that fail this (many ties, near-duplicates) are ranked
    against all rows.
    """
    n = len(z)
    candidates = min(k + SPARE, n - len(query))
    bound, row = bound.topk(candidates, largest=False)
    distance = (_wide(z[row]) - _wide(z[centre])[:, None]).square().sum(-1)
    neighbour, kth = _rank(distance, row, k, generator, ties)
    doubtful = ~bound[:, -1].isfinite()  # squares that overflow
    if candidates < n - len(query):
        doubtful |= ~(kth < bound[:, -1])
    if doubtful.any():
        everything = torch.arange(n, device=z.device)
        for block in torch.split(doubtful.nonzero()[:, 0], max(1, BLOCK // z.numel())):
            distance = (_wide(z) - _wide(z[centre[block]])[:, None]).square().sum(-1)
            distance[:, query] = float("inf")
            neighbour[block], _ = _rank(distance, everything.expand_as(distance), k, generator, ties)
    return neighbour


def _rank(
    distance: Tensor, row: Tensor, k: int, generator: torch.Generator | None, ties: Ties
) -> tuple[Tensor, Tensor]:
    """Of each line the k rows of smallest (distance, random number | row), nearest first; and the k-th distance."""
    if ties == "random":
        shuffle = _uniform(tuple(distance.shape), generator, distance.device).argsort(1)
    else:
        shuffle = row.argsort(1)
    distance, order = torch.sort(distance.gather(1, shuffle), dim=1, stable=True)
    nearest = shuffle.gather(1, order[:, :k])
    return row.gather(1, nearest), distance[:, k - 1]


def _wide(values: Tensor) -> Tensor:
    """Values in the precision that distances are compared in: float64, where the device has it."""
    return values if values.device.type == "mps" else values.double()


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """float32 products without TF32, bf16 or autocast: neighbours must not depend on the training's precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
