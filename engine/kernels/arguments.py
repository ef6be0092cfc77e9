"""Checks of what operations are called with. They are cheap, and wait for no GPU."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.gradients import transformed


def exact_type(where: str, *tensors: Tensor | None, integers: bool = False) -> torch.dtype:
    """The type in which an operation computes: float64 if one of its tensors is float64, else float32.

    Args:
        where: the operation, for errors.
        tensors: all that enter it, of any floating type; after the first, None is passed over.
        integers: take integers and booleans, too.

    Raises:
        EstimatorError: something else than a tensor, complex numbers (or integers), tensors on several devices.
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
    """Whether values of `tensor` may be looked at: a GPU would have to be waited for, and a graph has none."""
    if torch.compiler.is_compiling() or transformed():
        return False
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, torch.nn.Parameter)


def check_number(
    where: str, name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, above: bool = False
) -> None:
    """Refuse what is no number from `least` (or, with `above`, of more than that) to `most`; NaN is none.

    Raises:
        EstimatorError: it is not. A graph does not check.
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
    """Refuse what is no whole number of at least `least`.

    Raises:
        EstimatorError: it is not.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise EstimatorError(where, f"{name} = {value!r}", f"a whole number of at least {least}", f"Change {name}.")
