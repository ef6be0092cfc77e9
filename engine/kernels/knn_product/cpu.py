"""Neighbours on the CPU: a cheap product bounds all distances from below, and few rows are searched exactly.

Once for a bank, rows are centred. If the processor multiplies int8 fast, they are rounded to int8 with one scale per
row, and the norms of the rounding errors are kept; else they stay in float32. For a query q and a row b, rounded to q̂
and b̂, with residuals r = q − q̂ and s = b − b̂,

    |q − b|² = |q|² + |b|² − 2 q·b  >=  |q|² + |b|² − 2 (q̂·b̂ + |q||s| + |r||b̂|)

so one product gives a lower bound for every row. Groups of rows are searched by exact distance in float64, those of
least bound first, until no bound is below the k-th distance. The answer is exact whatever the product's precision, ties
included. In 128 dimensions the search visits some dozen rows per query. If the bounds tell little (tight clusters far
apart, many ties), it visits more rows, at worst all.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import njit
from torch import Tensor

from engine.errors import EstimatorError

GROUP = 64  # rows that share one bound
PRODUCTS = 1 << 23  # entries of one block of products: 32 MB
ROWS = 8192  # rows prepared at a time, in float64

# NaN and infinity are allowed for: an infinite distance marks a neighbour that is not known yet.
SUMS = {"reassoc", "contract", "nsz"}


# -- once for a bank --------------------------------------------------------------------------------------------------


def int8_is_fast() -> bool:
    """Whether int8 products run on the processor's own instructions (elsewhere they are slower than float32)."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return supported is not None and supported() and int8_is_exact()


@functools.cache
def int8_is_exact() -> bool:
    """Whether torch's int8 products are right. Without these instructions, sums of large products saturate.

    oneDNN may be kept from them by ONEDNN_MAX_CPU_ISA.
    """
    if not hasattr(torch, "_int_mm"):
        return False
    a = torch.arange(16)[:, None] * torch.arange(32)  # of small and of the largest entries
    a = torch.cat([a % 255 - 127, torch.full((8, 32), 127), torch.full((8, 32), -127)]).to(torch.int8)
    try:
        return torch.equal(torch._int_mm(a, a.T), (a.long() @ a.T.long()).int())
    except RuntimeError:
        return False


def prepare(z: Tensor, int8: bool | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What the search needs of a bank's condition z float32 [N, d].

    Returns:
        coarse: [N, d], rounded centred rows in units of the bank's largest entry: int8, times the row's scale; or
            float32.
        bounds: float32 [5, N]: the scale; |b|² rounded down; |b|, |b − b̂| and |b̂| rounded up.
        unit: float64 [1], the largest entry.
    """
    n, d = z.shape
    # with few columns the product is cheap anyway (and with one column torch 2.13's int8 product is wrong)
    int8 = d >= 8 and int8_is_fast() if int8 is None else int8
    mean = z.double().mean(0) if n else z.new_zeros(d).double()
    unit = max((float((part.double() - mean).abs().max()) for part in z.split(ROWS) if part.numel()), default=0.0)
    unit = unit or 1.0
    coarse = torch.empty(n, d, dtype=torch.int8 if int8 else torch.float32)
    bounds = torch.zeros(5, n, dtype=torch.float32)
    # rounding of the float32 product and of the bound's own arithmetic, in units of |q|² + |b|²
    slack = (d + 32) * torch.finfo(torch.float32).eps
    up = 1 + 1e-6
    for at in range(0, n, ROWS):
        rows = slice(at, min(at + ROWS, n))
        exact = (z[rows].double() - mean) / unit
        if int8:
            scale = (exact.abs().amax(1) / 127).clamp(min=1e-30)
            coarse[rows] = (exact / scale[:, None]).round().to(torch.int8)
            rounded = coarse[rows].double() * scale.float().double()[:, None]
        else:
            scale = torch.ones(len(exact), dtype=torch.float64)
            coarse[rows] = exact.float()
            rounded = coarse[rows].double()
        square = exact.square().sum(1)
        bounds[0, rows] = scale.float()
        bounds[1, rows] = (square * (1 - slack)).float()
        bounds[2, rows] = (square.sqrt() * up).float()
        bounds[3, rows] = ((exact - rounded).norm(dim=1) * up + 1e-30).float()
        bounds[4, rows] = (rounded.norm(dim=1) * up).float()
    return coarse, bounds, torch.tensor([unit], dtype=torch.float64)


# -- nearest neighbours -----------------------------------------------------------------------------------------------


def nearest(
    z: Tensor, coarse: Tensor, bounds: Tensor, unit: Tensor, query: Tensor, key: Tensor, k: int, first: bool,
    isolate: bool = True,
) -> Tensor:  # fmt: skip
    """As `reference.nearest`, with what `prepare` made of z. int64 [T, m, k]."""
    n, (draws, m) = len(z), query.shape
    taken = np.zeros((draws, n), dtype=np.bool_)
    if isolate:
        np.put_along_axis(taken, query.numpy(), True, axis=1)
    flat, neighbours = query.reshape(-1), query.new_empty(draws * m, k)
    size = max(1, PRODUCTS // max(1, n))
    for at in range(0, len(flat), size):
        part = slice(at, at + size)
        some = flat[part]
        if coarse.dtype == torch.int8:
            product = torch._int_mm(coarse, coarse[some].T)
        else:
            with torch.autocast("cpu", enabled=False):
                product = _full_precision_mm(coarse, coarse[some].T)
        low = np.empty((-(-n // GROUP), len(some)), dtype=np.float32)
        product, table, some = product.numpy(), bounds.numpy(), some.numpy()
        _bound_groups(product, table, some, low)
        low = np.ascontiguousarray(low.T)
        draw = np.arange(at, at + len(some)) // m
        _search(
            z.numpy(), product, table, low, unit.item() ** 2, some, key.reshape(-1)[part].numpy(), draw, taken, first,
            neighbours[part].numpy(),
        )  # fmt: skip
    return neighbours.reshape(draws, m, k)


def _full_precision_mm(a: Tensor, b: Tensor) -> Tensor:
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        return a @ b
    torch.set_float32_matmul_precision("highest")  # bf16 products would break the bounds
    try:
        return a @ b
    finally:
        torch.set_float32_matmul_precision(before)


@njit(cache=True, nogil=True, fastmath=SUMS)
def _bound_groups(product, bounds, query, low):
    """Least bound of each group of rows for each query; product [N, c], low float32 [groups, c]."""
    n, c = product.shape
    two = np.float32(2)
    scale, norm, residual = np.empty(c, np.float32), np.empty(c, np.float32), np.empty(c, np.float32)
    for i in range(c):
        scale[i], norm[i], residual[i] = two * bounds[0, query[i]], two * bounds[2, query[i]], two * bounds[3, query[i]]
    for g in range(low.shape[0]):
        least = low[g]
        for i in range(c):
            least[i] = np.inf
        for j in range(g * GROUP, min((g + 1) * GROUP, n)):
            s, base, r, b = bounds[0, j], bounds[1, j], bounds[3, j], bounds[4, j]
            line = product[j]
            for i in range(c):
                bound = base - s * scale[i] * np.float32(line[i]) - r * norm[i] - b * residual[i]
                least[i] = min(least[i], bound)


@njit(cache=True, nogil=True, fastmath=SUMS)
def _distance(a, b):
    total = 0.0
    for c in range(a.shape[0]):
        gap = np.float64(a[c]) - np.float64(b[c])
        total += gap * gap
    return total


@njit(cache=True, nogil=True)
def _mix(key, number):
    mask = np.int64(0xFFFFFFFF)
    h = ((number * np.int64(0x9E3779B1)) ^ key) & mask
    h = ((h ^ (h >> 16)) * np.int64(0x85EBCA6B)) & mask
    h = ((h ^ (h >> 13)) * np.int64(0xC2B2AE35)) & mask
    return h ^ (h >> 16)


@njit(cache=True, nogil=True)
def _search(z, product, bounds, low, unit2, query, key, draw, taken, first, neighbours):
    """The exact neighbours of each query, best group first; low [queries, groups] is used up."""
    n, k = len(z), neighbours.shape[1]
    distance, chance = np.empty(k, np.float64), np.empty(k, np.int64)
    for i in range(len(query)):
        q, isolated, best = query[i], taken[draw[i]], neighbours[i]
        scale, base, norm, residual = bounds[0, q], bounds[1, q], bounds[2, q], bounds[3, q]
        for r in range(k):
            distance[r], chance[r], best[r] = np.inf, 0, -1
        while True:
            g = 0
            for other in range(low.shape[1]):
                if low[i, other] < low[i, g]:
                    g = other
            # beyond the k-th distance, or all groups visited (their bound is infinite then)
            if np.isinf(low[i, g]) or (np.float64(low[i, g]) + base) * unit2 > distance[k - 1]:
                break
            low[i, g] = np.inf
            for j in range(g * GROUP, min((g + 1) * GROUP, n)):
                if isolated[j]:
                    continue
                bound = bounds[1, j] - 2 * bounds[0, j] * scale * np.float32(product[j, i])
                bound -= 2 * bounds[3, j] * norm + 2 * bounds[4, j] * residual
                if (np.float64(bound) + base) * unit2 > distance[k - 1]:
                    continue
                d = _distance(z[j], z[q])
                h = np.int64(0) if first else _mix(key[i], j)
                at = k  # where the row belongs among the best
                while at > 0 and (
                    best[at - 1] < 0
                    or d < distance[at - 1]
                    or (d == distance[at - 1] and (h < chance[at - 1] or (h == chance[at - 1] and j < best[at - 1])))
                ):
                    at -= 1
                if at < k:
                    for r in range(k - 1, at, -1):
                        distance[r], chance[r], best[r] = distance[r - 1], chance[r - 1], best[r - 1]
                    distance[at], chance[at], best[at] = d, h, j


# -- scalars and strata -----------------------------------------------------------------------------------------------


def nearest_on_line(ascending: Tensor, order: Tensor, query: Tensor, key: Tensor, k: int) -> Tensor:
    """As `reference.nearest_on_line`."""
    neighbours = query.new_empty(*query.shape, k)
    every = np.ones(query.shape[1], dtype=np.bool_)
    for t in range(len(query)):
        _line(ascending.numpy(), order.numpy(), query[t].numpy(), key[t].numpy(), every, neighbours[t].numpy())
    return neighbours


def within_strata(
    ascending: Tensor, order: Tensor, group: Tensor, start: Tensor, stop: Tensor, query: Tensor, key: Tensor, k: int
) -> Tensor:
    """As `reference.within_strata`."""
    neighbours = query.new_empty(*query.shape, k)
    for t in range(len(query)):
        short = np.zeros(query.shape[1], dtype=np.bool_)
        q, s, f = query[t].numpy(), key[t].numpy(), neighbours[t].numpy()
        _strata(order.numpy(), group.numpy(), start.numpy(), stop.numpy(), q, s, f, short)
        if short.any():
            _line(ascending.numpy(), order.numpy(), q, s, short, f)
    return neighbours


@njit(cache=True, nogil=True)
def _without(order, query):
    """As `reference._without`."""
    n = len(order)
    keep = np.ones(n, np.bool_)
    for q in query:
        keep[q] = False
    rest, before = np.empty(n - len(query), np.int64), np.empty(n + 1, np.int64)
    left = 0
    for i in range(n):
        before[i] = left
        if keep[order[i]]:
            rest[left] = i
            left += 1
    before[n] = left
    return rest, before


@njit(cache=True, nogil=True)
def _distinct(size, count, key, chosen):
    """As one row of `reference.distinct`: chosen[:count] is filled."""
    for step in range(count):
        top = size - count + step
        draw = (_mix(key, np.int64(step)) * (top + 1)) >> 32
        for i in range(step):
            if chosen[i] == draw:
                draw = top
                break
        chosen[step] = draw


@njit(cache=True, nogil=True)
def _strata(order, group, start, stop, query, key, neighbours, short):
    rest, before = _without(order, query)
    k = neighbours.shape[1]
    for i in range(len(query)):
        g = group[query[i]]
        low, high = before[start[g]], before[stop[g]]
        short[i] = high - low < k
        if not short[i]:
            _distinct(high - low, k, key[i], neighbours[i])
            for r in range(k):
                neighbours[i, r] = order[rest[low + neighbours[i, r]]]


@njit(cache=True, nogil=True)
def _line(ascending, order, query, key, wanted, neighbours):
    """Fills found[i] where wanted[i]."""
    n, k = len(order), neighbours.shape[1]
    rest, _ = _without(order, query)
    last = len(rest)
    value = np.empty(last, ascending.dtype)
    for i in range(last):
        value[i] = ascending[rest[i]]
    place_of = np.empty(n, np.int64)
    for i in range(n):
        place_of[order[i]] = i
    distance, place, draw = np.empty(k, np.float64), np.empty(k, np.int64), np.empty(k, np.int64)
    for i in range(len(query)):
        if not wanted[i]:
            continue
        centre = ascending[place_of[query[i]]]
        right = _first_not_below(value, centre)
        left = right - 1
        # nearest first; of equal distances the left one, as they stand in sorted order
        for r in range(k):
            below = np.float64(centre) - np.float64(value[left]) if left >= 0 else np.inf
            above = np.float64(value[right]) - np.float64(centre) if right < last else np.inf
            if below <= above:
                distance[r], place[r] = below, left
                left -= 1
            else:
                distance[r], place[r] = above, right
                right += 1
        kth = distance[k - 1]
        needed = 0
        for r in range(k):
            needed += distance[r] == kth
        # Rows at the k-th distance: left of the centre [low0, high0), right of it [low1, high1).
        low0, high0 = _tied_run(value, centre, kth, True)
        low1, high1 = _tied_run(value, centre, kth, False)
        _distinct(high0 - low0 + high1 - low1, needed, key[i], draw)
        for r in range(k):
            at = place[r]
            if r >= k - needed:
                at = draw[r - (k - needed)]
                at = low0 + at if at < high0 - low0 else low1 + at - (high0 - low0)
            neighbours[i, r] = order[rest[at]]


@njit(cache=True, nogil=True)
def _first_not_below(value, centre):
    """np.searchsorted, which takes numba a second to compile."""
    lo, hi = 0, len(value)
    while lo < hi:
        mid = (lo + hi) // 2
        if value[mid] < centre:
            lo = mid + 1
        else:
            hi = mid
    return lo


@njit(cache=True, nogil=True)
def _gap(value, centre):
    return abs(np.float64(value) - np.float64(centre))


@njit(cache=True, nogil=True)
def _tied_run(value, centre, kth, left):
    """Positions [low, high) of the values at distance kth on one side: below the centre, or from it on."""
    middle = _first_not_below(value, centre)
    a, b = (0, middle) if left else (middle, len(value))
    lo, hi = a, b  # distances fall towards the centre on the left and grow on the right
    while lo < hi:
        mid = (lo + hi) // 2
        gap = _gap(value[mid], centre)
        if gap > kth if left else gap < kth:
            lo = mid + 1
        else:
            hi = mid
    begin, lo, hi = lo, lo, b
    while lo < hi:
        mid = (lo + hi) // 2
        gap = _gap(value[mid], centre)
        if gap >= kth if left else gap <= kth:
            lo = mid + 1
        else:
            hi = mid
    return begin, lo


# -- taking rows ------------------------------------------------------------------------------------------------------


BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def take(
    features: Tensor, query: Tensor, neighbour: Tensor, counter: Tensor, plan: Tensor, m: int, size: int
) -> Tensor:
    """As `reference.take`; plan int64 [pieces, 5] holds the pieces' numbers."""
    step = counter.item()
    if not 0 <= step < len(query):
        raise EstimatorError(
            "EpochProducts.take", f"batch {step}", f"one of this epoch's {len(query)} batches", "Draw a longer epoch."
        )
    out = features.new_empty(size)
    bits = BITS[features.element_size()]  # numpy knows no bfloat16, and a copy needs no more
    _take(
        features.view(bits).numpy(), query.numpy(), neighbour.flatten(2).numpy(), step, plan.numpy(), m,
        neighbour.shape[3], out.view(bits).numpy(),
    )  # fmt: skip
    return out


@njit(cache=True, nogil=True)
def _take(features, query, neighbour, step, plan, m, k, out):
    for p in range(len(plan)):
        draw, column, width, at, near = plan[p]
        at *= m
        index = neighbour[step, draw] if near else query[step, draw]
        for i in range(m * k if near else m):
            line = features[index[i]]
            for c in range(column, column + width):
                out[at] = line[c]
                at += 1
