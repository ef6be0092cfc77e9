"""Estimates do not depend on what the caller has set for torch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """A context with torch's defaults: float32, the CPU, gradients, and products in full precision.

    Callers may be in a validation loop without gradients, under autocast, or with another default type or device. The
    default type is one for all threads; it is changed only where it is another one.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        yield


def alone(function: Function) -> Function:
    """A decorator: run the function in `own_settings`."""

    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with own_settings():
            return function(*args, **kwargs)

    return inner
