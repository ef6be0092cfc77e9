"""The concat critic on the GPU, for up to three hidden layers of up to 256; deeper and wider ones run as `plain`.

A program takes a tile of pairs, BLOCK_I rows by BLOCK_J columns, through all layers. The first hidden layer is formed
from its two parts when it is read, one slice of features at a time. The second exists one slice at a time as well, and
each slice is used for the third at once. So the layers of a pair never leave the chip in the forward pass.

InfoNCE streams the columns of a block of rows and keeps O(1) numbers per row. Backward passes go over slabs of pairs,
whose layers are computed again; a slab's gradients are kept feature-major for the products over pairs that the weights'
gradients are. Sums over tiles and slabs have a fixed order: no atomics, bitwise the same every time.

Products follow torch.get_float32_matmul_precision(): highest is tf32x3 (three products of split factors, close to
fp32), high tf32, medium bf16. Sums are fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.critics import plain, slabs
from engine.kernels.critics.plan import concat_algorithm
from engine.kernels.mlp.triton import PRECISIONS, dot, positive
from engine.kernels.triton_math import share_of_sum

# Rows and columns of a tile of pairs; features of a slice of the input and of the second layer; warps, stages.
SCORES = {"tf32x3": (1, 32, 16, 32, 8, 1), "tf32": (1, 64, 32, 64, 8, 2), "bf16": (1, 64, 32, 32, 8, 2)}
# Backward: pairs of a program; features of a slice of the input (TOP: and of the second layer); warps, stages.
TOP = {"tf32x3": (32, 16, 32, 8, 2), "tf32": (32, 32, 32, 8, 2), "bf16": (32, 32, 32, 8, 2)}
LAYER = {"tf32x3": (32, 16, 8, 1), "tf32": (32, 32, 8, 2), "bf16": (32, 32, 8, 2)}
# Rows and columns of the weight's gradient, pairs of a slice, warps, stages.
WEIGHT = {
    "tf32x3": (64, 64, 16, 8, 1),
    "tf32": (64, 64, 32, 8, 2),
    "bf16": (64, 64, 32, 8, 2),
}
TILE = 8  # rows and columns of a tile of pairs; a slab consists of tiles
# Pairs of a slab: a 32nd of all of them, within these limits. Its buffers take 3 · hidden numbers per pair.
SLAB = (1 << 13, 1 << 16)
SIDES = 16  # features of a program that adds up a slab's pairs
SPLITS = 8  # parts of a slab's pairs, each with a sum of weight gradients of its own


@triton.jit
def _vector(p, k, HIDDEN: tl.constexpr):
    return tl.load(p + k, mask=k < HIDDEN, other=0.0)


@triton.jit
def _matrix(p, a, a_stride, b, b_stride, HIDDEN: tl.constexpr):
    """Elements [a, b] of a weight [HIDDEN, HIDDEN], or of its transpose; 0 outside."""
    mask = (a < HIDDEN)[:, None] & (b < HIDDEN)[None, :]
    return tl.load(p + a[:, None] * a_stride + b[None, :] * b_stride, mask=mask, other=0.0)


@triton.jit
def _first(row_ptr, column_ptr, i, j, live, k, HIDDEN: tl.constexpr):
    """Features k of the first hidden layer of pairs (i, j), [pairs, features]; 0 outside."""
    mask = live[:, None] & (k < HIDDEN)[None, :]
    of_row = tl.load(row_ptr + i.to(tl.int64)[:, None] * HIDDEN + k[None, :], mask=mask, other=0.0)
    of_column = tl.load(column_ptr + j.to(tl.int64)[:, None] * HIDDEN + k[None, :], mask=mask, other=0.0)
    return positive(of_row + of_column)


@triton.jit
def _top(
    row_ptr, column_ptr, weight1, bias1, weight2, bias2, kept_ptr, i, j, live, slot, slots,
    HIDDEN: tl.constexpr, DEPTH: tl.constexpr, KEEP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The last hidden layer of BLOCK_P pairs, [BLOCK_P, BLOCK_H], 0 past HIDDEN. KEEP stores the second of three."""
    h = tl.arange(0, BLOCK_H)
    if DEPTH == 0:
        top = _first(row_ptr, column_ptr, i, j, live, h, HIDDEN)
    elif DEPTH == 1:
        top = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)
        for k0 in range(0, HIDDEN, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            below = _first(row_ptr, column_ptr, i, j, live, k, HIDDEN)
            top = dot(below, _matrix(weight1, k, 1, h, HIDDEN, HIDDEN), top, PRECISION)
        top = positive(top + _vector(bias1, h, HIDDEN)[None, :])
    else:
        top = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)
        for m0 in range(0, HIDDEN, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            part = tl.zeros([BLOCK_P, BLOCK_M], tl.float32)
            for k0 in range(0, HIDDEN, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                below = _first(row_ptr, column_ptr, i, j, live, k, HIDDEN)
                part = dot(below, _matrix(weight1, k, 1, m, HIDDEN, HIDDEN), part, PRECISION)
            part = positive(part + _vector(bias1, m, HIDDEN)[None, :])
            if KEEP:
                place = kept_ptr + m.to(tl.int64)[None, :] * slots + slot[:, None]
                tl.store(place, part.to(kept_ptr.dtype.element_ty), mask=(m < HIDDEN)[None, :])
            top = dot(part, _matrix(weight2, m, 1, h, HIDDEN, HIDDEN), top, PRECISION)
        top = positive(top + _vector(bias2, h, HIDDEN)[None, :])
    return top


@triton.jit
def _scores(
    row_ptr, column_ptr, weight1, bias1, weight2, bias2, last, last_bias, scores_ptr, rows, columns,
    HIDDEN: tl.constexpr, DEPTH: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of one tile of pairs. Grid: (column blocks, row blocks)."""
    p = tl.arange(0, BLOCK_I * BLOCK_J)
    i = tl.program_id(1) * BLOCK_I + p // BLOCK_J
    j = tl.program_id(0) * BLOCK_J + p % BLOCK_J
    live = (i < rows) & (j < columns)
    top = _top(
        row_ptr, column_ptr, weight1, bias1, weight2, bias2, row_ptr, i, j, live, p, 0,
        HIDDEN, DEPTH, False, BLOCK_I * BLOCK_J, BLOCK_H, BLOCK_K, BLOCK_M, PRECISION,
    )  # fmt: skip
    h = tl.arange(0, BLOCK_H)
    scores = tl.sum(top * _vector(last, h, HIDDEN)[None, :], 1) + tl.load(last_bias)
    tl.store(scores_ptr + i.to(tl.int64) * columns + j, scores, mask=live)


@triton.jit
def _statistics(
    row_ptr, column_ptr, weight1, bias1, weight2, bias2, last, last_bias, loss_ptr, shift_ptr, diagonal_ptr, count,
    HIDDEN: tl.constexpr, DEPTH: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """InfoNCE's loss of BLOCK_I rows, their LSE and the loss's derivative at the diagonal. Grid: (row blocks,).

    A row with a score that is not finite gives NaN.
    """
    p = tl.arange(0, BLOCK_I * BLOCK_J)
    own = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    i = tl.program_id(0) * BLOCK_I + p // BLOCK_J
    h = tl.arange(0, BLOCK_H)
    weight, bias = _vector(last, h, HIDDEN), tl.load(last_bias)
    joint = tl.zeros([BLOCK_I], tl.float32)
    check = tl.zeros([BLOCK_I], tl.float32)
    total = tl.zeros([BLOCK_I], tl.float32)
    high = tl.full([BLOCK_I], float("-inf"), tl.float32)
    for start in range(0, count, BLOCK_J):
        j = start + p % BLOCK_J
        top = _top(
            row_ptr, column_ptr, weight1, bias1, weight2, bias2, row_ptr, i, j, (i < count) & (j < count), p, 0,
            HIDDEN, DEPTH, False, BLOCK_I * BLOCK_J, BLOCK_H, BLOCK_K, BLOCK_M, PRECISION,
        )  # fmt: skip
        scores = tl.reshape(tl.sum(top * weight[None, :], 1) + bias, [BLOCK_I, BLOCK_J])
        column = (start + tl.arange(0, BLOCK_J))[None, :]
        is_joint = column == own[:, None]
        joint += tl.sum(tl.where(is_joint, scores, 0.0), 1)
        check += tl.sum(tl.where(column < count, scores - scores, 0.0), 1)
        others = tl.where((column < count) & (is_joint == 0), scores, float("-inf"))
        new = tl.maximum(high, tl.max(others, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(high - base) + tl.sum(tl.exp(others - base[:, None]), 1)
        high = new
    rest = high + tl.log(total)
    difference = rest - joint
    e = tl.exp(-tl.abs(difference))
    above = tl.log(1.0 + e) + check
    ok = own < count
    tl.store(loss_ptr + own, tl.maximum(difference, 0.0) + above, mask=ok)
    # not the joint score and the loss, whose sum has few digits where the joint score is far below the others
    tl.store(shift_ptr + own, tl.maximum(rest, joint) + above, mask=ok)
    tl.store(diagonal_ptr + own, -tl.where(difference >= 0, 1.0, e) / (1.0 + e) + check, mask=ok)


@triton.jit
def _place(number, row0, column0, column_tiles, BLOCK: tl.constexpr):
    """Row and column of the pair in slot `number` of a slab."""
    tile, p = number // (BLOCK * BLOCK), number % (BLOCK * BLOCK)
    return (
        row0 + tile // column_tiles * BLOCK + p // BLOCK,
        column0 + tile % column_tiles * BLOCK + p % BLOCK,
    )


@triton.jit
def _top_backward(
    row_ptr, column_ptr, weight1, bias1, weight2, bias2, last, last_bias, grad_ptr, shift_ptr, diagonal_ptr,
    kept_ptr, out_ptr, vectors_ptr, row0, column0, rows, columns, column_tiles, slots,
    HIDDEN: tl.constexpr, DEPTH: tl.constexpr, GIVEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_P of a slab's pairs the gradient of the last hidden layer before its ReLU, into out [HIDDEN, slots], the
    second of three layers, into kept, and their part of the last weight's gradient. Grid: (blocks of pairs,).

    GIVEN: the scores' gradients are given; else they are those of InfoNCE's mean loss.
    """
    slot = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    i, j = _place(slot, row0, column0, column_tiles, BLOCK)
    live = (i < rows) & (j < columns)
    if GIVEN:
        grad = tl.load(grad_ptr + i.to(tl.int64) * columns + j, mask=live, other=0.0)
    else:
        shift = tl.load(shift_ptr + i, mask=live, other=0.0)
        diagonal = tl.load(diagonal_ptr + i, mask=live, other=0.0)
    top = _top(
        row_ptr, column_ptr, weight1, bias1, weight2, bias2, kept_ptr, i, j, live, slot, slots,
        HIDDEN, DEPTH, DEPTH == 2, BLOCK_P, BLOCK_H, BLOCK_K, BLOCK_M, PRECISION,
    )  # fmt: skip
    h = tl.arange(0, BLOCK_H)
    weight = _vector(last, h, HIDDEN)
    if not GIVEN:
        score = tl.sum(top * weight[None, :], 1) + tl.load(last_bias)
        # chosen, not added: the diagonal's own derivative keeps its digits where the positive has all the weight
        grad = tl.where(i == j, diagonal, share_of_sum(score, shift)) / tl.cast(rows, tl.float32)
        grad = tl.where(live, grad, 0.0)
    own = vectors_ptr + tl.program_id(0).to(tl.int64) * HIDDEN
    tl.store(own + h, tl.sum(top * grad[:, None], 0), mask=h < HIDDEN)
    out = tl.where(top <= 0, 0.0, grad[:, None] * weight[None, :])
    place = out_ptr + h.to(tl.int64)[None, :] * slots + slot[:, None]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=(h < HIDDEN)[None, :])


@triton.jit
def _layer_backward(
    grad_ptr, weight_ptr, kept_ptr, row_ptr, column_ptr, out_ptr, row0, column0, rows, columns, column_tiles, slots,
    FIRST: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the layer below before its ReLU, from that of a layer, of BLOCK_P of a slab's pairs. Grid:
    (blocks of pairs,). The layer below is `kept`, or FIRST, formed here. All are [HIDDEN, slots]."""
    slot = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    h = tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)
    for k0 in range(0, HIDDEN, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        place = grad_ptr + k.to(tl.int64)[None, :] * slots + slot[:, None]
        grad = tl.load(place, mask=(k < HIDDEN)[None, :], other=0.0)
        total = dot(grad, _matrix(weight_ptr, k, HIDDEN, h, 1, HIDDEN), total, PRECISION)
    place = h.to(tl.int64)[None, :] * slots + slot[:, None]
    mask = (h < HIDDEN)[None, :]
    if FIRST:
        i, j = _place(slot, row0, column0, column_tiles, BLOCK)
        below = _first(row_ptr, column_ptr, i, j, (i < rows) & (j < columns), h, HIDDEN)
    else:
        below = tl.load(kept_ptr + place, mask=mask, other=0.0)
    tl.store(out_ptr + place, tl.where(below <= 0, 0.0, total).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sides(
    grad_ptr, rows_ptr, columns_ptr, row0, column0, rows, columns, row_tiles, column_tiles, slots,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Add a slab's gradients of the first layer, [HIDDEN, slots], up along rows and along columns, to what earlier
    slabs gave. Grid: (row tiles + column tiles, feature blocks)."""
    number = tl.program_id(0)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    e = tl.arange(0, BLOCK)
    base = grad_ptr + f.to(tl.int64)[:, None, None] * slots
    mask = (f < HIDDEN)[:, None, None]
    # [feature, row of the tile, column of the tile]
    within = (e[:, None] * BLOCK + e[None, :])[None]
    total = tl.zeros([BLOCK_F, BLOCK], tl.float32)
    if number < row_tiles:
        for t in range(0, column_tiles):
            at = (number * column_tiles + t) * BLOCK * BLOCK
            total += tl.sum(tl.load(base + at + within, mask=mask, other=0.0).to(tl.float32), 2)
        index = row0 + number * BLOCK + e
        place = rows_ptr + index.to(tl.int64)[None, :] * HIDDEN + f[:, None]
        ok = (f < HIDDEN)[:, None] & (index < rows)[None, :]
    else:
        number -= row_tiles
        for t in range(0, row_tiles):
            at = (t * column_tiles + number) * BLOCK * BLOCK
            total += tl.sum(tl.load(base + at + within, mask=mask, other=0.0).to(tl.float32), 1)
        index = column0 + number * BLOCK + e
        place = columns_ptr + index.to(tl.int64)[None, :] * HIDDEN + f[:, None]
        ok = (f < HIDDEN)[:, None] & (index < columns)[None, :]
    tl.store(place, tl.load(place, mask=ok, other=0.0) + total, mask=ok)


@triton.jit
def _weight_gradient(
    grad_ptr, below_ptr, row_ptr, column_ptr, parts_ptr, row0, column0, rows, columns, column_tiles, slots, run,
    FIRST: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a run of a slab's pairs to parts [splits, HIDDEN, HIDDEN + 1]: the gradient of a layer's weight, and in the
    last column that of its bias. Grid: (blocks of the weight, splits)."""
    across = tl.cdiv(HIDDEN, BLOCK_N)
    o = tl.program_id(0) // across * BLOCK_O + tl.arange(0, BLOCK_O)
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    own = parts_ptr + tl.program_id(1).to(tl.int64) * HIDDEN * (HIDDEN + 1)
    total = tl.zeros([BLOCK_O, BLOCK_N], tl.float32)
    of_bias = tl.zeros([BLOCK_O], tl.float32)
    begin = tl.program_id(1) * run
    for s0 in range(begin, tl.minimum(begin + run, slots), BLOCK_S):
        slot = s0 + tl.arange(0, BLOCK_S)
        place = grad_ptr + o.to(tl.int64)[:, None] * slots + slot[None, :]
        grad = tl.load(place, mask=(o < HIDDEN)[:, None], other=0.0)
        if FIRST:
            i, j = _place(slot, row0, column0, column_tiles, BLOCK)
            below = _first(row_ptr, column_ptr, i, j, (i < rows) & (j < columns), n, HIDDEN)
        else:
            place = below_ptr + n.to(tl.int64)[None, :] * slots + slot[:, None]
            below = tl.load(place, mask=(n < HIDDEN)[None, :], other=0.0)
        total = dot(grad, below, total, PRECISION)
        of_bias += tl.sum(grad.to(tl.float32), 1)
    place = own + o[:, None] * (HIDDEN + 1) + n[None, :]
    mask = (o < HIDDEN)[:, None] & (n < HIDDEN)[None, :]
    tl.store(place, tl.load(place, mask=mask, other=0.0) + total, mask=mask)
    if tl.program_id(0) % across == 0:
        last = own + o * (HIDDEN + 1) + HIDDEN
        tl.store(last, tl.load(last, mask=o < HIDDEN, other=0.0) + of_bias, mask=o < HIDDEN)


# -- host functions --


def concat_forward(x: Tensor, y: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """As `plain.concat_forward`."""
    return plain.concat_forward(x, y, layers, _pairs(x, layers, _forward_pairs, slabs.forward_pairs))


def concat_backward(grad: Tensor, x: Tensor, y: Tensor, layers: Sequence[Tensor], *wanted: bool) -> Tensor:
    """As `plain.concat_backward`."""
    pairs = _pairs(x, layers, _backward_pairs, slabs.backward_pairs)
    return plain.concat_backward(grad, x, y, layers, *wanted, pairs)


def concat_infonce(x: Tensor, y: Tensor, layers: Sequence[Tensor], *settings: bool) -> tuple[Tensor, Tensor]:
    """As `plain.concat_infonce`."""
    pairs = _pairs(x, layers, _infonce_pairs, slabs.infonce_pairs)
    return plain.concat_infonce(x, y, layers, *settings, pairs)


def _pairs(
    x: Tensor, layers: Sequence[Tensor], fused: Callable[..., None], by_slabs: Callable[..., None]
) -> Callable[..., None]:
    """The function for all pairs, by the chosen algorithm."""
    algorithm = concat_algorithm(x, layers)
    return fused if algorithm == "fused" else functools.partial(by_slabs, share=_share(algorithm))


def _share(algorithm: str) -> int:
    """By how much slabs are smaller than the largest."""
    return 2 if algorithm == "half_slabs" else 1


# -- launches; each takes the arguments of the function it is named after --


def concat_forward_launches(x: Tensor, y: Tensor, layers: Sequence[Tensor]) -> int:
    algorithm = concat_algorithm(x, layers)
    if algorithm == "fused":
        return 3 if x.shape[0] * y.shape[0] else 2
    return 2 + slabs.launches(y.shape[0], x.shape[0], *_widths(layers), "forward", False, _share(algorithm))


def concat_backward_launches(
    grad: Tensor, x: Tensor, y: Tensor, layers: Sequence[Tensor], input_grads: bool, weight_grads: bool
) -> int:
    pairs = y.shape[0], x.shape[0], *_widths(layers)
    outer, algorithm = _outer_launches(input_grads, weight_grads), concat_algorithm(x, layers)
    if algorithm == "fused":
        return outer + _fused_gradients(*pairs, True, weight_grads)
    return outer + slabs.launches(*pairs, "backward", weight_grads, _share(algorithm))


def concat_infonce_launches(
    x: Tensor, y: Tensor, layers: Sequence[Tensor], transpose: bool, input_grads: bool, weight_grads: bool
) -> int:
    pairs, wanted = (x.shape[0], x.shape[0], *_widths(layers)), input_grads or weight_grads
    outer, algorithm = _outer_launches(input_grads, weight_grads), concat_algorithm(x, layers)
    if algorithm == "fused":
        return outer + 1 + (_fused_gradients(*pairs, False, weight_grads) if wanted else 0)
    return outer + slabs.launches(*pairs, "infonce" if wanted else "losses", weight_grads, _share(algorithm))


def _widths(layers: Sequence[Tensor]) -> tuple[int, int]:
    """Width of the hidden layers, and how many there are after the first."""
    return layers[0].shape[0], len(layers) // 2 - 2


def _outer_launches(input_grads: bool, weight_grads: bool) -> int:
    """Of the first layer and its gradients, where it is not yet, or no longer, one of pairs."""
    return 2 + 2 * input_grads + 5 * weight_grads


def _fused_gradients(rows: int, columns: int, hidden: int, depth: int, given: bool, weight_grads: bool) -> int:
    """Of `_gradients`: sums set to zero, slabs, sums written out."""
    further = 2 * (depth + 1) if weight_grads else 0
    if not rows * columns:
        return 2 + further
    height, span = _slab(rows, columns)
    slabs = triton.cdiv(rows, height) * triton.cdiv(columns, span)
    total = 3 + further + slabs * (4 + depth * (1 + weight_grads))
    return total + (4 * depth + (3 if given else 4) if weight_grads else 0)


def _forward_pairs(of_x: Tensor, of_y: Tensor, further: Sequence[Tensor], scores: Tensor) -> None:
    rows, columns = scores.shape
    if not scores.numel():
        return
    block_i, block_j, *blocks, warps, stages = _score_blocks(columns)
    _scores[triton.cdiv(columns, block_j), triton.cdiv(rows, block_i)](
        of_y, of_x, *_chain(of_y, further), scores, rows, columns, *_sizes(of_y, further), block_i, block_j,
        _padded(of_y.shape[1]), *blocks, _precision(), num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _backward_pairs(
    grad: Tensor, of_x: Tensor, of_y: Tensor, further: Sequence[Tensor], sums_x: Tensor, sums_y: Tensor,
    of_weights: Sequence[Tensor],
) -> None:  # fmt: skip
    _gradients(of_y, of_x, further, grad.contiguous(), None, None, sums_y, sums_x, of_weights)


def _infonce_pairs(
    of_x: Tensor, of_y: Tensor, further: Sequence[Tensor], transpose: bool, losses: Tensor, sums_x: Tensor | None,
    sums_y: Tensor | None, of_weights: Sequence[Tensor],
) -> None:  # fmt: skip
    (row, sums_row), (column, sums_column) = ((of_x, sums_x), (of_y, sums_y))[:: 1 if transpose else -1]
    if not len(row):
        return
    shift, diagonal = torch.empty_like(losses), torch.empty_like(losses)
    block_i, block_j, *blocks, warps, stages = _score_blocks(len(column))
    _statistics[(triton.cdiv(len(row), block_i),)](
        row, column, *_chain(row, further), losses, shift, diagonal, len(row), *_sizes(row, further), block_i, block_j,
        _padded(row.shape[1]), *blocks, _precision(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if sums_row is not None:
        _gradients(row, column, further, None, shift, diagonal, sums_row, sums_column, of_weights)


def _gradients(
    row: Tensor, column: Tensor, further: Sequence[Tensor], grad: Tensor | None, shift: Tensor | None,
    diagonal: Tensor | None, sums_row: Tensor, sums_column: Tensor, of_weights: Sequence[Tensor],
) -> None:  # fmt: skip
    """Gradients of both parts of the first layer and of the further layers, a slab of pairs after another."""
    hidden, depth = _sizes(row, further)
    rows, columns, weights, precision = len(row), len(column), further[:-2:2], _precision()
    for total in (sums_row, sums_column, *of_weights):
        total.zero_()
    if not rows * columns:
        return
    height, span = _slab(rows, columns)
    most = height * span
    buffers = [row.new_empty(hidden * most, dtype=_buffer_dtype(precision)) for _ in range(depth + 1)]
    vectors = row.new_empty(most // TOP[precision][0], hidden)
    parts = [row.new_empty(SPLITS, hidden, hidden + 1).zero_() for _ in weights] if of_weights else []
    last = row.new_empty(hidden).zero_()
    padded = _padded(hidden)
    for row0 in range(0, rows, height):
        for column0 in range(0, columns, span):
            row_tiles = triton.cdiv(min(height, rows - row0), TILE)
            column_tiles = triton.cdiv(min(span, columns - column0), TILE)
            slots = row_tiles * column_tiles * TILE**2
            where = (row0, column0, rows, columns, column_tiles, slots)
            # the second of three hidden layers, the gradient at hand, room for the next one
            kept, now, other = buffers[-1], buffers[0], buffers[min(1, depth)]
            block_p, *blocks, warps, stages = TOP[precision]
            _top_backward[(slots // block_p,)](
                row, column, *_chain(row, further), grad, shift, diagonal, kept, now, vectors, *where, hidden, depth,
                grad is not None, TILE, padded, block_p, *blocks, precision, num_warps=warps, num_stages=stages,
            )  # fmt: skip
            last += vectors[: slots // block_p].sum(0)
            for n in range(depth - 1, -1, -1):
                first = n == 0
                if parts:
                    _add_weight_gradient(now, kept, row, column, parts[n], where, first, precision)
                block_p, block_k, warps, stages = LAYER[precision]
                _layer_backward[(slots // block_p,)](
                    now, weights[n], kept, row, column, other, *where, first, hidden, TILE, padded, block_p, block_k,
                    precision, num_warps=warps, num_stages=stages,
                )  # fmt: skip
                now, other = other, now
            _sides[row_tiles + column_tiles, triton.cdiv(hidden, SIDES)](
                now, sums_row, sums_column, row0, column0, rows, columns, row_tiles, column_tiles, slots, hidden, TILE,
                SIDES, num_warps=4,
            )  # fmt: skip
    if of_weights:
        for n, part in enumerate(parts):
            total = part.sum(0)
            of_weights[2 * n].copy_(total[:, :hidden])
            of_weights[2 * n + 1].copy_(total[:, hidden])
        of_weights[-2].copy_(last[None])
        # InfoNCE does not depend on the last bias: 0, or NaN where the loss is
        of_weights[-1].copy_(grad.sum() if grad is not None else 0 * diagonal.sum())


def _slab(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a slab of the fused kernels."""
    span = min(_up(columns), 1024)
    return max(TILE, min(_up(rows), max(SLAB[0], min(SLAB[1], rows * columns // 32)) // span // TILE * TILE)), span


def _add_weight_gradient(
    grad: Tensor, below: Tensor, row: Tensor, column: Tensor, parts: Tensor, where: tuple[int, ...], first: bool,
    precision: str,
) -> None:  # fmt: skip
    hidden, slots = row.shape[1], where[-1]
    block_o, block_n, block_s, warps, stages = WEIGHT[precision]
    run = triton.cdiv(triton.cdiv(slots, SPLITS), block_s) * block_s
    _weight_gradient[triton.cdiv(hidden, block_o) * triton.cdiv(hidden, block_n), SPLITS](
        grad, below, row, column, parts, *where, run, first, hidden, TILE, block_o, block_n, block_s, precision,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _chain(row: Tensor, further: Sequence[Tensor]) -> list[Tensor]:
    """Weight and bias of both further hidden layers, and of the last layer; those that there are not are not read."""
    return [*further[:-2], *[row] * (6 - len(further)), *further[-2:]]


def _sizes(row: Tensor, further: Sequence[Tensor]) -> tuple[int, int]:
    """Width of the hidden layers, and how many there are after the first."""
    return row.shape[1], len(further) // 2 - 1


def _score_blocks(columns: int) -> tuple[int, ...]:
    """SCORES with no more columns a tile than there are, and the more rows."""
    block_i, block_j, *rest = SCORES[_precision()]
    narrow = max(TILE, min(block_j, triton.next_power_of_2(columns)))
    return block_i * block_j // narrow, narrow, *rest


def _padded(hidden: int) -> int:
    return max(16, triton.next_power_of_2(hidden))


def _up(count: int) -> int:
    return triton.cdiv(count, TILE) * TILE


def _buffer_dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _precision() -> str:
    return PRECISIONS[torch.get_float32_matmul_precision()]
