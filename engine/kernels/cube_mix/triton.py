"""Triton kernels of the axis mix, for CUDA tensors (on CPU tensors triton's interpreter runs them, for tests).

A column is one vector along the mixed axis of x [outer, d_in, inner]; a program owns a block of columns, whichever axis
is mixed, so nothing is permuted. Forward is one launch. Backward is two: the first leaves the gradients of both layers'
outputs beside dx, the second multiplies them with their inputs into the weights' gradients. Sums over programs are left
as one partial result each and added by torch in a fixed order: no atomics, bitwise deterministic.

Axes of up to `cpu.SHORT` elements have kernels without products, one launch each way, that keep nothing.

Products follow torch.get_float32_matmul_precision(): highest is exact fp32, high tf32, medium bf16. Sums and statistics
are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.aot import AotCase
from engine.kernels.cube_mix.cpu import SHORT, kept_size

PRECISIONS = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
# By precision: columns of a program, depth of a product's step, hidden units of a step, warps. The backward pass holds
# more at once: with 64 columns it spills on sm_80, with 32 hidden units a step on sm_100.
BLOCKS = {"ieee": (32, 16, 32, 8), "tf32": (64, 32, 32, 8), "bf16": (64, 32, 32, 8)}
BACKWARD_BLOCKS = {"ieee": (32, 16, 32, 8), "tf32": (32, 32, 64, 8), "bf16": (32, 32, 64, 8)}
# Of the weights' gradients: rows and columns of the result, columns of the cube a step, warps.
WEIGHT_BLOCKS = {"ieee": (64, 32, 16, 4), "tf32": (64, 64, 32, 8), "bf16": (64, 64, 32, 8)}
SPLITS = 32  # runs of columns whose weight gradients are summed apart
SHORT_COLUMNS, SHORT_STEPS, SHORT_WARPS = 128, 16, 4


@triton.jit
def _activate(p, ACTIVATION: tl.constexpr):
    """f(p) and f'(p); at kinks as torch's."""
    if ACTIVATION == "gelu":
        distribution = 0.5 + 0.5 * tl.erf(p * 0.7071067811865476)
        value = p * distribution
        slope = distribution + p * tl.exp(p * p * -0.5) * 0.3989422804014327
    elif ACTIVATION == "relu":
        value = tl.where(p <= 0, 0.0, p)
        slope = tl.where(p <= 0, 0.0, 1.0)
    elif ACTIVATION == "tanh":
        e = tl.exp(-2.0 * tl.abs(p))
        value = (1.0 - e) / (1.0 + e)
        value = tl.where(p < 0, -value, value)
        slope = 1.0 - value * value
    elif ACTIVATION == "leakyrelu":
        slope = tl.where(p > 0, 1.0, 0.01)
        value = p * slope
    elif ACTIVATION == "elu":
        e = tl.exp(tl.where(p < 0, p, 0.0))
        value = tl.where(p > 0, p, e - 1.0)
        slope = tl.where(p > 0, 1.0, e)
    elif ACTIVATION == "hardtanh":
        value = tl.where(p < -1, -1.0, tl.where(p > 1, 1.0, p))
        slope = tl.where((p <= -1) | (p >= 1), 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "hardshrink")
        slope = tl.where((p > 0.5) | (p < -0.5), 1.0, 0.0)
        value = tl.where((p > 0.5) | (p < -0.5), p, 0.0)
    return value, slope


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _tile(p, rows, n_rows, row_stride, columns, live):
    """[rows, columns] at p + rows * row_stride + columns; 0 outside."""
    mask = (rows < n_rows)[:, None] & live[None, :]
    return tl.load(p + rows.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _matrix(p, rows, n_rows, row_stride, columns, n_columns, column_stride):
    """A weight's [rows, columns], of any strides; 0 outside."""
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(p + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=mask, other=0.0)


@triton.jit
def _statistics(
    x, at, live, inner, eps: tl.constexpr, D_IN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Mean and inverse deviation of every column of x, two passes."""
    mean = tl.zeros([BLOCK_C], tl.float32)
    for k0 in range(0, D_IN, BLOCK_K):
        mean += tl.sum(_tile(x, k0 + tl.arange(0, BLOCK_K), D_IN, inner, at, live), 0)
    mean = mean / D_IN
    square = tl.zeros([BLOCK_C], tl.float32)
    for k0 in range(0, D_IN, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        v = tl.where((k < D_IN)[:, None], _tile(x, k, D_IN, inner, at, live) - mean[None, :], 0.0)
        square += tl.sum(v * v, 0)
    return mean, 1.0 / tl.sqrt(square / D_IN + eps)


@triton.jit
def _normalise(v, rows, n, eps: tl.constexpr):
    """[rows, columns] of which n rows count -> normalised (0 in the others), inverse deviation."""
    mean = tl.sum(tl.where((rows < n)[:, None], v, 0.0), 0) / n
    v = tl.where((rows < n)[:, None], v - mean[None, :], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(v * v, 0) / n + eps)
    return v * inverse[None, :], inverse


@triton.jit
def _normalise_backward(d, normal, inverse, scale, n):
    """Gradient of the normalised value's source; rows past n are 0 in d."""
    g = d * scale[:, None]
    mean = tl.sum(g, 0) / n
    along = tl.sum(g * normal, 0) / n
    return inverse[None, :] * (g - mean[None, :] - normal * along[None, :])


@triton.jit
def forward_kernel(
    x, fc1, bias1, fc2, bias2, residual, scale, shift, y, pre, normal, inverse, columns, inner,
    eps: tl.constexpr, D_IN: tl.constexpr, HIDDEN: tl.constexpr, D_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    LN_FIRST: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    KEEP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y; if KEEP, for backward: pre [HIDDEN, columns], unless LN_FIRST normal [D_OUT, columns], inverse [columns]."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = c < columns
    at = c // inner * D_IN * inner + c % inner
    to = c // inner * D_OUT * inner + c % inner
    o = tl.arange(0, BLOCK_O)
    if LN_FIRST:
        mean, deviation = _statistics(x, at, live, inner, eps, D_IN, BLOCK_C, BLOCK_K)
    if RESIDUAL:
        total = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
        for k0 in range(0, D_IN, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            r = _matrix(residual, o, D_OUT, D_IN, k, D_IN, 1)
            total = _dot(r, _tile(x, k, D_IN, inner, at, live), total, PRECISION)
    else:
        total = _tile(x, o, D_IN, inner, at, live)
    for h0 in range(0, HIDDEN, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        p = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
        for k0 in range(0, D_IN, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            u = _tile(x, k, D_IN, inner, at, live)
            if LN_FIRST:
                a = tl.load(scale + k, mask=k < D_IN, other=0.0)
                b = tl.load(shift + k, mask=k < D_IN, other=0.0)
                u = (u - mean[None, :]) * deviation[None, :] * a[:, None] + b[:, None]
            p = _dot(_matrix(fc1, h, HIDDEN, D_IN, k, D_IN, 1), u, p, PRECISION)
        if BIAS1:
            p += tl.load(bias1 + h, mask=h < HIDDEN, other=0.0)[:, None]
        if KEEP:
            place = pre + h.to(tl.int64)[:, None] * columns + c[None, :]
            tl.store(place, p, mask=(h < HIDDEN)[:, None] & live[None, :])
        g, _ = _activate(p, ACTIVATION)
        total = _dot(_matrix(fc2, o, D_OUT, HIDDEN, h, HIDDEN, 1), g, total, PRECISION)
    if BIAS2:
        total += tl.load(bias2 + o, mask=o < D_OUT, other=0.0)[:, None]
    mask = (o < D_OUT)[:, None] & live[None, :]
    if not LN_FIRST:
        total, r = _normalise(total, o, D_OUT, eps)
        if KEEP:
            tl.store(normal + o.to(tl.int64)[:, None] * columns + c[None, :], total, mask=mask)
            tl.store(inverse + c, r, mask=live)
        a = tl.load(scale + o, mask=o < D_OUT, other=0.0)
        b = tl.load(shift + o, mask=o < D_OUT, other=0.0)
        total = total * a[:, None] + b[:, None]
    tl.store(y + o.to(tl.int64)[:, None] * inner + to[None, :], total, mask=mask)


@triton.jit
def backward_kernel(
    dy, x, fc1, fc2, residual, scale, pre, normal, inverse, dx, d, vectors, columns, inner,
    eps: tl.constexpr, D_IN: tl.constexpr, HIDDEN: tl.constexpr, D_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    LN_FIRST: tl.constexpr, RESIDUAL: tl.constexpr, NEED_X: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """dx, and for the weights: d [HIDDEN + D_OUT, columns], the gradients of both layers' outputs; vectors [programs,
    HIDDEN + D_OUT + 2 N], this program's part of the gradients of the biases, scale and shift (N is the norm's length).
    """
    pid = tl.program_id(0).to(tl.int64)
    c = pid * BLOCK_C + tl.arange(0, BLOCK_C)
    live = c < columns
    at = c // inner * D_IN * inner + c % inner
    to = c // inner * D_OUT * inner + c % inner
    o = tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    N: tl.constexpr = D_IN if LN_FIRST else D_OUT
    own = vectors + pid * (HIDDEN + D_OUT + 2 * N)
    ds = _tile(dy, o, D_OUT, inner, to, live)
    if not LN_FIRST:
        v = _tile(normal, o, D_OUT, columns, c, live)
        r = tl.load(inverse + c, mask=live, other=0.0)
        tl.store(own + HIDDEN + D_OUT + o, tl.sum(ds * v, 1), mask=o < N)
        tl.store(own + HIDDEN + D_OUT + N + o, tl.sum(ds, 1), mask=o < N)
        ds = _normalise_backward(ds, v, r, tl.load(scale + o, mask=o < D_OUT, other=0.0), D_OUT)
        ds = tl.where((o < D_OUT)[:, None] & live[None, :], ds, 0.0)
    tl.store(own + HIDDEN + o, tl.sum(ds, 1), mask=o < D_OUT)
    d2 = d + HIDDEN * columns.to(tl.int64)
    tl.store(d2 + o.to(tl.int64)[:, None] * columns + c[None, :], ds, mask=(o < D_OUT)[:, None] & live[None, :])
    # What follows reads it back in blocks: registers cannot be indexed.
    tl.debug_barrier()
    total = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
    for h0 in range(0, HIDDEN, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        dp = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
        for k0 in range(0, D_OUT, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            w = _matrix(fc2, h, HIDDEN, 1, k, D_OUT, HIDDEN)
            dp = _dot(w, _tile(d2, k, D_OUT, columns, c, live), dp, PRECISION)
        _, slope = _activate(_tile(pre, h, HIDDEN, columns, c, live), ACTIVATION)
        dp = tl.where((h < HIDDEN)[:, None] & live[None, :], dp * slope, 0.0)
        tl.store(d + h.to(tl.int64)[:, None] * columns + c[None, :], dp, mask=(h < HIDDEN)[:, None] & live[None, :])
        tl.store(own + h, tl.sum(dp, 1), mask=h < HIDDEN)
        if NEED_X or LN_FIRST:
            total = _dot(_matrix(fc1, i, D_IN, 1, h, HIDDEN, D_IN), dp, total, PRECISION)
    if LN_FIRST:
        v, r = _normalise(_tile(x, i, D_IN, inner, at, live), i, D_IN, eps)
        tl.store(own + HIDDEN + D_OUT + i, tl.sum(total * v, 1), mask=i < N)
        tl.store(own + HIDDEN + D_OUT + N + i, tl.sum(total, 1), mask=i < N)
        total = _normalise_backward(total, v, r, tl.load(scale + i, mask=i < D_IN, other=0.0), D_IN)
    if NEED_X:
        if RESIDUAL:
            for k0 in range(0, D_OUT, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                w = _matrix(residual, i, D_IN, 1, k, D_OUT, D_IN)
                total = _dot(w, _tile(d2, k, D_OUT, columns, c, live), total, PRECISION)
        else:
            total += _tile(d2, i, D_OUT, columns, c, live)
        tl.store(dx + i.to(tl.int64)[:, None] * inner + at[None, :], total, mask=(i < D_IN)[:, None] & live[None, :])


@triton.jit
def weights_kernel(
    x, scale, shift, pre, d, parts, columns, inner, run,
    eps: tl.constexpr, D_IN: tl.constexpr, HIDDEN: tl.constexpr, D_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    LN_FIRST: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Parts [splits, ...] of the gradients of fc1, fc2 and, if RESIDUAL, residual: one tile, one run of columns."""
    pid = tl.program_id(0)
    MH: tl.constexpr = (HIDDEN + BLOCK_M - 1) // BLOCK_M
    MO: tl.constexpr = (D_OUT + BLOCK_M - 1) // BLOCK_M
    NI: tl.constexpr = (D_IN + BLOCK_N - 1) // BLOCK_N
    NH: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    first = tl.program_id(1).to(tl.int64) * run
    last = tl.minimum(first + run, columns)
    SIZE: tl.constexpr = HIDDEN * D_IN + D_OUT * HIDDEN + (D_OUT * D_IN if RESIDUAL else 0)
    own = parts + tl.program_id(1).to(tl.int64) * SIZE
    d2 = d + HIDDEN * columns.to(tl.int64)
    if pid < MH * NI:
        _weights_tile(
            d, HIDDEN, x, D_IN, scale, shift, own, pid // NI, pid % NI, first, last, columns, inner, eps, D_IN,
            ACTIVATION, "normal" if LN_FIRST else "x", PRECISION, BLOCK_M, BLOCK_N, BLOCK_C, BLOCK_I,
        )  # fmt: skip
    elif pid < MH * NI + MO * NH:
        t = pid - MH * NI
        _weights_tile(
            d2, D_OUT, pre, HIDDEN, scale, shift, own + HIDDEN * D_IN, t // NH, t % NH, first, last, columns, inner,
            eps, D_IN, ACTIVATION, "hidden", PRECISION, BLOCK_M, BLOCK_N, BLOCK_C, BLOCK_I,
        )  # fmt: skip
    elif RESIDUAL:
        t = pid - MH * NI - MO * NH
        _weights_tile(
            d2, D_OUT, x, D_IN, scale, shift, own + HIDDEN * D_IN + D_OUT * HIDDEN, t // NI, t % NI, first, last,
            columns, inner, eps, D_IN, ACTIVATION, "x", PRECISION, BLOCK_M, BLOCK_N, BLOCK_C, BLOCK_I,
        )  # fmt: skip


@triton.jit
def _weights_tile(
    d, rows, source, width, scale, shift, to, m0, n0, first, last, columns, inner,
    eps: tl.constexpr, D_IN: tl.constexpr, ACTIVATION: tl.constexpr, SOURCE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    m = m0 * BLOCK_M + tl.arange(0, BLOCK_M)
    n = n0 * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c0 in range(first, last, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        live = c < last
        a = _tile(d, m, rows, columns, c, live)
        if SOURCE == "hidden":
            b, _ = _activate(_tile(source, n, width, columns, c, live), ACTIVATION)
        else:
            at = c // inner * D_IN * inner + c % inner
            b = _tile(source, n, width, inner, at, live)
            if SOURCE == "normal":
                mean, deviation = _statistics(source, at, live, inner, eps, D_IN, BLOCK_C, BLOCK_I)
                s = tl.load(scale + n, mask=n < width, other=0.0)
                t = tl.load(shift + n, mask=n < width, other=0.0)
                b = (b - mean[None, :]) * deviation[None, :] * s[:, None] + t[:, None]
        total = _dot(a, tl.trans(b), total, PRECISION)
    mask = (m < rows)[:, None] & (n < width)[None, :]
    tl.store(to + m[:, None] * width + n[None, :], total, mask=mask)


# -- short axes: [8, columns] in registers, products as sums --


@triton.jit
def _row(v, rows, i: tl.constexpr):
    return tl.sum(tl.where((rows == i)[:, None], v, 0.0), 0)


@triton.jit
def short_forward_kernel(
    x, fc1, bias1, fc2, bias2, residual, scale, shift, y, columns, inner,
    eps: tl.constexpr, D_IN: tl.constexpr, HIDDEN: tl.constexpr, D_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    LN_FIRST: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = c < columns
    at = c // inner * D_IN * inner + c % inner
    to = c // inner * D_OUT * inner + c % inner
    v = _tile(x, tl.arange(0, BLOCK_I), D_IN, inner, at, live)
    _, _, _, _, total = _short_tile(
        v, fc1, bias1, fc2, bias2, residual, scale, shift, eps, D_IN, HIDDEN, D_OUT, ACTIVATION, LN_FIRST, BIAS1, BIAS2,
        RESIDUAL, BLOCK_I, BLOCK_H, BLOCK_O, BLOCK_C,
    )  # fmt: skip
    o = tl.arange(0, BLOCK_O)
    if not LN_FIRST:
        total, _ = _normalise(total, o, D_OUT, eps)
        a = tl.load(scale + o, mask=o < D_OUT, other=0.0)
        b = tl.load(shift + o, mask=o < D_OUT, other=0.0)
        total = total * a[:, None] + b[:, None]
    tl.store(y + o.to(tl.int64)[:, None] * inner + to[None, :], total, mask=(o < D_OUT)[:, None] & live[None, :])


@triton.jit
def _short_tile(
    v, fc1, bias1, fc2, bias2, residual, scale, shift,
    eps: tl.constexpr, D_IN: tl.constexpr, HIDDEN: tl.constexpr, D_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    LN_FIRST: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x's tile -> the MLP's input, x normalised and its inverse deviation (LN_FIRST), pre-activation, sum."""
    i = tl.arange(0, BLOCK_I)
    h = tl.arange(0, BLOCK_H)
    o = tl.arange(0, BLOCK_O)
    u, normal = v, v
    inverse = tl.zeros([BLOCK_C], tl.float32)
    if LN_FIRST:
        normal, inverse = _normalise(v, i, D_IN, eps)
        a = tl.load(scale + i, mask=i < D_IN, other=0.0)
        b = tl.load(shift + i, mask=i < D_IN, other=0.0)
        u = normal * a[:, None] + b[:, None]
    p = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    for k in tl.static_range(D_IN):
        w = tl.load(fc1 + h * D_IN + k, mask=h < HIDDEN, other=0.0)
        p += w[:, None] * _row(u, i, k)[None, :]
    if BIAS1:
        p += tl.load(bias1 + h, mask=h < HIDDEN, other=0.0)[:, None]
    g, _ = _activate(p, ACTIVATION)
    total = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for k in tl.static_range(HIDDEN):
        w = tl.load(fc2 + o * HIDDEN + k, mask=o < D_OUT, other=0.0)
        total += w[:, None] * _row(g, h, k)[None, :]
    if RESIDUAL:
        for k in tl.static_range(D_IN):
            w = tl.load(residual + o * D_IN + k, mask=o < D_OUT, other=0.0)
            total += w[:, None] * _row(v, i, k)[None, :]
    else:
        total += v
    if BIAS2:
        total += tl.load(bias2 + o, mask=o < D_OUT, other=0.0)[:, None]
    return u, normal, inverse, p, total


@triton.jit
def short_backward_kernel(
    dy, x, fc1, bias1, fc2, bias2, residual, scale, shift, dx, vectors, parts, columns, inner,
    eps: tl.constexpr, D_IN: tl.constexpr, HIDDEN: tl.constexpr, D_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    LN_FIRST: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, RESIDUAL: tl.constexpr, NEED_X: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dx, and this program's part of all weights' gradients, over STEPS blocks of columns."""
    pid = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    h = tl.arange(0, BLOCK_H)
    o = tl.arange(0, BLOCK_O)
    N: tl.constexpr = D_IN if LN_FIRST else D_OUT
    BLOCK_N: tl.constexpr = BLOCK_I if LN_FIRST else BLOCK_O
    n = tl.arange(0, BLOCK_N)
    d_fc1 = tl.zeros([BLOCK_H, BLOCK_I], tl.float32)
    d_fc2 = tl.zeros([BLOCK_O, BLOCK_H], tl.float32)
    d_residual = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    d_bias1 = tl.zeros([BLOCK_H], tl.float32)
    d_bias2 = tl.zeros([BLOCK_O], tl.float32)
    d_scale = tl.zeros([BLOCK_N], tl.float32)
    d_shift = tl.zeros([BLOCK_N], tl.float32)
    factor = tl.load(scale + n, mask=n < N, other=0.0)
    for step in range(STEPS):
        c = (pid * STEPS + step) * BLOCK_C + tl.arange(0, BLOCK_C)
        live = c < columns
        at = c // inner * D_IN * inner + c % inner
        to = c // inner * D_OUT * inner + c % inner
        v = _tile(x, i, D_IN, inner, at, live)
        u, normal, inverse, p, total = _short_tile(
            v, fc1, bias1, fc2, bias2, residual, scale, shift, eps, D_IN, HIDDEN, D_OUT, ACTIVATION, LN_FIRST, BIAS1,
            BIAS2, RESIDUAL, BLOCK_I, BLOCK_H, BLOCK_O, BLOCK_C,
        )  # fmt: skip
        g, slope = _activate(p, ACTIVATION)
        ds = _tile(dy, o, D_OUT, inner, to, live)
        if not LN_FIRST:
            normal, inverse = _normalise(total, o, D_OUT, eps)
            d_scale += tl.sum(ds * normal, 1)
            d_shift += tl.sum(ds, 1)
            ds = _normalise_backward(ds, normal, inverse, factor, D_OUT)
            ds = tl.where((o < D_OUT)[:, None] & live[None, :], ds, 0.0)
        d_bias2 += tl.sum(ds, 1)
        dp = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
        for k in tl.static_range(D_OUT):
            w = tl.load(fc2 + k * HIDDEN + h, mask=h < HIDDEN, other=0.0)
            dp += w[:, None] * _row(ds, o, k)[None, :]
        dp = tl.where((h < HIDDEN)[:, None] & live[None, :], dp * slope, 0.0)
        d_bias1 += tl.sum(dp, 1)
        for k in tl.static_range(D_IN):
            d_fc1 += tl.where((i == k)[None, :], tl.sum(dp * _row(u, i, k)[None, :], 1)[:, None], 0.0)
            if RESIDUAL:
                d_residual += tl.where((i == k)[None, :], tl.sum(ds * _row(v, i, k)[None, :], 1)[:, None], 0.0)
        for k in tl.static_range(HIDDEN):
            d_fc2 += tl.where((h == k)[None, :], tl.sum(ds * _row(g, h, k)[None, :], 1)[:, None], 0.0)
        if NEED_X or LN_FIRST:
            du = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
            for k in tl.static_range(HIDDEN):
                w = tl.load(fc1 + k * D_IN + i, mask=i < D_IN, other=0.0)
                du += w[:, None] * _row(dp, h, k)[None, :]
            if LN_FIRST:
                d_scale += tl.sum(du * normal, 1)
                d_shift += tl.sum(du, 1)
                du = _normalise_backward(du, normal, inverse, factor, D_IN)
            if NEED_X:
                if RESIDUAL:
                    for k in tl.static_range(D_OUT):
                        w = tl.load(residual + k * D_IN + i, mask=i < D_IN, other=0.0)
                        du += w[:, None] * _row(ds, o, k)[None, :]
                else:
                    du += ds
                mask = (i < D_IN)[:, None] & live[None, :]
                tl.store(dx + i.to(tl.int64)[:, None] * inner + at[None, :], du, mask=mask)
    own = vectors + pid * (HIDDEN + D_OUT + 2 * N)
    tl.store(own + h, d_bias1, mask=h < HIDDEN)
    tl.store(own + HIDDEN + o, d_bias2, mask=o < D_OUT)
    tl.store(own + HIDDEN + D_OUT + n, d_scale, mask=n < N)
    tl.store(own + HIDDEN + D_OUT + N + n, d_shift, mask=n < N)
    SIZE: tl.constexpr = HIDDEN * D_IN + D_OUT * HIDDEN + (D_OUT * D_IN if RESIDUAL else 0)
    part = parts + pid * SIZE
    ih = (h < HIDDEN)[:, None] & (i < D_IN)[None, :]
    tl.store(part + h[:, None] * D_IN + i[None, :], d_fc1, mask=ih)
    part += HIDDEN * D_IN
    tl.store(part + o[:, None] * HIDDEN + h[None, :], d_fc2, mask=(o < D_OUT)[:, None] & (h < HIDDEN)[None, :])
    if RESIDUAL:
        part += D_OUT * HIDDEN
        tl.store(part + o[:, None] * D_IN + i[None, :], d_residual, mask=(o < D_OUT)[:, None] & (i < D_IN)[None, :])


# -- host functions --


def _sizes(x: Tensor, fc1: Tensor, fc2: Tensor) -> dict[str, int]:
    return {"D_IN": x.shape[1], "HIDDEN": fc1.shape[0], "D_OUT": fc2.shape[0]}


def _is_short(sizes: dict[str, int]) -> bool:
    return max(sizes.values()) <= SHORT


def _short_blocks(sizes: dict[str, int]) -> dict[str, int]:
    names = {"BLOCK_I": "D_IN", "BLOCK_H": "HIDDEN", "BLOCK_O": "D_OUT"}
    return {block: triton.next_power_of_2(sizes[name]) for block, name in names.items()} | {"BLOCK_C": SHORT_COLUMNS}


def _precision() -> str:
    return PRECISIONS[torch.get_float32_matmul_precision()]


def _padded(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def _parts_of(kept: Tensor, sizes: dict[str, int], columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """pre, normal, inverse: views of what is kept; with ln_first it ends with pre, and the others are not used."""
    hidden, d_out = sizes["HIDDEN"] * columns, sizes["D_OUT"] * columns
    return kept, kept[min(hidden, len(kept) - 1) :], kept[min(hidden + d_out, len(kept) - 1) :]


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def forward(
    x: Tensor,
    fc1: Tensor,
    bias1: Tensor | None,
    fc2: Tensor,
    bias2: Tensor | None,
    residual: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    activation: str,
    ln_first: bool,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """x [outer, d_in, inner] -> y [outer, d_out, inner], what the backward pass needs (1-d, empty unless `keep`).
    float32."""
    x, *weights = _contiguous(x, fc1, bias1, fc2, bias2, residual, scale, shift)
    outer, d_in, inner = x.shape
    sizes = _sizes(x, fc1, fc2)
    y = x.new_empty(outer, sizes["D_OUT"], inner)
    kept = x.new_empty(kept_size(outer, inner, d_in, sizes["HIDDEN"], sizes["D_OUT"], ln_first) if keep else 0)
    columns = outer * inner
    if not columns:
        return y, kept
    weights = [x if w is None else w for w in weights]  # not read where it is None
    flags = {
        "eps": eps, "ACTIVATION": activation, "LN_FIRST": ln_first, "BIAS1": bias1 is not None,
        "BIAS2": bias2 is not None, "RESIDUAL": residual is not None,
    }  # fmt: skip
    if _is_short(sizes):
        short_forward_kernel[(triton.cdiv(columns, SHORT_COLUMNS),)](
            x, *weights, y, columns, inner, **flags, **sizes, **_short_blocks(sizes), num_warps=SHORT_WARPS
        )
        return y, kept
    precision = _precision()
    block_c, block_k, block_h, warps = BLOCKS[precision]
    forward_kernel[(triton.cdiv(columns, block_c),)](
        x, *weights, y, *(_parts_of(kept, sizes, columns) if keep else [x] * 3), columns, inner, **flags, **sizes,
        PRECISION=precision, KEEP=keep, BLOCK_C=block_c, BLOCK_K=block_k, BLOCK_H=block_h,
        BLOCK_O=_padded(sizes["D_OUT"]), num_warps=warps,
    )  # fmt: skip
    return y, kept


def backward(
    dy: Tensor,
    x: Tensor,
    kept: Tensor,
    fc1: Tensor,
    bias1: Tensor | None,
    fc2: Tensor,
    bias2: Tensor | None,
    residual: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    activation: str,
    ln_first: bool,
    eps: float,
    need_x: bool,
) -> list[Tensor]:
    """Gradients of the weights that are not None, in their order, and after them, where `need_x`, the one of x."""
    given = (fc1, bias1, fc2, bias2, residual, scale, shift)
    dy, x, *weights = _contiguous(dy, x, *given)
    outer, d_in, inner = x.shape
    sizes = _sizes(x, fc1, fc2)
    hidden, d_out, columns = sizes["HIDDEN"], sizes["D_OUT"], outer * inner
    dx = torch.empty_like(x) if need_x else None
    if not columns:
        found = [torch.zeros_like(w) for w in given if w is not None]
        return found if dx is None else [*found, dx]
    weights = [x if w is None else w for w in weights]
    to = x if dx is None else dx
    norm = len(scale)
    size = hidden * d_in + d_out * hidden + (0 if residual is None else d_out * d_in)
    flags = {"eps": eps, "ACTIVATION": activation, "LN_FIRST": ln_first, "RESIDUAL": residual is not None}
    if _is_short(sizes):
        programs = triton.cdiv(columns, SHORT_COLUMNS * SHORT_STEPS)
        vectors = x.new_empty(programs, hidden + d_out + 2 * norm)
        parts = x.new_empty(programs, size)
        short_backward_kernel[(programs,)](
            dy, x, *weights, to, vectors, parts, columns, inner, **flags, BIAS1=bias1 is not None,
            BIAS2=bias2 is not None, NEED_X=need_x, **sizes, **_short_blocks(sizes), STEPS=SHORT_STEPS,
            num_warps=SHORT_WARPS,
        )  # fmt: skip
    else:
        vectors, parts = _long_backward(dy, x, kept, weights, to, columns, inner, sizes, flags, need_x, size)
    d_bias1, d_bias2, d_scale, d_shift = vectors.split([hidden, d_out, norm, norm], 1)
    splits = [hidden * d_in, d_out * hidden, size - hidden * d_in - d_out * hidden]
    d_fc1, d_fc2, d_residual = parts.split(splits, 1)
    gradients = (d_fc1, d_bias1, d_fc2, d_bias2, d_residual, d_scale, d_shift)
    found = [g.sum(0).view(w.shape) for g, w in zip(gradients, given, strict=True) if w is not None]
    return found if dx is None else [*found, dx]


def _long_backward(
    dy: Tensor,
    x: Tensor,
    kept: Tensor,
    weights: Sequence[Tensor],
    dx: Tensor,
    columns: int,
    inner: int,
    sizes: dict[str, int],
    flags: dict[str, object],
    need_x: bool,
    size: int,
) -> tuple[Tensor, Tensor]:
    fc1, _, fc2, _, residual, scale, shift = weights
    d_in, hidden, d_out = sizes["D_IN"], sizes["HIDDEN"], sizes["D_OUT"]
    precision = _precision()
    block_c, block_k, block_h, warps = BACKWARD_BLOCKS[precision]
    programs = triton.cdiv(columns, block_c)
    d = x.new_empty(hidden + d_out, columns)
    vectors = x.new_empty(programs, hidden + d_out + 2 * len(scale))
    pre, normal, inverse = _parts_of(kept, sizes, columns)
    backward_kernel[(programs,)](
        dy, x, fc1, fc2, residual, scale, pre, normal, inverse, dx, d, vectors, columns, inner, **flags, **sizes,
        NEED_X=need_x, PRECISION=precision, BLOCK_C=block_c, BLOCK_K=block_k, BLOCK_H=block_h, BLOCK_O=_padded(d_out),
        BLOCK_I=_padded(d_in), num_warps=warps,
    )  # fmt: skip
    block_m, block_n, step, warps = WEIGHT_BLOCKS[precision]
    splits = min(SPLITS, triton.cdiv(columns, step))
    run = triton.cdiv(triton.cdiv(columns, splits), step) * step
    splits = triton.cdiv(columns, run)
    parts = x.new_empty(splits, size)
    tiles = triton.cdiv(hidden, block_m) * triton.cdiv(d_in, block_n)
    tiles += triton.cdiv(d_out, block_m) * triton.cdiv(hidden, block_n)
    if flags["RESIDUAL"]:
        tiles += triton.cdiv(d_out, block_m) * triton.cdiv(d_in, block_n)
    weights_kernel[(tiles, splits)](
        x, scale, shift, pre, d, parts, columns, inner, run, **flags, **sizes, PRECISION=precision, BLOCK_M=block_m,
        BLOCK_N=block_n, BLOCK_C=step, BLOCK_I=block_k, num_warps=warps,
    )  # fmt: skip
    return vectors, parts


# -- ahead-of-time cases --


def aot_cases() -> list[AotCase]:
    """The flagship's axes, every kernel in every precision; gelu, and LayerNorm at the end unless named otherwise."""
    found = []
    common = {"eps": 1e-6, "ACTIVATION": "gelu", "RESIDUAL": True}
    for axis, (d_in, hidden, d_out) in {"time": (100, 50, 50), "channel": (128, 128, 128)}.items():
        sizes = {"D_IN": d_in, "HIDDEN": hidden, "D_OUT": d_out}
        for precision in BLOCKS:
            for ln_first in (False, True):
                variant = f"{axis}{'_ln_first' if ln_first else ''}/{precision}"
                dot, quick = precision != "ieee", precision != "bf16" and (axis == "channel") != ln_first
                settings = common | sizes | {"LN_FIRST": ln_first, "PRECISION": precision}
                c, k, h, warps = BLOCKS[precision]
                blocks = {"BLOCK_C": c, "BLOCK_K": k, "BLOCK_H": h, "BLOCK_O": _padded(d_out)}
                constexprs = settings | blocks | {"BIAS1": True, "BIAS2": True, "KEEP": True}
                found.append(_case("forward", variant, forward_kernel, constexprs, warps, dot, quick))
                c, k, h, warps = BACKWARD_BLOCKS[precision]
                blocks = {"BLOCK_C": c, "BLOCK_K": k, "BLOCK_H": h, "BLOCK_O": _padded(d_out)}
                constexprs = settings | blocks | {"BLOCK_I": _padded(d_in), "NEED_X": True}
                found.append(_case("backward", variant, backward_kernel, constexprs, warps, dot, quick))
                m, n, c, warps = WEIGHT_BLOCKS[precision]
                constexprs = settings | {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_C": c, "BLOCK_I": k}
                found.append(_case("weights", variant, weights_kernel, constexprs, warps, dot, quick))
    sizes = {"D_IN": 3, "HIDDEN": 3, "D_OUT": 3}
    for ln_first in (False, True):
        settings = common | sizes | _short_blocks(sizes) | {"LN_FIRST": ln_first, "BIAS1": True, "BIAS2": True}
        variant = f"modality{'_ln_first' if ln_first else ''}/fp32"
        backward_settings = settings | {"NEED_X": True, "STEPS": SHORT_STEPS}
        found += [
            _case("short_forward", variant, short_forward_kernel, settings, SHORT_WARPS, False, not ln_first),
            _case(
                "short_backward", variant, short_backward_kernel, backward_settings, SHORT_WARPS, False, not ln_first
            ),
        ]
    return found


def _case(
    kind: str, variant: str, kernel: object, constexprs: dict[str, object], warps: int, dot: bool, quick: bool
) -> AotCase:
    names = [name for name in kernel.arg_names if name not in constexprs]
    signature = {name: "i32" if name in ("columns", "inner", "run") else "*fp32" for name in names}
    return AotCase(f"cube_mix.{kind}/{variant}", kernel, signature, constexprs, num_warps=warps, dot=dot, quick=quick)
