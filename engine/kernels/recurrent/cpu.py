"""Host functions of the compiled kernel: recurrent.cpp holds the loops."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import DataError
from engine.kernels import build
from engine.kernels.build import pointer, pointers
from engine.kernels.recurrent.reference import GATES

SOURCE = Path(__file__).with_name("recurrent.cpp")
LANES = 16  # hidden units are padded to the vector's width, at most 16 floats
SLOTS = {"gru": 4, "lstm": 5}  # values kept per unit, token and direction for the backward pass


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernel for float32 or float64, compiled at its first use; None (logged once) if it cannot be compiled."""
    address, size, count = build.POINTER, build.SIZE, build.INT
    functions = {"recurrent": [count, count, *[size] * 4, *[address] * 5, count, *[address] * 4]}
    return build.library(SOURCE, dtype, functions, "torch.nn.GRU and LSTM run")


def state_width(layers: int, hidden: int, cell: str) -> int:
    """Numbers kept per token for the backward pass."""
    padded = -(-hidden // LANES) * LANES
    return 2 * layers * padded * SLOTS[cell] + 2 * (layers - 1) * hidden


def forward(x: Tensor, length: Tensor, weights: Sequence[Tensor], cell: str, tokens: int) -> tuple[Tensor, Tensor]:
    """x [B, L, d], length int64 [B], weights -> out [B, L, 2H], what the backward pass needs (1-d).

    `tokens`: room to make for tokens, at least length.sum(). float32 or float64.
    """
    hidden, layers = weights[1].shape[1], len(weights) // 8
    x = x.contiguous()
    weights = [w.contiguous() for w in weights]
    length = checked(length, x, tokens)
    out = x.new_empty(*x.shape[:2], 2 * hidden)
    state = x.new_empty(tokens * state_width(layers, hidden, cell))
    _run(x, length, weights, out, state, cell)
    return out, state


def backward(
    gradient: Tensor, x: Tensor, length: Tensor, weights: Sequence[Tensor], out: Tensor, state: Tensor, cell: str,
    input_gradient: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the weights, in their order, and after them, where `input_gradient`, the one of x."""
    hidden, layers = weights[1].shape[1], len(weights) // 8
    x = x.contiguous()
    gradient = gradient.contiguous()
    weights = [w.contiguous() for w in weights]
    tokens = state.numel() // state_width(layers, hidden, cell)
    length = checked(length, x, tokens)
    tokens = int(length.sum())
    gradients = [torch.empty_like(w) for w in weights]
    dx = torch.empty_like(x) if input_gradient else None
    padded = -(-hidden // LANES) * LANES
    work = x.new_empty(tokens * (2 * 4 * padded + min(layers - 1, 2) * 2 * hidden))
    _run(x, length, weights, out, state, cell, gradient, dx, gradients, work)
    return gradients if dx is None else [*gradients, dx]


def checked(length: Tensor, x: Tensor, tokens: int) -> Tensor:
    """Lengths that the kernel may trust: wrong ones would make it read and write foreign memory."""
    if length.is_floating_point():
        raise DataError("lengths", f"{length.dtype}", "whole numbers", "Give numbers of frames.")
    length = length.to("cpu", torch.int64).contiguous()
    batch, width, _ = x.shape
    if length.shape != (batch,):
        raise DataError(
            "lengths", f"shape {list(length.shape)}", f"[{batch}], one per row", "Give each row its length."
        )
    least, most = (int(v) for v in length.aminmax()) if batch else (1, 0)
    if least < 1 or most > width:
        raise DataError("lengths", f"values from {least} to {most}", f"values from 1 to {width}", "Drop empty rows.")
    if int(length.sum()) > tokens:
        raise DataError("lengths", f"a sum of {int(length.sum())}", f"at most {tokens}", "Pass the same lengths again.")
    return length


def _run(
    x: Tensor, length: Tensor, weights: Sequence[Tensor], out: Tensor, state: Tensor, cell: str,
    gradient: Tensor | None = None, dx: Tensor | None = None, dweights: Sequence[Tensor] = (),
    work: Tensor | None = None,
) -> None:  # fmt: skip
    loaded = library(x.dtype)
    if loaded is None:
        raise RuntimeError("the compiled recurrent kernel is not available on this machine")
    batch, width, features = x.shape
    if not batch:
        for d in dweights:
            d.zero_()
        return

    loaded.recurrent(
        int(cell == "lstm"), len(weights) // 8, batch, width, features, weights[1].shape[1], length.data_ptr(),
        x.data_ptr(), pointers(weights), out.data_ptr(), state.data_ptr(), torch.get_num_threads(), pointer(gradient),
        pointer(dx), pointers(dweights), pointer(work),
    )  # fmt: skip


def check(x: Tensor, weights: Sequence[Tensor], cell: str) -> None:
    """Raise ValueError unless the shapes are those of a bidirectional torch.nn.GRU or LSTM with biases."""
    if cell not in GATES or not weights or len(weights) % 8 or x.ndim != 3:
        raise ValueError(
            f"expected x [B, L, d], cell gru or lstm and 8 weights per layer; found {x.ndim}-d x, {cell!r}"
        )
    hidden, features = weights[1].shape[-1], x.shape[2]
    rows = GATES[cell] * hidden
    for i in range(0, len(weights), 4):
        expected = [(rows, features if i < 8 else 2 * hidden), (rows, hidden), (rows,), (rows,)]
        shapes = [tuple(w.shape) for w in weights[i : i + 4]]
        if shapes != expected:
            raise ValueError(f"weights of layer {i // 8}: found shapes {shapes}, expected {expected}")
