"""Statistics of rows and their gradients on the GPU: library products of a chunk of rows, one kernel on its scores.

Signatures: cpu.py. Chunks, products and sums are those of mi_bounds.chunked; its text says what memory they take.
Accumulates in fp32. No atomics: results are bitwise the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.contrastive.losses import (
    NEGATIVE_COUNT,
    NEGATIVES,
    POSITIVE_COUNT,
    POSITIVES,
    ROWS,
    SPREAD,
    TOTAL,
    WEIGHTS,
)
from engine.kernels.contrastive.pairs import Pairs
from engine.kernels.mi_bounds.chunked import _Chunks, _Pair, _Sums, in_range
from engine.kernels.mi_bounds.scores import _load, _store
from engine.kernels.mi_bounds.tiles import push, sigmoid, softplus
from engine.kernels.triton_math import share_of_sum

# Rows and columns of a tile, warps.
STATISTICS = {"BLOCK_M": 4, "BLOCK_N": 512, "num_warps": 4}
GRADIENTS = {"BLOCK_M": 4, "BLOCK_N": 256, "num_warps": 4}

# Which pairs are positive: column i of row i, those that are listed, those of one label.
DIAGONAL, LISTED, LABELLED = 0, 1, 2

_POSITIVES, _SPREAD, _NEGATIVES, _WEIGHTS, _TOTAL, _POSITIVE_COUNT, _NEGATIVE_COUNT, _ROWS = (
    tl.constexpr(place)
    for place in (POSITIVES, SPREAD, NEGATIVES, WEIGHTS, TOTAL, POSITIVE_COUNT, NEGATIVE_COUNT, ROWS)
)


@triton.jit
def _roles(
    positives_ptr, labels_ptr, key_labels_ptr, row_ids_ptr, key_ids_ptr, mask_ptr, row, row_ok, column, column_ok,
    columns, listed,
    ROLE: tl.constexpr, HAS_IDS: tl.constexpr, HAS_MASK: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
):  # fmt: skip
    """Where a tile's pairs are positive, and where they are negative."""
    valid = row_ok[:, None] & column_ok[None, :]
    if ROLE == 2:
        of_row = tl.load(labels_ptr + row, mask=row_ok, other=0)
        of_column = tl.load(key_labels_ptr + column, mask=column_ok, other=0)
        positive = of_row[:, None] == of_column[None, :]
    elif ROLE == 1:
        positive = (column < 0)[None, :] & row_ok[:, None]
        for place in range(0, listed):
            chosen = tl.load(positives_ptr + row.to(tl.int64) * listed + place, mask=row_ok, other=-1).to(tl.int32)
            positive = positive | (column[None, :] == chosen[:, None])
    else:
        positive = column[None, :] == row[:, None]
    positive = positive & valid
    negative = valid
    if EXCLUDE_SELF:
        other = column[None, :] != row[:, None]
        positive = positive & other
        negative = negative & other
    if HAS_IDS:
        of_row = tl.load(row_ids_ptr + row, mask=row_ok, other=0)
        of_column = tl.load(key_ids_ptr + column, mask=column_ok, other=0)
        negative = negative & (of_row[:, None] != of_column[None, :])
    if HAS_MASK:
        cell = row.to(tl.int64)[:, None] * columns + column[None, :]
        negative = negative & (tl.load(mask_ptr + cell, mask=valid, other=1) == 0)
    return positive, negative & (positive == 0)


@triton.jit
def _statistics(
    scores_ptr, scale_ptr, bias_ptr, positives_ptr, labels_ptr, key_labels_ptr, row_ids_ptr, key_ids_ptr, mask_ptr,
    out_ptr, begin, height, rows, columns, listed, slots,
    ROLE: tl.constexpr, HAS_IDS: tl.constexpr, HAS_MASK: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    IS_SIGMOID: tl.constexpr, HARDNESS: tl.constexpr, WITH_TOTAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Statistics of BLOCK_M rows of a chunk, into out [7, G, N]. Grid: (row blocks, groups)."""
    group = tl.program_id(1).to(tl.int64)
    local = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, row_ok = begin + local, local < height
    start_of_row = (group * height + local) * columns
    zero = tl.zeros((BLOCK_M,), tl.float32)
    lowest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    positive_high, positive_sum, positive_total, positive_count = lowest, zero, zero, zero
    negative_high, negative_sum, negative_total, negative_count = lowest, zero, zero, zero
    weight_high, weight_sum = lowest, zero
    for start in range(0, columns, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        column_ok = column < columns
        mask = row_ok[:, None] & column_ok[None, :]
        scores = _load(scores_ptr, scale_ptr, start_of_row[:, None] + column[None, :], mask, True)
        positive, negative = _roles(
            positives_ptr, labels_ptr, key_labels_ptr, row_ids_ptr, key_ids_ptr, mask_ptr, row, row_ok, column,
            column_ok, columns, listed, ROLE, HAS_IDS, HAS_MASK, EXCLUDE_SELF,
        )  # fmt: skip
        positive_count += tl.sum(tl.where(positive, 1.0, 0.0), 1)
        negative_count += tl.sum(tl.where(negative, 1.0, 0.0), 1)
        if IS_SIGMOID:
            scores += tl.load(bias_ptr)
            terms = softplus(tl.where(positive, -scores, scores))
            negative_total += tl.sum(tl.where(positive | negative, terms, 0.0), 1)
        else:
            of_positives = tl.where(positive, scores, float("-inf"))
            positive_high, positive_sum = push(positive_high, positive_sum, of_positives, 1)
            positive_total += tl.sum(tl.where(positive, scores, 0.0), 1)
            of_negatives = tl.where(negative, (1.0 + HARDNESS) * scores, float("-inf"))
            negative_high, negative_sum = push(negative_high, negative_sum, of_negatives, 1)
            if HARDNESS > 0:
                of_weights = tl.where(negative, HARDNESS * scores, float("-inf"))
                weight_high, weight_sum = push(weight_high, weight_sum, of_weights, 1)
            if WITH_TOTAL:
                negative_total += tl.sum(tl.where(negative, scores, 0.0), 1)
    place = group * rows + row
    if IS_SIGMOID:
        tl.store(out_ptr + place, negative_total, mask=row_ok)
        tl.store(out_ptr + _SPREAD * slots + place, zero, mask=row_ok)
        tl.store(out_ptr + _NEGATIVES * slots + place, zero, mask=row_ok)
    else:
        lse = positive_high + tl.log(positive_sum)
        mean = positive_total / tl.maximum(positive_count, 1.0)
        spread = tl.where(positive_count > 0, lse - mean, 0.0)
        tl.store(out_ptr + place, lse, mask=row_ok)
        tl.store(out_ptr + _SPREAD * slots + place, spread, mask=row_ok)
        tl.store(out_ptr + _NEGATIVES * slots + place, negative_high + tl.log(negative_sum), mask=row_ok)
    of_weights = zero
    if HARDNESS > 0:
        of_weights = weight_high + tl.log(weight_sum)
    tl.store(out_ptr + _WEIGHTS * slots + place, of_weights, mask=row_ok)
    tl.store(out_ptr + _TOTAL * slots + place, negative_total, mask=row_ok)
    tl.store(out_ptr + _POSITIVE_COUNT * slots + place, positive_count, mask=row_ok)
    tl.store(out_ptr + _NEGATIVE_COUNT * slots + place, negative_count, mask=row_ok)


@triton.jit
def _gradients(
    scores_ptr, scale_ptr, bias_ptr, positives_ptr, labels_ptr, key_labels_ptr, row_ids_ptr, key_ids_ptr, mask_ptr,
    grads_ptr, state_ptr, sums_ptr, out_ptr, begin, height, rows, columns, listed, slots, plane,
    ROLE: tl.constexpr, HAS_IDS: tl.constexpr, HAS_MASK: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    IS_SIGMOID: tl.constexpr, HARDNESS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_M rows' scores, and its sums over the columns. grads [G, 7, N], state [7, G, N]. Grid: (row
    blocks, groups). `out` may be `scores`."""
    group = tl.program_id(1).to(tl.int64)
    local = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, row_ok = begin + local, local < height
    start_of_row = (group * height + local) * columns
    place = group * rows + row
    grads_ptr += group * _ROWS * rows
    # of the first statistic: that of the positives, or the sigmoid loss
    first = tl.load(grads_ptr + row, mask=row_ok, other=0.0)
    spread = tl.load(grads_ptr + _SPREAD * rows + row, mask=row_ok, other=0.0)
    weight = tl.load(grads_ptr + _NEGATIVES * rows + row, mask=row_ok, other=0.0) * (1.0 + HARDNESS)
    of_weights = tl.load(grads_ptr + _WEIGHTS * rows + row, mask=row_ok, other=0.0) * HARDNESS
    total = tl.load(grads_ptr + _TOTAL * rows + row, mask=row_ok, other=0.0)
    positives = tl.load(state_ptr + place, mask=row_ok, other=0.0)
    negatives = tl.load(state_ptr + _NEGATIVES * slots + place, mask=row_ok, other=0.0)
    weights = tl.load(state_ptr + _WEIGHTS * slots + place, mask=row_ok, other=0.0)
    count = tl.load(state_ptr + _POSITIVE_COUNT * slots + place, mask=row_ok, other=1.0)
    share_of_one = 1.0 / tl.maximum(count, 1.0)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, columns, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        column_ok = column < columns
        mask = row_ok[:, None] & column_ok[None, :]
        cell = start_of_row[:, None] + column[None, :]
        scores = _load(scores_ptr, scale_ptr, cell, mask, True)
        positive, negative = _roles(
            positives_ptr, labels_ptr, key_labels_ptr, row_ids_ptr, key_ids_ptr, mask_ptr, row, row_ok, column,
            column_ok, columns, listed, ROLE, HAS_IDS, HAS_MASK, EXCLUDE_SELF,
        )  # fmt: skip
        if IS_SIGMOID:
            scores += tl.load(bias_ptr)
            grad = first[:, None] * tl.where(positive, -sigmoid(-scores), sigmoid(scores))
            grad = tl.where(positive | negative, grad, 0.0)
            sums += tl.sum(grad, 1)
        else:
            share = share_of_sum(scores, positives[:, None])
            of_positive = spread[:, None] * (share - share_of_one[:, None]) + first[:, None] * share
            # one positive has the share 1; a product taken again may differ in its last digit
            of_positive = tl.where(count[:, None] == 1, first[:, None], of_positive)
            of_negative = weight[:, None] * share_of_sum((1.0 + HARDNESS) * scores, negatives[:, None])
            of_negative += total[:, None]
            if HARDNESS > 0:
                of_negative += of_weights[:, None] * share_of_sum(HARDNESS * scores, weights[:, None])
            # chosen, not added: what is not chosen may be infinite
            grad = tl.where(positive, of_positive, tl.where(negative, of_negative, 0.0))
        _store(out_ptr, cell, grad, mask, plane, SPLIT)
    tl.store(sums_ptr + place, sums, mask=row_ok)


class _Roles:
    """`Pairs` as arguments of the kernels."""

    def __init__(self, pairs: Pairs):
        pairs = pairs._replace(mask=None if pairs.mask is None else pairs.mask.contiguous().view(torch.uint8))
        tensors = [None if t is None else t.contiguous() for t in pairs[:-1]]
        self.tensors = tensors
        self.listed = 0 if pairs.positives is None else pairs.positives.shape[1]
        role = LABELLED if pairs.labels is not None else DIAGONAL if pairs.positives is None else LISTED
        self.constants = role, pairs.row_ids is not None, pairs.mask is not None, pairs.exclude_self


def statistics(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor | None, hardness: float, with_total: bool,
    *pairs: Tensor | bool | None,
) -> Tensor:  # fmt: skip
    """One product."""
    roles, (groups, rows, _) = _Roles(Pairs(*pairs)), q.shape
    out = torch.empty((ROWS, groups, rows), dtype=torch.float32, device=q.device)
    for begin, scores, _ in _Chunks(_Pair(q, k), with_gradient=False):
        height, columns = scores.shape[1:]
        _statistics[triton.cdiv(height, STATISTICS["BLOCK_M"]), groups](
            scores, scale, bias, *roles.tensors, out, begin, height, rows, columns, roles.listed, groups * rows,
            *roles.constants, bias is not None, float(hardness), with_total, **STATISTICS,
        )  # fmt: skip
    return out


def gradients(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor | None, hardness: float, with_keys: bool, grads: Tensor,
    state: Tensor, *pairs: Tensor | bool | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Three products."""
    pair, roles, (groups, rows, _) = _Pair(q, k), _Roles(Pairs(*pairs)), q.shape
    sums = torch.empty((groups, rows), dtype=torch.float32, device=q.device)
    share = (lambda: grads.new_full((groups, 1), 1 + 2 * hardness)) if hardness else None
    factor, (grads,) = in_range(q, scale, grads.transpose(0, 1).contiguous().view(groups, -1), share=share)
    totals = _Sums(pair)
    for begin, scores, gradient in _Chunks(pair, with_gradient=True):
        height, columns = scores.shape[1:]
        _gradients[triton.cdiv(height, GRADIENTS["BLOCK_M"]), groups](
            scores, scale, bias, *roles.tensors, grads, state, sums, gradient, begin, height, rows, columns,
            roles.listed, groups * rows, scores.numel(), *roles.constants, bias is not None, float(hardness),
            gradient.ndim == 4, **GRADIENTS,
        )  # fmt: skip
        totals.add(begin, gradient)
    dq, dk = totals.scaled(factor)
    if q.dtype == torch.float16 and bias is not None:
        sums = sums * (factor[:, 0] / scale)
    return dq, dk if with_keys else k.new_empty(0), sums
