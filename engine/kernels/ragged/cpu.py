"""Host functions of the compiled kernel: ragged.cpp holds the loops."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.kernels import build

SOURCE = Path(__file__).with_name("ragged.cpp")
KINDS = {torch.float32: 0, torch.float16: 1, torch.int32: 2}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernel, compiled at its first use; None (logged once) where it cannot be had."""
    pointer, size, count, real = build.POINTER, build.SIZE, build.INT, build.DOUBLE
    functions = {
        "ragged_pad": [count, *[pointer] * 3, *[size] * 5, *[pointer] * 2, count],
        "ragged_scale": [pointer, size, size, pointer, pointer, real, pointer, count],
    }
    return build.library(SOURCE, torch.float32, functions, "plain torch runs")


def pad(values: Tensor, offsets: Tensor, rows: Tensor, width: int, fill: int, closing: int) -> tuple[Tensor, Tensor]:
    """As `reference.pad`.

    Raises:
        ValueError: rows out of range.
    """
    values, offsets, rows = values.contiguous(), offsets.contiguous(), rows.contiguous()
    count, batch = len(offsets) - 1, len(rows)
    dtype = torch.int64 if values.dtype == torch.int32 else torch.float32
    out = values.new_empty((batch, width, *values.shape[1:]), dtype=dtype)
    lengths = rows.new_empty(batch)
    if not batch:
        return out, lengths
    least, most = (int(v) for v in rows.aminmax())
    if least < 0 or most >= count:
        raise ValueError(f"rows from {least} to {most} of {count} sequences")
    library().ragged_pad(
        KINDS[values.dtype], values.data_ptr(), offsets.data_ptr(), rows.data_ptr(), batch, width,
        values.shape[1] if values.ndim == 2 else 1, fill, closing, out.data_ptr(), lengths.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out, lengths


def scale(values: np.ndarray, shift: np.ndarray, factor: np.ndarray, clip: float) -> np.ndarray | None:
    """`(values - shift) * factor` in float64, cut to ±clip, as float32; frames that are all zero stay so.

    Args:
        values: float32 [frames, d]. shift, factor: float64 [d]. clip: infinity leaves values as they are.

    Returns:
        float32 [frames, d], bit for bit what numpy computes; None where there is no compiled kernel.
    """
    loaded = library()
    if loaded is None:
        return None
    values = np.ascontiguousarray(values, np.float32)
    shift, factor = (np.ascontiguousarray(a, np.float64) for a in (shift, factor))
    out = np.empty(values.shape, np.float32)
    loaded.ragged_scale(
        values.ctypes.data, len(values), values.shape[1], shift.ctypes.data, factor.ctypes.data, clip, out.ctypes.data,
        torch.get_num_threads(),
    )  # fmt: skip
    return out
