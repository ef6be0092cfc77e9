"""Checks of the arguments of operations. They are cheap and do not wait for a GPU."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.gradients import transformed

_PLAIN = Tensor, torch.nn.Parameter
_WIDE = torch.float32, torch.bfloat16, torch.float16
_WAYS = {"DTensor": ".full_tensor() or .to_local()", "AsyncCollectiveTensor": ".wait()"}


def exact_type(where: str, *tensors: Tensor | None, integers: bool = False, needed: int = 1) -> torch.dtype:
    """The dtype in which an operation computes: float64 if one of its tensors is float64, else float32.

    Args:
        where: the operation, for errors.
        tensors: all of its tensors, of any floating dtype.
        integers: accept integers and booleans, too.
        needed: how many of the first tensors must be there. Later ones may be None, which is skipped.

    Raises:
        EstimatorError: anything but a dense tensor with data, complex numbers (or integers), floating-point numbers of
            8 bits, or tensors on several devices.
    """
    device, exact = None, torch.float32
    for number, tensor in enumerate(tensors):
        if tensor is None and number >= needed:
            continue
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_nested:
            _check_dense(where, tensor)
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise EstimatorError(
                where, f"tensors on {device} and on {tensor.device}", "all on one device", "Move them with .to(device)."
            )
        dtype = tensor.dtype
        if dtype == torch.float64:
            exact = dtype
        elif dtype not in _WIDE and (dtype.is_floating_point or dtype.is_complex or not integers):
            expected = "floating-point numbers of 16, 32 or 64 bits"
            raise EstimatorError(where, f"a tensor of {dtype}", expected, "Call .float() on it.")
    if device is not None and device.type == "meta" and type(tensors[0]) in _PLAIN:
        do = "Move the module with .to_empty(device=...), or ask for shapes under torch's FakeTensorMode."
        raise EstimatorError(where, "tensors on meta", "tensors with data", do)
    return exact


def _check_dense(where: str, tensor: Any) -> None:
    """Refuse what holds no numbers that a kernel can read. Subclasses that are tensors as others are stay."""
    if not isinstance(tensor, Tensor):
        raise EstimatorError(where, f"a {type(tensor).__name__}", "a torch.Tensor", "Call torch.as_tensor on it.")
    if torch.compiler.is_compiling():
        return
    kind = type(tensor)
    # torch's own tracing is done with such subclasses; operations have rules for them
    tracing = kind.__module__.startswith("torch._subclasses")
    handler = getattr(kind, "__torch_dispatch__", None)
    if not tracing and handler is not torch._C._disabled_torch_dispatch_impl and handler is not None:
        way = _WAYS.get(
            kind.__name__, "its method that gives one, such as .to_dense(), .full_tensor() or .dequantize()"
        )
        raise EstimatorError(where, f"a {kind.__name__}", "a plain torch.Tensor", f"Call {way} first.")
    if tensor.is_nested or tensor.layout is not torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise EstimatorError(where, f"a {layout} tensor", "a dense one", "Call .to_dense(), or pad it, first.")


def _proxies() -> bool:
    """Whether make_fx records what is done. It does not let tensors become numbers."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors requires a gradient that is being recorded."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def looks_at(tensor: Tensor) -> bool:
    """Whether the host may read the values of `tensor`: not on a GPU, which it would wait for, and not in a graph."""
    if torch.compiler.is_compiling() or transformed() or _proxies():
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
