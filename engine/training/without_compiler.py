"""Runs that compile nothing do not import torch's compiler, which takes a second."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

DISABLED = "__dynamo_disable"
"""Where torch keeps a function as its compiler is to see it."""


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """A context in which optimisers do not import torch's compiler.

    Some of their methods must not be compiled. At the first call torch asks its compiler for a version that is never
    compiled, and so imports it. Here that version is the method itself. Nothing changes where the compiler is imported.
    """
    marked = []
    if "torch._dynamo" not in sys.modules:
        for method in vars(torch.optim.Optimizer).values():
            plain = getattr(method, "__wrapped__", None)
            if getattr(getattr(method, "__code__", None), "co_name", None) == "inner" and not hasattr(plain, DISABLED):
                setattr(plain, DISABLED, plain)
                marked.append(plain)
    try:
        yield
    finally:
        for plain in marked:
            delattr(plain, DISABLED)


def step_without_compiler(optimizer: torch.optim.Optimizer) -> None:
    """Have `optimizer.step` do the same without importing torch's compiler. torch imports it to mark a graph break."""
    plain = inspect.unwrap(type(optimizer).step)

    @functools.wraps(plain)
    def step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return plain(self, closure)

    optimizer.step = types.MethodType(optimizer.profile_hook_step(step), optimizer)  # type: ignore[method-assign]
