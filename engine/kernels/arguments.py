"""Checks of the arguments of operations. They are cheap and do not wait for a GPU."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.gradients import transformed


def exact_type(where: str, *tensors: Tensor | None, integers: bool = False) -> torch.dtype:
    """The dtype in which an operation computes: float64 if one of its tensors is float64, else float32.

    Args:
        where: the operation, for errors.
        tensors: all of its tensors, of any floating dtype. After the first, None is skipped.
        integers: accept integers and booleans, too.

    Raises:
        EstimatorError: anything but a tensor, complex numbers (or integers), or tensors on several devices.
    """
    device, exact = None, torch.float32
    for tensor in tensors:
        if tensor is None and device is not None:
            continue
        if not isinstance(tensor, Tensor):
            raise EstimatorError(where, f"a {type(tensor).__name__}", "a torch.Tensor", "Call torch.as_tensor on it.")
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise EstimatorError(
                where, f"tensors on {device} and on {tensor.device}", "all on one device", "Move them with .to(device)."
            )
        dtype = tensor.dtype
        if dtype == torch.float64:
            exact = dtype
        elif not dtype.is_floating_point and (dtype.is_complex or not integers):
            raise EstimatorError(where, f"a tensor of {dtype}", "floating-point numbers", "Call .float() on it.")
    return exact


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors requires a gradient that is being recorded."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def looks_at(tensor: Tensor) -> bool:
    """Whether the host may read the values of `tensor`: not on a GPU, which it would wait for, and not in a graph."""
    if torch.compiler.is_compiling() or transformed():
        return False
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, torch.nn.Parameter)


def check_number(
    where: str, name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, above: bool = False
) -> None:
    """Refuse anything but a number from `least` (with `above`: greater than `least`) to `most`. NaN is refused.

    Raises:
        EstimatorError: the value is refused. Within a graph nothing is checked.
    """
    if torch.compiler.is_compiling():
        return
    real = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if real and least <= value <= most and not (above and value == least):
        return
    low = f"above {least:g}" if above else f"from {least:g}"
    limits = low if math.isinf(most) else f"{low} to {most:g}"
    raise EstimatorError(where, f"{name} = {value!r}", f"a number {limits}", f"Change {name}.")


def check_count(where: str, name: str, value: Any, least: int = 1) -> None:
    """Refuse anything but a whole number of at least `least`.

    Raises:
        EstimatorError: the value is refused.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise EstimatorError(where, f"{name} = {value!r}", f"a whole number of at least {least}", f"Change {name}.")
