"""The two operations on a GPU. Sums over rows have a fixed order: no atomics, bitwise the same every time.

In a backward pass PROGRAMS programs go over the rows and keep their sums of the parameters' gradients in registers;
torch adds up what they leave, in one more launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.aot import AotCase
from engine.kernels.dropout import reference as dropout

PROGRAMS = 512
GELU = {"ROWS": 16, "BLOCK_C": 128}  # a tile of bias_gelu
GELU_PROGRAMS = 64  # of the rows; the columns have programs of their own
PIECE_BITS = tl.constexpr(dropout.PIECE.bit_length() - 1)
WITHIN = tl.constexpr(dropout.PIECE - 1)  # the bits of a place within its piece


def _norm_blocks(c: int) -> dict[str, int]:
    """Rows at a time, columns and warps of a program that holds whole rows: 1,024 numbers, or one row."""
    block = max(triton.next_power_of_2(c), 16)
    return {"ROWS": max(1024 // block, 1), "BLOCK_C": block, "num_warps": min(max(block // 256, 4), 16)}


def _drop(p: float, after: bool) -> dict[str, int | float]:
    """Constants of dropout: thresholds before and after LayerNorm, of which 0 keeps everything."""
    threshold = dropout.threshold(p)
    return {"BEFORE": 0 if after else threshold, "AFTER": threshold if after else 0, "SCALE": 1 / (1 - p)}


def add_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, weight: Tensor, shift: Tensor, seed: Tensor | None,
    p: float, after: bool, eps: float, number: int, low: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `cpu.add_norm`."""
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    n, c = x.shape
    y = torch.empty((n, c), dtype=weight.dtype, device=x.device)
    small = torch.empty((0,) if low is None else (n, c), dtype=low or x.dtype, device=x.device)
    if n:
        blocks = _norm_blocks(c)
        add_norm_kernel[(triton.cdiv(n, blocks["ROWS"]),)](
            x, bias, residual, weight, shift, seed, y, None if low is None else small, n, c, eps, number,
            **_drop(p, after), **blocks,
        )  # fmt: skip
    return y, small


def add_norm_backward(
    grad: Tensor | None, grad_low: Tensor | None, x: Tensor, bias: Tensor | None, residual: Tensor | None,
    weight: Tensor, seed: Tensor | None, p: float, after: bool, eps: float, number: int, parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `cpu.add_norm_backward`."""
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    grad, grad_low = (None if g is None else g.contiguous() for g in (grad, grad_low))
    n, c = x.shape
    dx = torch.empty((n, c), dtype=x.dtype, device=x.device)
    if residual is None:
        dresidual = torch.empty((0,), dtype=x.dtype, device=x.device)
    else:
        dresidual = torch.empty((n, c), dtype=residual.dtype, device=x.device)
    blocks = _norm_blocks(c)
    programs = min(PROGRAMS, triton.cdiv(n, blocks["ROWS"]))
    sums = torch.empty((programs, 3, c) if parameters else (0,), dtype=weight.dtype, device=x.device)
    if n:
        add_norm_backward_kernel[(programs,)](
            grad, grad_low, x, bias, residual, weight, seed, dx, None if residual is None else dresidual,
            sums if parameters else None, n, c, eps, number, **_drop(p, after), **blocks,
        )  # fmt: skip
    return dx, dresidual, sums.sum(0) if parameters else sums


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """As `cpu.bias_gelu`."""
    x = x.contiguous()
    n, c = x.shape
    y = torch.empty((n, c), dtype=x.dtype, device=x.device)
    if n:
        grid = (triton.cdiv(n, GELU["ROWS"]), triton.cdiv(c, GELU["BLOCK_C"]))
        bias_gelu_kernel[grid](x, bias, y, n, c, **GELU)
    return y


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, parameters: bool) -> tuple[Tensor, Tensor]:
    """As `cpu.bias_gelu_backward`."""
    x, grad = x.contiguous(), grad.contiguous()
    n, c = x.shape
    dx = torch.empty((n, c), dtype=x.dtype, device=x.device)
    programs = min(GELU_PROGRAMS, triton.cdiv(n, GELU["ROWS"]))
    sums = torch.empty((programs, c) if parameters else (0,), dtype=bias.dtype, device=x.device)
    if n:
        grid = (programs, triton.cdiv(c, GELU["BLOCK_C"]))
        bias_gelu_backward_kernel[grid](grad, x, bias, dx, sums if parameters else None, n, c, **GELU)
    return dx, sums.sum(0) if parameters else sums


@triton.jit
def _mixed(h):
    """As `engine.kernels.dropout.reference.mixed`, on uint32."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _drop_out(v, index, seed, number, THRESHOLD: tl.constexpr, SCALE: tl.constexpr):
    """v * SCALE at the places `index` (int64) that `dropout.keep` keeps, else 0; v itself if THRESHOLD is 0."""
    if THRESHOLD == 0:
        return v
    drawn = tl.load(seed) + number
    low, high = drawn.to(tl.uint32), (drawn >> 32).to(tl.uint32)
    key = _mixed(low ^ _mixed(high ^ _mixed((index >> PIECE_BITS).to(tl.uint32))))
    draw = _mixed(_mixed((index & WITHIN).to(tl.uint32) + key) ^ high)
    return tl.where(draw >= THRESHOLD, v * SCALE, 0.0)


@triton.jit
def _normalised(
    x, bias, residual, seed, number, place, column, live, c, eps, BEFORE: tl.constexpr, SCALE: tl.constexpr
):  # fmt: skip
    """Rows of LayerNorm's normalised input, and 1 / their standard deviation [rows, 1]. Columns past c hold 0."""
    total = tl.load(x + place, mask=live, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + column, mask=column < c, other=0.0)[None, :]
    total = _drop_out(total, place, seed, number, BEFORE, SCALE)
    if residual is not None:
        total += tl.load(residual + place, mask=live, other=0.0).to(tl.float32)
    inside = (column < c)[None, :]
    centred = tl.where(inside, total - (tl.sum(total, 1) / c)[:, None], 0.0)
    scale = (1.0 / tl.sqrt(tl.sum(centred * centred, 1) / c + eps))[:, None]
    return centred * scale, scale


@triton.jit(do_not_specialize=["number"])
def add_norm_kernel(
    x, bias, residual, weight, shift, seed, y, small, n, c, eps, number,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Whole rows of the result, and again in the type of `small`. Grid: (blocks of rows,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_C)
    place = row.to(tl.int64)[:, None] * c + column[None, :]
    live = (row < n)[:, None] & (column < c)[None, :]
    normal, _ = _normalised(x, bias, residual, seed, number, place, column, live, c, eps, BEFORE, SCALE)
    w = tl.load(weight + column, mask=column < c, other=0.0)[None, :]
    b = tl.load(shift + column, mask=column < c, other=0.0)[None, :]
    result = normal * w + b
    result = _drop_out(result, place, seed, number, AFTER, SCALE)
    tl.store(y + place, result, mask=live)
    if small is not None:
        tl.store(small + place, result.to(small.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["number"])
def add_norm_backward_kernel(
    grad, grad_low, x, bias, residual, weight, seed, dx, dresidual, sums, n, c, eps, number,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of x and residual, and a program's part of those of weight, shift and bias. Grid: (programs,)."""
    column = tl.arange(0, BLOCK_C)
    w = tl.load(weight + column, mask=column < c, other=0.0)[None, :]
    of_weight = tl.zeros([BLOCK_C], tl.float32)
    of_shift = tl.zeros([BLOCK_C], tl.float32)
    of_bias = tl.zeros([BLOCK_C], tl.float32)
    for start in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        place = row.to(tl.int64)[:, None] * c + column[None, :]
        live = (row < n)[:, None] & (column < c)[None, :]
        normal, scale = _normalised(x, bias, residual, seed, number, place, column, live, c, eps, BEFORE, SCALE)
        g = tl.zeros([ROWS, BLOCK_C], tl.float32)
        if grad is not None:
            g += tl.load(grad + place, mask=live, other=0.0).to(tl.float32)
        if grad_low is not None:
            g += tl.load(grad_low + place, mask=live, other=0.0).to(tl.float32)
        g = _drop_out(g, place, seed, number, AFTER, SCALE)
        along = g * w
        mean = (tl.sum(along, 1) / c)[:, None]
        inner = scale * (along - mean - normal * (tl.sum(along * normal, 1) / c)[:, None])
        if dresidual is not None:
            tl.store(dresidual + place, inner.to(dresidual.dtype.element_ty), mask=live)
        outer = _drop_out(inner, place, seed, number, BEFORE, SCALE)
        tl.store(dx + place, outer.to(dx.dtype.element_ty), mask=live)
        if sums is not None:
            of_weight += tl.sum(g * normal, 0)
            of_shift += tl.sum(g, 0)
            of_bias += tl.sum(tl.where(live, outer, 0.0), 0)
    if sums is not None:
        part = sums + tl.program_id(0) * 3 * c + column
        tl.store(part, of_weight, mask=column < c)
        tl.store(part + c, of_shift, mask=column < c)
        tl.store(part + 2 * c, of_bias, mask=column < c)


@triton.jit
def bias_gelu_kernel(x, bias, y, n, c, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile of gelu(x + bias). Grid: (blocks of rows, blocks of columns)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    place = row.to(tl.int64)[:, None] * c + column[None, :]
    live = (row < n)[:, None] & (column < c)[None, :]
    v = tl.load(x + place, mask=live, other=0.0).to(tl.float32)
    v += tl.load(bias + column, mask=column < c, other=0.0)[None, :]
    result = v * 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))
    tl.store(y + place, result.to(y.dtype.element_ty), mask=live)


@triton.jit
def bias_gelu_backward_kernel(grad, x, bias, dx, sums, n, c, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The gradient of x, and a program's part of the bias's. Grid: (programs, blocks of columns)."""
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.load(bias + column, mask=column < c, other=0.0)[None, :]
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        place = row.to(tl.int64)[:, None] * c + column[None, :]
        live = (row < n)[:, None] & (column < c)[None, :]
        v = tl.load(x + place, mask=live, other=0.0).to(tl.float32) + b
        g = tl.load(grad + place, mask=live, other=0.0).to(tl.float32)
        below = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))
        g *= below + v * tl.exp(-0.5 * v * v) * 0.3989422804014327
        tl.store(dx + place, g.to(dx.dtype.element_ty), mask=live)
        total += tl.sum(g, 0)
    if sums is not None:
        tl.store(sums + tl.program_id(0) * c + column, total, mask=column < c)


def aot_cases() -> list[AotCase]:
    """BERT's layers at MiniLM's and BERT-base's widths, with dropout, in training's precisions; and the embeddings'."""
    cases = []
    for name, low, c in (("bf16", "bf16", 384), ("bf16", "bf16", 768), ("fp32", "fp32", 384)):
        blocks = _norm_blocks(c)
        warps = blocks.pop("num_warps")
        common = {"n": "i32", "c": "i32"}
        norm = {"weight": "*fp32", "seed": "*i64", "eps": "fp32", "number": "i32", **common}
        inside = {"x": f"*{low}", "bias": "*fp32", "residual": "*fp32", **norm}
        outside = {"x": "*fp32", **norm}  # the embeddings': neither bias nor residual
        result = {"shift": "*fp32", "y": "*fp32"}
        slopes = {"grad": "*fp32", "sums": "*fp32"}
        both = low != "fp32"
        given = {"small": f"*{low}"} if both else {}
        more = {"grad_low": f"*{low}"} if both else {}
        for place, after, forward, backward in (
            ("layer", False, {**inside, **result, **given},
             {**inside, **slopes, **more, "dx": f"*{low}", "dresidual": "*fp32"}),
            ("embeddings", True, {**outside, **result, **given}, {**outside, **slopes, **more, "dx": "*fp32"}),
        ):  # fmt: skip
            if place == "embeddings" and not both:
                continue
            fixed = {**_drop(0.1, after), **blocks}
            for kernel, signature in ((add_norm_kernel, forward), (add_norm_backward_kernel, backward)):
                absent = {k: None for k in kernel.arg_names if k not in signature and k not in fixed}
                title = f"transformer.{kernel.__name__.removesuffix('_kernel')}/{place}/c{c}/{name}"
                cases.append(AotCase(title, kernel, signature, {**fixed, **absent}, num_warps=warps))
        width = {"x": f"*{low}", "bias": "*fp32", **common}
        for kernel, signature in (
            (bias_gelu_kernel, {**width, "y": f"*{low}"}),
            (bias_gelu_backward_kernel, {**width, "grad": f"*{low}", "dx": f"*{low}", "sums": "*fp32"}),
        ):
            if c == 384:
                title = f"transformer.{kernel.__name__.removesuffix('_kernel')}/{name}"
                cases.append(AotCase(title, kernel, signature, dict(GELU)))
    return cases
