"""Averages of training: means of numbers over an epoch, and the moving average of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.sharded import local

Sums = Mapping[str, tuple[float, int]]
"""{name: (sum over samples, number of samples)}."""


def means(sums: Sums) -> dict[str, float]:
    return {name: value / weight for name, (value, weight) in sums.items()}


class Average:
    """Sample-weighted sums of named numbers. Batches are added on the device, which is read once, in `sums`."""

    def __init__(self) -> None:
        self._on_device: dict[tuple[str, ...], tuple[Tensor, int | Tensor]] = {}
        self._sums: dict[str, tuple[float, int]] = {}
        self._later: list[Callable[[], Sums]] = []

    def add(self, names: Sequence[str], values: Tensor, weight: int | Tensor, keep: Tensor | None = None) -> None:
        """Add one batch's values [names], which are means over `weight` samples.

        Args:
            keep: a bool on the device: False leaves the batch out.
        """
        key = tuple(names)
        total, seen = self._on_device.get(key, (0.0, 0))
        if keep is not None:
            values, weight = torch.where(keep, values, torch.zeros_like(values)), keep * weight
        self._on_device[key] = total + values.detach() * weight, seen + weight

    def add_sums(self, sums: Sums) -> None:
        for name, (value, weight) in sums.items():
            total, seen = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value, seen + weight

    def add_later(self, read: Callable[[], Sums]) -> None:
        """Add sums that are not read from the device before they are asked for."""
        self._later.append(read)

    def _read(self) -> None:
        later, self._later = self._later, []
        for read in later:
            self.add_sums(read())

    def sums(self) -> Sums:
        """Everything that was added. Waits for the device."""
        self._read()
        for names, (total, weight) in self._on_device.items():
            if weight := int(weight):
                self.add_sums({name: (value, weight) for name, value in zip(names, total.tolist(), strict=True)})
        self._on_device.clear()
        return self._sums

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors. The tensors may still be on the device."""
        self._read()
        batches = [[list(names), total, weight] for names, (total, weight) in self._on_device.items()]
        return {"batches": batches, "sums": {name: list(pair) for name, pair in self._sums.items()}}

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device | str = "cpu") -> Average:
        """The sums that `state_dict` gave."""
        average = cls()
        average._on_device = {tuple(n): (total.to(device), int(weight)) for n, total, weight in state["batches"]}
        average._sums = {name: (total, weight) for name, (total, weight) in state["sums"].items()}
        return average


@dataclass
class EpochResult:
    """Means over one pass. `information` and `estimators` (nats) are empty where no term was evaluated.

    Attributes:
        loss: the whole loss of stage 2; `task` is its part without the information terms.
        information: of stage 2 or of evaluation. `estimators` is that of stage 1.
        prediction: [N, n], and `target`; of an evaluation only.
        features: of all samples in an evaluation. In training: those that stage 1 saw, of one state of the model.
        skipped: steps of both stages that were left out because a loss or a gradient was not finite.
    """

    loss: float
    task: float
    information: dict[str, float] = field(default_factory=dict)
    estimators: dict[str, float] = field(default_factory=dict)
    prediction: Tensor | None = None
    target: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    skipped: int = 0


class WeightAverage:
    """Exponential moving average of a module's floating-point parameters and buffers (Polyak averaging).

    Args:
        module: whose weights are averaged.
        decay: weight of the past in every update, in (0, 1). Update t uses min(decay, (1 + t) / (10 + t)), so that the
            weights of the first steps are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay, self.updates = module, decay, 0
        self.hold: Tensor | None = None  # on the device: 1 where the present step is left out, else 0
        self._made: Tensor | None = None  # on the device: updates that were made, where it may leave out some
        self.values = {k: v.detach().clone() for k, v in module.state_dict().items() if v.is_floating_point()}
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        # entries of these may be infinite: a mask of -inf, or MINE's moving average before its first batch
        self._unbounded = {k for k, v in self.values.items() if k not in parameters or not _all_finite(v)}

    def next_rate(self) -> float:
        """Weight of the present in the next update. Each call counts as one update."""
        rate = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        return rate

    @torch.no_grad()
    def rate(self, rate: float | Tensor) -> float | Tensor:
        """Weight of the present in this update: `rate` of `next_rate`, or what the device counts.

        With `hold`, only the device knows which updates were made. A step that it leaves out is not counted, and its
        weight is 0.
        """
        if self.hold is None and self._made is None:
            return rate
        hold = torch.zeros((), device=self._made.device) if self.hold is None else self.hold
        if self._made is None:
            # `next_rate` has counted this update
            self._made = torch.full((), self.updates - 1.0, dtype=torch.float64, device=hold.device)
        kept = 1 - hold
        rate = (1 - ((1 + self._made) / (10 + self._made)).clamp(max=self.decay)) * kept
        self._made.add_(kept)
        return rate.float() if rate.is_cuda else rate

    def settle(self) -> None:
        """Take over how many updates the device has made. Waits for it."""
        if self._made is not None:
            self.updates = int(self._made)

    @torch.no_grad()
    def update(self, rate: float | Tensor, moved: frozenset[str] = frozenset()) -> None:
        """Move the average towards the module's present weights by `rate`, a number or a 0-d tensor.

        An entry whose present or average is infinite has no mean: it becomes the present one, unless the rate is 0.

        Args:
            moved: names of averages that have already moved.
        """
        state = self.module.state_dict()
        alike: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        for name, value in self.values.items():
            if name in self._unbounded and name not in moved:
                alike.setdefault((value.device, value.dtype), []).append(name)
        for names in alike.values():
            _move([local(self.values[k]) for k in names], [local(state[k].detach()) for k in names], rate)
        names = [name for name in self.values if name not in moved and name not in self._unbounded]
        if not names:
            return
        values, present = [local(self.values[k]) for k in names], [local(state[k].detach()) for k in names]
        if not isinstance(rate, Tensor):
            torch._foreach_lerp_(values, present, rate)
            return
        change = torch._foreach_sub(present, values)
        torch._foreach_mul_(change, rate)
        torch._foreach_add_(values, change)

    def names_of(self, parameters: Sequence[Tensor]) -> list[str | None]:
        """The name of each parameter's average; None for one that has none. Of a tied parameter: the first name."""
        names: dict[int, str] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if name in self.values:
                names.setdefault(id(parameter), name)
        return [names.get(id(p)) for p in parameters]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the module holds the averaged weights."""
        own = {k: torch.empty_like(v) for k, v in self.values.items()}
        _copy(own, self.module.state_dict())
        _load(self.module, self.values)
        try:
            yield
        finally:
            _load(self.module, own)

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        return {"updates": self.updates, "values": self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = state["updates"]
        if self._made is not None:
            self._made.fill_(self.updates)
        for name, value in state["values"].items():
            self.values[name].copy_(value)


def _move(values: Sequence[Tensor], present: Sequence[Tensor], rate: float | Tensor) -> None:
    """Move values of one type towards the present, of which some may be infinite. Joined, for few launches."""
    value, now = (torch.cat([t.flatten() for t in tensors]) for tensors in (values, present))
    change = now - value
    if isinstance(rate, Tensor):
        mean, without_mean = value + rate * change, torch.where(rate > 0, now, value)
    else:
        mean, without_mean = torch.lerp(value, now, rate), now if rate > 0 else value
    parts = torch.where(change.isfinite(), mean, without_mean).split([t.numel() for t in values])
    torch._foreach_copy_(list(values), [part.view(t.shape) for part, t in zip(parts, values, strict=True)])


def _all_finite(value: Tensor) -> bool:
    return value.is_meta or bool(local(value).isfinite().all())


@torch.no_grad()
def _copy(to: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy the values of the same names, all at once."""
    torch._foreach_copy_([local(v.detach()) for v in to.values()], [local(values[k].detach()) for k in to])


def _load(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """As `module.load_state_dict(values, strict=False)`, in few launches where the module's state is its own memory."""
    state = {k: v for k, v in module.state_dict().items() if k in values}
    own = {local(t).data_ptr() for t in (*module.parameters(), *module.buffers())}
    if all(local(v).data_ptr() in own for v in state.values()) and not any(map(_loads_itself, module.modules())):
        _copy(state, values)
    else:
        module.load_state_dict(values, strict=False)


def _loads_itself(module: nn.Module) -> bool:
    """Whether loading does more to a module than to copy values."""
    function = type(module)._load_from_state_dict
    return bool(module._load_state_dict_post_hooks) or not (function.__module__ or "").startswith("torch.")
