"""Host functions of the compiled kernel: ragged.cpp holds the loops."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.kernels import build

SOURCE = Path(__file__).with_name("ragged.cpp")
Scale = tuple[Tensor, Tensor, float]  # see `op.Source`
KINDS = {torch.float32: 0, torch.float16: 1, torch.int32: 2}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernel, compiled at its first use; None (logged once) if it cannot be compiled."""
    pointer, size, count, real = build.POINTER, build.SIZE, build.INT, build.DOUBLE
    functions = {
        "ragged_pad": [size, pointer, size, *[pointer] * 4, count],
        "ragged_scale": [pointer, size, size, pointer, pointer, real, pointer, count],
    }
    return build.library(SOURCE, torch.float32, functions, "plain torch runs")


def pad(values: Tensor, offsets: Tensor, rows: Tensor, width: int, fill: int, closing: int) -> tuple[Tensor, Tensor]:
    """As `reference.pad`.

    Raises:
        ValueError: rows out of range, or offsets that fall or leave the values.
    """
    batches = Batches([(values, offsets, fill, closing, width, None)], rows, [len(rows)], [[width]])
    lengths = rows.new_empty(len(rows))
    return batches.take(0, lengths)[0], lengths


class Batches:
    """Runs of `rows` out of several ragged arrays, padded one batch per call.

    Args:
        sources: (values, offsets, fill, closing, most, scale) each, as for `op.pad_batches`.
        rows: int64, of all batches end to end.
        sizes: rows of each batch.
        widths: for each batch, the widths of its tensors, one per source.

    Raises:
        ValueError: rows out of range, or offsets that fall or leave the values.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Tensor | None, Tensor, int, int, int, Scale | None]],
        rows: Tensor,
        sizes: Sequence[int],
        widths: Sequence[Sequence[int]],
    ):
        self._rows = rows.contiguous()
        if len(rows):
            least, most = (int(v) for v in rows.aminmax())
            count = min(len(offsets) for _, offsets, *_ in sources) - 1
            if least < 0 or most >= count:
                raise ValueError(f"rows from {least} to {most} of {count} sequences")
        self._widths, self._sizes = np.array(widths, np.int64), sizes
        self._starts = np.cumsum([0, *sizes]).tolist()
        self._kept: list[Tensor | np.ndarray] = []  # what the kernel is given addresses of
        self._sources = (_Source * len(sources))()
        frames = []  # shape of a frame, and dtype of the result
        for at, (values, offsets, fill, closing, longest, scale) in enumerate(sources):
            kind, d, frame, dtype = 0, 1, (), torch.int64
            _check_offsets(offsets, None if values is None else len(values))
            if values is not None:
                values, kind, frame = values.contiguous(), KINDS[values.dtype], tuple(values.shape[1:])
                if values.numel() == 0:
                    values = values.new_zeros(1)  # of no numbers there is no address, which would mean no values
                d, dtype = math.prod(frame), torch.int64 if values.dtype == torch.int32 else torch.float32
            shift, factor, clip = scale or (None, None, 0.0)
            parts = [values, offsets.contiguous(), shift, factor]
            self._kept += parts
            values, offsets, shift, factor = (None if p is None else p.data_ptr() for p in parts)
            self._sources[at] = (kind, values, offsets, d, fill, closing, longest, shift, factor, clip)
            frames.append((frame, dtype))
        self._shapes = [
            [((size, width, *frame), dtype) for width, (frame, dtype) in zip(row, frames, strict=True)]
            for size, row in zip(sizes, widths, strict=True)
        ]
        self._pad = library().ragged_pad

    def take(self, number: int, lengths: Tensor | None = None) -> list[Tensor]:
        """A padded batch.

        Args:
            lengths: int64, filled with the lengths of the last source's sequences.
        """
        batch = [torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in self._shapes[number]]
        self._pad(
            len(self._sources), self._sources, self._sizes[number], self._rows.data_ptr() + 8 * self._starts[number],
            self._widths.ctypes.data + 8 * number * len(self._sources),
            (ctypes.c_void_p * len(batch))(*(out.data_ptr() for out in batch)),
            None if lengths is None else lengths.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return batch


def _check_offsets(offsets: Tensor, total: int | None) -> None:
    """Refuse offsets by which the kernel would read or write other memory.

    Args:
        total: how many values there are; None: the kernel reads none.
    """
    if len(offsets) < 2:
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first < 0 or (total is not None and last > total) or bool((offsets.diff() < 0).any()):
        of = "" if total is None else f" of {total} values"
        raise ValueError(f"offsets from {first} to {last}{of}: they must rise from 0 or stay, and not leave the values")


class _Source(ctypes.Structure):
    """As in ragged.cpp."""

    _fields_ = [
        ("kind", ctypes.c_int64), ("values", ctypes.c_void_p), ("offsets", ctypes.c_void_p), ("d", ctypes.c_int64),
        ("fill", ctypes.c_int64), ("closing", ctypes.c_int64), ("most", ctypes.c_int64),
        ("shift", ctypes.c_void_p), ("factor", ctypes.c_void_p), ("clip", ctypes.c_double),
    ]  # fmt: skip


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
