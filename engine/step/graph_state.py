"""Python state that a CUDA graph reads: numbers as tensors, and a watch over what a graph holds as it was."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import ConfigError


class DeviceNumbers:
    """Numbers that change from step to step, such as learning rates, as tensors that a graph reads.

    Python keeps the numbers, and `refresh` copies those that changed. The other settings of an optimiser are fixed in
    its graphs: see `optimizer_settings`.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._values: dict[Hashable, tuple[Tensor, float | None]] = {}

    def tensor(self, name: Hashable) -> Tensor:
        """The number `name` as a 0-d tensor: float32 on a GPU, where optimisers read no other type, else float64."""
        if name not in self._values:
            dtype = torch.float32 if self._device.type == "cuda" else torch.float64
            self._values[name] = torch.zeros((), dtype=dtype, device=self._device), None
        return self._values[name][0]

    def refresh(self, name: Hashable, value: float) -> None:
        tensor = self.tensor(name)
        if self._values[name][1] != value:
            tensor.fill_(value)
            self._values[name] = tensor, value

    def refresh_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy the present learning rates of the optimiser's groups."""
        for number, group in enumerate(optimizer.param_groups):
            self.refresh((id(optimizer), number), float(group["lr"]))

    @contextlib.contextmanager
    def rates(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """A context in which the optimiser's learning rates are the tensors."""
        own = [group["lr"] for group in optimizer.param_groups]
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = self.tensor((id(optimizer), number))
        try:
            yield
        finally:
            for group, rate in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = rate


def optimizer_settings(optimizer: torch.optim.Optimizer) -> list[tuple]:
    """An optimiser's settings without its learning rates. They are fixed in a captured graph."""
    return [tuple((k, v) for k, v in g.items() if k not in ("params", "lr")) for g in optimizer.param_groups]


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Prepare an optimiser so that a graph can hold its step.

    Raises:
        ConfigError: no graph can hold the step of such an optimiser.
    """
    kind, first = type(optimizer).__name__, optimizer.param_groups[0]
    if "capturable" not in optimizer.defaults and not first.get("fused"):
        raise ConfigError(
            "graphs", f"the optimiser {kind}, which reads its learning rate on the host",
            "one that can be captured: Adam, AdamW or another with capturable=True, SGD with fused=True",
            "Use such an optimiser, or graphs off.",
        )  # fmt: skip
    if device.type != "cuda":
        if not all(group.get("fused") for group in optimizer.param_groups):
            found = f"the optimiser {kind} on {device.type}, which there counts its steps on the host"
            raise ConfigError("graphs", found, "one with fused=True", "Use Adam(..., fused=True), or graphs off.")
        return
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(device)


class _Content:
    """What some dicts hold at a time, to find out quickly whether they still hold the very same objects."""

    def __init__(self, dicts: Iterable[dict[Any, Any]]):
        self._dicts = list(dicts)
        self.values = [*itertools.chain.from_iterable(map(dict.values, self._dicts))]

    def same(self) -> bool:
        present = itertools.chain.from_iterable(map(dict.values, self._dicts))
        return sum(map(len, self._dicts)) == len(self.values) and all(map(operator.is_, present, self.values))


_requires_grad = operator.attrgetter("requires_grad")


class StateWatch:
    """Finds out whether a tensor that graphs read has been replaced or has moved.

    Args:
        modules: their parameters, buffers and submodules are watched.
        optimizers: their state is watched. State that a step adds counts as no replacement.
    """

    def __init__(self, modules: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]):
        self._roots, self._optimizers = list(modules), list(optimizers)
        every = [module for root in self._roots for module in root.modules()]
        self._parameters = _Content(module._parameters for module in every)
        self._tensors = [p for p in self._parameters.values if p is not None]
        self._places, self._moving = self._present()
        self._parts = [
            (held, name, value) for m in every for held in (m._buffers, m._modules) for name, value in held.items()
        ]
        self._state = [
            (o, p, name, value)
            for o in self._optimizers
            for p, state in o.state.items()
            for name, value in state.items()
        ]
        self._everything = _Content(
            [
                *(held for m in every for held in (vars(m), m._buffers, m._modules)),
                *(held for o in self._optimizers for held in (vars(o), o.state, *o.state.values())),
            ]
        )

    def _present(self) -> tuple[list[int], list[bool]]:
        """Where the parameters lie, and which of them require gradients."""
        return [*map(Tensor.data_ptr, self._tensors)], [*map(_requires_grad, self._tensors)]

    def moved(self) -> bool:
        """Whether a parameter was added, replaced, moved in memory, frozen or unfrozen."""
        return not self._parameters.same() or self._present() != (self._places, self._moving)

    def replaced(self) -> bool:
        """Whether a buffer, a submodule or an optimiser's state was replaced."""
        parts = (held.get(name) is not value for held, name, value in self._parts)
        state = (o.state.get(p, {}).get(name) is not value for o, p, name, value in self._state)
        return any(parts) or any(state)

    def unchanged(self, modules: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> bool:
        """Whether these are the modules and optimisers that are watched, and all that they hold is what they held.

        Quick, and on the safe side: False does not mean that a graph has become wrong.
        """
        same = [*modules, *optimizers] == [*self._roots, *self._optimizers]
        return same and self._everything.same() and not self.moved()


def plain_settings(modules: Iterable[nn.Module]) -> list[tuple]:
    """Plain settings of modules, such as a dropout's p. They are fixed in a captured graph.

    Integers are left out: an integer that changes is a counter.
    """
    return [
        (name, value)
        for root in modules
        for module in root.modules()
        for name, value in vars(module).items()
        if name != "training" and isinstance(value, (bool, float, str))
    ]
