"""GPU kernels for products of fp32 that are taken in bf16: splitting numbers into three parts, adding the products up.

A number of fp32 is the sum of three of bf16 (`plan.PARTS`, `plan.KEPT`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECES = {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 4}


@triton.jit
def three_parts(x):
    """fp32 as the sum of three numbers of bf16, the largest first."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _split_rows(x_ptr, out_ptr, rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The three parts of x [rows, width] next to each other, [rows, 3 width]. Grid: (row blocks, width blocks)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    first = row.to(tl.int64)[:, None] * width + column[None, :]
    place = first + 2 * row.to(tl.int64)[:, None] * width
    high, middle, low = three_parts(tl.load(x_ptr + first, mask=mask, other=0.0))
    tl.store(out_ptr + place, high, mask=mask)
    tl.store(out_ptr + place + width, middle, mask=mask)
    tl.store(out_ptr + place + 2 * width, low, mask=mask)


@triton.jit
def _fold(
    a_ptr, b_ptr, c_ptr, out_ptr, rows, width, group_step,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum of the pieces of a [G, rows, A width], b [.., B width] and c [.., C width], the smallest first, into out,
    whose groups lie `group_step` apart. Grid: (row blocks, width blocks, groups)."""
    group = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    place = (group * rows + row)[:, None] * width
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(C):
        total += tl.load(c_ptr + C * place + (C - 1 - i) * width + column[None, :], mask=mask, other=0.0)
    for i in tl.static_range(B):
        total += tl.load(b_ptr + B * place + (B - 1 - i) * width + column[None, :], mask=mask, other=0.0)
    for i in tl.static_range(A):
        total += tl.load(a_ptr + A * place + (A - 1 - i) * width + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + group * group_step + row.to(tl.int64)[:, None] * width + column[None, :], total, mask=mask)


def split(x: Tensor) -> Tensor:
    """The parts of fp32 x [G, N, d] in bf16, [G, N, 3 d]: they add up to x, the largest first."""
    groups, rows, width = x.shape
    out = torch.empty(groups, rows, 3 * width, dtype=torch.bfloat16, device=x.device)
    grid = (triton.cdiv(groups * rows, PIECES["BLOCK_M"]), triton.cdiv(width, PIECES["BLOCK_N"]))
    _split_rows[grid](x, out, groups * rows, width, **PIECES)
    return out


def fold(pieces: list[Tensor], out: Tensor) -> None:
    """Write into out [G, n, d] the sum of all blocks of width d of three tensors [G, n, count d]."""
    groups, rows, width = out.shape
    counts = [p.shape[2] // width for p in pieces]
    grid = (triton.cdiv(rows, PIECES["BLOCK_M"]), triton.cdiv(width, PIECES["BLOCK_N"]), groups)
    _fold[grid](*pieces, out, rows, width, out.stride(0), *counts, **PIECES)
