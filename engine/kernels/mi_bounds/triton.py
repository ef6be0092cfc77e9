"""Streaming statistics and gradients of score matrices on the GPU. Signatures: cpu.py.

FlashAttention-shaped: a program owns a block of rows, streams the columns, keeps O(1) numbers a row and writes each
output once. Backward passes recompute the scores, once owning rows (dq) and once owning columns (dk). No atomics, so
that results are bitwise the same every time.

fp32 embeddings are multiplied on tensor cores as tf32x3 (three products, close to fp32), or as tf32 where
`torch.backends.cuda.matmul.allow_tf32` says so; embeddings of 16 bits in their own type. Sums accumulate in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.aot import AotCase
from engine.kernels.mi_bounds.statistics import log_weights
from engine.kernels.registry import interpreting

LSE, CLIPPED, SOFTPLUS = 0, 1, 2
KINDS = {"lse": LSE, "clipped": CLIPPED, "softplus": SOFTPLUS}

# Whose `positives` there is: none (the diagonal), the owned side's, the streamed side's.
DIAGONAL, OWN, OTHER = 0, 1, 2

# Owned and streamed rows of a tile, columns of the embeddings a product takes at a time, warps, stages.
STATISTICS = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 2}
GRADIENTS = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 2}
MIXTURE = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 1}
MIXTURE_GRADIENTS = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 1}
# The same for fp32 (gradients: for tf32x3). Larger tiles spill: tf32x3 holds each factor twice.
STATISTICS_FP32 = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 16, "num_warps": 8, "num_stages": 2}
GRADIENTS_FP32 = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 32, "num_warps": 8, "num_stages": 1}
MIXTURE_GRADIENTS_FP32 = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_D": 32, "num_warps": 4, "num_stages": 1}
SCORES = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
SCORES_MIXTURE = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
# Columns of dq or dk that one program accumulates; wider embeddings take several programs.
MAX_WIDTH = 128


@triton.jit
def _dot_tile(
    a_ptr, b_ptr, a_index, b_index, a_count, b_count, width, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """scale * a b^T for the given rows of a [a_count, width] and b [b_count, width]; 0 where there is no row."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a_mask = (a_index < a_count)[:, None] & (d < width)[None, :]
        b_mask = (b_index < b_count)[None, :] & (d < width)[:, None]
        a = tl.load(a_ptr + a_index.to(tl.int64)[:, None] * width + d[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + b_index.to(tl.int64)[None, :] * width + d[:, None], mask=b_mask, other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total * scale


@triton.jit
def _score_tile(
    q_ptr, k_ptr, scale_ptr, own, other, own_count, other_count, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    GIVEN: tl.constexpr,
):  # fmt: skip
    """Scores of the given rows and columns: computed, or loaded where q_ptr is a matrix of scores (GIVEN)."""
    if GIVEN:
        mask = (own < own_count)[:, None] & (other < other_count)[None, :]
        place = own.to(tl.int64)[:, None] * other_count + other[None, :]
        return tl.load(q_ptr + place, mask=mask, other=0.0).to(tl.float32)
    else:
        scale = tl.load(scale_ptr)
        return _dot_tile(
            q_ptr, k_ptr, own, other, own_count, other_count, width, scale,
            BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _finite(x):
    """0 for -inf, so that differences with it are defined."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _logaddexp(a, b):
    high = tl.maximum(a, b)
    low = tl.minimum(a, b)
    return high + tl.log(1.0 + tl.exp(low - _finite(high)))


@triton.jit
def _push(high, total, scores):
    """Merge a tile of scores into a running (maximum, sum of e^(S - maximum)) a row; -inf counts for nothing."""
    new = tl.maximum(high, tl.max(scores, 1))
    base = _finite(new)
    total = total * tl.exp(high - base) + tl.sum(tl.exp(scores - base[:, None]), 1)
    return new, total


@triton.jit
def _statistics(
    q_ptr, k_ptr, scale_ptr, positives_ptr, joint_ptr, rest_ptr, rows, columns, width,
    KIND: tl.constexpr, TAU: tl.constexpr, HAS_POSITIVES: tl.constexpr, EXCLUDE_SELF: tl.constexpr, GIVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """D and R of BLOCK_M rows of one group. Grid: (row blocks, groups)."""
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += group * rows * (columns if GIVEN else width)
    k_ptr += group * columns * width
    positive = row
    if HAS_POSITIVES:
        positive = tl.load(positives_ptr + row, mask=row < rows, other=-1).to(tl.int32)
    joint = tl.zeros((BLOCK_M,), tl.float32)
    high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, columns, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        scores = _score_tile(
            q_ptr, k_ptr, scale_ptr, row, column, rows, columns, width,
            BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, UPCAST, GIVEN,
        )  # fmt: skip
        is_positive = column[None, :] == positive[:, None]
        joint += tl.sum(tl.where(is_positive, scores, 0.0), 1)
        keep = (column < columns)[None, :] & (is_positive == 0)
        if EXCLUDE_SELF:
            keep = keep & (column[None, :] != row[:, None])
        if KIND == 2:
            total += tl.sum(tl.where(keep, _softplus(scores), 0.0), 1)
        else:
            if KIND == 1:
                scores = tl.minimum(tl.maximum(scores, -TAU), TAU)
            high, total = _push(high, total, tl.where(keep, scores, float("-inf")))
    rest = total if KIND == 2 else high + tl.log(total)
    place = group * rows + row
    tl.store(joint_ptr + place, joint, mask=row < rows)
    tl.store(rest_ptr + place, rest, mask=row < rows)


@triton.jit
def _gradients(
    own_ptr, other_ptr, scale_ptr, positives_ptr, own_weight_ptr, own_shift_ptr, other_weight_ptr, other_shift_ptr,
    diagonal_ptr, out_ptr, own_count, other_count, width,
    HAS_OWN: tl.constexpr, HAS_OTHER: tl.constexpr, IS_SIGMOID: tl.constexpr, OWNS_ROWS: tl.constexpr,
    POSITIVES: tl.constexpr, EXCLUDE_SELF: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """scale * dS other for BLOCK_M owned embeddings, BLOCK_W of their columns. Grid: (blocks, groups, width blocks).

    dS = -weight e^(S - shift) summed over the sides that have one (or -weight sigmoid(S)); the row's diagonal
    coefficient at its positive.
    """
    group = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    own_ok = own < own_count
    own_place, other_base = group * own_count + own, group * other_count
    own_ptr += group * own_count * width
    other_ptr += group * other_count * width
    if HAS_OWN:
        own_weight = tl.load(own_weight_ptr + own_place, mask=own_ok, other=0.0)
        if IS_SIGMOID == 0:
            own_shift = tl.load(own_shift_ptr + own_place, mask=own_ok, other=0.0)
    own_mark = own
    if POSITIVES == 1:
        own_mark = tl.load(positives_ptr + own, mask=own_ok, other=-1).to(tl.int32)
    if OWNS_ROWS:
        own_diagonal = tl.load(diagonal_ptr + own_place, mask=own_ok, other=0.0)
    total = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for start in range(0, other_count, BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        other_ok = other < other_count
        scores = _score_tile(
            own_ptr, other_ptr, scale_ptr, own, other, own_count, other_count, width,
            BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, UPCAST, False,
        )  # fmt: skip
        grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if IS_SIGMOID:
            grad = _sigmoid(scores)
            if HAS_OWN:
                grad = -own_weight[:, None] * grad
            else:
                grad = -tl.load(other_weight_ptr + other_base + other, mask=other_ok, other=0.0)[None, :] * grad
        else:
            if HAS_OWN:
                grad -= own_weight[:, None] * tl.exp(scores - own_shift[:, None])
            if HAS_OTHER:
                weight = tl.load(other_weight_ptr + other_base + other, mask=other_ok, other=0.0)
                shift = tl.load(other_shift_ptr + other_base + other, mask=other_ok, other=0.0)
                grad -= weight[None, :] * tl.exp(scores - shift[None, :])
        other_mark = other
        if POSITIVES == 2:
            other_mark = tl.load(positives_ptr + other, mask=other_ok, other=-1).to(tl.int32)
        is_positive = own_mark[:, None] == other_mark[None, :]
        if OWNS_ROWS:
            diagonal = own_diagonal[:, None]
        else:
            diagonal = tl.load(diagonal_ptr + other_base + other, mask=other_ok, other=0.0)[None, :]
        # chosen, not added: a positive's e^(S - shift) may be infinite
        grad = tl.where(is_positive, diagonal, grad)
        keep = own_ok[:, None] & other_ok[None, :]
        if EXCLUDE_SELF:
            keep = keep & (own[:, None] != other[None, :])
        grad = tl.where(keep, grad, 0.0)
        mask = other_ok[:, None] & (w < width)[None, :]
        value = tl.load(other_ptr + other.to(tl.int64)[:, None] * width + w[None, :], mask=mask, other=0.0)
        if UPCAST:
            value = value.to(tl.float32)
        total = tl.dot(grad.to(value.dtype), value, total, input_precision=PRECISION)
    mask = own_ok[:, None] & (w < width)[None, :]
    scale = tl.load(scale_ptr)
    place = own_place[:, None] * width + w[None, :]
    tl.store(out_ptr + place, (total * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _push_largest(top, arg, high, total, scores, column):
    """Merge a tile into the largest score of each row, its column, and the (maximum, sum) of all the others."""
    tile_top = tl.max(scores, 1)
    is_top = scores == tile_top[:, None]
    # the first of equal ones, and only that one
    tile_arg = tl.min(tl.where(is_top, column[None, :], 2147483647), 1)
    others = tl.where(column[None, :] == tile_arg[:, None], float("-inf"), scores)
    loser = tl.minimum(top, tile_top)
    new = tl.maximum(tl.maximum(high, loser), tl.max(others, 1))
    base = _finite(new)
    total = total * tl.exp(high - base) + tl.exp(loser - base) + tl.sum(tl.exp(others - base[:, None]), 1)
    arg = tl.where(tile_top > top, tile_arg, arg)
    return tl.maximum(top, tile_top), arg, new, total


@triton.jit
def _leave_one_out(scores, column, total, arg, rest):
    """LSE of each row without the column, from the row's LSE, its largest column and the LSE of all others."""
    share = tl.exp(scores - _finite(total))
    is_largest = column == arg
    return tl.where(is_largest, rest, total + tl.log(1.0 - tl.where(is_largest, 0.0, share)))


@triton.jit
def _mixture(
    q_ptr, k_ptr, scale_ptr, baseline_ptr, joint_ptr, rest_ptr, excess_ptr, shares_ptr, state_ptr, count, width, slots,
    LOG_ALPHA: tl.constexpr, LOG_BETA: tl.constexpr, GIVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Row statistics of the interpolated bound, in two passes over the columns. Grid: (row blocks, groups).

    state [7, G, B] is what the gradient needs: D; LSE, largest column and LSE of the others, of S - D and of log p - L.
    What is taken relative to D keeps the more digits the larger D is.
    """
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < count
    place = group * count + row
    q_ptr += group * count * (count if GIVEN else width)
    k_ptr += group * count * width
    a = tl.load(baseline_ptr + place, mask=row_ok, other=0.0)
    log_others = tl.log(tl.cast(count - 1, tl.float32))

    joint = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    arg = tl.full((BLOCK_M,), -1, tl.int32)
    high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, count, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        scores = _score_tile(
            q_ptr, k_ptr, scale_ptr, row, column, count, count, width,
            BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, UPCAST, GIVEN,
        )  # fmt: skip
        joint += tl.sum(tl.where(column[None, :] == row[:, None], scores, 0.0), 1)
        scores = tl.where((column < count)[None, :], scores, float("-inf"))
        top, arg, high, total = _push_largest(top, arg, high, total, scores, column)
    without_top = high + tl.log(total)
    rest = without_top - joint
    lse = _logaddexp(top - joint, rest)

    excess = tl.zeros((BLOCK_M,), tl.float32)
    shares = tl.zeros((BLOCK_M,), tl.float32)
    z_top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    z_arg = tl.full((BLOCK_M,), -1, tl.int32)
    z_high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    z_total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, count, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        scores = _score_tile(
            q_ptr, k_ptr, scale_ptr, row, column, count, count, width,
            BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, UPCAST, GIVEN,
        )  # fmt: skip
        keep = (column < count)[None, :] & (column[None, :] != row[:, None])
        scores -= joint[:, None]
        loo = _leave_one_out(scores, column[None, :], lse[:, None], arg[:, None], rest[:, None])
        odds = loo - log_others + (joint - a)[:, None] + (LOG_ALPHA - LOG_BETA)
        relative = _logaddexp(loo - log_others + LOG_ALPHA, (a - joint)[:, None] + LOG_BETA)
        excess += tl.sum(tl.where(keep, relative, 0.0), 1)
        shares += tl.sum(tl.where(keep, _sigmoid(-odds), 0.0), 1)
        z = tl.where(keep, -_softplus(-odds) - loo, float("-inf"))
        z_top, z_arg, z_high, z_total = _push_largest(z_top, z_arg, z_high, z_total, z, column)
    z_rest = z_high + tl.log(z_total)

    without_joint = joint + _leave_one_out(tl.zeros_like(joint), row, lse, arg, rest)
    without_joint = tl.where(row == arg, without_top, without_joint)
    tl.store(joint_ptr + place, joint, mask=row_ok)
    tl.store(rest_ptr + place, without_joint, mask=row_ok)
    tl.store(excess_ptr + place, excess, mask=row_ok)
    tl.store(shares_ptr + place, shares, mask=row_ok)
    tl.store(state_ptr + place, lse, mask=row_ok)
    tl.store(state_ptr + slots + place, arg.to(tl.float32), mask=row_ok)
    tl.store(state_ptr + 2 * slots + place, rest, mask=row_ok)
    tl.store(state_ptr + 3 * slots + place, _logaddexp(z_top, z_rest), mask=row_ok)
    tl.store(state_ptr + 4 * slots + place, z_arg.to(tl.float32), mask=row_ok)
    tl.store(state_ptr + 5 * slots + place, z_rest, mask=row_ok)
    tl.store(state_ptr + 6 * slots + place, joint, mask=row_ok)


@triton.jit
def _mixture_tile(
    scores, row, column, row_ok, place, baseline_ptr, state_ptr, marginal_ptr, count, slots,
    LOG_ALPHA: tl.constexpr, LOG_BETA: tl.constexpr,
):  # fmt: skip
    """dV / dS of a tile. row, row_ok and place [n, 1] or [1, n], column the other way: the tile may lie either way."""
    pairs = tl.cast(count, tl.float32) * tl.cast(count - 1, tl.float32)
    log_others = tl.log(tl.cast(count - 1, tl.float32))
    a = tl.load(baseline_ptr + place, mask=row_ok, other=0.0)
    marginal = tl.load(marginal_ptr + place, mask=row_ok, other=0.0)
    lse = tl.load(state_ptr + place, mask=row_ok, other=0.0)
    arg = tl.load(state_ptr + slots + place, mask=row_ok, other=0.0).to(tl.int32)
    rest = tl.load(state_ptr + 2 * slots + place, mask=row_ok, other=0.0)
    z_lse = tl.load(state_ptr + 3 * slots + place, mask=row_ok, other=0.0)
    z_arg = tl.load(state_ptr + 4 * slots + place, mask=row_ok, other=0.0).to(tl.int32)
    z_rest = tl.load(state_ptr + 5 * slots + place, mask=row_ok, other=0.0)
    joint = tl.load(state_ptr + 6 * slots + place, mask=row_ok, other=0.0)
    is_joint = row == column
    own = tl.where(is_joint, 1.0, -tl.exp(scores + marginal)) / tl.cast(count, tl.float32)
    scores -= joint
    loo = _leave_one_out(scores, column, lse, arg, rest)
    odds = loo - log_others + (joint - a) + (LOG_ALPHA - LOG_BETA)
    z = tl.where(is_joint, float("-inf"), -_softplus(-odds) - loo)
    mixed = _leave_one_out(z, column, z_lse, z_arg, z_rest)
    grad = own - tl.exp(scores + mixed) / pairs
    return tl.where(row_ok & (column < count), grad, 0.0)


@triton.jit
def _mixture_gradients(
    own_ptr, other_ptr, scale_ptr, baseline_ptr, state_ptr, marginal_ptr, grad_ptr, out_ptr, count, width, slots,
    LOG_ALPHA: tl.constexpr, LOG_BETA: tl.constexpr, OWNS_ROWS: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """As `_gradients`, for the interpolated bound. Grid: (blocks, groups, width blocks)."""
    group = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    own_ptr += group * count * width
    other_ptr += group * count * width
    base = group * count
    total = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for start in range(0, count, BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        scores = _score_tile(
            own_ptr, other_ptr, scale_ptr, own, other, count, count, width,
            BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, UPCAST, False,
        )  # fmt: skip
        if OWNS_ROWS:
            row, column = own[:, None], other[None, :]
        else:
            row, column = other[None, :], own[:, None]
        grad = _mixture_tile(
            scores, row, column, row < count, base + row, baseline_ptr, state_ptr, marginal_ptr, count, slots,
            LOG_ALPHA, LOG_BETA,
        )  # fmt: skip
        mask = (other < count)[:, None] & (w < width)[None, :]
        value = tl.load(other_ptr + other.to(tl.int64)[:, None] * width + w[None, :], mask=mask, other=0.0)
        if UPCAST:
            value = value.to(tl.float32)
        total = tl.dot(grad.to(value.dtype), value, total, input_precision=PRECISION)
    mask = (own < count)[:, None] & (w < width)[None, :]
    factor = tl.load(scale_ptr) * tl.load(grad_ptr + group)
    place = (base + own)[:, None] * width + w[None, :]
    tl.store(out_ptr + place, (total * factor).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _score_gradients(
    scores_ptr, weight_ptr, shift_ptr, diagonal_ptr, out_ptr, count,
    IS_SIGMOID: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dV / dS elementwise. Grid: (row blocks, column blocks, groups)."""
    group = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, mask = row < count, (row < count)[:, None] & (column < count)[None, :]
    place = group * count + row
    cell = place[:, None] * count + column[None, :]
    scores = tl.load(scores_ptr + cell, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + place, mask=row_ok, other=0.0)
    diagonal = tl.load(diagonal_ptr + place, mask=row_ok, other=0.0)
    if IS_SIGMOID:
        grad = -weight[:, None] * _sigmoid(scores)
    else:
        shift = tl.load(shift_ptr + place, mask=row_ok, other=0.0)
        grad = -weight[:, None] * tl.exp(scores - shift[:, None])
    tl.store(out_ptr + cell, tl.where(row[:, None] == column[None, :], diagonal[:, None], grad), mask=mask)


@triton.jit
def _score_mixture_gradients(
    scores_ptr, baseline_ptr, state_ptr, marginal_ptr, grad_ptr, out_ptr, count, slots,
    LOG_ALPHA: tl.constexpr, LOG_BETA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dV / dS of the interpolated bound, elementwise. Grid: (row blocks, column blocks, groups)."""
    group = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    row_ok, mask = row < count, (row < count) & (column < count)
    place = group * count + row
    cell = place * count + column
    scores = tl.load(scores_ptr + cell, mask=mask, other=0.0)
    grad = _mixture_tile(
        scores, row, column, row_ok, place, baseline_ptr, state_ptr, marginal_ptr, count, slots, LOG_ALPHA, LOG_BETA
    )
    tl.store(out_ptr + cell, grad * tl.load(grad_ptr + group), mask=mask)


def statistics(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, kind: str, tau: float
) -> tuple[Tensor, Tensor]:
    q, k = q.contiguous(), k.contiguous()
    groups, rows, width = q.shape
    joint, rest = _rows_like(q), _rows_like(q)
    config = STATISTICS_FP32 if q.dtype == torch.float32 else STATISTICS
    _statistics[triton.cdiv(rows, config["BLOCK_M"]), groups](
        q, k, scale, positives, joint, rest, rows, k.shape[1], width,
        KINDS[kind], tau, positives is not None, exclude_self, False, **config, **_dot(q),
    )  # fmt: skip
    return joint, rest


def gradients(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    positives: Tensor | None,
    exclude_self: bool,
    row_weight: Tensor,
    row_shift: Tensor | None,
    col_weight: Tensor | None,
    col_shift: Tensor | None,
    diagonal: Tensor,
) -> tuple[Tensor, Tensor]:
    q, k, diagonal = q.contiguous(), k.contiguous(), diagonal.contiguous()
    row = (_contiguous(row_weight), _contiguous(row_shift))
    column = (_contiguous(col_weight), _contiguous(col_shift))
    both = col_weight is not None
    width = q.shape[2]
    block_w = _width_block(width)
    config = GRADIENTS_FP32 if _dot(q)["PRECISION"] == "tf32x3" else GRADIENTS
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    for own, other, own_side, other_side, out, owns_rows in (
        (q, k, row, column, dq, True),
        (k, q, column, row, dk, False),
    ):
        whose = DIAGONAL if positives is None else OWN if owns_rows else OTHER
        grid = (triton.cdiv(own.shape[1], config["BLOCK_M"]), own.shape[0], triton.cdiv(width, block_w))
        _gradients[grid](
            own, other, scale, positives, *own_side, *other_side, diagonal, out, own.shape[1], other.shape[1], width,
            owns_rows or both, both or not owns_rows, row_shift is None, owns_rows, whose, exclude_self, block_w,
            **config, **_dot(q),
        )  # fmt: skip
    return dq, dk


def mixture(
    q: Tensor, k: Tensor, scale: Tensor, log_baseline: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run_mixture(q.contiguous(), k.contiguous(), scale, log_baseline, alpha, False)[:4]


def mixture_gradients(
    q: Tensor, k: Tensor, scale: Tensor, log_baseline: Tensor, alpha: float, rest: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    q, k, a = q.contiguous(), k.contiguous(), log_baseline.contiguous()
    groups, count, width = q.shape
    state = _run_mixture(q, k, scale, a, alpha, False)[4]
    marginal = weight - rest
    block_w = _width_block(width)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    config = MIXTURE_GRADIENTS_FP32 if q.dtype == torch.float32 else MIXTURE_GRADIENTS
    grid = (triton.cdiv(count, config["BLOCK_M"]), groups, triton.cdiv(width, block_w))
    for own, other, out, owns_rows in ((q, k, dq, True), (k, q, dk, False)):
        _mixture_gradients[grid](
            own, other, scale, a, state, marginal, grad.contiguous(), out, count, width, groups * count,
            *_log_weights(alpha), owns_rows, block_w, **config, **_dot(q),
        )  # fmt: skip
    return dq, dk


def score_statistics(scores: Tensor, kind: str, tau: float) -> tuple[Tensor, Tensor]:
    scores = scores.contiguous()
    groups, count, _ = scores.shape
    joint, rest = _rows_like(scores), _rows_like(scores)
    _statistics[triton.cdiv(count, SCORES["BLOCK_M"]), groups](
        scores, scores, scores, None, joint, rest, count, count, count,
        KINDS[kind], tau, False, False, True, BLOCK_D=16, **SCORES, **_dot(scores),
    )  # fmt: skip
    return joint, rest


def score_gradients(scores: Tensor, row_weight: Tensor, row_shift: Tensor | None, diagonal: Tensor) -> Tensor:
    scores = scores.contiguous()
    groups, count, _ = scores.shape
    out = torch.empty_like(scores)
    grid = (triton.cdiv(count, SCORES["BLOCK_M"]), triton.cdiv(count, SCORES["BLOCK_N"]), groups)
    _score_gradients[grid](
        scores, row_weight.contiguous(), _contiguous(row_shift), diagonal.contiguous(), out, count,
        row_shift is None, **SCORES,
    )  # fmt: skip
    return out


def score_mixture(scores: Tensor, log_baseline: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = scores.contiguous()
    return _run_mixture(scores, scores, scores, log_baseline, alpha, True)[:4]


def score_mixture_gradients(
    scores: Tensor, log_baseline: Tensor, alpha: float, rest: Tensor, weight: Tensor, grad: Tensor
) -> Tensor:
    scores, a = scores.contiguous(), log_baseline.contiguous()
    groups, count, _ = scores.shape
    state = _run_mixture(scores, scores, scores, a, alpha, True)[4]
    out = torch.empty_like(scores)
    config = SCORES_MIXTURE
    grid = (triton.cdiv(count, config["BLOCK_M"]), triton.cdiv(count, config["BLOCK_N"]), groups)
    _score_mixture_gradients[grid](
        scores, a, state, weight - rest, grad.contiguous(), out, count, groups * count, *_log_weights(alpha), **config
    )
    return out


def _run_mixture(
    q: Tensor, k: Tensor, scale: Tensor, log_baseline: Tensor, alpha: float, given: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    groups, count, width = q.shape
    rows = [_rows_like(q) for _ in range(4)]
    state = torch.empty(7, groups, count, dtype=torch.float32, device=q.device)
    _mixture[triton.cdiv(count, MIXTURE["BLOCK_M"]), groups](
        q, k, scale, log_baseline.contiguous(), *rows, state, count, width, groups * count,
        *_log_weights(alpha), given, **MIXTURE, **_dot(q),
    )  # fmt: skip
    return *rows, state


def _rows_like(q: Tensor) -> Tensor:
    return torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _width_block(width: int) -> int:
    return min(MAX_WIDTH, max(16, triton.next_power_of_2(width)))


def _log_weights(alpha: float) -> tuple[float, float]:
    # far beyond any score instead of infinite, so that sums with it stay defined
    log_alpha, log_beta = log_weights(alpha)
    return max(log_alpha, -1e30), max(log_beta, -1e30)


def _dot(q: Tensor) -> dict[str, object]:
    """How products are taken; the interpreter multiplies the raw bits of 16-bit numbers, so there they are widened."""
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    return {"PRECISION": precision if q.dtype == torch.float32 else "ieee", "UPCAST": interpreting()}


def aot_cases() -> list[AotCase]:
    """Every kernel in fp32 (tf32x3), tf32 and bf16, in the configurations that the host functions launch."""
    cases = []
    rows = {"joint_ptr": "*fp32", "rest_ptr": "*fp32"}
    sizes = {"rows": "i32", "columns": "i32", "width": "i32"}
    plain = {"HAS_POSITIVES": False, "EXCLUDE_SELF": False}
    log_alpha, log_beta = _log_weights(0.01)
    weights = {"LOG_ALPHA": log_alpha, "LOG_BETA": log_beta}

    def add(name: str, kernel, signature: dict, constexprs: dict, config: dict, dot: bool = True, quick: bool = True):
        blocks = {key: value for key, value in config.items() if key.startswith("BLOCK")}
        launch = {key: value for key, value in config.items() if key.startswith("num")}
        cases.append(
            AotCase(f"mi_bounds.{name}", kernel, signature, {**constexprs, **blocks}, dot=dot, quick=quick, **launch)
        )

    for dtype, element, precision in (("fp32", "fp32", "tf32x3"), ("tf32", "fp32", "tf32"), ("bf16", "bf16", "ieee")):
        dot = {"PRECISION": precision, "UPCAST": False}
        quick = dtype != "tf32"
        pair = {"q_ptr": f"*{element}", "k_ptr": f"*{element}", "scale_ptr": "*fp32"}
        sides = {"own_ptr": f"*{element}", "other_ptr": f"*{element}", "scale_ptr": "*fp32"}
        out = {"out_ptr": f"*{element}"}
        for kind in KINDS:
            add(
                f"statistics/{kind}/{dtype}",
                _statistics,
                {**pair, **rows, **sizes},
                {**plain, **dot, "KIND": KINDS[kind], "TAU": 5.0, "GIVEN": False, "positives_ptr": None},
                STATISTICS if element == "bf16" else STATISTICS_FP32,
                quick=quick and kind == "lse",
            )
        sides_of = {
            "rows": (True, False, False, True),
            "columns": (False, True, False, False),
            "symmetric": (True, True, False, True),
            "sigmoid": (True, False, True, True),
        }
        for variant, (has_own, has_other, is_sigmoid, owns_rows) in sides_of.items():
            pointers, absent = {"diagonal_ptr": "*fp32"}, {"positives_ptr": None}
            for side, has in (("own", has_own), ("other", has_other)):
                for what in ("weight", "shift"):
                    if has and not (is_sigmoid and what == "shift"):
                        pointers[f"{side}_{what}_ptr"] = "*fp32"
                    else:
                        absent[f"{side}_{what}_ptr"] = None
            add(
                f"gradients/{variant}/{dtype}",
                _gradients,
                {**sides, **out, **pointers, "own_count": "i32", "other_count": "i32", "width": "i32"},
                {
                    **dot, **absent, "HAS_OWN": has_own, "HAS_OTHER": has_other, "IS_SIGMOID": is_sigmoid,
                    "OWNS_ROWS": owns_rows, "POSITIVES": DIAGONAL, "EXCLUDE_SELF": False, "BLOCK_W": MAX_WIDTH,
                },
                GRADIENTS_FP32 if dtype == "fp32" else GRADIENTS,
                quick=quick and variant in ("rows", "columns"),
            )  # fmt: skip
        add(
            f"mixture/{dtype}",
            _mixture,
            {
                **pair, **rows, "baseline_ptr": "*fp32", "excess_ptr": "*fp32", "shares_ptr": "*fp32",
                "state_ptr": "*fp32", "count": "i32", "width": "i32", "slots": "i32",
            },
            {**dot, **weights, "GIVEN": False},
            MIXTURE,
            quick=dtype == "fp32",
        )  # fmt: skip
        for owns_rows in (True, False):
            add(
                f"mixture_gradients/{'rows' if owns_rows else 'columns'}/{dtype}",
                _mixture_gradients,
                {
                    **sides, **out, "baseline_ptr": "*fp32", "state_ptr": "*fp32", "marginal_ptr": "*fp32",
                    "grad_ptr": "*fp32", "count": "i32", "width": "i32", "slots": "i32",
                },
                {**dot, **weights, "OWNS_ROWS": owns_rows, "BLOCK_W": MAX_WIDTH},
                MIXTURE_GRADIENTS if element == "bf16" else MIXTURE_GRADIENTS_FP32,
                quick=dtype == "fp32",
            )  # fmt: skip

    given = {"q_ptr": "*fp32", "k_ptr": "*fp32", "scale_ptr": "*fp32"}
    no_dot = {"GIVEN": True, "PRECISION": "ieee", "UPCAST": False, "BLOCK_D": 16}
    add(
        "score_statistics",
        _statistics,
        {**given, **rows, **sizes},
        {**plain, **no_dot, "KIND": LSE, "TAU": 5.0, "positives_ptr": None},
        SCORES,
        dot=False,
    )
    cells = {"scores_ptr": "*fp32", "out_ptr": "*fp32", "count": "i32"}
    for name, is_sigmoid in (("exponential", False), ("sigmoid", True)):
        shift = {} if is_sigmoid else {"shift_ptr": "*fp32"}
        add(
            f"score_gradients/{name}",
            _score_gradients,
            {**cells, **shift, "weight_ptr": "*fp32", "diagonal_ptr": "*fp32"},
            {"IS_SIGMOID": is_sigmoid, **({"shift_ptr": None} if is_sigmoid else {})},
            SCORES,
            dot=False,
        )
    state = {"baseline_ptr": "*fp32", "state_ptr": "*fp32", "slots": "i32"}
    add(
        "score_mixture",
        _mixture,
        {**given, **rows, **state, "excess_ptr": "*fp32", "shares_ptr": "*fp32", "count": "i32", "width": "i32"},
        {**weights, **no_dot},
        {**MIXTURE, "BLOCK_D": 16},
        dot=False,
    )
    add(
        "score_mixture_gradients",
        _score_mixture_gradients,
        {**cells, **state, "marginal_ptr": "*fp32", "grad_ptr": "*fp32"},
        weights,
        SCORES_MIXTURE,
        dot=False,
    )
    return cases
