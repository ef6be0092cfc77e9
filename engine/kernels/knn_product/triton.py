"""Neighbours on a GPU: distances tile by tile with the best few kept on chip, then exact ranking. No host sync.

Two kernels. The first bounds all squared distances from below by an exact-float32 product ("ieee": TF32 would move
neighbours) and keeps, for each query and each part of the bank, the CANDIDATES rows of least bound. The second merges
the parts, ranks the candidates by exact distance in float64, and certifies: if the k-th exact distance is below the
largest bound among the candidates, no other row can be nearer or tied. Queries that fail the certificate (many ties,
near-duplicates) are answered, in the same launch, by a scan of the whole bank.

Every program owns its queries: no atomics, and the result is bitwise that of `reference.nearest`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Exact-float32 products take registers, not tensor cores: small tiles, many warps.
BOUND = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_D": 16, "num_warps": 8, "num_stages": 2}
RANK = {"BLOCK_N": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
TAKE = {"BLOCK_M": 16, "BLOCK_D": 128, "num_warps": 4}
CANDIDATES = 16
MOST_PARTS = 64  # of the bank, searched side by side


def prepare(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the search needs of a bank's condition z float32 [N, d]: centred rows [N, d], |b|² [N], unit float64 [1].

    Rows are centred, which changes no distance but loses less to cancellation, and divided by the largest entry (the
    unit), so that no square overflows. |b|² is rounded down by more than the product's rounding error: with it,
    |q|² + |b|² − 2 q·b is a lower bound.
    """
    d = z.shape[1]
    wide = z.double()
    centred = wide - wide.mean(0)
    unit = centred.abs().amax().clamp(min=torch.finfo(torch.float32).tiny).reshape(1)
    centred = centred / unit
    slack = 2 * (d + 32) * torch.finfo(torch.float32).eps
    return centred.float(), (centred.square().sum(1) * (1 - slack)).float(), unit


def nearest(
    z: Tensor, coarse: Tensor, bounds: Tensor, unit: Tensor, query: Tensor, key: Tensor, k: int, first: bool,
    isolate: bool = True,
) -> Tensor:  # fmt: skip
    """As `reference.nearest`, with what `prepare` made of z. int64 [T, m, k]."""
    (n, d), (draws, m) = z.shape, query.shape
    query, key = query.contiguous(), key.contiguous()
    taken = torch.zeros(draws, n, dtype=torch.int8, device=z.device)
    if isolate:
        taken.scatter_(1, query, 1)
    size = max(CANDIDATES, triton.next_power_of_2(k))
    tiles = triton.cdiv(n, BOUND["BLOCK_N"])
    tiles_each = triton.cdiv(tiles, MOST_PARTS)
    parts = triton.cdiv(tiles, tiles_each)
    bound = torch.empty(draws, m, parts, size, dtype=torch.float32, device=z.device)
    row = torch.empty(draws, m, parts, size, dtype=torch.int32, device=z.device)
    neighbours = torch.empty(draws, m, k, dtype=torch.int64, device=z.device)
    if neighbours.numel() == 0:
        return neighbours
    bound_kernel[(parts, triton.cdiv(m, BOUND["BLOCK_M"]), draws)](
        coarse, bounds, query, taken, bound, row, n, m, d, parts, tiles_each, SIZE=size, **BOUND
    )
    rank_kernel[(m, draws)](
        z, unit, query, key, taken, bound, row, neighbours, n, m, d, parts,
        K=k, KEEP=triton.next_power_of_2(k), SIZE=size, PARTS=triton.next_power_of_2(parts * size), FIRST=first, **RANK,
    )  # fmt: skip
    return neighbours


@triton.jit
def bound_kernel(
    coarse, norm, query, taken, bound, row, n, m, d, parts, tiles_each,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Of one draw's BLOCK_M queries and one part of the bank the SIZE rows of least bound, unordered.

    The running set is replaced at its largest entry: SIZE times a tile, the least of the tile against the largest kept.
    """
    part, draw = tl.program_id(0), tl.program_id(2).to(tl.int64)
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    asked = i < m
    q = tl.load(query + draw * m + i, mask=asked, other=0)
    own = tl.load(norm + q, mask=asked, other=0.0)
    slot = tl.arange(0, SIZE)
    best = tl.full([BLOCK_M, SIZE], float("inf"), tl.float32)
    place = tl.full([BLOCK_M, SIZE], 0, tl.int32)
    for tile in range(tiles_each):
        j = (part * tiles_each + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        there = j < n
        dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for c0 in range(0, d, BLOCK_D):
            c = c0 + tl.arange(0, BLOCK_D)
            a = tl.load(coarse + q[:, None] * d + c[None, :], mask=asked[:, None] & (c < d)[None, :], other=0.0)
            b = tl.load(
                coarse + j.to(tl.int64)[None, :] * d + c[:, None], mask=there[None, :] & (c < d)[:, None], other=0.0
            )
            dot = tl.dot(a, b, dot, input_precision="ieee")
        base = tl.load(norm + j, mask=there, other=0.0)
        isolated = tl.load(taken + draw * n + j, mask=there, other=1)
        low = own[:, None] + base[None, :] - 2.0 * dot
        low = tl.where((there & (isolated == 0))[None, :], low, float("inf"))
        for _ in range(SIZE):
            least, at = tl.min(low, 1, return_indices=True)
            largest, into = tl.max(best, 1, return_indices=True)
            better = (slot[None, :] == into[:, None]) & (least < largest)[:, None]
            best = tl.where(better, least[:, None], best)
            which = (part * tiles_each + tile) * BLOCK_N + at
            place = tl.where(better, which[:, None].to(tl.int32), place)
            low = tl.where(tl.arange(0, BLOCK_N)[None, :] == at[:, None], float("inf"), low)
    to = ((draw * m + i) * parts + part)[:, None] * SIZE + slot[None, :]
    tl.store(bound + to, best, mask=asked[:, None])
    tl.store(row + to, place, mask=asked[:, None])


@triton.jit
def _mix(key, number):
    h = ((number * 0x9E3779B1) ^ key) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)


@triton.jit
def _distances(z, q, j, there, d, BLOCK_D: tl.constexpr):
    """|z_j − z_q|² in float64 of rows j [n] (int64)."""
    total = tl.zeros(j.shape, tl.float64)
    for c0 in range(0, d, BLOCK_D):
        c = c0 + tl.arange(0, BLOCK_D)
        a = tl.load(z + q * d + c, mask=c < d, other=0.0).to(tl.float64)
        b = tl.load(z + j[:, None] * d + c[None, :], mask=there[:, None] & (c < d)[None, :], other=0.0).to(tl.float64)
        gap = b - a[None, :]
        total += tl.sum(gap * gap, 1)
    return total


@triton.jit
def _least(distance, chance, j):
    """The least (distance, chance, row) of all."""
    d = tl.min(distance, 0)
    h = tl.min(tl.where(distance == d, chance, 0x7FFFFFFFFFFFFFFF), 0)
    r = tl.min(tl.where((distance == d) & (chance == h), j, 0x7FFFFFFFFFFFFFFF), 0)
    return d, h, r


@triton.jit
def _merge(distance, chance, j, best, best_chance, best_row, K: tl.constexpr, KEEP: tl.constexpr):
    """The K least of the rows given and of those kept (KEEP slots, from K on unused), in order."""
    slot = tl.arange(0, KEEP)
    new = tl.full([KEEP], float("inf"), tl.float64)
    new_chance = tl.full([KEEP], 0x7FFFFFFFFFFFFFFF, tl.int64)
    new_row = tl.full([KEEP], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for r in range(K):
        d1, h1, r1 = _least(distance, chance, j)
        d2, h2, r2 = _least(best, best_chance, best_row)
        one = (d1 < d2) | ((d1 == d2) & ((h1 < h2) | ((h1 == h2) & (r1 < r2))))
        dd, hh, rr = tl.where(one, d1, d2), tl.where(one, h1, h2), tl.where(one, r1, r2)
        new = tl.where(slot == r, dd, new)
        new_chance = tl.where(slot == r, hh, new_chance)
        new_row = tl.where(slot == r, rr, new_row)
        distance = tl.where(j == rr, float("inf"), distance)
        best = tl.where(best_row == rr, float("inf"), best)
    return new, new_chance, new_row


@triton.jit
def rank_kernel(
    z, unit, query, key, taken, bound, row, found, n, m, d, parts,
    K: tl.constexpr, KEEP: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """The exact neighbours of one query, from its candidates or, where these cannot be certified, from all rows."""
    i, draw = tl.program_id(0), tl.program_id(1).to(tl.int64)
    q = tl.load(query + draw * m + i)
    seed = tl.load(key + draw * m + i)
    scale = tl.load(unit)
    at = tl.arange(0, PARTS)
    bounds = tl.load(bound + (draw * m + i) * parts * SIZE + at, mask=at < parts * SIZE, other=float("inf"))
    rows = tl.load(row + (draw * m + i) * parts * SIZE + at, mask=at < parts * SIZE, other=0)
    slot = tl.arange(0, SIZE)
    chosen = tl.full([SIZE], 0, tl.int64)
    low = tl.full([SIZE], float("inf"), tl.float32)
    for r in range(SIZE):
        least, where = tl.min(bounds, 0, return_indices=True)
        which = tl.sum(tl.where(at == where, rows, 0), 0)
        chosen = tl.where(slot == r, which.to(tl.int64), chosen)
        low = tl.where(slot == r, least, low)
        bounds = tl.where(at == where, float("inf"), bounds)
    there = low < float("inf")
    distance = tl.where(there, _distances(z, q, chosen, there, d, BLOCK_D), float("inf"))
    # rows that are none are kept apart, so that none of them is taken for a row that is one
    chosen = tl.where(there, chosen, -1 - slot)
    chance = chosen * 0 if FIRST else _mix(seed, chosen)
    best = tl.full([KEEP], float("inf"), tl.float64)
    best_chance = tl.full([KEEP], 0x7FFFFFFFFFFFFFFF, tl.int64)
    best_row = tl.full([KEEP], 0x7FFFFFFFFFFFFFFF, tl.int64)
    best, best_chance, best_row = _merge(distance, chance, chosen, best, best_chance, best_row, K, KEEP)
    kth = tl.max(tl.where(tl.arange(0, KEEP) < K, best, 0.0), 0)
    # an infinite last bound: every row that may be taken is a candidate
    last = tl.max(low, 0).to(tl.float64) * scale * scale
    if kth >= last:
        best = tl.full([KEEP], float("inf"), tl.float64)
        best_chance = tl.full([KEEP], 0x7FFFFFFFFFFFFFFF, tl.int64)
        best_row = tl.full([KEEP], 0x7FFFFFFFFFFFFFFF, tl.int64)
        for j0 in range(0, n, BLOCK_N):
            j = (j0 + tl.arange(0, BLOCK_N)).to(tl.int64)
            inside = j < n
            isolated = tl.load(taken + draw * n + j, mask=inside, other=1)
            gap = _distances(z, q, j, inside, d, BLOCK_D)
            gap = tl.where(inside & (isolated == 0), gap, float("inf"))
            tie = j * 0 if FIRST else _mix(seed, j)
            best, best_chance, best_row = _merge(gap, tie, j, best, best_chance, best_row, K, KEEP)
    out = tl.arange(0, KEEP)
    tl.store(found + (draw * m + i) * K + out, best_row, mask=out < K)


# -- taking rows ------------------------------------------------------------------------------------------------------


def take(
    features: Tensor, query: Tensor, neighbour: Tensor, counter: Tensor, plan: Tensor, m: int, size: int
) -> Tensor:
    """As `reference.take`, in one launch; plan int64 [pieces, 5] holds the pieces' numbers."""
    (_, draws, most), k = query.shape, neighbour.shape[3]
    out = features.new_empty(size)
    take_kernel[(len(plan), triton.cdiv(m * k, TAKE["BLOCK_M"]))](
        features, query, neighbour, counter, plan, out, features.shape[1], draws, most, m, k, **TAKE
    )
    return out


@triton.jit
def take_kernel(
    features, query, neighbour, counter, plan, out, width_of_all, draws, most, m, k,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one piece."""
    piece = plan + tl.program_id(0) * 5
    draw, column, width = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2)
    start, near = tl.load(piece + 3) * m, tl.load(piece + 4)
    base = (tl.load(counter) * draws + draw) * most
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    # one of the two is empty
    of_neighbour, of_query = i < near * m * k, i < (1 - near) * m
    there = of_neighbour | of_query
    row = tl.load(neighbour + base * k + i, mask=of_neighbour, other=0)
    row += tl.load(query + base + i, mask=of_query, other=0)
    for c0 in range(0, width, BLOCK_D):
        c = c0 + tl.arange(0, BLOCK_D)
        inside = there[:, None] & (c < width)[None, :]
        value = tl.load(features + row[:, None] * width_of_all + column + c[None, :], mask=inside)
        tl.store(out + start + i.to(tl.int64)[:, None] * width + c[None, :], value, mask=inside)
