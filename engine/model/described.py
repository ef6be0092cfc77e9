"""Models without memory: sizes and types of their tensors are known before any memory is taken."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DRAWS = {Tensor.normal_, Tensor.uniform_, Tensor.bernoulli_, Tensor.exponential_, Tensor.random_, Tensor.geometric_}


class _NoValues(TorchFunctionMode):
    """Leaves out what only gives tensors their values. For tensors without memory torch would import its compiler."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in DRAWS or getattr(func, "__module__", None) == "torch.nn.init":
            tensor = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        if func is torch.stack and len(args) == 1 and not kwargs and all(t.is_meta for t in args[0]):
            first = args[0][0]
            return first.new_empty((len(args[0]), *first.shape))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """A context in which modules are made on the meta device. Their tensors have sizes and types, but no values.

    >>> with without_memory():
    ...     layer = torch.nn.Linear(10**6, 10**6)
    >>> layer.weight.device
    device(type='meta')
    """
    with torch.device("meta"), _NoValues():
        yield
