"""GPU kernels over scores that are stored: a caller's matrix, or a chunk of rows of products (chunked.py).

A chunk [G, n, M] holds the rows from `begin` on of G matrices [N, M]. Its numbers times `scale` are
the scores; None if they are scores already. Statistics are read and written by the rows' place in [G, N].
No atomics: results are bitwise the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.mi_bounds.splitting import three_parts
from engine.kernels.mi_bounds.statistics import log_weights
from engine.kernels.mi_bounds.tiles import (
    KINDS,
    finite,
    infonce_row,
    leave_one_out,
    logaddexp,
    push,
    push_largest,
    sigmoid,
    softplus,
)
from engine.kernels.triton_math import at_most, share_of_sum

# Rows and columns of a tile, warps. A row that is read twice is taken alone, so that it is still in the cache.
ROWS = {"BLOCK_M": 4, "BLOCK_N": 512, "num_warps": 4}
GRADIENT_ROWS = {"BLOCK_M": 1, "BLOCK_N": 2048, "num_warps": 4}
CELLS = {"BLOCK_M": 4, "BLOCK_N": 256, "num_warps": 4}
COLUMNS = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4}
MIXTURE = {"BLOCK_M": 4, "BLOCK_N": 256, "num_warps": 4}
MIXTURE_CELLS = {"BLOCK_M": 4, "BLOCK_N": 256, "num_warps": 4}

# For statistics of the columns, a chunk's rows are split into so many parts, to have enough programs.
PARTS = 8


@triton.jit
def _load(scores_ptr, scale_ptr, cell, mask, SCALED: tl.constexpr):
    scores = tl.load(scores_ptr + cell, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        scores *= tl.load(scale_ptr)
    return scores


@triton.jit
def _store(out_ptr, cell, value, mask, plane, SPLIT: tl.constexpr):
    """A gradient in the type of `out`, or its parts, `plane` cells apart."""
    if SPLIT:
        high, middle, low = three_parts(value)
        tl.store(out_ptr + cell, high, mask=mask)
        tl.store(out_ptr + plane + cell, middle, mask=mask)
        tl.store(out_ptr + 2 * plane + cell, low, mask=mask)
    else:
        tl.store(out_ptr + cell, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _positive(positives_ptr, row, row_ok, HAS_POSITIVES: tl.constexpr):
    positive = row
    if HAS_POSITIVES:
        positive = tl.load(positives_ptr + row, mask=row_ok, other=-1).to(tl.int32)
    return positive


@triton.jit
def _rows(
    scores_ptr, scale_ptr, positives_ptr, joint_ptr, rest_ptr, begin, height, rows, columns,
    KIND: tl.constexpr, TAU: tl.constexpr, SCALED: tl.constexpr, HAS_POSITIVES: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """D and R of BLOCK_M rows of a chunk. Grid: (row blocks, groups)."""
    group = tl.program_id(1).to(tl.int64)
    local = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, row_ok = begin + local, local < height
    start_of_row = (group * height + local) * columns
    positive = _positive(positives_ptr, row, row_ok, HAS_POSITIVES)
    joint = tl.zeros((BLOCK_M,), tl.float32)
    high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, columns, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        mask = row_ok[:, None] & (column < columns)[None, :]
        scores = _load(scores_ptr, scale_ptr, start_of_row[:, None] + column[None, :], mask, SCALED)
        is_positive = column[None, :] == positive[:, None]
        joint += tl.sum(tl.where(is_positive, scores, 0.0), 1)
        keep = (column < columns)[None, :] & (is_positive == 0)
        if EXCLUDE_SELF:
            keep = keep & (column[None, :] != row[:, None])
        if KIND == 2:
            total += tl.sum(tl.where(keep, softplus(scores), 0.0), 1)
        else:
            if KIND == 1:
                scores = tl.minimum(tl.maximum(scores, -TAU), TAU)
            high, total = push(high, total, tl.where(keep, scores, float("-inf")), 1)
    rest = total if KIND == 2 else high + tl.log(total)
    place = group * rows + row
    tl.store(joint_ptr + place, joint, mask=row_ok)
    tl.store(rest_ptr + place, rest, mask=row_ok)


@triton.jit
def _infonce_rows(
    scores_ptr, scale_ptr, positives_ptr, losses_ptr, state_ptr, out_ptr, begin, height, rows, columns, slots, plane,
    HAS_POSITIVES: tl.constexpr, EXCLUDE_SELF: tl.constexpr, WITH_GRADIENT: tl.constexpr, SPLIT: tl.constexpr,
    FACTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """InfoNCE loss of BLOCK_M rows, its state as in triton._infonce, FACTOR times its gradient. Grid: (row blocks,
    groups). `out` may be `scores`. The second pass over a row finds it in the cache.
    """
    group = tl.program_id(1).to(tl.int64)
    local = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, row_ok = begin + local, local < height
    start_of_row = (group * height + local) * columns
    positive = _positive(positives_ptr, row, row_ok, HAS_POSITIVES)
    joint = tl.zeros((BLOCK_M,), tl.float32)
    high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, columns, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        mask = row_ok[:, None] & (column < columns)[None, :]
        scores = _load(scores_ptr, scale_ptr, start_of_row[:, None] + column[None, :], mask, True)
        is_positive = column[None, :] == positive[:, None]
        joint += tl.sum(tl.where(is_positive, scores, 0.0), 1)
        keep = (column < columns)[None, :] & (is_positive == 0)
        if EXCLUDE_SELF:
            keep = keep & (column[None, :] != row[:, None])
        high, total = push(high, total, tl.where(keep, scores, float("-inf")), 1)
    rest = high + tl.log(total)
    loss, lse, share = infonce_row(joint, rest)
    place = group * rows + row
    tl.store(losses_ptr + place, loss, mask=row_ok)
    tl.store(state_ptr + place, joint, mask=row_ok)
    tl.store(state_ptr + slots + place, rest, mask=row_ok)
    tl.store(state_ptr + 2 * slots + place, lse, mask=row_ok)
    tl.store(state_ptr + 3 * slots + place, share, mask=row_ok)
    if WITH_GRADIENT:
        for start in range(0, columns, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            mask = row_ok[:, None] & (column < columns)[None, :]
            cell = start_of_row[:, None] + column[None, :]
            scores = _load(scores_ptr, scale_ptr, cell, mask, True)
            # chosen, not subtracted: 1 - p of a positive has digits that p lacks
            grad = tl.where(column[None, :] == positive[:, None], -share[:, None], share_of_sum(scores, lse[:, None]))
            if EXCLUDE_SELF:
                grad = tl.where(column[None, :] == row[:, None], 0.0, grad)
            _store(out_ptr, cell, FACTOR * grad, mask, plane, SPLIT)


@triton.jit
def _columns(
    scores_ptr, scale_ptr, parts_ptr, begin, height, columns, part_height, slots,
    IS_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Merge a chunk into (maximum, sum) of every column's scores but the diagonal one. Grid: (column blocks, parts,
    groups); a part of the chunk's rows has numbers of its own, [2, G, parts, M]."""
    group = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < columns
    place = (group * tl.num_programs(1) + part) * columns + column
    high = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    if not IS_FIRST:
        high = tl.load(parts_ptr + place, mask=column_ok, other=0.0)
        total = tl.load(parts_ptr + slots + place, mask=column_ok, other=0.0)
    end = tl.minimum((part + 1) * part_height, height)
    for start in range(part * part_height, end, BLOCK_M):
        local = start + tl.arange(0, BLOCK_M)
        mask = (local < end)[:, None] & column_ok[None, :]
        cell = (group * height + local)[:, None] * columns + column[None, :]
        scores = _load(scores_ptr, scale_ptr, cell, mask, True)
        keep = mask & ((begin + local)[:, None] != column[None, :])
        high, total = push(high, total, tl.where(keep, scores, float("-inf")), 0)
    tl.store(parts_ptr + place, high, mask=column_ok)
    tl.store(parts_ptr + slots + place, total, mask=column_ok)


@triton.jit
def _merge_parts(parts_ptr, out_ptr, columns, slots, PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Log-sum-exp of every column from its parts. Grid: (column blocks, groups)."""
    group = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = (group * PARTS + tl.arange(0, PARTS))[:, None] * columns + column[None, :]
    mask = (column < columns)[None, :]
    part_high = tl.load(parts_ptr + place, mask=mask, other=0.0)
    part_total = tl.load(parts_ptr + slots + place, mask=mask, other=0.0)
    high = tl.max(part_high, 0)
    total = tl.sum(part_total * tl.exp(part_high - finite(high)[None, :]), 0)
    tl.store(out_ptr + group * columns + column, high + tl.log(total), mask=column < columns)


@triton.jit
def _gradients(
    scores_ptr, scale_ptr, positives_ptr, row_weight_ptr, row_shift_ptr, col_weight_ptr, col_shift_ptr, diagonal_ptr,
    out_ptr, begin, height, rows, columns, plane,
    IS_SIGMOID: tl.constexpr, HAS_COLUMNS: tl.constexpr, SCALED: tl.constexpr, HAS_POSITIVES: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dV / dS elementwise; see triton._gradients. Grid: (row blocks, column blocks, groups). `out` may be `scores`.

    SCALED, shifts are log-sum-exps of products that are computed again here. Of scores that were stored they may be any
    numbers.
    """
    group = tl.program_id(2).to(tl.int64)
    local = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, row_ok, column_ok = begin + local, local < height, column < columns
    mask = row_ok[:, None] & column_ok[None, :]
    cell = (group * height + local)[:, None] * columns + column[None, :]
    place = group * rows + row
    positive = _positive(positives_ptr, row, row_ok, HAS_POSITIVES)
    scores = _load(scores_ptr, scale_ptr, cell, mask, SCALED)
    weight = tl.load(row_weight_ptr + place, mask=row_ok, other=0.0)
    diagonal = tl.load(diagonal_ptr + place, mask=row_ok, other=0.0)
    if IS_SIGMOID:
        grad = -weight[:, None] * sigmoid(scores)
    else:
        shift = tl.load(row_shift_ptr + place, mask=row_ok, other=0.0)
        if SCALED:
            grad = -weight[:, None] * share_of_sum(scores, shift[:, None])
        else:
            grad = -weight[:, None] * tl.exp(scores - shift[:, None])
    if HAS_COLUMNS:
        weight = tl.load(col_weight_ptr + group * columns + column, mask=column_ok, other=0.0)
        shift = tl.load(col_shift_ptr + group * columns + column, mask=column_ok, other=0.0)
        grad -= weight[None, :] * share_of_sum(scores, shift[None, :])
    # chosen, not added: a positive has no part in the statistics that shifts are
    grad = tl.where(column[None, :] == positive[:, None], diagonal[:, None], grad)
    if EXCLUDE_SELF:
        grad = tl.where(column[None, :] == row[:, None], 0.0, grad)
    _store(out_ptr, cell, grad, mask, plane, SPLIT)


@triton.jit
def _mixture(
    scores_ptr, scale_ptr, baseline_ptr, joint_ptr, rest_ptr, excess_ptr, shares_ptr, state_ptr, begin, height, count,
    slots, LOG_ALPHA: tl.constexpr, LOG_BETA: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Row statistics of the interpolated bound, in two passes over the columns. Grid: (row blocks, groups).

    state [7, G, N] is what the gradient needs: D; LSE, largest column and LSE of the others, of S - D and of log p - L.
    What is taken relative to D keeps the more digits the larger D is.
    """
    group = tl.program_id(1).to(tl.int64)
    local = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, row_ok = begin + local, local < height
    start_of_row = (group * height + local) * count
    place = group * count + row
    a = tl.load(baseline_ptr + place, mask=row_ok, other=0.0)
    log_others = tl.log(tl.cast(count - 1, tl.float32))

    joint = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    arg = tl.full((BLOCK_M,), -1, tl.int32)
    high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, count, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        mask = row_ok[:, None] & (column < count)[None, :]
        scores = _load(scores_ptr, scale_ptr, start_of_row[:, None] + column[None, :], mask, SCALED)
        joint += tl.sum(tl.where(column[None, :] == row[:, None], scores, 0.0), 1)
        scores = tl.where((column < count)[None, :], scores, float("-inf"))
        top, arg, high, total = push_largest(top, arg, high, total, scores, column)
    without_top = high + tl.log(total)
    rest = without_top - joint
    lse = logaddexp(top - joint, rest)

    excess = tl.zeros((BLOCK_M,), tl.float32)
    shares = tl.zeros((BLOCK_M,), tl.float32)
    z_top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    z_arg = tl.full((BLOCK_M,), -1, tl.int32)
    z_high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    z_total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, count, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        mask = row_ok[:, None] & (column < count)[None, :]
        scores = _load(scores_ptr, scale_ptr, start_of_row[:, None] + column[None, :], mask, SCALED)
        keep = (column < count)[None, :] & (column[None, :] != row[:, None])
        scores -= joint[:, None]
        loo = leave_one_out(scores, column[None, :], lse[:, None], arg[:, None], rest[:, None])
        odds = loo - log_others + (joint - a)[:, None] + (LOG_ALPHA - LOG_BETA)
        relative = logaddexp(loo - log_others + LOG_ALPHA, (a - joint)[:, None] + LOG_BETA)
        excess += tl.sum(tl.where(keep, relative, 0.0), 1)
        shares += tl.sum(tl.where(keep, sigmoid(-odds), 0.0), 1)
        z = tl.where(keep, -softplus(-odds) - loo, float("-inf"))
        z_top, z_arg, z_high, z_total = push_largest(z_top, z_arg, z_high, z_total, z, column)
    z_rest = z_high + tl.log(z_total)

    without_joint = joint + leave_one_out(tl.zeros_like(joint), row, lse, arg, rest)
    without_joint = tl.where(row == arg, without_top, without_joint)
    tl.store(joint_ptr + place, joint, mask=row_ok)
    tl.store(rest_ptr + place, without_joint, mask=row_ok)
    tl.store(excess_ptr + place, excess, mask=row_ok)
    tl.store(shares_ptr + place, shares, mask=row_ok)
    tl.store(state_ptr + place, lse, mask=row_ok)
    tl.store(state_ptr + slots + place, arg.to(tl.float32), mask=row_ok)
    tl.store(state_ptr + 2 * slots + place, rest, mask=row_ok)
    tl.store(state_ptr + 3 * slots + place, logaddexp(z_top, z_rest), mask=row_ok)
    tl.store(state_ptr + 4 * slots + place, z_arg.to(tl.float32), mask=row_ok)
    tl.store(state_ptr + 5 * slots + place, z_rest, mask=row_ok)
    tl.store(state_ptr + 6 * slots + place, joint, mask=row_ok)


@triton.jit
def _mixture_gradients(
    scores_ptr, scale_ptr, baseline_ptr, state_ptr, row_rest_ptr, weight_ptr, grad_ptr, out_ptr, begin, height, count,
    slots, plane,
    LOG_ALPHA: tl.constexpr, LOG_BETA: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dV / dS of the interpolated bound, elementwise. Grid: (row blocks, column blocks, groups).

    No score is above a log-sum-exp that it is part of.
    """
    group = tl.program_id(2).to(tl.int64)
    local = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    row, row_ok = begin + local, local < height
    mask = row_ok & (column < count)
    cell = (group * height + local) * count + column
    place = group * count + row
    scores = _load(scores_ptr, scale_ptr, cell, mask, SCALED)

    pairs = tl.cast(count, tl.float32) * tl.cast(count - 1, tl.float32)
    log_others = tl.log(tl.cast(count - 1, tl.float32))
    a = tl.load(baseline_ptr + place, mask=row_ok, other=0.0)
    row_rest = tl.load(row_rest_ptr + place, mask=row_ok, other=0.0)
    weight = tl.load(weight_ptr + place, mask=row_ok, other=0.0)
    lse = tl.load(state_ptr + place, mask=row_ok, other=0.0)
    arg = tl.load(state_ptr + slots + place, mask=row_ok, other=0.0).to(tl.int32)
    rest = tl.load(state_ptr + 2 * slots + place, mask=row_ok, other=0.0)
    z_lse = tl.load(state_ptr + 3 * slots + place, mask=row_ok, other=0.0)
    z_arg = tl.load(state_ptr + 4 * slots + place, mask=row_ok, other=0.0).to(tl.int32)
    z_rest = tl.load(state_ptr + 5 * slots + place, mask=row_ok, other=0.0)
    joint = tl.load(state_ptr + 6 * slots + place, mask=row_ok, other=0.0)
    is_joint = row == column
    marginal = tl.exp(at_most(scores, row_rest) - row_rest + weight)
    own = tl.where(is_joint, 1.0, -marginal) / tl.cast(count, tl.float32)
    scores -= joint
    loo = leave_one_out(scores, column, lse, arg, rest)
    odds = loo - log_others + (joint - a) + (LOG_ALPHA - LOG_BETA)
    z = tl.where(is_joint, float("-inf"), -softplus(-odds) - loo)
    mixed = leave_one_out(z, column, z_lse, z_arg, z_rest)
    grad = (own - tl.exp(at_most(scores + mixed, log_others)) / pairs) * tl.load(grad_ptr + group)
    _store(out_ptr, cell, grad, mask, plane, SPLIT)


def rows(
    scores: Tensor, scale: Tensor | None, positives: Tensor | None, exclude_self: bool, kind: str, tau: float,
    begin: int, joint: Tensor, rest: Tensor,
) -> None:  # fmt: skip
    """Write D and R of a chunk's rows into joint and rest [G, N]."""
    groups, height, columns = scores.shape
    _rows[triton.cdiv(height, ROWS["BLOCK_M"]), groups](
        scores, scale, positives, joint, rest, begin, height, joint.shape[1], columns,
        KINDS[kind], tau, scale is not None, positives is not None, exclude_self, **ROWS,
    )  # fmt: skip


def infonce_rows(
    scores: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, begin: int, losses: Tensor,
    state: Tensor, out: Tensor | None, factor: float,
) -> None:  # fmt: skip
    """Write a chunk's losses into [G, N], its state into [4, G, N], and `factor` times its gradient into `out`."""
    groups, height, columns = scores.shape
    config = ROWS if out is None else GRADIENT_ROWS
    _infonce_rows[triton.cdiv(height, config["BLOCK_M"]), groups](
        scores, scale, positives, losses, state, out, begin, height, losses.shape[1], columns, losses.numel(),
        scores.numel(), positives is not None, exclude_self, out is not None, _is_split(out), factor, **config,
    )  # fmt: skip


def columns(scores: Tensor, scale: Tensor, begin: int, parts: Tensor) -> None:
    """Merge a chunk into the columns' running (maximum, sum of exponentials) [2, G, PARTS, M], diagonal left out."""
    groups, height, count = scores.shape
    grid = (triton.cdiv(count, COLUMNS["BLOCK_N"]), PARTS, groups)
    _columns[grid](
        scores, scale, parts, begin, height, count, triton.cdiv(height, PARTS), parts[0].numel(), begin == 0, **COLUMNS
    )


def merge_parts(parts: Tensor, out: Tensor) -> None:
    """Write the columns' log-sum-exp into out [G, M]."""
    groups, count = out.shape
    block = COLUMNS["BLOCK_N"]
    _merge_parts[triton.cdiv(count, block), groups](
        parts, out, count, parts[0].numel(), PARTS=PARTS, BLOCK_N=block, num_warps=COLUMNS["num_warps"]
    )


def gradients(
    scores: Tensor, scale: Tensor | None, positives: Tensor | None, exclude_self: bool, row_weight: Tensor,
    row_shift: Tensor | None, col_weight: Tensor | None, col_shift: Tensor | None, diagonal: Tensor, begin: int,
    out: Tensor,
) -> None:  # fmt: skip
    """Write a chunk's dV / dS into `out`; weights and shifts are those of all rows and columns, contiguous."""
    groups, height, columns = scores.shape
    grid = (triton.cdiv(height, CELLS["BLOCK_M"]), triton.cdiv(columns, CELLS["BLOCK_N"]), groups)
    _gradients[grid](
        scores, scale, positives, row_weight, row_shift, col_weight, col_shift, diagonal, out, begin, height,
        row_weight.shape[1], columns, scores.numel(), row_shift is None, col_weight is not None, scale is not None,
        positives is not None, exclude_self, _is_split(out), **CELLS,
    )  # fmt: skip


def mixture(
    scores: Tensor, scale: Tensor | None, log_baseline: Tensor, alpha: float, begin: int, statistics: list[Tensor],
    state: Tensor,
) -> None:  # fmt: skip
    """Write a chunk's row statistics of the interpolated bound into four [G, N], and its state into [7, G, N]."""
    groups, height, count = scores.shape
    _mixture[triton.cdiv(height, MIXTURE["BLOCK_M"]), groups](
        scores, scale, log_baseline, *statistics, state, begin, height, count, groups * count,
        *_log_weights(alpha), scale is not None, **MIXTURE,
    )  # fmt: skip


def mixture_gradients(
    scores: Tensor, scale: Tensor | None, log_baseline: Tensor, alpha: float, state: Tensor, rest: Tensor,
    weight: Tensor, grad: Tensor, begin: int, out: Tensor,
) -> None:  # fmt: skip
    """Write a chunk's dV / dS of the interpolated bound into `out`. rest, weight: as for `cpu.mixture_gradients`."""
    groups, height, count = scores.shape
    config = MIXTURE_CELLS
    grid = (triton.cdiv(height, config["BLOCK_M"]), triton.cdiv(count, config["BLOCK_N"]), groups)
    _mixture_gradients[grid](
        scores, scale, log_baseline, state, rest, weight, grad, out, begin, height, count, groups * count,
        scores.numel(), *_log_weights(alpha), scale is not None, _is_split(out), **config,
    )  # fmt: skip


def _is_split(out: Tensor | None) -> bool:
    """Whether a gradient is written as its parts, [3, G, n, M]."""
    return out is not None and out.ndim == 4


def score_statistics(scores: Tensor, kind: str, tau: float) -> tuple[Tensor, Tensor]:
    """cpu.score_statistics."""
    scores = scores.contiguous()
    joint, rest = rows_like(scores, 2)
    rows(scores, None, None, False, kind, tau, 0, joint, rest)
    return joint, rest


def score_gradients(scores: Tensor, row_weight: Tensor, row_shift: Tensor | None, diagonal: Tensor) -> Tensor:
    """cpu.score_gradients."""
    scores = scores.contiguous()
    out = torch.empty_like(scores)
    shift = None if row_shift is None else row_shift.contiguous()
    gradients(scores, None, None, False, row_weight.contiguous(), shift, None, None, diagonal.contiguous(), 0, out)
    return out


def score_mixture(scores: Tensor, log_baseline: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cpu.score_mixture."""
    scores = scores.contiguous()
    statistics = rows_like(scores, 4)
    mixture(scores, None, log_baseline.contiguous(), alpha, 0, statistics, state_like(scores))
    return tuple(statistics)


def score_mixture_gradients(
    scores: Tensor, log_baseline: Tensor, alpha: float, rest: Tensor, weight: Tensor, grad: Tensor
) -> Tensor:
    """cpu.score_mixture_gradients."""
    scores, a, state = scores.contiguous(), log_baseline.contiguous(), state_like(scores)
    mixture(scores, None, a, alpha, 0, rows_like(scores, 4), state)
    out = torch.empty_like(scores)
    rest, weight, grad = rest.contiguous(), weight.contiguous(), grad.contiguous()
    mixture_gradients(scores, None, a, alpha, state, rest, weight, grad, 0, out)
    return out


def rows_like(first: Tensor, count: int) -> list[Tensor]:
    """`count` contiguous fp32 tensors [G, N], for the rows of a tensor [G, N, anything]. One allocation each: they
    are outputs, which may not share memory."""
    return [torch.empty(first.shape[:2], dtype=torch.float32, device=first.device) for _ in range(count)]


def state_like(first: Tensor) -> Tensor:
    """Room for the interpolated bound's state, [7, G, N]."""
    return torch.empty((7, *first.shape[:2]), dtype=torch.float32, device=first.device)


def _log_weights(alpha: float) -> tuple[float, float]:
    # far beyond any score instead of infinite, so that sums with it stay defined
    log_alpha, log_beta = log_weights(alpha)
    return max(log_alpha, -1e30), max(log_beta, -1e30)
