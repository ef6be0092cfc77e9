"""Host functions of the compiled kernel: ragged.cpp holds the loops."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
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
        "ragged_pad": [size, pointer, size, *[pointer] * 5, count],
        "ragged_scale": [pointer, size, size, pointer, pointer, real, pointer, count],
    }
    return build.library(SOURCE, torch.float32, functions, "plain torch runs")


def pad(values: Tensor, offsets: Tensor, rows: Tensor, width: int, fill: int, closing: int) -> tuple[Tensor, Tensor]:
    """As `reference.pad`.

    Raises:
        ValueError: rows out of range.
    """
    batches = Batches([(values, offsets, fill, closing, width)], rows)
    lengths = rows.new_empty(len(rows))
    return batches.take(0, [len(rows)], [[width]], lengths)[0][0], lengths


class Batches:
    """Runs of `rows` out of several ragged arrays, padded a few batches a call.

    Args:
        sources: (values, offsets, fill, closing, most) each, as for `op.pad_batches`.
        rows: int64.

    Raises:
        ValueError: rows out of range.
    """

    def __init__(self, sources: Sequence[tuple[Tensor | None, Tensor, int, int, int]], rows: Tensor):
        self._rows = rows.contiguous()
        if len(rows):
            least, most = (int(v) for v in rows.aminmax())
            count = min(len(offsets) for _, offsets, *_ in sources) - 1
            if least < 0 or most >= count:
                raise ValueError(f"rows from {least} to {most} of {count} sequences")
        self._shapes: list[tuple[tuple[int, ...], torch.dtype]] = []  # of a frame, and the dtype of the result
        self._kept: list[Tensor] = []  # what the kernel is given addresses of
        self._sources = (_Source * len(sources))()
        for at, (values, offsets, fill, closing, longest) in enumerate(sources):
            offsets = offsets.contiguous()
            self._kept.append(offsets)
            if values is None:
                self._shapes.append(((), torch.int64))
                self._sources[at] = (0, None, offsets.data_ptr(), 1, 0, -1, longest)
                continue
            values = values.contiguous()
            self._kept.append(values)
            self._shapes.append(
                (tuple(values.shape[1:]), torch.int64 if values.dtype == torch.int32 else torch.float32)
            )
            d = values.shape[1] if values.ndim == 2 else 1
            found = (KINDS[values.dtype], values.data_ptr(), offsets.data_ptr(), d, fill, closing, longest)
            self._sources[at] = found
        self._pad = library().ragged_pad

    def take(
        self, start: int, sizes: Sequence[int], widths: Sequence[Sequence[int]], lengths: Tensor | None = None
    ) -> list[list[Tensor]]:
        """The padded batches of `sizes` rows each from row `start` on.

        Args:
            widths: of each batch, one a source.
            lengths: int64, filled with the lengths of the last source's sequences.
        """
        found = [
            [torch.empty((size, w, *frame), dtype=dtype) for w, (frame, dtype) in zip(width, self._shapes, strict=True)]
            for size, width in zip(sizes, widths, strict=True)
        ]
        numbers, addresses = ctypes.c_int64 * len(sizes), len(sizes) * len(self._shapes)
        self._pad(
            len(self._shapes), self._sources, len(sizes), numbers(*sizes), self._rows.data_ptr() + 8 * start,
            (ctypes.c_int64 * addresses)(*(w for width in widths for w in width)),
            (ctypes.c_void_p * addresses)(*(out.data_ptr() for batch in found for out in batch)),
            None if lengths is None else lengths.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return found


class _Source(ctypes.Structure):
    """As in ragged.cpp."""

    _fields_ = [
        ("kind", ctypes.c_int64), ("values", ctypes.c_void_p), ("offsets", ctypes.c_void_p), ("d", ctypes.c_int64),
        ("fill", ctypes.c_int64), ("closing", ctypes.c_int64), ("most", ctypes.c_int64),
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
