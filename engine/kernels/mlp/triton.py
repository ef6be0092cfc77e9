"""Layers of many small MLPs of one shape on the GPU: one launch per layer forward, one per layer backward.

MLPs come in sections. In a first layer a section is the MLPs that read one input; a further layer is one section. A
program works out one tile of one MLP's product, and the bias, the ReLU and its derivative belong to the product's
kernel. In the backward pass the programs of the weight's gradient and those of the layer below share a launch: both
need nothing but the gradient of the layer's output.

Products follow torch.get_float32_matmul_precision(): highest is tf32x3 (three products of split factors, close to
fp32), high is tf32 (operands rounded to nearest, as cuBLAS rounds them), medium is bf16. Sums are fp32 and have a fixed
order: the same inputs give bitwise the same results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.mlp.plan import WIDE, tile
from engine.kernels.triton_math import round_tf32

PRECISIONS = {"highest": "tf32x3", "high": "tf32", "medium": "bf16"}


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b of fp32 or bf16 tiles."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    elif PRECISION == "tf32":
        return tl.dot(round_tf32(a.to(tl.float32)), round_tf32(b.to(tl.float32)), total, input_precision="tf32")
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)


@triton.jit
def positive(v):
    """ReLU; NaN passes, as in torch."""
    return tl.where(v < 0, 0.0, v)


@triton.jit
def load_split(p, q, group, r, rows, split, c, columns, other_axis: tl.constexpr):
    """[r, c] (or, with other_axis, [c, r]) of a group's rows: the first `split` from p [G, split, columns], the others
    from q [G, rows - split, columns]."""
    own = r * columns
    p += tl.cast(group, tl.int64) * split * columns
    q += tl.cast(group, tl.int64) * (rows - split) * columns
    shift = split * columns
    if other_axis:
        place = own[None, :] + c[:, None]
        live, first = (r < rows)[None, :] & (c < columns)[:, None], (r < split)[None, :]
    else:
        place = own[:, None] + c[None, :]
        live, first = (r < rows)[:, None] & (c < columns)[None, :], (r < split)[:, None]
    return tl.load(p + place, mask=live & first, other=0.0) + tl.load(
        q + place - shift, mask=live & (first == 0), other=0.0
    )


@triton.jit
def store_split(p, q, group, r, rows, split, c, columns, value):
    """What `load_split` reads."""
    place = (r * columns)[:, None] + c[None, :]
    live, first = (r < rows)[:, None] & (c < columns)[None, :], (r < split)[:, None]
    tl.store(p + tl.cast(group, tl.int64) * split * columns + place, value, mask=live & first)
    q += tl.cast(group, tl.int64) * (rows - split) * columns
    tl.store(q + place - split * columns, value, mask=live & (first == 0))


@triton.jit
def _section(g, tensors, others, BEGINS: tl.constexpr, WIDTHS: tl.constexpr, SECTIONS: tl.constexpr):
    """Of MLP g's section: one of `tensors`, one of `others`, the number of its first MLP and its width."""
    tensor, other = tensors[0], others[0]
    begin, width = tl.cast(BEGINS[0], tl.int32), tl.cast(WIDTHS[0], tl.int32)
    for s in tl.static_range(1, SECTIONS):
        if g >= BEGINS[s]:
            tensor, other = tensors[s], others[s]
            begin, width = tl.cast(BEGINS[s], tl.int32), tl.cast(WIDTHS[s], tl.int32)
    return tensor, other, begin, width


@triton.jit
def _forward(
    inputs, weights, biases, out_ptr, second_ptr, rows, split,
    OUT: tl.constexpr, BEGINS: tl.constexpr, WIDTHS: tl.constexpr, SECTIONS: tl.constexpr, SHARED: tl.constexpr,
    RELU: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One layer, [G, rows, OUT]. Grid: (row blocks, output blocks, MLPs).

    SHARED: a section's MLPs read one input [rows, width]; else each its own of [G, rows, width].
    SPLIT: rows from `split` on go to a second output.
    """
    g = tl.program_id(2)
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x, w, begin, width = _section(g, inputs, weights, BEGINS, WIDTHS, SECTIONS)
    b, _, _, _ = _section(g, biases, biases, BEGINS, WIDTHS, SECTIONS)
    local = tl.cast(g - begin, tl.int64)
    if not SHARED:
        x += local * rows * width
    x += r[:, None] * width
    w += (local * OUT + n[None, :]) * width
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, width, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        rows_of_x = tl.load(x + k[None, :], mask=(r < rows)[:, None] & (k < width)[None, :], other=0.0)
        columns_of_w = tl.load(w + k[:, None], mask=(k < width)[:, None] & (n < OUT)[None, :], other=0.0)
        total = dot(rows_of_x, columns_of_w, total, PRECISION)
    total += tl.load(b + local * OUT + n, mask=n < OUT, other=0.0)[None, :]
    if RELU:
        total = positive(total)
    if SPLIT:
        store_split(out_ptr, second_ptr, g, r, rows, split, n, OUT, total)
    else:
        place = (tl.cast(g, tl.int64) * rows + r[:, None]) * OUT + n[None, :]
        tl.store(out_ptr + place, total, mask=(r < rows)[:, None] & (n < OUT)[None, :])


@triton.jit
def load_grad(
    grad_ptr, second_ptr, g, r, rows, split, o, OUT: tl.constexpr, SPLIT: tl.constexpr, other_axis: tl.constexpr
):  # fmt: skip
    """[r, o], or with other_axis [o, r], of MLP g's gradient [rows, OUT]; see `load_split`."""
    if SPLIT:
        return load_split(grad_ptr, second_ptr, g, r, rows, split, o, OUT, other_axis)
    else:
        own = grad_ptr + tl.cast(g, tl.int64) * rows * OUT
        if other_axis:
            live = (o < OUT)[:, None] & (r < rows)[None, :]
            return tl.load(own + r[None, :] * OUT + o[:, None], mask=live, other=0.0)
        else:
            live = (r < rows)[:, None] & (o < OUT)[None, :]
            return tl.load(own + r[:, None] * OUT + o[None, :], mask=live, other=0.0)


@triton.jit
def _scale(scale_ptr, g, SCALE: tl.constexpr, PLACES: tl.constexpr, COUNT: tl.constexpr):
    """The factor of MLP g's gradient: scale[PLACES[g]]."""
    if SCALE:
        place = tl.cast(PLACES[0], tl.int32)
        for m in tl.static_range(1, COUNT):
            if g == m:
                place = tl.cast(PLACES[m], tl.int32)
        return tl.load(scale_ptr + place)
    else:
        return 1.0


@triton.jit
def _backward(
    grad_ptr, second_ptr, scale_ptr, below, weights, of_weights, of_biases, of_below, rows, split, stride,
    weight_tiles, column_tiles, OUT: tl.constexpr, BEGINS: tl.constexpr, ENDS: tl.constexpr, WIDTHS: tl.constexpr,
    SECTIONS: tl.constexpr, SHARED: tl.constexpr, SPLIT: tl.constexpr, SCALE: tl.constexpr, PLACES: tl.constexpr,
    WEIGHTS: tl.constexpr, BELOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of one layer's weights and biases (WEIGHTS) and of the layer below (BELOW), from those of its output,
    [G, rows, OUT]. Grid: (tiles, MLPs): `weight_tiles` of the weight's gradient, then those of the layer below.

    SHARED: the layer below is a section's input [rows, width], whose gradient is the sum over the section's MLPs. Else
    it is a hidden layer [G, stride, width] after its ReLU, and the gradient is that before the ReLU, [G, rows, width].
    SCALE: the gradient of MLP g counts scale[PLACES[g]] times; not with SHARED.
    """
    number, g = tl.program_id(0), tl.program_id(1)
    x, w, begin, width = _section(g, below, weights, BEGINS, WIDTHS, SECTIONS)
    local = tl.cast(g - begin, tl.int64)
    if WEIGHTS and number < weight_tiles:
        o = number // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        n = number % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        of_w, of_b, _, _ = _section(g, of_weights, of_biases, BEGINS, WIDTHS, SECTIONS)
        if not SHARED:
            x += local * stride * width
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        of_bias = tl.zeros([BLOCK_M], tl.float32)
        for r0 in range(0, rows, BLOCK_K):
            r = r0 + tl.arange(0, BLOCK_K)
            grad = load_grad(grad_ptr, second_ptr, g, r, rows, split, o, OUT, SPLIT, True)
            live = (r < rows)[:, None] & (n < width)[None, :]
            total = dot(grad, tl.load(x + r[:, None] * width + n[None, :], mask=live, other=0.0), total, PRECISION)
            of_bias += tl.sum(grad, 1)
        scale = _scale(scale_ptr, g, SCALE, PLACES, ENDS[SECTIONS - 1])
        live = (o < OUT)[:, None] & (n < width)[None, :]
        tl.store(of_w + (local * OUT + o[:, None]) * width + n[None, :], total * scale, mask=live)
        if number % column_tiles == 0:
            tl.store(of_b + local * OUT + o, of_bias * scale, mask=o < OUT)
    elif BELOW:
        number -= weight_tiles
        r = number // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        n = number % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        live = (r < rows)[:, None] & (n < width)[None, :]
        of_x, _, _, _ = _section(g, of_below, of_below, BEGINS, WIDTHS, SECTIONS)
        if SHARED:
            # a section's first MLP sums up the section
            end = tl.cast(ENDS[0], tl.int32)
            for s in tl.static_range(1, SECTIONS):
                if g >= BEGINS[s]:
                    end = tl.cast(ENDS[s], tl.int32)
            end = tl.where(g == begin, end, g)
        else:
            end = g + 1
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for m in range(g, end):
            own = w + tl.cast(m - begin, tl.int64) * OUT * width + n[None, :]
            for o0 in range(0, OUT, BLOCK_K):
                o = o0 + tl.arange(0, BLOCK_K)
                grad = load_grad(grad_ptr, second_ptr, m, r, rows, split, o, OUT, SPLIT, False)
                weight = tl.load(own + o[:, None] * width, mask=(o < OUT)[:, None] & (n < width)[None, :], other=0.0)
                total = dot(grad, weight, total, PRECISION)
        if SHARED:
            if g == begin:
                tl.store(of_x + r[:, None] * width + n[None, :], total, mask=live)
        else:
            place = r[:, None] * width + n[None, :]
            kept = tl.load(x + local * stride * width + place, mask=live, other=0.0)
            total = tl.where(kept <= 0, 0.0, total * _scale(scale_ptr, g, SCALE, PLACES, ENDS[SECTIONS - 1]))
            tl.store(of_x + local * rows * width + place, total, mask=live)


# -- host functions --


def layer_forward(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], out: Tensor, *, shared: bool,
    relu: bool, second: Tensor | None = None,
) -> None:  # fmt: skip
    """One layer of all MLPs of all sections. All tensors are fp32 and contiguous. One launch.

    Args:
        inputs: of every section [rows, width] (shared) or [n, rows, width].
        weights, biases: of every section [n, OUT, width], [n, OUT].
        out: [G, rows, OUT].
        second: [G, m, OUT]: the last m rows; then out has rows - m.
    """
    begins, _, widths = _sections(weights)
    rows, split = inputs[0].shape[-2], out.shape[1]
    precision = precision_now()
    m, n, k, warps, stages = tile(out, rows, precision)
    if not out.shape[0] * rows:
        return
    count, width = len(out), out.shape[2]
    _forward[triton.cdiv(rows, m), triton.cdiv(width, n), count](
        tuple(inputs), tuple(weights), tuple(biases), out, out if second is None else second, rows, split, width,
        begins, widths, len(weights), shared, relu, second is not None, precision, m, n, k, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip


def layer_backward(
    grad: Tensor, below: Sequence[Tensor], weights: Sequence[Tensor], of_weights: Sequence[Tensor],
    of_biases: Sequence[Tensor], of_below: Sequence[Tensor], *, shared: bool, second: Tensor | None = None,
    scale: Tensor | None = None, places: Sequence[int] = (),
) -> None:  # fmt: skip
    """Gradients of one layer of all MLPs. All tensors are fp32 and contiguous. One launch.

    Args:
        grad: [G, rows, OUT], of the layer's output before its activation.
        second: [G, m, OUT], the gradient of m more rows.
        below, weights: as `inputs` and `weights` of `layer_forward`; a hidden layer may have more rows than `grad`.
        of_weights, of_biases, of_below: the gradients to write, each in the shape of its tensor; empty if they are not
            wanted. That of a hidden layer is the gradient before its ReLU.
        scale, places: the gradient of MLP g counts scale[places[g]] times; not with `shared`.
    """
    begins, ends, widths = _sections(weights)
    rows = grad.shape[1] + (0 if second is None else second.shape[1])
    precision = precision_now()
    # with deep tiles the sum over a section's MLPs spills on Ampere
    m, n, k, warps, stages = WIDE[precision] if shared else tile(grad, rows, precision)
    count, width = len(grad), grad.shape[2]
    column_tiles = triton.cdiv(max(widths), n)
    weight_tiles = triton.cdiv(width, m) * column_tiles if of_weights else 0
    tiles = weight_tiles + (triton.cdiv(rows, m) * column_tiles if of_below else 0)
    if not count * tiles:
        return
    nothing = tuple(below)
    _backward[tiles, count](
        grad, grad if second is None else second, grad if scale is None else scale, tuple(below), tuple(weights),
        tuple(of_weights) or nothing, tuple(of_biases) or nothing, tuple(of_below) or nothing, rows, grad.shape[1],
        below[0].shape[-2], weight_tiles, column_tiles, width, begins, ends, widths, len(weights), shared,
        second is not None, scale is not None, tuple(places), bool(of_weights), bool(of_below), precision, m, n, k,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def precision_now() -> str:
    return PRECISIONS[torch.get_float32_matmul_precision()]


def _sections(weights: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of every section the number of its first MLP, that after its last one, and its width."""
    ends, total = [], 0
    for weight in weights:
        total += len(weight)
        ends.append(total)
    return (0, *ends[:-1]), tuple(ends), tuple(weight.shape[2] for weight in weights)
