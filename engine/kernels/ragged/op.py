"""Gathering and right-padding sequences that lie end to end, as an operation without synchronisation.

On CPU tensors a kernel compiled at first use (ragged.cpp) runs it, on CUDA tensors a Triton kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.kernels import registry
from engine.kernels.compiling import constant_when_compiled
from engine.kernels.ragged import cpu, reference

RESULT = {torch.float16: torch.float32, torch.float32: torch.float32, torch.int32: torch.int64}


def pad(
    values: Tensor, offsets: Tensor, rows: Tensor, width: int, *, fill: int = 0, closing: int = -1
) -> tuple[Tensor, Tensor]:
    """Sequences `rows` of a ragged array as a right-padded batch. Bitwise the same on every backend.

    Args:
        values: All sequences end to end, [total, d] or [total], float16, float32 or int32.
        offsets: int64 [N + 1]. Sequence i is `values[offsets[i]:offsets[i + 1]]`.
        rows: int64 [B], each from 0 to N - 1. On a GPU they are not checked.
        width: Length of the batch's second axis, at least 1. Longer sequences are cut to it.
        fill: Value of the padding.
        closing: Last value of a sequence of numbers that was cut, such as a text's closing token. -1 keeps its own.

    Returns:
        The batch [B, width, d] or [B, width], float32 (int64 for int32 values); and lengths int64 [B], at most `width`.

    Raises:
        ValueError: Wrong shapes or dtypes; on a CPU also rows out of range, or offsets that fall or leave the values.

    Example:
        >>> values, offsets = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 3])
        >>> pad(values, offsets, torch.tensor([1, 0]), 2)[0]
        tensor([[2., 3.],
                [1., 0.]])
    """
    if values.dtype not in RESULT or values.ndim not in (1, 2) or (closing >= 0 and values.ndim != 1):
        raise ValueError(
            f"values of dtype {values.dtype} and shape {list(values.shape)}; see engine.kernels.ragged.pad"
        )
    if offsets.dtype != torch.int64 or rows.dtype != torch.int64 or offsets.ndim != 1 or rows.ndim != 1 or width < 1:
        raise ValueError("offsets and rows must be int64 vectors, and width at least 1")
    if not values.device == offsets.device == rows.device:
        raise ValueError(f"values on {values.device}, offsets on {offsets.device}, rows on {rows.device}: move them")
    backend = registry.backend_for(values, "ragged_pad")
    if values.requires_grad and torch.is_grad_enabled():
        backend = "reference"  # the kernels have no gradients
    if backend == "reference" or (backend == "cpu" and not _compiled()):
        return reference.pad(values, offsets, rows, width, fill, closing)
    return registry.call("ragged_pad", values, offsets, rows, width, fill, closing)


@dataclass(frozen=True)
class Source:
    """Sequences end to end, and how batches of them are padded.

    Attributes:
        values, offsets, fill, closing: as for `pad`. Without values a batch is int64 [B, width]: 1 where a sequence has
            something, else 0.
        most: longer sequences are cut to it, whatever the width.
        scale: (shift, factor, clip), float64 [d] each, where `values` is, and a number: a frame v becomes
            (v - shift) * factor, in float64, cut to ±clip (infinity: not cut); frames that are all zero stay so. None:
            frames as they are. Of values [total, d] of floats with fill 0.

    Raises:
        ValueError: another fill with `scale`.
    """

    values: Tensor | None
    offsets: Tensor
    fill: int = 0
    closing: int = -1
    most: int = sys.maxsize
    scale: tuple[Tensor, Tensor, float] | None = None

    def __post_init__(self):
        if self.scale is not None and self.fill != 0:
            raise ValueError(f"scaled frames are padded with 0, not with {self.fill}")


def pad_batches(
    sources: Sequence[Source], rows: Tensor, sizes: Sequence[int], widths: Sequence[Sequence[int]]
) -> Iterator[list[Tensor]]:
    """Padded batches out of several ragged arrays, one after another: an epoch of a loader.

    On a CPU, one call of the kernel makes one batch.

    Args:
        sources: what is padded. All hold the same sequences.
        rows: int64, of all batches end to end.
        sizes: rows of each batch.
        widths: for each batch, the widths of its tensors, one per source, at least 1.

    Yields:
        The batch's tensors, one per source.

    Raises:
        ValueError: on a CPU, rows out of range, or offsets that fall or leave the values.
    """
    values = next(s.values for s in sources if s.values is not None)
    if registry.backend_for(values, "ragged_pad") == "cpu" and cpu.library() is not None:
        given = [(s.values, s.offsets, s.fill, s.closing, s.most, s.scale) for s in sources]
        batches = cpu.Batches(given, rows, sizes, widths)
        yield from map(batches.take, range(len(sizes)))
        return
    start = 0
    for size, width in zip(sizes, widths, strict=True):
        part = rows[start : start + size]
        yield [_padded(source, part, w) for source, w in zip(sources, width, strict=True)]
        start += size


def scale(values: np.ndarray, shift: np.ndarray, factor: np.ndarray, clip: float) -> np.ndarray:
    """`(values - shift) * factor` in float64, cut to ±clip, as float32. Frames that are all zero stay so.

    Bitwise the same on every backend. `use_backend("reference")` takes the formula in torch.

    Args:
        values: frames [n, d] of floats, on the host. shift, factor: float64 [d]. clip: infinity leaves values uncut.
    """
    scaled = cpu.scale(values, shift, factor, clip) if registry.setting() != "reference" else None
    if scaled is None:
        frames = torch.from_numpy(np.array(values, np.float32))
        scaled = reference.scale(frames, torch.from_numpy(shift), torch.from_numpy(factor), clip).numpy()
    return scaled


def _padded(source: Source, rows: Tensor, width: int) -> Tensor:
    if source.values is None:
        length = (source.offsets[rows + 1] - source.offsets[rows]).clamp(max=source.most)
        return (torch.arange(width, device=rows.device) < length[:, None]).long()
    cut = min(width, source.most)
    out, _ = pad(source.values, source.offsets, rows, cut, fill=source.fill, closing=source.closing)
    if source.scale is not None:
        out = reference.scale(out, *source.scale)
    if cut == width:
        return out
    return torch.nn.functional.pad(out, (*[0] * (2 * out.dim() - 4), 0, width - cut), value=source.fill)


@constant_when_compiled
def _compiled() -> bool:
    return cpu.library() is not None


def _fake(values: Tensor, offsets: Tensor, rows: Tensor, width: int, fill: int, closing: int) -> tuple[Tensor, Tensor]:
    out = values.new_empty((rows.shape[0], width, *values.shape[1:]), dtype=RESULT[values.dtype])
    return out, rows.new_empty(rows.shape)


registry.register(
    "ragged_pad",
    "(Tensor values, Tensor offsets, Tensor rows, SymInt width, int fill, int closing) -> (Tensor, Tensor)",
    cpu=cpu.pad,
    cuda=registry.lazy("engine.kernels.ragged.triton", "pad"),
    fake=_fake,
)
