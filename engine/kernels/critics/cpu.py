"""Grouped MLPs and the concat critic on the CPU: host functions of critics.cpp, or plain torch without that library.

Plain tensors in and out, fp32 or fp64, no autograd. All hidden layers end in ReLU, whose derivative follows from its
output, so only outputs are kept. The same number of threads gives bitwise the same result every time.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.kernels import build
from engine.kernels.build import addresses, pointer, pointers
from engine.kernels.critics import plain

SOURCE = Path(__file__).with_name("critics.cpp")


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernel for float32 or float64, compiled at its first use; None (logged once) if it cannot be compiled."""
    address, size, count = build.POINTER, build.SIZE, build.INT
    grouped = [size, address, address, *[size] * 4, *[address] * 3]
    functions = {
        "grouped_mlp": [*grouped, address, count, *[address] * 4],
        "grouped_infonce": [*grouped, size, *[address] * 5, count],
        "concat": [*[size] * 4, *[address] * 4, count, *[address] * 4],
        "concat_loss": [*[size] * 3, *[address] * 4, count, *[address] * 3],
    }
    return build.library(SOURCE, dtype, functions, "plain torch runs")


def mlp_forward(
    x: Tensor, more: Sequence[Tensor], first: Sequence[Tensor], rest: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """As `plain.mlp_forward`."""
    if library(x.dtype) is None:
        return plain.mlp_forward(x, more, first, rest)
    inputs = [t.contiguous() for t in (x, *more)]
    rows, count = x.shape[0], sum(w.shape[0] for w in first[::2])  # len() of a tensor is slow
    hidden, width = first[0].shape[1], rest[-2].shape[1]
    out = x.new_empty(count, rows, width)
    state = x.new_empty(plain.state_size(rows, count, hidden, len(rest) // 2))
    library(x.dtype).grouped_mlp(
        *_head(inputs, first, rest, state), pointer(out), torch.get_num_threads(), None, None, None, None
    )
    return out, state


def mlp_backward(grad: Tensor, *arguments: Any) -> Tensor:
    """As `plain.mlp_backward`."""
    if library(grad.dtype) is None:
        return plain.mlp_backward(grad, *arguments)
    return _mlp_backward(grad, None, *arguments)


def grouped_infonce(
    x: Tensor, more: Sequence[Tensor], first: Sequence[Tensor], rest: Sequence[Tensor], q: Sequence[int],
    k: Sequence[int], grads: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `plain.grouped_infonce`, a block of rows of the scores at a time."""
    if library(x.dtype) is None:
        return plain.grouped_infonce(x, more, first, rest, q, k, grads)
    inputs = [t.contiguous() for t in (x, *more)]
    rows, count = x.shape[0], sum(w.shape[0] for w in first[::2])  # len() of a tensor is slow
    hidden, width = first[0].shape[1], rest[-2].shape[1]
    split = plain.state_size(rows, count, hidden, len(rest) // 2)
    state = x.new_empty(plain.infonce_state_size(rows, count, hidden, width, len(rest) // 2) if grads else split)
    outputs, losses = x.new_empty(plain.state_size(rows, count, width, 1)), x.new_empty(len(q))
    numbers = ctypes.c_int64 * len(q)
    library(x.dtype).grouped_infonce(
        *_head(inputs, first, rest, state), len(q), numbers(*q), numbers(*k), losses.data_ptr(), outputs.data_ptr(),
        pointer(state[split:] if grads else None), torch.get_num_threads(),
    )  # fmt: skip
    return losses, state if grads else x.new_empty(0)


def grouped_infonce_backward(
    grad: Tensor, inputs: Sequence[Tensor], first: Sequence[Tensor], rest: Sequence[Tensor], state: Tensor,
    q: Sequence[int], k: Sequence[int], *wanted: bool,
) -> Tensor:  # fmt: skip
    """As `plain.grouped_infonce_backward`."""
    if library(grad.dtype) is None:
        return plain.grouped_infonce_backward(grad, inputs, first, rest, state, q, k, *wanted)
    of_outputs = state[plain.state_size(inputs[0].shape[0], 2 * len(q), first[0].shape[1], len(rest)) :]
    of_critics = grad.tolist()
    factors = [of_critics[c] for c in plain.critic_of(q, k)]
    return _mlp_backward(of_outputs, factors, inputs, first, rest, state, *wanted)


def concat_forward(x: Tensor, y: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """As `plain.concat_forward`."""
    return plain.concat_forward(x, y, layers, None if library(x.dtype) is None else _concat)


def concat_backward(grad: Tensor, *arguments: Any) -> Tensor:
    """As `plain.concat_backward`."""
    return plain.concat_backward(grad, *arguments, None if library(grad.dtype) is None else _backward_pairs)


def concat_infonce(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """As `plain.concat_infonce`, in one pass over the pairs."""
    return plain.concat_infonce(x, *arguments, None if library(x.dtype) is None else _infonce_pairs)


def _backward_pairs(grad: Tensor, of_x: Tensor, of_y: Tensor, further: Sequence[Tensor], *sums: Any) -> None:
    _concat(of_x, of_y, further, None, grad, *sums)


def _infonce_pairs(
    of_x: Tensor, of_y: Tensor, further: Sequence[Tensor], transpose: bool, losses: Tensor, sums_x: Tensor | None,
    sums_y: Tensor | None, of_weights: Sequence[Tensor],
) -> None:  # fmt: skip
    (of_row, sums_row), (of_column, sums_column) = ((of_x, sums_x), (of_y, sums_y))[:: 1 if transpose else -1]
    library(of_x.dtype).concat_loss(
        len(of_x), of_x.shape[1], len(further) // 2, of_row.data_ptr(), of_column.data_ptr(), pointers(further),
        losses.data_ptr(), torch.get_num_threads(), pointer(sums_row), pointer(sums_column), pointers(of_weights),
    )  # fmt: skip


def _head(
    inputs: Sequence[Tensor], first: Sequence[Tensor | None], rest: Sequence[Tensor | None], state: Tensor
) -> tuple[object, ...]:
    """The arguments that the functions on grouped MLPs have in common."""
    sizes = ctypes.c_int64 * len(inputs)
    weights = first[::2]
    return (
        len(inputs), sizes(*(w.shape[0] for w in weights)), sizes(*(x.shape[1] for x in inputs)), inputs[0].shape[0],
        weights[0].shape[1], rest[-2].shape[1], len(rest) // 2, pointers(inputs), pointers([*first, *rest]),
        state.data_ptr(),
    )  # fmt: skip


def _mlp_backward(
    grad: Tensor, scale: Sequence[float] | None, inputs: Sequence[Tensor], first: Sequence[Tensor],
    rest: Sequence[Tensor], state: Tensor, input_grads: bool, weight_grads: bool,
) -> Tensor:  # fmt: skip
    """`scale`: one factor an MLP, where `grad` is in the kernel's blocks."""
    inputs = [t.contiguous() for t in inputs]
    sizes = [math.prod(shape) for shape in plain.grad_shapes(inputs, (*first, *rest), input_grads, weight_grads)]
    gradients = grad.new_empty(sum(sizes))
    # addresses, not views: making these would cost a small step more than the rest of this function
    begin, width = gradients.data_ptr(), gradients.element_size()
    places = [begin + width * at for at in itertools.accumulate(sizes[:-1], initial=0)] if sizes else []
    split = len(inputs) if input_grads else 0
    pairs = [[t for w in part for t in (w, None)] for part in (first, rest)]
    real = ctypes.c_float if state.dtype == torch.float32 else ctypes.c_double
    factors = None if scale is None else (real * len(scale))(*scale)
    library(state.dtype).grouped_mlp(
        *_head(inputs, *pairs, state), None, torch.get_num_threads(), grad.data_ptr(), factors,
        addresses(places[:split]), addresses(places[split:]),
    )  # fmt: skip
    return gradients


def _concat(
    of_x: Tensor, of_y: Tensor, further: Sequence[Tensor], scores: Tensor | None, grad: Tensor | None = None,
    sums_x: Tensor | None = None, sums_y: Tensor | None = None, of_weights: Sequence[Tensor] = (),
) -> None:  # fmt: skip
    library(of_x.dtype).concat(
        len(of_y), len(of_x), of_x.shape[1], len(further) // 2, of_y.data_ptr(), of_x.data_ptr(), pointers(further),
        pointer(scores), torch.get_num_threads(), pointer(grad), pointer(sums_y), pointer(sums_x),
        pointers(of_weights),
    )  # fmt: skip
