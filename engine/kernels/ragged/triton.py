"""Padding on a GPU: a program copies a block of one sequence's rows, or fills what lies past its end."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4


def _blocks(d: int) -> dict[str, int]:
    """Rows and columns of a block: about 2048 numbers."""
    columns = min(triton.next_power_of_2(d), 128)
    return {"BLOCK_T": max(16, 2048 // columns), "BLOCK_D": columns}


def pad(values: Tensor, offsets: Tensor, rows: Tensor, width: int, fill: int, closing: int) -> tuple[Tensor, Tensor]:
    """As `reference.pad`."""
    values, offsets, rows = values.contiguous(), offsets.contiguous(), rows.contiguous()
    d = values.shape[1] if values.ndim == 2 else 1
    dtype = torch.int64 if values.dtype == torch.int32 else torch.float32
    out = torch.empty((len(rows), width, *values.shape[1:]), dtype=dtype, device=values.device)
    lengths = torch.empty(len(rows), dtype=torch.int64, device=values.device)
    if len(rows):
        blocks = _blocks(d)
        grid = (len(rows), triton.cdiv(width, blocks["BLOCK_T"]))
        pad_kernel[grid](values, offsets, rows, out, lengths, width, d, fill, closing, **blocks, num_warps=WARPS)
    return out, lengths


@triton.jit
def pad_kernel(
    values, offsets, rows, out, lengths, width, d, fill, closing, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.load(rows + b)
    start = tl.load(offsets + row)
    whole = tl.load(offsets + row + 1) - start
    n = tl.minimum(whole, width)
    if tl.program_id(1) == 0:
        tl.store(lengths + b, n)
    source = (start + t)[:, None] * d
    to = (b * width + t)[:, None] * d
    kept = (t < n)[:, None]
    for c0 in range(0, d, BLOCK_D):
        c = (c0 + tl.arange(0, BLOCK_D))[None, :]
        v = tl.load(values + source + c, mask=kept & (c < d), other=0).to(out.dtype.element_ty)
        v = tl.where(kept, v, tl.full([1, 1], 0, out.dtype.element_ty) + fill)
        cut = (closing >= 0) & (n < whole)
        v = tl.where(((t == n - 1) & cut)[:, None], tl.full([1, 1], 0, out.dtype.element_ty) + closing, v)
        tl.store(out + to + c, v, mask=(t < width)[:, None] & (c < d))
