"""Counting what a host function would launch on a GPU: Triton kernels, and torch's operations that compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from engine.kernels import registry
from tests.interpret import device

# Operations that compute nothing, beside views.
NOTHING = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::detach", "aten::lift_fresh")


@dataclass
class Launches:
    count: int = 0


class _TorchLaunches(TorchDispatchMode):
    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if (
            func.namespace == "engine"
        ):  # registry.call goes through torch under a mode; the host function is what counts
            name = func._schema.name.removeprefix("engine::")
            with self:
                return registry._operations[name].cuda(*args, **(kwargs or {}))
        returns = [r.alias_info for r in func._schema.returns]
        view = returns and all(r is not None and not r.is_write for r in returns)
        if not view and not func._schema.name.startswith(NOTHING):
            self.launches.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def launches() -> Iterator[Launches]:
    """Count the launches of the block, whose kernels are not computed in the interpreter."""
    found = Launches()

    def one() -> None:
        found.count += 1

    with device.launches_noticed(one, compute=False), _TorchLaunches(found):
        yield found
