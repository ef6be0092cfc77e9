"""What a GPU does between cuDNN's recurrences: turning rows round, joining directions, LayerNorm of their sum.

cuDNN runs on tensors that are ordered by step, [L, B, ...]; of others it makes a copy. So these kernels read and write
that order. A row's valid steps are turned round within its length; what lies behind them is cleared.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # numbers of a tile, about
PROGRAMS = 128  # of norm's backward pass, at most


def _blocks(width: int) -> dict[str, int]:
    """Rows and columns of a tile."""
    columns = min(max(triton.next_power_of_2(width), 16), 128)
    return {"ROWS": TILE // columns, "BLOCK": columns}


def _norm_blocks(hidden: int) -> dict[str, int]:
    """Rows and columns of a tile of whole rows, and warps."""
    block = max(triton.next_power_of_2(hidden), 16)
    return {"ROWS": min(max(TILE // block, 1), 16), "BLOCK": block, "num_warps": 4 if block <= 1024 else 8}


def turn(x: Tensor, length: Tensor, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `plumbing.turn`."""
    x = x if x.stride(2) == 1 else x.contiguous()
    texts, steps, width = x.shape
    plain, turned = (torch.empty((steps, texts, width), dtype=x.dtype, device=x.device) for _ in range(2))
    start = torch.empty((1, texts, hidden), dtype=x.dtype, device=x.device)
    if x.numel():
        blocks = _blocks(width)
        grid = (triton.cdiv(texts * steps, blocks["ROWS"]), triton.cdiv(width, blocks["BLOCK"]))
        turn_kernel[grid](
            x, length, plain, turned, start, texts * steps, texts, width, x.stride(0), x.stride(1), start.numel(),
            **blocks,
        )  # fmt: skip
    return plain, turned, start


def join(forward: Tensor, backward: Tensor, length: Tensor, on: bool) -> tuple[Tensor, Tensor]:
    """As `plumbing.join`."""
    forward, backward = forward.contiguous(), backward.contiguous()
    steps, texts, hidden = forward.shape
    shape = (steps, texts, 2 * hidden) if on else (texts, steps, 2 * hidden)
    joined = torch.empty(shape, dtype=forward.dtype, device=forward.device)
    turned = torch.empty(shape if on else (0,), dtype=forward.dtype, device=forward.device)
    if forward.numel():
        blocks = _blocks(hidden)
        grid = (triton.cdiv(texts * steps, blocks["ROWS"]), triton.cdiv(hidden, blocks["BLOCK"]))
        strides = (texts * 2 * hidden, 2 * hidden) if on else (2 * hidden, steps * 2 * hidden)
        join_kernel[grid](
            forward, backward, length, joined, turned if on else None, texts * steps, texts, hidden, *strides, **blocks
        )
    return joined, turned


def join_backward(
    grad: Tensor | None, turned_grad: Tensor | None, length: Tensor, on: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `plumbing.join_backward`."""
    grad, turned_grad = (None if g is None else g.contiguous() for g in (grad, turned_grad))
    like = turned_grad if grad is None else grad
    (steps, texts), hidden = (like.shape[:2] if on else like.shape[1::-1]), like.shape[2] // 2
    of_forward, of_backward = (
        torch.empty((steps, texts, hidden), dtype=like.dtype, device=like.device) for _ in range(2)
    )
    if like.numel():
        blocks = _blocks(hidden)
        grid = (triton.cdiv(texts * steps, blocks["ROWS"]), triton.cdiv(hidden, blocks["BLOCK"]))
        strides = (texts * 2 * hidden, 2 * hidden) if on else (2 * hidden, steps * 2 * hidden)
        join_backward_kernel[grid](
            grad, turned_grad, length, of_forward, of_backward, texts * steps, texts, hidden, *strides, **blocks
        )
    return of_forward, of_backward


def norm(
    forward: Tensor, backward: Tensor, length: Tensor, weight: Tensor, shift: Tensor, eps: float, clear: bool
) -> Tensor:  # fmt: skip
    """As `plumbing.norm`."""
    forward, backward = forward.contiguous(), backward.contiguous()
    steps, texts, hidden = forward.shape
    y = torch.empty((texts, steps, hidden), dtype=forward.dtype, device=forward.device)
    if y.numel():
        blocks = _norm_blocks(hidden)
        norm_kernel[(triton.cdiv(texts * steps, blocks["ROWS"]),)](
            forward, backward, length, weight, shift, y, texts * steps, texts, steps, hidden, eps, CLEAR=clear, **blocks
        )
    return y


def norm_backward(
    grad: Tensor, forward: Tensor, backward: Tensor, length: Tensor, weight: Tensor, shift: Tensor, eps: float,
    clear: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `plumbing.norm_backward`."""
    grad, forward, backward = grad.contiguous(), forward.contiguous(), backward.contiguous()
    steps, texts, hidden = forward.shape
    of_forward, of_backward = (torch.empty_like(forward) for _ in range(2))
    blocks = _norm_blocks(hidden)
    tiles = triton.cdiv(texts * steps, blocks["ROWS"])
    programs = triton.cdiv(tiles, max(triton.cdiv(tiles, PROGRAMS), 1))  # all of them with as many tiles
    parts = torch.empty((programs, 2, hidden), dtype=weight.dtype, device=weight.device)
    if forward.numel():
        norm_backward_kernel[(programs,)](
            grad, forward, backward, length, weight, shift, of_forward, of_backward, parts, texts * steps, texts, steps,
            hidden, eps, CLEAR=clear, **blocks,
        )  # fmt: skip
    return of_forward, of_backward, parts.sum(0)


# Not specialised: every bucket of lengths would compile the kernels anew.
_SIZES = ["n", "texts", "steps"]


@triton.jit
def _steps(row, n, texts, lengths):
    """Of rows in the order of steps: step, text, whether the step is valid, and its place in the text turned round."""
    step, text = row // texts, row % texts
    own = tl.minimum(tl.load(lengths + text, mask=row < n, other=0).to(tl.int32), n // texts)
    inside = (row < n) & (step < own)
    return step, text, inside, tl.where(inside, own - 1 - step, step)


@triton.jit(do_not_specialize=_SIZES)
def turn_kernel(
    x, lengths, plain, turned, start, n, texts, width, text_stride, step_stride, n_start,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [texts, steps, width] by steps, and so turned round; and zeros. Grid: (blocks of rows, blocks of columns)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    step, text, _, other = _steps(row, n, texts, lengths)
    live = (row < n)[:, None] & (column < width)
    source = x + text.to(tl.int64)[:, None] * text_stride + column
    here = tl.load(source + step.to(tl.int64)[:, None] * step_stride, mask=live, other=0.0)
    there = tl.load(source + other.to(tl.int64)[:, None] * step_stride, mask=live, other=0.0)
    to = row.to(tl.int64)[:, None] * width + column
    tl.store(plain + to, here, mask=live)
    tl.store(turned + to, there, mask=live)
    if tl.program_id(1) == 0:
        for first in range(tl.program_id(0) * BLOCK, n_start, tl.num_programs(0) * BLOCK):
            i = first + tl.arange(0, BLOCK)
            tl.store(start + i, tl.zeros([BLOCK], start.dtype.element_ty), mask=i < n_start)


@triton.jit(do_not_specialize=_SIZES)
def join_kernel(
    forward, backward, lengths, joined, turned, n, texts, hidden, step_stride, text_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both directions side by side; the backward one was computed turned round. And the same turned round."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    step, text, inside, other = _steps(row, n, texts, lengths)
    live, valid = (row < n)[:, None] & (column < hidden), inside[:, None] & (column < hidden)
    here = row.to(tl.int64)[:, None] * hidden + column
    there = (other.to(tl.int64) * texts + text)[:, None] * hidden + column
    to = (step.to(tl.int64) * step_stride + text.to(tl.int64) * text_stride)[:, None] + column
    tl.store(joined + to, tl.load(forward + here, mask=valid, other=0.0), mask=live)
    tl.store(joined + to + hidden, tl.load(backward + there, mask=valid, other=0.0), mask=live)
    if turned is not None:
        tl.store(turned + to, tl.load(forward + there, mask=valid, other=0.0), mask=live)
        tl.store(turned + to + hidden, tl.load(backward + here, mask=valid, other=0.0), mask=live)


@triton.jit(do_not_specialize=_SIZES)
def join_backward_kernel(
    grad, turned_grad, lengths, of_forward, of_backward, n, texts, hidden, step_stride, text_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    step, text, inside, other = _steps(row, n, texts, lengths)
    live, valid = (row < n)[:, None] & (column < hidden), inside[:, None] & (column < hidden)
    here = (step.to(tl.int64) * step_stride + text.to(tl.int64) * text_stride)[:, None] + column
    there = (other.to(tl.int64) * step_stride + text.to(tl.int64) * text_stride)[:, None] + column
    first = tl.zeros([ROWS, BLOCK], of_forward.dtype.element_ty)
    second = tl.zeros([ROWS, BLOCK], of_forward.dtype.element_ty)
    if grad is not None:
        first += tl.load(grad + here, mask=valid, other=0.0)
        second += tl.load(grad + there + hidden, mask=valid, other=0.0)
    if turned_grad is not None:
        first += tl.load(turned_grad + there, mask=valid, other=0.0)
        second += tl.load(turned_grad + here + hidden, mask=valid, other=0.0)
    to = row.to(tl.int64)[:, None] * hidden + column
    tl.store(of_forward + to, first, mask=live)
    tl.store(of_backward + to, second, mask=live)


@triton.jit
def _normalised(forward, backward, row, text, other, inside, texts, hidden, column, eps):
    """LayerNorm's normalised input, the sum of both directions, and 1 / its standard deviation [rows, 1]."""
    valid = inside[:, None] & (column < hidden)[None, :]
    here = row.to(tl.int64)[:, None] * hidden + column[None, :]
    there = (other.to(tl.int64) * texts + text)[:, None] * hidden + column[None, :]
    total = tl.load(forward + here, mask=valid, other=0.0) + tl.load(backward + there, mask=valid, other=0.0)
    centred = tl.where((column < hidden)[None, :], total - (tl.sum(total, 1) / hidden)[:, None], 0.0)
    scale = (1.0 / tl.sqrt(tl.sum(centred * centred, 1) / hidden + eps))[:, None]
    return centred * scale, scale


@triton.jit(do_not_specialize=_SIZES)
def norm_kernel(
    forward, backward, lengths, weight, shift, y, n, texts, steps, hidden, eps,
    CLEAR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """relu(LayerNorm(forward + backward)) [texts, steps, hidden]. Grid: (blocks of rows,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    step, text, inside, other = _steps(row, n, texts, lengths)
    normal, _ = _normalised(forward, backward, row, text, other, inside, texts, hidden, column, eps)
    w = tl.load(weight + column, mask=column < hidden, other=0.0)[None, :]
    b = tl.load(shift + column, mask=column < hidden, other=0.0)[None, :]
    result = normal * w + b
    result = tl.where(result < 0, 0.0, result)  # NaN passes, as in torch
    if CLEAR:
        result = tl.where(inside[:, None], result, 0.0)
    to = (text.to(tl.int64) * steps + step)[:, None] * hidden + column[None, :]
    tl.store(y + to, result, mask=(row < n)[:, None] & (column < hidden)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def norm_backward_kernel(
    grad, forward, backward, lengths, weight, shift, of_forward, of_backward, parts, n, texts, steps, hidden, eps,
    CLEAR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of both directions, and a program's part of those of weight and shift. Grid: (programs,)."""
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < hidden, other=0.0)[None, :]
    b = tl.load(shift + column, mask=column < hidden, other=0.0)[None, :]
    of_weight = tl.zeros([BLOCK], tl.float32)
    of_shift = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        step, text, inside, other = _steps(row, n, texts, lengths)
        normal, scale = _normalised(forward, backward, row, text, other, inside, texts, hidden, column, eps)
        counts = inside if CLEAR else row < n
        live = (row < n)[:, None] & (column < hidden)[None, :]
        at = (text.to(tl.int64) * steps + step)[:, None] * hidden + column[None, :]
        g = tl.load(grad + at, mask=counts[:, None] & (column < hidden)[None, :], other=0.0)
        g = tl.where(normal * w + b > 0, g, 0.0)
        along = g * w
        mean = (tl.sum(along, 1) / hidden)[:, None]
        inner = scale * (along - mean - normal * (tl.sum(along * normal, 1) / hidden)[:, None])
        inner = tl.where(inside[:, None], inner, 0.0)
        here = row.to(tl.int64)[:, None] * hidden + column[None, :]
        there = (other.to(tl.int64) * texts + text)[:, None] * hidden + column[None, :]
        tl.store(of_forward + here, inner, mask=live)
        tl.store(of_backward + there, inner, mask=live)
        of_weight += tl.sum(g * normal, 0)
        of_shift += tl.sum(g, 0)
    part = parts + tl.program_id(0) * 2 * hidden + column
    tl.store(part, of_weight, mask=column < hidden)
    tl.store(part + hidden, of_shift, mask=column < hidden)
