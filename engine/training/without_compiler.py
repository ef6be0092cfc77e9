"""Runs that compile nothing do not import torch's compiler, which takes a second."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

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
