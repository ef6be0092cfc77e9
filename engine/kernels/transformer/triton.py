"""The operations on a GPU. Sums over rows have a fixed order: no atomics, bitwise the same every time.

In a backward pass a few hundred programs (`plan`) go over the rows and keep their sums of the parameters' gradients in
registers. What they leave is added up in one more launch, or, with `apart`, later and for many operations at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.dropout import reference as dropout
from engine.kernels.registry import interpreting
from engine.kernels.transformer import plan
from engine.kernels.transformer.reference import HIDDEN
from engine.kernels.transformer.sums import MOST
from engine.kernels.triton_math import drop_out

GELU = {"ROWS": plan.GELU_ROWS, "BLOCK_C": 128}  # a tile of bias_gelu
EMBED = {"ROWS": 16, "BLOCK_C": 128}  # a tile of the embeddings
# A warp adds up the gradients of one embedding, columns at a time: it looks through the tokens in blocks of SCAN for an
# earlier one of its id, and in blocks of ROWS for those whose rows it adds.
EMBED_BACKWARD = {"SCAN": 128, "ROWS": 32, "BLOCK_C": 64, "num_warps": 1}
SUM = {"ROWS": 32, "BLOCK": 64}  # a tile of sums over parts
NOT_SEEN = tl.constexpr(HIDDEN)


def _norm_blocks(c: int) -> dict[str, int]:
    """Rows at a time, columns and warps of a program that holds whole rows: 2,048 numbers, or one row."""
    block = max(triton.next_power_of_2(c), 16)
    return {"ROWS": max(2048 // block, 1), "BLOCK_C": block, "num_warps": 8 if block <= 2048 else 16}


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
    weight: Tensor, seed: Tensor | None, p: float, after: bool, eps: float, number: int, parameters: bool, apart: bool,
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
    programs = plan.norm_programs(n, c)
    sums = torch.empty((programs, 3, c) if parameters else (0,), dtype=weight.dtype, device=x.device)
    if n:
        add_norm_backward_kernel[(programs,)](
            grad, grad_low, x, bias, residual, weight, seed, dx, None if residual is None else dresidual,
            sums if parameters else None, n, c, eps, number, **_drop(p, after), **plan.norm_blocks(c),
        )  # fmt: skip
    return dx, dresidual, _added_up(sums, parameters, apart)


def _added_up(sums: Tensor, parameters: bool, apart: bool) -> Tensor:
    return sum_parts(sums, [])[0] if parameters and not apart else sums


def sum_parts(first: Tensor, others: Sequence[Tensor]) -> Tensor:
    """As `cpu.sum_parts`."""
    parts = [part.contiguous() for part in (first, *others)]
    rows, *shape = first.shape
    out = torch.empty((len(parts), *shape), dtype=first.dtype, device=first.device)
    width = out[0].numel()
    for start in range(0, len(parts), MOST):
        some = parts[start : start + MOST]
        grid = (triton.cdiv(width, SUM["BLOCK"]), len(some))
        sum_parts_kernel[grid](*some, *some[:1] * (MOST - len(some)), out[start:], rows, width, **SUM)
    return out


def embed(token_ids: Tensor, position: Tensor | None, words: Tensor, positions: Tensor, types: Tensor) -> Tensor:
    """As `cpu.embed`."""
    token_ids, position = token_ids.contiguous(), None if position is None else position.contiguous()
    words, positions, types = words.contiguous(), positions.contiguous(), types.contiguous()
    n, c = token_ids.numel(), words.shape[1]
    x = torch.empty((n, c), dtype=words.dtype, device=words.device)
    if n:
        grid = (triton.cdiv(n, EMBED["ROWS"]), triton.cdiv(c, EMBED["BLOCK_C"]))
        embed_kernel[grid](
            token_ids, position, words, positions, types, x, n, token_ids.shape[1], len(words), len(positions), c,
            **EMBED,
        )  # fmt: skip
    return x


def embed_backward(
    grad: Tensor, token_ids: Tensor, position: Tensor | None, parts: Tensor, words: int, positions: int, types: int,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `cpu.embed_backward`."""
    grad, parts, token_ids = grad.contiguous(), parts.contiguous(), token_ids.contiguous()
    position = None if position is None else position.contiguous()
    n, c = grad.shape
    dwords = torch.zeros((words, c), dtype=grad.dtype, device=grad.device)
    of_places = torch.empty((positions, c), dtype=grad.dtype, device=grad.device)
    of_types = torch.empty((types, c), dtype=grad.dtype, device=grad.device)
    embed_backward_kernel[(n + positions + types, triton.cdiv(c, EMBED_BACKWARD["BLOCK_C"]))](
        grad, token_ids, position, parts, dwords, of_places, of_types, n, token_ids.shape[1], len(parts), words,
        positions, c, padding, **EMBED_BACKWARD,
    )  # fmt: skip
    return dwords, of_places, of_types


def _text_blocks(length: int, width: int) -> dict[str, int | bool]:
    """A program of attention holds one head of one text. The interpreter would multiply the bits of 16-bit numbers."""
    block = max(triton.next_power_of_2(length), 16)
    return {
        "BLOCK_L": block,
        "BLOCK_D": max(triton.next_power_of_2(width), 16),
        "num_warps": 8 if block > 32 else 4,
        "UPCAST": interpreting(),
    }


def _mask_strides(mask: Tensor) -> tuple[Tensor, int, int]:
    """The mask with its last axis contiguous, and its strides along texts and queries (0: one row for all)."""
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    return mask, mask.stride(0), mask.stride(2) if mask.shape[2] > 1 else 0


def attention(
    qkv: Tensor, q_bias: Tensor, k_bias: Tensor, v_bias: Tensor, mask: Tensor, seed: Tensor | None, p: float,
    heads: int, number: int,
) -> Tensor:  # fmt: skip
    """As `cpu.attention`."""
    qkv, (mask, *strides) = qkv.contiguous(), _mask_strides(mask)
    c, length = len(q_bias), mask.shape[-1]
    out = torch.empty((len(qkv), c), dtype=qkv.dtype, device=qkv.device)
    if len(qkv):
        attention_kernel[(heads, len(mask))](
            qkv, q_bias, k_bias, v_bias, mask, seed, out, *strides, length, c, c // heads, (c // heads) ** -0.5, number,
            THRESHOLD=dropout.threshold(p), SCALE=1 / (1 - p), **_text_blocks(length, c // heads),
        )  # fmt: skip
    return out


def attention_backward(
    grad: Tensor, qkv: Tensor, q_bias: Tensor, k_bias: Tensor, v_bias: Tensor, mask: Tensor, seed: Tensor | None,
    p: float, heads: int, number: int, parameters: bool, apart: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `cpu.attention_backward`."""
    qkv, grad, (mask, *strides) = qkv.contiguous(), grad.contiguous(), _mask_strides(mask)
    c, length = len(q_bias), mask.shape[-1]
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    sums = torch.empty((len(mask), 3, c) if parameters else (0,), dtype=q_bias.dtype, device=qkv.device)
    if len(qkv):
        attention_backward_kernel[(heads, len(mask))](
            grad, qkv, q_bias, k_bias, v_bias, mask, seed, dqkv, sums if parameters else None, *strides,
            length, c, c // heads, (c // heads) ** -0.5, number,
            THRESHOLD=dropout.threshold(p), SCALE=1 / (1 - p), **_text_blocks(length, c // heads),
        )  # fmt: skip
    return dqkv, _added_up(sums, parameters, apart)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """As `cpu.bias_gelu`."""
    x = x.contiguous()
    n, c = x.shape
    y = torch.empty((n, c), dtype=x.dtype, device=x.device)
    if n:
        grid = (triton.cdiv(n, GELU["ROWS"]), triton.cdiv(c, GELU["BLOCK_C"]))
        bias_gelu_kernel[grid](x, bias, y, n, c, **GELU)
    return y


def bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor, parameters: bool, apart: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `cpu.bias_gelu_backward`."""
    x, grad = x.contiguous(), grad.contiguous()
    n, c = x.shape
    dx = torch.empty((n, c), dtype=x.dtype, device=x.device)
    programs = plan.gelu_programs(n)
    sums = torch.empty((programs, 1, c) if parameters else (0,), dtype=bias.dtype, device=x.device)
    if n:
        grid = (programs, triton.cdiv(c, GELU["BLOCK_C"]))
        bias_gelu_backward_kernel[grid](grad, x, bias, dx, sums if parameters else None, n, c, **GELU)
    sums = _added_up(sums, parameters, apart)
    return dx, sums[0] if parameters and not apart else sums


@triton.jit
def _normalised(
    x, bias, residual, seed, number, first, place, column, live, c, eps, BEFORE: tl.constexpr, SCALE: tl.constexpr
):  # fmt: skip
    """Rows of LayerNorm's normalised input, and 1 / their standard deviation [rows, 1]. Columns past c hold 0."""
    total = tl.load(x + place, mask=live, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + column, mask=column < c, other=0.0)[None, :]
    total = drop_out(total, first, column[None, :], seed, number, BEFORE, SCALE)
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
    first = row.to(tl.int64)[:, None] * c
    place = first + column[None, :]
    live = (row < n)[:, None] & (column < c)[None, :]
    normal, _ = _normalised(x, bias, residual, seed, number, first, place, column, live, c, eps, BEFORE, SCALE)
    w = tl.load(weight + column, mask=column < c, other=0.0)[None, :]
    b = tl.load(shift + column, mask=column < c, other=0.0)[None, :]
    result = normal * w + b
    result = drop_out(result, first, column[None, :], seed, number, AFTER, SCALE)
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
        first = row.to(tl.int64)[:, None] * c
        place = first + column[None, :]
        live = (row < n)[:, None] & (column < c)[None, :]
        normal, scale = _normalised(x, bias, residual, seed, number, first, place, column, live, c, eps, BEFORE, SCALE)
        g = tl.zeros([ROWS, BLOCK_C], tl.float32)
        if grad is not None:
            g += tl.load(grad + place, mask=live, other=0.0).to(tl.float32)
        if grad_low is not None:
            g += tl.load(grad_low + place, mask=live, other=0.0).to(tl.float32)
        g = drop_out(g, first, column[None, :], seed, number, AFTER, SCALE)
        along = g * w
        mean = (tl.sum(along, 1) / c)[:, None]
        inner = scale * (along - mean - normal * (tl.sum(along * normal, 1) / c)[:, None])
        if dresidual is not None:
            tl.store(dresidual + place, inner.to(dresidual.dtype.element_ty), mask=live)
        outer = drop_out(inner, first, column[None, :], seed, number, BEFORE, SCALE)
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


@triton.jit(do_not_specialize=["rows"])
def sum_parts_kernel(
    p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15, out, rows, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the rows of up to MOST tensors [rows, width]. Grid: (blocks of columns, tensors)."""
    which = tl.program_id(1)
    parts = p0
    given = (p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15)
    for i in tl.static_range(15):
        if which == i + 1:
            parts = given[i]
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        live = (row < rows)[:, None] & (column < width)[None, :]
        total += tl.load(parts + row.to(tl.int64)[:, None] * width + column[None, :], mask=live, other=0.0)
    tl.store(out + which.to(tl.int64) * width + column, tl.sum(total, 0), mask=column < width)


# Not specialised: every bucket of lengths would compile the kernels anew.
_SIZES = ["n", "length", "programs", "vocabulary", "places"]


@triton.jit(do_not_specialize=_SIZES)
def embed_kernel(
    token_ids, position, words, positions, types, x, n, length, vocabulary, places, c,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of word + (position + type 0); NaN where a token or a position has no row. Grid: (rows, columns)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live, inside = row < n, (column < c)[None, :]
    token = tl.load(token_ids + row, mask=live, other=0)
    if position is None:  # noqa: SIM108 - each side is compiled only where it is meant
        place = (row % length).to(tl.int64)
    else:
        place = tl.load(position + row, mask=live, other=0)
    known = live & (token >= 0) & (token < vocabulary) & (place >= 0) & (place < places)
    there = known[:, None] & inside
    missing = float("nan")
    word = tl.load(words + token[:, None] * c + column[None, :], mask=there, other=missing).to(tl.float32)
    at = tl.load(positions + place[:, None] * c + column[None, :], mask=there, other=missing).to(tl.float32)
    kind = tl.load(types + column, mask=column < c, other=0.0).to(tl.float32)
    to = x + row.to(tl.int64)[:, None] * c + column[None, :]
    tl.store(to, word + (at + kind[None, :]), mask=live[:, None] & inside)


@triton.jit
def _sum_of_rows(grad, keys, key, first, n, length, c, column, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum over the rows i >= first of grad with keys[i] == key, in their order. Without keys i % length is the key."""
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(first, n, ROWS):
        i = start + tl.arange(0, ROWS)
        if keys is None:
            same = (i < n) & (i % length == key)
        else:
            same = (i < n) & (tl.load(keys + i, mask=i < n, other=0) == key)
        if tl.max(same.to(tl.int32), 0) > 0:
            place = i.to(tl.int64)[:, None] * c + column[None, :]
            total += tl.sum(tl.load(grad + place, mask=same[:, None] & (column < c)[None, :], other=0.0), 0)
    return total


@triton.jit(do_not_specialize=_SIZES)
def embed_backward_kernel(
    grad, token_ids, position, parts, of_words, of_places, of_types, n, length, programs, vocabulary, places, c,
    padding, SCAN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of the embeddings. Grid: (n + places + types, blocks of columns).

    A program of the first n is a row: if it is the first of its token it adds up all rows of this token. The next are
    positions, which add up their rows. The last are types: all rows are of the first, whose gradient is the sum over
    parts [programs, 3, c] of the last of the three.
    """
    which = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < c
    if which < n:
        token = tl.load(token_ids + which)
        earlier = tl.zeros([SCAN], tl.int32)
        for start in range(0, which, SCAN):
            i = start + tl.arange(0, SCAN)
            earlier += ((i < which) & (tl.load(token_ids + i, mask=i < which, other=0) == token)).to(tl.int32)
        known = (token >= 0) & (token < vocabulary) & (token != padding)
        if known & (tl.max(earlier, 0) == 0):
            total = _sum_of_rows(grad, token_ids, token, which, n, length, c, column, ROWS, BLOCK_C)
            tl.store(of_words + token * c + column, total, mask=inside)
    elif which < n + places:
        place = which - n
        total = _sum_of_rows(grad, position, place, 0, n, length, c, column, ROWS, BLOCK_C)
        tl.store(of_places + place.to(tl.int64) * c + column, total, mask=inside)
    else:
        kind = which - n - places
        tile = tl.zeros([ROWS, BLOCK_C], tl.float32)
        if kind == 0:
            for start in range(0, programs, ROWS):
                row = start + tl.arange(0, ROWS)
                part = parts + (row.to(tl.int64)[:, None] * 3 + 2) * c + column[None, :]
                tile += tl.load(part, mask=(row < programs)[:, None] & inside[None, :], other=0.0)
        tl.store(of_types + kind.to(tl.int64) * c + column, tl.sum(tile, 0), mask=inside)


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def _rows(x, bias, first, stride, i, e, length, d):
    """Rows i of one head, with its bias, rounded to x's type; rows past `length` and columns past d hold 0."""
    live = (i < length)[:, None] & (e < d)[None, :]
    v = tl.load(x + first + i[:, None] * stride + e[None, :], mask=live, other=0.0)
    b = tl.load(bias + e, mask=e < d, other=0.0)[None, :]
    return tl.where(live, v.to(tl.float32) + b, 0.0).to(x.dtype.element_ty)


@triton.jit
def _attention_weights(q, k, mask, text, mask_text, mask_row, i, length, scale, UPCAST: tl.constexpr):
    """softmax(q k' scale + mask) [BLOCK_L, BLOCK_L]; keys past `length` weigh 0."""
    j = i[None, :]
    if mask.dtype.element_ty.is_int():  # of tokens: one row for all queries
        seen = tl.load(mask + text * mask_text + j, mask=j < length, other=0).to(tl.int32)
        added = tl.where(j < length, tl.where(seen != 0, 0.0, NOT_SEEN), float("-inf"))
        scores = _dot(q, tl.trans(k), UPCAST) * scale + added
    else:
        scores = _dot(q, tl.trans(k), UPCAST) * scale
        live = (i < length)[:, None] & (j < length)
        scores += tl.load(mask + text * mask_text + i[:, None] * mask_row + j, mask=live, other=0.0).to(tl.float32)
        scores = tl.where(j < length, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit(do_not_specialize=["number"])
def attention_kernel(
    qkv, q_bias, k_bias, v_bias, mask, seed, out, mask_text, mask_row, length, c, d, scale, number,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One head of one text. Grid: (heads, texts)."""
    head, text = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, e = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_D)
    first = text * length * 3 * c + head * d
    q = _rows(qkv, q_bias + head * d, first, 3 * c, i, e, length, d)
    k = _rows(qkv, k_bias + head * d, first + c, 3 * c, i, e, length, d)
    v = _rows(qkv, v_bias + head * d, first + 2 * c, 3 * c, i, e, length, d)
    weights = _attention_weights(q, k, mask, text, mask_text, mask_row, i, length, scale, UPCAST)
    start, offset = (text * tl.num_programs(0) + head) * length * length, i[:, None] * length + i[None, :]
    weights = drop_out(weights, start, offset, seed, number, THRESHOLD, SCALE)
    result = _dot(weights.to(v.dtype), v, UPCAST)
    to = out + (text * length + i[:, None]) * c + head * d + e[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=(i < length)[:, None] & (e < d)[None, :])


@triton.jit
def _store_rows(dx, sums, value, first, stride, place, i, e, length, d):
    """Gradients of one head's rows, and their sum over the rows."""
    live = (i < length)[:, None] & (e < d)[None, :]
    tl.store(dx + first + i[:, None] * stride + e[None, :], value.to(dx.dtype.element_ty), mask=live)
    if sums is not None:
        tl.store(sums + place + e, tl.sum(tl.where(live, value, 0.0), 0), mask=e < d)


@triton.jit(do_not_specialize=["number"])
def attention_backward_kernel(
    grad, qkv, q_bias, k_bias, v_bias, mask, seed, dqkv, sums, mask_text, mask_row, length, c, d, scale, number,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of one head of one text, and their sums over its tokens. Grid: (heads, texts)."""
    head, text = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, e = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_D)
    live = (i < length)[:, None] & (e < d)[None, :]
    first = text * length * 3 * c + head * d
    q = _rows(qkv, q_bias + head * d, first, 3 * c, i, e, length, d)
    k = _rows(qkv, k_bias + head * d, first + c, 3 * c, i, e, length, d)
    g = tl.load(grad + (text * length + i[:, None]) * c + head * d + e[None, :], mask=live, other=0.0)
    weights = _attention_weights(q, k, mask, text, mask_text, mask_row, i, length, scale, UPCAST)
    start, offset = (text * tl.num_programs(0) + head) * length * length, i[:, None] * length + i[None, :]
    kept = drop_out(weights, start, offset, seed, number, THRESHOLD, SCALE)
    sum_place = text * 3 * c + head * d
    dv = _dot(tl.trans(kept.to(g.dtype)), g, UPCAST)
    _store_rows(dqkv, sums, dv, first + 2 * c, 3 * c, sum_place + 2 * c, i, e, length, d)
    v = _rows(qkv, v_bias + head * d, first + 2 * c, 3 * c, i, e, length, d)
    slopes = drop_out(_dot(g, tl.trans(v), UPCAST), start, offset, seed, number, THRESHOLD, SCALE)
    slopes = weights * (slopes - tl.sum(weights * slopes, 1)[:, None]) * scale
    slopes = tl.where((i < length)[:, None], slopes, 0.0).to(g.dtype)
    dq = _dot(slopes, k, UPCAST)
    _store_rows(dqkv, sums, dq, first, 3 * c, sum_place, i, e, length, d)
    dk = _dot(tl.trans(slopes), q, UPCAST)
    _store_rows(dqkv, sums, dk, first + c, 3 * c, sum_place + c, i, e, length, d)


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
