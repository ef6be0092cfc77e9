# ruff: noqa: RUF005 - Triton does not unpack tuples
"""Triton kernels of the axis mix, for CUDA tensors (on CPU tensors triton's interpreter runs them, for tests).

A column is one vector along the mixed axis of x [outer, d_in, inner]. A program owns a block of columns, whichever axis
is mixed, so nothing is permuted.

- Long axes multiply with `tl.dot`: one launch forward, three backward. The first gives dx and the gradients of both
  layers' outputs. The second multiplies these with the layers' inputs into gradients of the weights. The third adds up
  the parts that the programs of the first two wrote.
- Short axes (`cpu.SHORT`) hold a column in registers, one number per thread: one launch forward, two backward. They
  keep nothing for the backward pass.
- `pair_*` mix a short modality axis and then the channels. Forward is one launch: a program mixes the modalities of
  whole rows, leaves them in memory and goes on with the channels of the same rows. Backward is that of the two axes,
  with one sum for both: four launches.

There are no atomics. Every sum has a fixed order, so results are bitwise the same in every run. One kernel serves both
with and without a state to keep, and with and without dx: in two kernels the compiler might fuse multiplications and
additions differently, which would change the last bits.

`precision` is that of the products: fp32 (three tf32 products of split factors), tf32 (operands rounded to nearest),
bf16 or fp16. LayerNorm and all sums are fp32. What is kept for the backward pass is stored in 16 bits where the
products are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.cube_mix.cpu import SHORT, STORAGE, Argument, kept_size
from engine.kernels.registry import interpreting
from engine.kernels.triton_math import round_tf32

# A program takes the largest number of COLUMNS with which there are still ENOUGH programs, about two per processor.
ENOUGH = 256
COLUMNS = (32, 16)
DEPTH = 32  # numbers that one step of a product sums over
HIDDEN_STEP = 64  # hidden units of a step
# Gradients of the weights: rows and columns of the result, columns of the cube per step, most programs.
WEIGHT_ROWS, WEIGHT_COLUMNS, WEIGHT_STEP, WEIGHT_PROGRAMS = 64, 64, 32, 512
SHORT_COLUMNS, SHORT_PROGRAMS = 256, 512
SUM_ROWS, SUM_COLUMNS = 128, 32
WARPS, STAGES = 8, 2
# The interpreter's tl.dot multiplies the bit patterns of bf16 operands.
INTERPRETED = tl.constexpr(interpreting())


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
        a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
        if INTERPRETED:
            return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
        return tl.dot(a, b, total)
    elif PRECISION == "fp16":
        return tl.dot(a.to(tl.float16), b.to(tl.float16), total)
    elif PRECISION == "tf32":
        return tl.dot(round_tf32(a), round_tf32(b), total, input_precision="tf32")
    else:
        tl.static_assert(PRECISION == "fp32")
        return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def _tile(p, rows, n_rows, row_stride, columns, live):
    """[rows, columns] at p + rows * row_stride + columns, as fp32; 0 outside."""
    mask = (rows < n_rows)[:, None] & live[None, :]
    return tl.load(p + rows.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(p, rows, n_rows, row_stride, columns, live, value):
    """The inverse of `_tile`."""
    mask = (rows < n_rows)[:, None] & live[None, :]
    tl.store(p + rows.to(tl.int64)[:, None] * row_stride + columns[None, :], value, mask=mask)


@triton.jit
def _matrix(p, rows, n_rows, row_stride, columns, n_columns, column_stride):
    """A weight's [rows, columns], of any strides; 0 outside."""
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(p + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=mask, other=0.0)


# Means multiply by 1 / n. A division is approximate, so the mean of one element would not be that element.


@triton.jit
def _statistics(
    x,
    at,
    live,
    inner: tl.constexpr,
    eps: tl.constexpr,
    D_IN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Mean and inverse deviation of every column of x, two passes."""
    mean = tl.zeros([BLOCK_C], tl.float32)
    for k0 in range(0, D_IN, BLOCK_K):
        mean += tl.sum(_tile(x, k0 + tl.arange(0, BLOCK_K), D_IN, inner, at, live), 0)
    mean = mean * (1.0 / D_IN)
    square = tl.zeros([BLOCK_C], tl.float32)
    for k0 in range(0, D_IN, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        v = tl.where((k < D_IN)[:, None], _tile(x, k, D_IN, inner, at, live) - mean[None, :], 0.0)
        square += tl.sum(v * v, 0)
    return mean, 1.0 / tl.sqrt(square * (1.0 / D_IN) + eps)


@triton.jit
def _centre(v, rows, n: tl.constexpr):
    """[rows, columns] of which n rows count, less the column's mean; 0 in the other rows."""
    mean = tl.sum(tl.where((rows < n)[:, None], v, 0.0), 0) * (1.0 / n)
    return tl.where((rows < n)[:, None], v - mean[None, :], 0.0)


@triton.jit
def _inverse_deviation(centred, n: tl.constexpr, eps: tl.constexpr):
    return 1.0 / tl.sqrt(tl.sum(centred * centred, 0) * (1.0 / n) + eps)


@triton.jit
def _normalise_backward(d, normal, inverse, scale, n: tl.constexpr):
    """Gradient of the normalised value's source; rows past n are 0 in d."""
    g = d * scale[:, None]
    mean = tl.sum(g, 0) * (1.0 / n)
    along = tl.sum(g * normal, 0) * (1.0 / n)
    return inverse[None, :] * (g - mean[None, :] - normal * along[None, :])


# -- long axes --


@triton.jit(do_not_specialize=["keep"])
def forward_kernel(
    x, fc1, bias1, fc2, bias2, residual, scale, shift, y, pre, centred, columns, inner: tl.constexpr, keep,
    eps: tl.constexpr, D_IN: tl.constexpr, HIDDEN: tl.constexpr, D_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    LN_FIRST: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y; if keep, for backward: pre [HIDDEN, columns] and, unless LN_FIRST, centred [D_OUT, columns], the sum before
    LayerNorm less its mean."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    _forward(
        x, fc1, bias1, fc2, bias2, residual, scale, shift, y, pre, centred, columns, inner, keep, c, c < columns, eps,
        D_IN, HIDDEN, D_OUT, ACTIVATION, LN_FIRST, BIAS1, BIAS2, RESIDUAL, PRECISION, BLOCK_C, BLOCK_K, BLOCK_H,
        BLOCK_O,
    )  # fmt: skip


@triton.jit
def _forward(
    x, fc1, bias1, fc2, bias2, residual, scale, shift, y, pre, centred, columns, inner: tl.constexpr, keep, c, live,
    eps: tl.constexpr, D_IN: tl.constexpr, HIDDEN: tl.constexpr, D_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    LN_FIRST: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """`forward_kernel` for the columns c, where they are live."""
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
        if keep:
            _store(pre, h, HIDDEN, columns, c, live, p)
        g, _ = _activate(p, ACTIVATION)
        total = _dot(_matrix(fc2, o, D_OUT, HIDDEN, h, HIDDEN, 1), g, total, PRECISION)
    if BIAS2:
        total += tl.load(bias2 + o, mask=o < D_OUT, other=0.0)[:, None]
    if not LN_FIRST:
        total = _centre(total, o, D_OUT)
        if keep:
            _store(centred, o, D_OUT, columns, c, live, total)
        a = tl.load(scale + o, mask=o < D_OUT, other=0.0)
        b = tl.load(shift + o, mask=o < D_OUT, other=0.0)
        total = total * _inverse_deviation(total, D_OUT, eps)[None, :] * a[:, None] + b[:, None]
    _store(y, o, D_OUT, inner, to, live, total)


@triton.jit
def backward_kernel(
    dy, x, fc1, fc2, residual, scale, pre, centred, dx, d1, d2, vectors, columns, inner: tl.constexpr,
    eps: tl.constexpr, D_IN: tl.constexpr, HIDDEN: tl.constexpr, D_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    LN_FIRST: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """dx, and for the weights: d1 [HIDDEN, columns] and d2 [D_OUT, columns], the gradients of both layers' outputs;
    vectors [programs, HIDDEN + D_OUT + 2 N], this program's part of the gradients of the biases, scale and shift (N is
    the norm's length)."""
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
        v = _tile(centred, o, D_OUT, columns, c, live)
        r = _inverse_deviation(v, D_OUT, eps)
        v = v * r[None, :]
        tl.store(own + HIDDEN + D_OUT + o, tl.sum(ds * v, 1), mask=o < N)
        tl.store(own + HIDDEN + D_OUT + N + o, tl.sum(ds, 1), mask=o < N)
        ds = _normalise_backward(ds, v, r, tl.load(scale + o, mask=o < D_OUT, other=0.0), D_OUT)
        ds = tl.where((o < D_OUT)[:, None] & live[None, :], ds, 0.0)
    tl.store(own + HIDDEN + o, tl.sum(ds, 1), mask=o < D_OUT)
    _store(d2, o, D_OUT, columns, c, live, ds)
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
        _store(d1, h, HIDDEN, columns, c, live, dp)
        tl.store(own + h, tl.sum(dp, 1), mask=h < HIDDEN)
        total = _dot(_matrix(fc1, i, D_IN, 1, h, HIDDEN, D_IN), dp, total, PRECISION)
    if LN_FIRST:
        v = _centre(_tile(x, i, D_IN, inner, at, live), i, D_IN)
        r = _inverse_deviation(v, D_IN, eps)
        v = v * r[None, :]
        tl.store(own + HIDDEN + D_OUT + i, tl.sum(total * v, 1), mask=i < N)
        tl.store(own + HIDDEN + D_OUT + N + i, tl.sum(total, 1), mask=i < N)
        total = _normalise_backward(total, v, r, tl.load(scale + i, mask=i < D_IN, other=0.0), D_IN)
    if RESIDUAL:
        for k0 in range(0, D_OUT, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            w = _matrix(residual, i, D_IN, 1, k, D_OUT, D_IN)
            total = _dot(w, _tile(d2, k, D_OUT, columns, c, live), total, PRECISION)
    else:
        total += _tile(d2, i, D_OUT, columns, c, live)
    _store(dx, i, D_IN, inner, at, live, total)


@triton.jit
def weights_kernel(
    x, scale, shift, pre, d1, d2, parts, columns, inner: tl.constexpr, run,
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
    if pid < MH * NI:
        _weights_tile(
            d1, HIDDEN, x, D_IN, scale, shift, own, pid // NI, pid % NI, first, last, columns, inner, eps, D_IN,
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
    d, rows, source, width, scale, shift, to, m0, n0, first, last, columns, inner: tl.constexpr,
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


# -- short axes: a column is a tuple of D_IN numbers, each of them a vector over the program's columns --


@triton.jit
def _scalars(p, n: tl.constexpr):
    values = ()
    for i in tl.static_range(n):
        values = values + (tl.load(p + i),)
    return values


@triton.jit
def _column(p, at, live, inner: tl.constexpr, n: tl.constexpr):
    values = ()
    for i in tl.static_range(n):
        values = values + (tl.load(p + at + i * inner, mask=live, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _store_column(p, at, live, inner: tl.constexpr, values, n: tl.constexpr):
    for i in tl.static_range(n):
        tl.store(p + at + i * inner, values[i], mask=live)


@triton.jit
def _product(w, v, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """w [ROWS, COLUMNS] v."""
    values = ()
    for i in tl.static_range(ROWS):
        total = w[i * COLUMNS] * v[0]
        for k in tl.static_range(1, COLUMNS):
            total += w[i * COLUMNS + k] * v[k]
        values = values + (total,)
    return values


@triton.jit
def _transposed_product(w, v, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """v w, with w [ROWS, COLUMNS]."""
    values = ()
    for k in tl.static_range(COLUMNS):
        total = w[k] * v[0]
        for i in tl.static_range(1, ROWS):
            total += w[i * COLUMNS + k] * v[i]
        values = values + (total,)
    return values


@triton.jit
def _outer(a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    values = ()
    for i in tl.static_range(ROWS):
        for k in tl.static_range(COLUMNS):
            values = values + (a[i] * b[k],)
    return values


@triton.jit
def _add(a, b, n: tl.constexpr):
    values = ()
    for i in tl.static_range(n):
        values = values + (a[i] + b[i],)
    return values


@triton.jit
def _multiply(a, b, n: tl.constexpr):
    values = ()
    for i in tl.static_range(n):
        values = values + (a[i] * b[i],)
    return values


@triton.jit
def _total(v, n: tl.constexpr):
    total = v[0]
    for i in tl.static_range(1, n):
        total += v[i]
    return total


@triton.jit
def _normalise_column(v, n: tl.constexpr, eps: tl.constexpr):
    """Normalised, inverse deviation."""
    mean = _total(v, n) * (1.0 / n)
    centred = ()
    for i in tl.static_range(n):
        centred = centred + (v[i] - mean,)
    inverse = 1.0 / tl.sqrt(_total(_multiply(centred, centred, n), n) * (1.0 / n) + eps)
    normal = ()
    for i in tl.static_range(n):
        normal = normal + (centred[i] * inverse,)
    return normal, inverse


@triton.jit
def _normalise_column_backward(d, normal, inverse, scale, n: tl.constexpr):
    g = _multiply(d, scale, n)
    mean = _total(g, n) * (1.0 / n)
    along = _total(_multiply(g, normal, n), n) * (1.0 / n)
    values = ()
    for i in tl.static_range(n):
        values = values + (inverse * (g[i] - mean - normal[i] * along),)
    return values


@triton.jit
def _short_weights(
    fc1, bias1, fc2, bias2, residual, scale, shift,
    D_IN: tl.constexpr, HIDDEN: tl.constexpr, D_OUT: tl.constexpr, LN_FIRST: tl.constexpr, BIAS1: tl.constexpr,
    BIAS2: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """All weights as scalars. A missing weight has no elements."""
    N: tl.constexpr = D_IN if LN_FIRST else D_OUT
    return (
        _scalars(fc1, HIDDEN * D_IN), _scalars(bias1, HIDDEN if BIAS1 else 0), _scalars(fc2, D_OUT * HIDDEN),
        _scalars(bias2, D_OUT if BIAS2 else 0), _scalars(residual, D_OUT * D_IN if RESIDUAL else 0), _scalars(scale, N),
        _scalars(shift, N),
    )  # fmt: skip


@triton.jit
def _short_mix(
    v, weights, eps: tl.constexpr, D_IN: tl.constexpr, HIDDEN: tl.constexpr, D_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr, LN_FIRST: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """x's columns -> the MLP's input, normalised x and its inverse deviation (if LN_FIRST), hidden units and their
    slope, sum before a LayerNorm at the end."""
    fc1, bias1, fc2, bias2, residual, scale, shift = weights
    u, normal, inverse = v, v, v[0]
    if LN_FIRST:
        normal, inverse = _normalise_column(v, D_IN, eps)
        u = _add(_multiply(normal, scale, D_IN), shift, D_IN)
    p = _product(fc1, u, HIDDEN, D_IN)
    if BIAS1:
        p = _add(p, bias1, HIDDEN)
    g, slope = (), ()
    for h in tl.static_range(HIDDEN):
        value, derivative = _activate(p[h], ACTIVATION)
        g, slope = g + (value,), slope + (derivative,)
    total = _product(fc2, g, D_OUT, HIDDEN)
    total = _add(total, _product(residual, v, D_OUT, D_IN) if RESIDUAL else v, D_OUT)
    if BIAS2:
        total = _add(total, bias2, D_OUT)
    return u, normal, inverse, g, slope, total


@triton.jit
def _short_forward(
    x, weights, y, c, live, inner: tl.constexpr,
    eps: tl.constexpr, D_IN: tl.constexpr, HIDDEN: tl.constexpr, D_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    LN_FIRST: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """y for the columns c, where they are live."""
    at = c // inner * D_IN * inner + c % inner
    to = c // inner * D_OUT * inner + c % inner
    v = _column(x, at, live, inner, D_IN)
    _, _, _, _, _, total = _short_mix(
        v, weights, eps, D_IN, HIDDEN, D_OUT, ACTIVATION, LN_FIRST, BIAS1, BIAS2, RESIDUAL
    )
    if not LN_FIRST:
        total, _ = _normalise_column(total, D_OUT, eps)
        total = _add(_multiply(total, weights[5], D_OUT), weights[6], D_OUT)
    _store_column(y, to, live, inner, total, D_OUT)


@triton.jit
def short_forward_kernel(
    x, fc1, bias1, fc2, bias2, residual, scale, shift, y, columns, inner: tl.constexpr,
    eps: tl.constexpr, D_IN: tl.constexpr, HIDDEN: tl.constexpr, D_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    LN_FIRST: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    weights = _short_weights(
        fc1, bias1, fc2, bias2, residual, scale, shift, D_IN, HIDDEN, D_OUT, LN_FIRST, BIAS1, BIAS2, RESIDUAL
    )
    _short_forward(
        x, weights, y, c, c < columns, inner, eps, D_IN, HIDDEN, D_OUT, ACTIVATION, LN_FIRST, BIAS1, BIAS2, RESIDUAL
    )


@triton.jit
def short_backward_kernel(
    dy, x, fc1, bias1, fc2, bias2, residual, scale, shift, dx, parts, columns, inner: tl.constexpr, run,
    eps: tl.constexpr, D_IN: tl.constexpr, HIDDEN: tl.constexpr, D_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    LN_FIRST: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx, and in parts [programs, ...] the gradients of all weights over this program's run of columns: fc1, fc2,
    residual (if RESIDUAL), both biases, scale, shift."""
    N: tl.constexpr = D_IN if LN_FIRST else D_OUT
    SIZE: tl.constexpr = HIDDEN * D_IN + D_OUT * HIDDEN + (D_OUT * D_IN if RESIDUAL else 0) + HIDDEN + D_OUT + 2 * N
    weights = _short_weights(
        fc1, bias1, fc2, bias2, residual, scale, shift, D_IN, HIDDEN, D_OUT, LN_FIRST, BIAS1, BIAS2, RESIDUAL
    )
    first = tl.program_id(0).to(tl.int64) * run
    last = tl.minimum(first + run, columns)
    totals = ()
    for _ in tl.static_range(SIZE):
        totals = totals + (tl.zeros([BLOCK_C], tl.float32),)
    for c0 in range(first, last, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        live = c < last
        at = c // inner * D_IN * inner + c % inner
        to = c // inner * D_OUT * inner + c % inner
        v = _column(x, at, live, inner, D_IN)
        ds = _column(dy, to, live, inner, D_OUT)
        u, normal, inverse, g, slope, total = _short_mix(
            v, weights, eps, D_IN, HIDDEN, D_OUT, ACTIVATION, LN_FIRST, BIAS1, BIAS2, RESIDUAL
        )
        if not LN_FIRST:
            normal, inverse = _normalise_column(total, D_OUT, eps)
            d_norm = _multiply(ds, normal, D_OUT) + ds
            ds = _normalise_column_backward(ds, normal, inverse, weights[5], D_OUT)
        dp = _multiply(_transposed_product(weights[2], ds, D_OUT, HIDDEN), slope, HIDDEN)
        du = _transposed_product(weights[0], dp, HIDDEN, D_IN)
        if LN_FIRST:
            d_norm = _multiply(du, normal, D_IN) + du
            du = _normalise_column_backward(du, normal, inverse, weights[5], D_IN)
        products = _outer(dp, u, HIDDEN, D_IN) + _outer(ds, g, D_OUT, HIDDEN)
        if RESIDUAL:
            products = products + _outer(ds, v, D_OUT, D_IN)
            du = _add(du, _transposed_product(weights[4], ds, D_OUT, D_IN), D_IN)
        else:
            du = _add(du, ds, D_IN)
        totals = _add(totals, products + dp + ds + d_norm, SIZE)
        _store_column(dx, at, live, inner, du, D_IN)
    for i in tl.static_range(SIZE):
        tl.store(parts + tl.program_id(0).to(tl.int64) * SIZE + i, tl.sum(totals[i]))


# -- modality and channel together --


@triton.jit(do_not_specialize=["keep"])
def pair_forward_kernel(
    x, m_fc1, m_bias1, m_fc2, m_bias2, m_residual, m_scale, m_shift,
    fc1, bias1, fc2, bias2, residual, scale, shift, mixed, y, pre, centred, rows, columns, keep,
    eps: tl.constexpr, M_IN: tl.constexpr, M_HIDDEN: tl.constexpr, M_OUT: tl.constexpr, D_IN: tl.constexpr,
    HIDDEN: tl.constexpr, D_OUT: tl.constexpr, ACTIVATION: tl.constexpr, LN_FIRST: tl.constexpr,
    M_BIAS1: tl.constexpr, M_BIAS2: tl.constexpr, M_RESIDUAL: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr,
    RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """x [rows, M_IN, D_IN] -> mixed [rows, M_OUT, D_IN] -> y [rows, M_OUT, D_OUT]; columns = rows * M_OUT."""
    ROWS: tl.constexpr = BLOCK_C // M_OUT
    first = tl.program_id(0).to(tl.int64) * ROWS
    weights = _short_weights(
        m_fc1, m_bias1, m_fc2, m_bias2, m_residual, m_scale, m_shift, M_IN, M_HIDDEN, M_OUT, LN_FIRST, M_BIAS1,
        M_BIAS2, M_RESIDUAL,
    )  # fmt: skip
    last = tl.minimum(first + ROWS, rows) * D_IN
    for c0 in range(first * D_IN, last, BLOCK_S):
        c = c0 + tl.arange(0, BLOCK_S)
        _short_forward(
            x, weights, mixed, c, c < last, D_IN, eps, M_IN, M_HIDDEN, M_OUT, ACTIVATION, LN_FIRST, M_BIAS1, M_BIAS2,
            M_RESIDUAL,
        )  # fmt: skip
    # The program reads back what it wrote, in another arrangement.
    tl.debug_barrier()
    n = tl.arange(0, BLOCK_C)
    c = first * M_OUT + n
    _forward(
        mixed, fc1, bias1, fc2, bias2, residual, scale, shift, y, pre, centred, columns, 1, keep, c,
        (n < ROWS * M_OUT) & (c < columns), eps, D_IN, HIDDEN, D_OUT, ACTIVATION, LN_FIRST, BIAS1, BIAS2, RESIDUAL,
        PRECISION, BLOCK_C, BLOCK_K, BLOCK_H, BLOCK_O,
    )  # fmt: skip


# -- sums over programs --


# Not specialised, because triton makes a number of 1 a constant, and then no branch can change it.
_COUNTS = [f"{other}{n}" for other in ("", "other_") for n in ("matrix_stride", "vector_stride")]
_COUNTS += ["n_matrices", "n_vectors", "n_other_matrices", "n_other_vectors"]


@triton.jit(do_not_specialize=_COUNTS)
def sum_kernel(
    matrices, n_matrices, matrix_stride, vectors, n_vectors, vector_stride,
    fc1, fc2, residual, bias1, bias2, scale, shift,
    other_matrices, n_other_matrices, other_matrix_stride, other_vectors, n_other_vectors, other_vector_stride,
    other_fc1, other_fc2, other_residual, other_bias1, other_bias2, other_scale, other_shift,
    SIZES: tl.constexpr, WANTED: tl.constexpr, OTHER_SIZES: tl.constexpr, OTHER_WANTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradients of one axis' weights, or of two axes': sums over the rows of matrices [n_matrices, ...] (fc1, fc2,
    residual) and of vectors (both biases, scale, shift), each into its own tensor.

    SIZES, WANTED: elements of the seven in those rows, and as many or 0 for those that are wanted.
    """
    block = tl.program_id(0)
    # Replaced below, where the block belongs.
    source, rows, stride, out, width, first = matrices, n_matrices, matrix_stride, fc1, block * 0, block * 0
    outs = (fc1, fc2, residual, bias1, bias2, scale, shift)
    for i in tl.static_range(7):
        if (block >= 0) & (block * COLUMNS < WANTED[i]):
            out, width, first = outs[i], WANTED[i], block * COLUMNS
            if i < 3:
                source, rows, stride = matrices, n_matrices, matrix_stride
            else:
                source, rows, stride = vectors, n_vectors, vector_stride
        block -= (WANTED[i] + COLUMNS - 1) // COLUMNS
        if i < 3:
            matrices += SIZES[i]
        else:
            vectors += SIZES[i]
    outs = (other_fc1, other_fc2, other_residual, other_bias1, other_bias2, other_scale, other_shift)
    for i in tl.static_range(7):
        if (block >= 0) & (block * COLUMNS < OTHER_WANTED[i]):
            out, width, first = outs[i], OTHER_WANTED[i], block * COLUMNS
            if i < 3:
                source, rows, stride = other_matrices, n_other_matrices, other_matrix_stride
            else:
                source, rows, stride = other_vectors, n_other_vectors, other_vector_stride
        block -= (OTHER_WANTED[i] + COLUMNS - 1) // COLUMNS
        if i < 3:
            other_matrices += OTHER_SIZES[i]
        else:
            other_vectors += OTHER_SIZES[i]
    j = first + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i0 in range(0, rows, ROWS):
        total += _tile(source, i0 + tl.arange(0, ROWS), rows, stride, j, j < width)
    tl.store(out + j, tl.sum(total, 0), mask=j < width)


# -- host functions --


def _sizes(x: Tensor, fc1: Tensor, fc2: Tensor) -> dict[str, int]:
    return {"D_IN": x.shape[1], "HIDDEN": fc1.shape[0], "D_OUT": fc2.shape[0]}


def _flags(weights: Sequence[Tensor | None]) -> dict[str, bool]:
    _, bias1, _, bias2, residual, _, _ = weights
    return {"BIAS1": bias1 is not None, "BIAS2": bias2 is not None, "RESIDUAL": residual is not None}


def _padded(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def _forward_warps(precision: str) -> int:
    """Fewer warps let more programs share a processor; fp32's split factors need the registers of more."""
    return WARPS if precision == "fp32" else WARPS // 2


def _columns(columns: int) -> int:
    """Columns of a program."""
    return next((n for n in COLUMNS if columns >= ENOUGH * n), COLUMNS[-1])


def _forward_blocks(sizes: dict[str, int], block_c: int) -> dict[str, int]:
    step = min(HIDDEN_STEP, _padded(sizes["HIDDEN"]))
    return {"BLOCK_C": block_c, "BLOCK_K": DEPTH, "BLOCK_H": step, "BLOCK_O": _padded(sizes["D_OUT"])}


def _backward_blocks(sizes: dict[str, int], block_c: int) -> dict[str, int]:
    return _forward_blocks(sizes, block_c) | {"BLOCK_I": _padded(sizes["D_IN"])}


def _weight_blocks(precision: str) -> dict[str, int]:
    width = WEIGHT_COLUMNS if precision != "fp32" else WEIGHT_COLUMNS // 2
    return {"BLOCK_M": WEIGHT_ROWS, "BLOCK_N": width, "BLOCK_C": WEIGHT_STEP, "BLOCK_I": DEPTH}


def _kept_parts(kept: Tensor, x: Tensor, sizes: dict[str, int], columns: int) -> tuple[Tensor, Tensor]:
    """pre and centred: views of the kept numbers, or x if they are not kept."""
    hidden = sizes["HIDDEN"] * columns
    return (kept, kept[hidden:]) if len(kept) > hidden else (kept, x) if len(kept) else (x, x)


def _present(tensors: Sequence[Tensor | None], other: Tensor) -> list[Tensor]:
    """Contiguous; `other` where there is none, which a kernel does not read."""
    return [other if t is None else t.contiguous() for t in tensors]


def forward(x: Tensor, *rest: Argument) -> tuple[Tensor, Tensor]:
    """x [outer, d_in, inner] -> y [outer, d_out, inner] of `dtype`, what the backward pass needs (1-d, empty unless
    `keep`). x float32 or of 16 bits, weights float32; they and the settings follow x as in op.py's schema."""
    given, (activation, ln_first, eps, precision, dtype, keep) = rest[:7], rest[7:]
    x = x.contiguous()
    outer, d_in, inner = x.shape
    sizes, columns = _sizes(x, given[0], given[2]), outer * inner
    y = x.new_empty(outer, sizes["D_OUT"], inner, dtype=dtype)
    size = kept_size(outer, inner, d_in, sizes["HIDDEN"], sizes["D_OUT"], ln_first) if keep else 0
    kept = x.new_empty(size, dtype=STORAGE.get(precision, torch.float32))
    if not columns:
        return y, kept
    weights = _present(given, x)
    settings = {"eps": eps, "ACTIVATION": activation, "LN_FIRST": ln_first} | sizes | _flags(given)
    if max(sizes.values()) <= SHORT:
        short_forward_kernel[(triton.cdiv(columns, SHORT_COLUMNS),)](
            x, *weights, y, columns, inner, **settings, BLOCK_C=SHORT_COLUMNS, num_warps=WARPS
        )
        return y, kept
    block_c = _columns(columns)
    forward_kernel[(triton.cdiv(columns, block_c),)](
        x, *weights, y, *_kept_parts(kept, x, sizes, columns), columns, inner, int(keep), **settings,
        PRECISION=precision, **_forward_blocks(sizes, block_c), num_warps=_forward_warps(precision), num_stages=STAGES,
    )  # fmt: skip
    return y, kept


def backward(dy: Tensor, x: Tensor, kept: Tensor, *rest: Argument) -> list[Tensor]:
    """Gradients of the weights that are not None, in their order, and then, with `need_x`, the one of x."""
    given, (activation, ln_first, eps, precision, need_x) = rest[:7], rest[7:]
    dy, x = dy.contiguous(), x.contiguous()
    if not x.numel():
        gradients = [torch.zeros_like(w) for w in given if w is not None]
        return [*gradients, torch.empty_like(x)] if need_x else gradients
    settings = {"eps": eps, "ACTIVATION": activation, "LN_FIRST": ln_first}
    if max(_sizes(x, given[0], given[2]).values()) <= SHORT:
        dx, *parts = _short_backward(dy, x, given, settings)
    else:
        dx, *parts = _long_backward(dy, x, kept, given, settings | {"PRECISION": precision})
    gradients = _sums(*parts, given)
    return [*gradients, dx] if need_x else gradients


def pair_forward(
    x: Tensor, *rest: Argument
) -> tuple[Tensor, Tensor, Tensor]:  # weights of the modality axis, of the channel axis, settings: as in op.py's schema
    """x [rows, m_in, d_in] -> y [rows, m_out, d_out] in float32, the modality axis mixed [rows, m_out, d_in], and what
    the channel axis keeps for the backward pass (1-d, empty unless `keep`)."""
    modality, channel = rest[:7], rest[7:14]
    activation, ln_first, eps, precision, keep = rest[14:]
    x = x.contiguous()
    rows, m_in, d_in = x.shape
    m_out, hidden, d_out = len(modality[2]), len(channel[0]), len(channel[2])
    storage = STORAGE.get(precision, torch.float32)
    y = x.new_empty(rows, m_out, d_out, dtype=torch.float32)
    mixed = x.new_empty(rows, m_out, d_in, dtype=storage)
    columns = rows * m_out
    kept = x.new_empty(kept_size(columns, 1, d_in, hidden, d_out, ln_first) if keep else 0, dtype=storage)
    if not columns:
        return y, mixed, kept
    sizes = {"D_IN": d_in, "HIDDEN": hidden, "D_OUT": d_out}
    settings = {"eps": eps, "ACTIVATION": activation, "LN_FIRST": ln_first} | sizes | _flags(channel)
    settings |= {"M_IN": m_in, "M_HIDDEN": len(modality[0]), "M_OUT": m_out}
    settings |= {f"M_{name}": flag for name, flag in _flags(modality).items()}
    block_c = _columns(columns)
    pair_forward_kernel[(triton.cdiv(rows, block_c // m_out),)](
        x, *_present(modality, x), *_present(channel, x), mixed, y, *_kept_parts(kept, x, sizes, columns), rows,
        columns, int(keep), **settings, PRECISION=precision, **_forward_blocks(sizes, block_c),
        BLOCK_S=SHORT_COLUMNS, num_warps=_forward_warps(precision), num_stages=STAGES,
    )  # fmt: skip
    return y, mixed, kept


def pair_backward(dy: Tensor, x: Tensor, mixed: Tensor, kept: Tensor, *rest: Argument) -> list[Tensor]:
    """Gradients of the weights that are not None, modality before channel, and after them, where `need_x`, the one of
    x."""
    modality, channel = rest[:7], rest[7:14]
    activation, ln_first, eps, precision, need_x = rest[14:]
    dy, x = dy.contiguous(), x.contiguous()
    if not x.numel():
        gradients = [torch.zeros_like(w) for w in (*modality, *channel) if w is not None]
        return [*gradients, torch.empty_like(x)] if need_x else gradients
    settings = {"eps": eps, "ACTIVATION": activation, "LN_FIRST": ln_first}
    rows = mixed.view(-1, mixed.shape[2], 1)
    d_mixed, *parts = _long_backward(
        dy.view(-1, dy.shape[2], 1), rows, kept, channel, settings | {"PRECISION": precision}
    )
    dx, *modality_parts = _short_backward(d_mixed.view(mixed.shape), x, modality, settings)
    gradients = _sums(*modality_parts, modality, *parts, channel)
    return [*gradients, dx] if need_x else gradients


def _short_backward(
    dy: Tensor, x: Tensor, given: Sequence[Tensor | None], settings: dict[str, object]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx; parts [programs, ...] of the gradients of the matrices and of the vectors among the weights."""
    outer, _, inner = x.shape
    sizes, columns = _sizes(x, given[0], given[2]), outer * inner
    steps = triton.cdiv(triton.cdiv(columns, SHORT_COLUMNS), SHORT_PROGRAMS)
    run = steps * SHORT_COLUMNS
    programs = triton.cdiv(columns, run)
    dx = torch.empty_like(x)
    lengths = _lengths(given)
    parts = x.new_empty(programs, sum(lengths), dtype=torch.float32)
    short_backward_kernel[(programs,)](
        dy, x, *_present(given, x), dx, parts, columns, inner, run, **settings, **sizes, **_flags(given),
        BLOCK_C=SHORT_COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return dx, *parts.split([sum(lengths[:3]), sum(lengths[3:])], 1)


def _long_backward(
    dy: Tensor, x: Tensor, kept: Tensor, given: Sequence[Tensor | None], settings: dict[str, object]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx; parts [programs, ...] of the gradients of the matrices and of the vectors among the weights."""
    outer, d_in, inner = x.shape
    sizes, columns = _sizes(x, given[0], given[2]), outer * inner
    hidden, d_out = sizes["HIDDEN"], sizes["D_OUT"]
    fc1, _, fc2, _, residual, scale, shift = _present(given, x)
    settings = settings | sizes | {"RESIDUAL": given[4] is not None}
    pre, centred = _kept_parts(kept, x, sizes, columns)
    matrices, vector_length = sum(_lengths(given)[:3]), sum(_lengths(given)[3:])
    block_c = _columns(columns)
    programs = triton.cdiv(columns, block_c)
    dx = torch.empty_like(x)
    d1, d2 = kept.new_empty(hidden, columns), kept.new_empty(d_out, columns)
    vectors = x.new_empty(programs, vector_length, dtype=torch.float32)
    backward_kernel[(programs,)](
        dy, x, fc1, fc2, residual, scale, pre, centred, dx, d1, d2, vectors, columns, inner, **settings,
        **_backward_blocks(sizes, block_c), num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    blocks = _weight_blocks(settings["PRECISION"])
    results = [(hidden, d_in), (d_out, hidden)] + ([(d_out, d_in)] if settings["RESIDUAL"] else [])
    tiles = sum(triton.cdiv(m, blocks["BLOCK_M"]) * triton.cdiv(n, blocks["BLOCK_N"]) for m, n in results)
    steps = triton.cdiv(columns, WEIGHT_STEP)
    run = triton.cdiv(steps, max(1, WEIGHT_PROGRAMS // tiles)) * WEIGHT_STEP
    splits = triton.cdiv(columns, run)
    parts = x.new_empty(splits, matrices, dtype=torch.float32)
    weights_kernel[(tiles, splits)](
        x, scale, shift, pre, d1, d2, parts, columns, inner, run, **settings, **blocks, num_warps=WARPS,
        num_stages=STAGES,
    )  # fmt: skip
    return dx, parts, vectors


def _lengths(given: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Of the gradients as the kernels leave them: fc1, fc2, residual, then both biases, scale and shift. The biases'
    are there whether there are biases or not."""
    fc1, _, fc2, _, residual, scale, shift = given
    matrices = (fc1.numel(), fc2.numel(), 0 if residual is None else residual.numel())
    return (*matrices, len(fc1), len(fc2), len(scale), len(shift))


def _sums(matrices: Tensor, vectors: Tensor, given: Sequence[Tensor | None], *other: object) -> list[Tensor]:
    """Gradients of the weights that are not None, in their order, from parts [programs, ...] of those of the matrices
    and of the vectors among them. `other` is the same three of a second axis, whose gradients follow."""
    gradients, arguments, constexprs, blocks = _axis_sums(matrices, vectors, given)
    if other:
        more, other_arguments, other_constexprs, other_blocks = _axis_sums(*other)
        gradients, blocks = [*gradients, *more], blocks + other_blocks
    else:
        other_arguments, other_constexprs = arguments, {"SIZES": (0,) * 7, "WANTED": (0,) * 7}
    sum_kernel[(blocks,)](
        *arguments, *other_arguments, **constexprs, **{f"OTHER_{k}": v for k, v in other_constexprs.items()},
        ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return gradients


def _axis_sums(
    matrices: Tensor, vectors: Tensor, given: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor | int], dict[str, tuple[int, ...]], int]:
    """One axis' gradients, yet to be filled; arguments of `sum_kernel`; its constants; blocks."""
    gradients = [None if w is None else torch.empty_like(w, memory_format=torch.contiguous_format) for w in given]
    fc1, bias1, fc2, bias2, residual, scale, shift = gradients
    outs = (fc1, fc2, residual, bias1, bias2, scale, shift)
    wanted = tuple(0 if g is None else g.numel() for g in outs)
    parts = [matrices, len(matrices), matrices.stride(0), vectors, len(vectors), vectors.stride(0)]
    present = [g for g in gradients if g is not None]
    constexprs = {"SIZES": _lengths(given), "WANTED": wanted}
    blocks = sum(triton.cdiv(n, SUM_COLUMNS) for n in wanted)
    return present, [*parts, *(matrices if g is None else g for g in outs)], constexprs, blocks
