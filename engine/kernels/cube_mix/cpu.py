"""Host functions of the compiled kernel: cube_mix.cpp holds the loops."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.kernels import build
from engine.kernels.build import pointer, pointers

SOURCE = Path(__file__).with_name("cube_mix.cpp")
# In the order of the kernel's tables.
ACTIVATIONS = ("gelu", "relu", "tanh", "leakyrelu", "elu", "hardtanh", "hardshrink")
COLUMNS = 64  # columns of a tile, as in cube_mix.cpp
SHORT = 8  # axes and layers up to this length are computed again in the backward pass instead of kept
# What a GPU keeps for the backward pass, by the precision of products; float32 for the others.
STORAGE = {"bf16": torch.bfloat16, "fp16": torch.float16}

Argument = Tensor | str | bool | float | None


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernel for float32 or float64, compiled at its first use; None (logged once) if it cannot be compiled."""
    head = [build.POINTER, build.DOUBLE, build.INT, build.POINTER]
    functions = {
        "cube_mix_forward": [*head, *[build.POINTER] * 3],
        "cube_mix_backward": [*head, *[build.POINTER] * 5],
    }
    return build.library(SOURCE, dtype, functions, "plain torch runs")


def kept_size(outer: int, inner: int, d_in: int, hidden: int, d_out: int, ln_first: bool) -> int:
    """Numbers kept for the backward pass."""
    if max(d_in, hidden, d_out) <= SHORT:
        return 0
    tiles = (outer + COLUMNS - 1) // COLUMNS if inner == 1 else outer * ((inner + COLUMNS - 1) // COLUMNS)
    return tiles * COLUMNS * (hidden if ln_first else hidden + d_out + 1)


def forward(x: Tensor, *rest: Argument) -> tuple[Tensor, Tensor]:
    """x [outer, d_in, inner] -> y [outer, d_out, inner], what the backward pass needs (1-d). float32 or float64.

    After x come the seven weights and the settings, as in op.py's schema. Without `keep` nothing is kept for the
    backward pass. precision and dtype are for GPUs: here everything has x's dtype.
    """
    given, (activation, ln_first, eps, _, _, keep) = rest[:7], rest[7:]
    x, weights = x.contiguous(), _contiguous(*given)
    outer, d_in, inner = x.shape
    hidden, d_out = weights[0].shape[0], weights[2].shape[0]
    y = x.new_empty(outer, d_out, inner)
    kept = x.new_empty(kept_size(outer, inner, d_in, hidden, d_out, ln_first) if keep else 0)
    if y.numel():
        head = _head(x, weights, activation, ln_first, eps, kept)
        library(x.dtype).cube_mix_forward(*head, x.data_ptr(), y.data_ptr(), kept.data_ptr())
    return y, kept


def backward(dy: Tensor, x: Tensor, kept: Tensor, *rest: Argument) -> list[Tensor]:
    """Gradients of the weights that are not None, in their order, and then, with `need_x`, the one of x."""
    given, (activation, ln_first, eps, _, need_x) = rest[:7], rest[7:]
    x, dy, weights = x.contiguous(), dy.contiguous(), _contiguous(*given)
    dx = torch.empty_like(x) if need_x else None
    if not dy.numel():
        gradients = [None if w is None else torch.zeros_like(w) for w in weights]
        dx = None if dx is None else dx.zero_()
    else:
        gradients = [None if w is None else torch.empty_like(w) for w in weights]
        head = _head(x, weights, activation, ln_first, eps, kept)
        library(x.dtype).cube_mix_backward(
            *head, dy.data_ptr(), x.data_ptr(), kept.data_ptr(), pointer(dx), pointers(gradients)
        )
    return [g for g in (*gradients, dx) if g is not None]


def pair_forward(
    x: Tensor, *rest: Argument
) -> tuple[Tensor, Tensor, Tensor]:  # both axes' weights and settings: as in op.py's schema
    """The modality axis of x [rows, m_in, d_in], then the channels: y, x with the modalities mixed, what the channels'
    backward pass needs. The modality axis is short, so nothing is kept for it."""
    modality, channel, settings, (precision, keep) = rest[:7], rest[7:14], rest[14:17], rest[17:]
    mixed, _ = forward(x, *modality, *settings, precision, x.dtype, False)
    y, kept = forward(mixed.flatten(0, 1)[..., None], *channel, *settings, precision, x.dtype, keep)
    return y.view(*mixed.shape[:2], -1), mixed, kept


def pair_backward(dy: Tensor, x: Tensor, mixed: Tensor, kept: Tensor, *rest: Argument) -> list[Tensor]:
    """Gradients of the weights that are not None, modality before channel, and after them, where `need_x`, the one of
    x."""
    modality, channel, settings, (precision, need_x) = rest[:7], rest[7:14], rest[14:17], rest[17:]
    rows = mixed.flatten(0, 1)[..., None]
    *of_channel, d_mixed = backward(dy.reshape(len(rows), -1, 1), rows, kept, *channel, *settings, precision, True)
    nothing = x.new_empty(0)
    gradients = backward(d_mixed.view(mixed.shape), x, nothing, *modality, *settings, precision, need_x)
    of_modality, dx = (gradients[:-1], gradients[-1:]) if need_x else (gradients, [])
    return [*of_modality, *of_channel, *dx]


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _head(
    x: Tensor, weights: Sequence[Tensor | None], activation: str, ln_first: bool, eps: float, kept: Tensor
) -> tuple[object, ...]:
    outer, d_in, inner = x.shape
    hidden, d_out = weights[0].shape[0], weights[2].shape[0]
    numbers = (outer, inner, d_in, hidden, d_out, ACTIVATIONS.index(activation), int(ln_first), int(kept.numel() > 0))
    return (ctypes.c_int64 * 8)(*numbers), eps, torch.get_num_threads(), pointers(weights)
