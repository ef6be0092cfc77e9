"""Runs that compile nothing do not import torch's compiler, which takes a second."""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer

DISABLED = "__dynamo_disable"
"""Where torch keeps a function as its compiler is to see it."""
GRADED = {
    "torch", "torch._dynamo", "_dynamo", "graph_break", "cast", "Optimizer", "is_grad_enabled", "set_grad_enabled",
    "defaults",
}  # fmt: skip
"""All that torch's inner wrapper of `step` uses: it sets whether gradients are on, and tells the compiler to stop."""


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
    """Have `optimizer.step` do the same without importing torch's compiler. torch imports it to mark a graph break.

    Nothing changes where `step` is wrapped otherwise than torch does: by a later version, or by code of a user's.
    """
    hooked = type(optimizer).step
    graded = getattr(hooked, "__wrapped__", None)
    plain = getattr(graded, "__wrapped__", None)
    if not _is_torchs(hooked, "wrapper") or not _is_torchs(graded, "_use_grad") or hasattr(plain, "__wrapped__"):
        return
    if not {*graded.__code__.co_names} <= GRADED:
        return

    @functools.wraps(plain)
    def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return plain(self, *args, **kwargs)

    optimizer.step = types.MethodType(optimizer.profile_hook_step(step), optimizer)


def _is_torchs(function: Any, name: str) -> bool:
    """Whether a function is one of this name from torch's module of optimisers."""
    code, file = getattr(function, "__code__", None), torch_optimizer.__file__
    return code is not None and (code.co_name, code.co_filename) == (name, file)
