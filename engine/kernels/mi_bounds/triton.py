"""Fused statistics and gradients of score matrices on the GPU, for embeddings of up to `MAX_WIDTH`. Signatures: cpu.py.

FlashAttention-shaped: a program owns a block of rows, which stays on the chip, streams the other side and writes each
output once; memory is that of the outputs. InfoNCE is attention with the keys as values: its forward pass finds dq
beside the loss (two products), and its backward pass computes the scores again for dk (two). The other bounds take one
product forward and four backward. No atomics: results are bitwise the same every time.

fp32 embeddings are multiplied on tensor cores as tf32x3 (three products, close to fp32), or as tf32 where
`torch.backends.cuda.matmul.allow_tf32` says so; embeddings of 16 bits in their own type. Sums accumulate in fp32. A
tensor core ignores the bits that tf32 lacks, which would bias every product, so all that it is given is rounded before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.dispatch import architecture
from engine.kernels.mi_bounds.chunked import contiguous, in_range
from engine.kernels.mi_bounds.scores import rows_like
from engine.kernels.mi_bounds.statistics import LSE, SHARE
from engine.kernels.mi_bounds.tiles import KINDS, LN_2, LOG2_E, finite, infonce_row, sigmoid, softplus
from engine.kernels.registry import interpreting
from engine.kernels.triton_math import at_most, round_tf32

# Which side `positives` belongs to: none (positives are on the diagonal), the owned side, the streamed side.
DIAGONAL, OWN, OTHER = 0, 1, 2

# With fewer owned rows than this, large tiles would leave most of a chip idle.
FEW_ROWS = 4096
ROUND_BLOCK = 1024


@triton.jit
def _load(ptr, index, count, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, UPCAST: tl.constexpr):
    """Rows [n, BLOCK_W] of embeddings; 0 where there is no row or column."""
    w = tl.arange(0, BLOCK_W)
    mask = (index < count)[:, None] & (w < WIDTH)[None, :]
    x = tl.load(ptr + index.to(tl.int64)[:, None] * WIDTH + w[None, :], mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _store(ptr, index, count, x, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    w = tl.arange(0, BLOCK_W)
    mask = (index < count)[:, None] & (w < WIDTH)[None, :]
    tl.store(ptr + index.to(tl.int64)[:, None] * WIDTH + w[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _operand(x, like, ROUND: tl.constexpr):
    """A product's left factor, in the right one's dtype."""
    if ROUND:
        x = round_tf32(x)
    return x.to(like.dtype)


@triton.jit
def _scores(
    a, b, a_ptr, b_ptr, a_index, b_index, a_count, b_count, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """a b^T of loaded rows; or, with BLOCK_D < BLOCK_W, of BLOCK_D columns at a time, loaded anew.

    tf32x3 splits its operands in registers, which do not hold those of whole rows.
    """
    if BLOCK_D == BLOCK_W:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, WIDTH, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            a_mask = (a_index < a_count)[:, None] & (d < WIDTH)[None, :]
            b_mask = (b_index < b_count)[None, :] & (d < WIDTH)[:, None]
            a_part = tl.load(a_ptr + a_index.to(tl.int64)[:, None] * WIDTH + d[None, :], mask=a_mask, other=0.0)
            b_part = tl.load(b_ptr + b_index.to(tl.int64)[None, :] * WIDTH + d[:, None], mask=b_mask, other=0.0)
            if UPCAST:
                a_part, b_part = a_part.to(tl.float32), b_part.to(tl.float32)
            total = tl.dot(a_part, b_part, total, input_precision=PRECISION)
        return total


@triton.jit
def _round(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """fp32 rounded to tf32. Grid: (blocks,)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, round_tf32(tl.load(x_ptr + i, mask=i < count, other=0.0)), mask=i < count)


@triton.jit
def _statistics(
    q_ptr, k_ptr, scale_ptr, joint_ptr, rest_ptr, rows, columns,
    KIND: tl.constexpr, TAU: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """D and R of BLOCK_M rows of one group, with the positives on the diagonal. Grid: (row blocks, groups)."""
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += group * rows * WIDTH
    k_ptr += group * columns * WIDTH
    # log-sum-exps are taken in base 2
    base = 1.0 if KIND == 2 else LOG2_E
    scale = tl.load(scale_ptr) * base
    own = _load(q_ptr, row, rows, WIDTH, BLOCK_W, UPCAST)
    joint = tl.zeros((BLOCK_M,), tl.float32)
    high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, columns, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        other = _load(k_ptr, column, columns, WIDTH, BLOCK_W, UPCAST)
        scores = _scores(
            own, other, q_ptr, k_ptr, row, column, rows, columns, PRECISION, UPCAST, WIDTH, BLOCK_W, BLOCK_D, BLOCK_M,
            BLOCK_N,
        ) * scale  # fmt: skip
        is_positive = column[None, :] == row[:, None]
        joint += tl.sum(tl.where(is_positive, scores, 0.0), 1)
        keep = (column < columns)[None, :] & (is_positive == 0)
        if KIND == 2:
            total += tl.sum(tl.where(keep, softplus(scores), 0.0), 1)
        else:
            if KIND == 1:
                scores = tl.minimum(tl.maximum(scores, -TAU * base), TAU * base)
            scores = tl.where(keep, scores, float("-inf"))
            new = tl.maximum(high, tl.max(scores, 1))
            total = total * tl.exp2(high - finite(new)) + tl.sum(tl.exp2(scores - finite(new)[:, None]), 1)
            high = new
    rest = total if KIND == 2 else (high + tl.log2(total)) * LN_2
    place = group * rows + row
    tl.store(joint_ptr + place, joint / base, mask=row < rows)
    tl.store(rest_ptr + place, rest, mask=row < rows)


@triton.jit
def _infonce(
    q_ptr, k_ptr, scale_ptr, positives_ptr, losses_ptr, state_ptr, pull_ptr, rows, columns, slots,
    HAS_POSITIVES: tl.constexpr, EXCLUDE_SELF: tl.constexpr, PULL: tl.constexpr, ROUND: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """InfoNCE loss of BLOCK_M rows of one group and its state. Grid: (row blocks, groups).

    state [4, G, N]: joint, rest, the log-sum-exp of all scores, share = 1 - probability of the positive. With PULL also
    pull [G, N, d], the gradient with respect to q: scale * share * (mean of the other keys, weighted by their
    probabilities, less the positive key).
    """
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < rows
    q_ptr += group * rows * WIDTH
    k_ptr += group * columns * WIDTH
    scale = tl.load(scale_ptr) * LOG2_E
    positive = row
    if HAS_POSITIVES:
        positive = tl.load(positives_ptr + row, mask=row_ok, other=-1).to(tl.int32)
    own = _load(q_ptr, row, rows, WIDTH, BLOCK_W, UPCAST)
    joint = tl.zeros((BLOCK_M,), tl.float32)
    high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    pull = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for start in range(0, columns, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        other = _load(k_ptr, column, columns, WIDTH, BLOCK_W, UPCAST)
        scores = _scores(
            own, other, q_ptr, k_ptr, row, column, rows, columns, PRECISION, UPCAST, WIDTH, BLOCK_W, BLOCK_D, BLOCK_M,
            BLOCK_N,
        ) * scale  # fmt: skip
        is_positive = column[None, :] == positive[:, None]
        joint += tl.sum(tl.where(is_positive, scores, 0.0), 1)
        keep = (column < columns)[None, :] & (is_positive == 0)
        if EXCLUDE_SELF:
            keep = keep & (column[None, :] != row[:, None])
        scores = tl.where(keep, scores, float("-inf"))
        new = tl.maximum(high, tl.max(scores, 1))
        fade = tl.exp2(high - finite(new))
        weight = tl.exp2(scores - finite(new)[:, None])
        total = total * fade + tl.sum(weight, 1)
        if PULL:
            pull = tl.dot(_operand(weight, other, ROUND), other, pull * fade[:, None], input_precision=PRECISION)
        high = new
    # the difference in base 2 first: joint and rest may be large and close to each other
    rest = high + tl.log2(total)
    difference = (rest - joint) * LN_2
    loss, _, share = infonce_row(tl.zeros_like(joint), difference)
    lse = tl.maximum(rest, joint) * LN_2 + softplus(-tl.abs(difference))
    place = group * rows + row
    tl.store(losses_ptr + place, loss, mask=row_ok)
    tl.store(state_ptr + place, joint * LN_2, mask=row_ok)
    tl.store(state_ptr + slots + place, rest * LN_2, mask=row_ok)
    tl.store(state_ptr + 2 * slots + place, lse, mask=row_ok)
    tl.store(state_ptr + 3 * slots + place, share, mask=row_ok)
    if PULL:
        key = _load(k_ptr, tl.where(row_ok, positive, columns), columns, WIDTH, BLOCK_W, UPCAST).to(tl.float32)
        mean = pull / tl.where(total == 0.0, 1.0, total)[:, None]
        pull_ptr += group * rows * WIDTH
        _store(pull_ptr, row, rows, (share * tl.load(scale_ptr))[:, None] * (mean - key), WIDTH, BLOCK_W)


@triton.jit
def _gradients(
    own_ptr, other_ptr, scale_ptr, factor_ptr, positives_ptr, own_weight_ptr, own_shift_ptr, other_weight_ptr,
    other_shift_ptr, diagonal_ptr, out_ptr, own_count, other_count,
    HAS_OWN: tl.constexpr, HAS_OTHER: tl.constexpr, IS_SIGMOID: tl.constexpr, OWNS_ROWS: tl.constexpr,
    IS_SHARE: tl.constexpr, HAS_FACTORS: tl.constexpr, POSITIVES: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    ROUND: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """factor * dS other for BLOCK_M owned embeddings. Grid: (blocks, groups).

    dS = -weight e^(S - shift) summed over the sides that have one, or -weight sigmoid(S). Shifts are log-sum-exps, so
    that e^(S - shift) is at most 1 (`triton_math.share_of_sum`). At a row's positive dS is the row's diagonal
    coefficient. With IS_SHARE weights are InfoNCE losses' gradients: dS = weight e^(S - shift), and -weight times the
    coefficient at the positive. The factor is one number, or one per group.
    """
    group = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own_ok = own < own_count
    own_place, other_base = group * own_count + own, group * other_count
    own_ptr += group * own_count * WIDTH
    other_ptr += group * other_count * WIDTH
    base = 1.0 if IS_SIGMOID else LOG2_E
    scale = tl.load(scale_ptr) * base
    if HAS_OWN:
        own_weight = tl.load(own_weight_ptr + own_place, mask=own_ok, other=0.0)
        if IS_SIGMOID == 0:
            own_shift = tl.load(own_shift_ptr + own_place, mask=own_ok, other=0.0) * LOG2_E
    own_mark = own
    if POSITIVES == 1:
        own_mark = tl.load(positives_ptr + own, mask=own_ok, other=-1).to(tl.int32)
    if OWNS_ROWS:
        own_diagonal = tl.load(diagonal_ptr + own_place, mask=own_ok, other=0.0)
        if IS_SHARE:
            own_weight = -own_weight
            own_diagonal *= own_weight
    rows = _load(own_ptr, own, own_count, WIDTH, BLOCK_W, UPCAST)
    total = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for start in range(0, other_count, BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        other_ok = other < other_count
        value = _load(other_ptr, other, other_count, WIDTH, BLOCK_W, UPCAST)
        scores = _scores(
            rows, value, own_ptr, other_ptr, own, other, own_count, other_count, PRECISION, UPCAST, WIDTH, BLOCK_W,
            BLOCK_D, BLOCK_M, BLOCK_N,
        ) * scale  # fmt: skip
        if HAS_OTHER:
            weight = tl.load(other_weight_ptr + other_base + other, mask=other_ok, other=0.0)
            if IS_SHARE:
                weight = -weight
        if IS_SIGMOID:
            grad = sigmoid(scores)
            grad *= -own_weight[:, None] if HAS_OWN else -weight[None, :]
        else:
            grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if HAS_OWN:
                grad -= own_weight[:, None] * tl.exp2(at_most(scores - own_shift[:, None], 0.0))
            if HAS_OTHER:
                shift = tl.load(other_shift_ptr + other_base + other, mask=other_ok, other=0.0) * LOG2_E
                grad -= weight[None, :] * tl.exp2(at_most(scores - shift[None, :], 0.0))
        other_mark = other
        if POSITIVES == 2:
            other_mark = tl.load(positives_ptr + other, mask=other_ok, other=-1).to(tl.int32)
        is_positive = own_mark[:, None] == other_mark[None, :]
        if OWNS_ROWS:
            diagonal = own_diagonal[:, None]
        else:
            coefficient = tl.load(diagonal_ptr + other_base + other, mask=other_ok, other=0.0)
            if IS_SHARE:
                coefficient *= weight
            diagonal = coefficient[None, :]
        # chosen, not added: a positive has no part in the statistics that shifts are
        grad = tl.where(is_positive, diagonal, grad)
        # rows past the end have weights of 0 or are not stored; a weight of 0 times an infinite number is not 0
        keep = own_ok[:, None] & other_ok[None, :]
        if EXCLUDE_SELF:
            keep = keep & (own[:, None] != other[None, :])
        grad = tl.where(keep, grad, 0.0)
        total = tl.dot(_operand(grad, value, ROUND), value, total, input_precision=PRECISION)
    factor = tl.load(factor_ptr + (group if HAS_FACTORS else 0))
    out_ptr += group * own_count * WIDTH
    _store(out_ptr, own, own_count, total * factor, WIDTH, BLOCK_W)


@dataclass(frozen=True)
class Precision:
    """How products are taken: tl.dot's input_precision, and whether operands are rounded to tf32 before."""

    name: str

    @property
    def dot(self) -> dict[str, object]:
        # the interpreter multiplies the raw bits of 16-bit numbers, so there they are widened
        return {"PRECISION": {"fp32": "tf32x3", "tf32": "tf32"}.get(self.name, "ieee"), "UPCAST": interpreting()}

    @property
    def rounds(self) -> bool:
        return self.name == "tf32"


def precision_of(q: Tensor) -> Precision:
    if q.dtype != torch.float32:
        return Precision("half")
    return Precision("tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32")


# Owned and streamed rows of a tile, columns of the embeddings at a time (0 for all), warps, stages. There is one entry
# for few owned rows, one for many, and one for many on one architecture. None spills on an architecture that uses it.
Config = tuple[int, int, int, int, int]
STATISTICS: dict[str, dict[str | int, Config]] = {
    "half": {"few": (64, 64, 0, 4, 3), "many": (128, 128, 0, 8, 3)},
    "tf32": {"few": (64, 64, 0, 4, 2), "many": (128, 64, 0, 8, 2)},
    "fp32": {"few": (64, 64, 16, 8, 2), "many": (64, 64, 16, 8, 2)},
}
INFONCE: dict[str, dict[str | int, Config]] = {
    "half": {"few": (64, 64, 0, 4, 3), "many": (128, 64, 0, 8, 3), 90: (128, 128, 0, 8, 3)},
    "tf32": {"few": (64, 32, 0, 8, 2), "many": (64, 32, 0, 8, 2), 90: (128, 64, 0, 8, 2), 100: (128, 64, 0, 8, 2)},
    "fp32": {"few": (64, 32, 32, 8, 1), "many": (64, 32, 32, 8, 1)},
}
GRADIENTS: dict[str, dict[str | int, Config]] = {
    "half": {"few": (64, 64, 0, 4, 2), "many": (128, 64, 0, 8, 2), 90: (128, 128, 0, 8, 2)},
    "tf32": {"few": (64, 32, 0, 4, 2), "many": (64, 32, 0, 4, 2), 90: (128, 64, 0, 8, 2), 100: (128, 64, 0, 8, 2)},
    "fp32": {"few": (64, 32, 32, 8, 1), "many": (64, 32, 32, 8, 1)},
}


def tile(configs: dict[str, dict[str | int, Config]], precision: str, rows: int, width: int, arch: int | None) -> dict:
    """Keywords of a launch for `rows` owned rows, all groups together."""
    choices = configs[precision]
    block_m, block_n, block_d, warps, stages = choices["few"] if rows < FEW_ROWS else choices.get(arch, choices["many"])
    block_w = max(16, triton.next_power_of_2(width))
    return {
        "WIDTH": width, "BLOCK_W": block_w, "BLOCK_D": min(block_d or block_w, block_w), "BLOCK_M": block_m,
        "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def statistics(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, kind: str, tau: float
) -> tuple[Tensor, Tensor]:
    if positives is not None or exclude_self:
        raise NotImplementedError("bounds have their positives on the diagonal; see infonce for the rest")
    (q, k), precision = _operands(q, k)
    groups, rows, width = q.shape
    joint, rest = rows_like(q, 2)
    config = tile(STATISTICS, precision.name, groups * rows, width, architecture(q.device))
    _statistics[triton.cdiv(rows, config["BLOCK_M"]), groups](
        q, k, scale, joint, rest, rows, k.shape[1], KINDS[kind], tau, **precision.dot, **config
    )
    return joint, rest


def symmetric_statistics(q: Tensor, k: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    joint, rest = statistics(q, k, scale, None, False, "lse", 0.0)
    return joint, rest, statistics(k, q, scale, None, False, "lse", 0.0)[1]


def infonce(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, gradients: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `autograd.InfoNCE` wants it. One product; two for `gradients` "rows"."""
    (q, k), precision = _operands(q, k)
    groups, rows, width = q.shape
    (losses,) = rows_like(q, 1)
    state = torch.empty((4, groups, rows), dtype=torch.float32, device=q.device)
    dq = torch.empty(q.shape if gradients == "rows" else (0,), dtype=torch.float32, device=q.device)
    config = tile(INFONCE, precision.name, groups * rows, width, architecture(q.device))
    _infonce[triton.cdiv(rows, config["BLOCK_M"]), groups](
        q, k, scale, positives, losses, state, dq, rows, k.shape[1], groups * rows,
        positives is not None, exclude_self, gradients == "rows", precision.rounds, **precision.dot, **config,
    )  # fmt: skip
    return losses, state, dq, torch.empty(0, dtype=torch.float32, device=q.device)


def infonce_keys(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, weight: Tensor, state: Tensor
) -> Tensor:
    """dk from the gradient of the losses, `weight` [G, B]. Two products."""
    (q, k), precision = _operands(q, k)
    factor, (weight,) = in_range(q, scale, weight)
    return _run(
        k, q, scale, factor, positives, (None, None), (weight, state[LSE]), state[SHARE], False, True, exclude_self,
        precision,
    )  # fmt: skip


def gradients(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, row_weight: Tensor,
    row_shift: Tensor | None, col_weight: Tensor | None, col_shift: Tensor | None, diagonal: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (q, k), precision = _operands(q, k)
    factor, (row_weight, col_weight, diagonal) = in_range(q, scale, row_weight, col_weight, diagonal)
    row, column = (row_weight, contiguous(row_shift)), (col_weight, contiguous(col_shift))
    shared = (scale, factor, positives)
    dq = _run(q, k, *shared, row, column, diagonal, True, False, exclude_self, precision)
    dk = _run(k, q, *shared, column, row, diagonal, False, False, exclude_self, precision)
    return dq, dk


def _run(
    own: Tensor, other: Tensor, scale: Tensor, factor: Tensor, positives: Tensor | None,
    own_side: tuple[Tensor | None, Tensor | None], other_side: tuple[Tensor | None, Tensor | None], diagonal: Tensor,
    owns_rows: bool, is_share: bool, exclude_self: bool, precision: Precision,
) -> Tensor:  # fmt: skip
    groups, count, width = own.shape
    out = torch.empty_like(own)
    whose = DIAGONAL if positives is None else OWN if owns_rows else OTHER
    is_sigmoid = own_side[1] is None and other_side[1] is None
    config = tile(GRADIENTS, precision.name, groups * count, width, architecture(own.device))
    _gradients[triton.cdiv(count, config["BLOCK_M"]), groups](
        own, other, scale, factor, positives, *own_side, *other_side, diagonal, out, count, other.shape[1],
        own_side[0] is not None, other_side[0] is not None, is_sigmoid, owns_rows, is_share, factor.dim() > 0, whose,
        exclude_self, precision.rounds, **precision.dot, **config,
    )  # fmt: skip
    return out


def _operands(*tensors: Tensor) -> tuple[list[Tensor], Precision]:
    """Embeddings in the form for tl.dot: contiguous, and rounded if it would truncate them."""
    precision = precision_of(tensors[0])
    tensors = [t.contiguous() for t in tensors]
    return [_rounded(t) for t in tensors] if precision.rounds else tensors, precision


def _rounded(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _round[triton.cdiv(x.numel(), ROUND_BLOCK),](x, out, x.numel(), BLOCK=ROUND_BLOCK)
    return out
