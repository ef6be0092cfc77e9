"""Gathering and right-padding sequences that lie end to end, as an operation: no host work, no synchronisation.

On CPU tensors a kernel compiled at first use (ragged.cpp) runs it, on CUDA tensors a Triton kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels import registry
from engine.kernels.ragged import cpu, reference

RESULT = {torch.float16: torch.float32, torch.float32: torch.float32, torch.int32: torch.int64}


def pad(
    values: Tensor, offsets: Tensor, rows: Tensor, width: int, *, fill: int = 0, closing: int = -1
) -> tuple[Tensor, Tensor]:
    """Sequences `rows` of a ragged array as a right-padded batch. Bitwise the same on every backend.

    Args:
        values: [total, d] or [total], float16, float32 or int32: all sequences end to end.
        offsets: int64 [N + 1]; sequence i is `values[offsets[i]:offsets[i + 1]]`.
        rows: int64 [B], each in 0..N-1; on a GPU they are not checked.
        width: length of the batch's second axis, at least 1; longer sequences are cut to it.
        fill: what padding holds.
        closing: what the last place of a cut sequence of numbers holds (a text's closing token); -1 leaves it.

    Returns:
        Padded [B, width, d] or [B, width], float32 (int64 for int32 values), and lengths int64 [B], at most `width`.

    Raises:
        ValueError: wrong shapes or dtypes; on a CPU also rows out of range.
    """
    if values.dtype not in RESULT or values.ndim not in (1, 2) or (closing >= 0 and values.ndim != 1):
        raise ValueError(
            f"values of dtype {values.dtype} and shape {list(values.shape)}; see engine.kernels.ragged.pad"
        )
    if offsets.dtype != torch.int64 or rows.dtype != torch.int64 or offsets.ndim != 1 or rows.ndim != 1 or width < 1:
        raise ValueError("offsets and rows must be int64 vectors, and width at least 1")
    backend = registry.backend_for(values, "ragged_pad")
    if backend == "reference" or (backend == "cpu" and not _compiled()):
        return reference.pad(values, offsets, rows, width, fill, closing)
    return registry.call("ragged_pad", values, offsets, rows, width, fill, closing)


@torch.compiler.assume_constant_result  # torch.compile must not look inside
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
