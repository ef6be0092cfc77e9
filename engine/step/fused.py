"""Which updates of Adam and AdamW one pass over the weights can make, and what it needs to know of them.

The optimiser stays torch's: its state, its groups and its learning rates are read where they are, and the weights, the
moments, the step counters, the averages and kept 16-bit copies are changed in place (`engine.kernels.update`). What
the pass does not compute exactly is left to the optimiser's own step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW
from torch.optim import optimizer as torch_optimizer

from engine.kernels.registry import backend_for
from engine.kernels.update import Settings, Table
from engine.kernels.update.reference import Weight
from engine.kernels.update.tables import layout
from engine.model.lowered import Copies
from engine.step.averages import WeightAverage
from engine.step.graphs import keep_for_graph

KEPT = 64
"""Tables that are kept here. A CUDA graph keeps those that it reads itself (`engine.step.graphs.keep_for_graph`)."""


@dataclass(frozen=True)
class Plan:
    """Weights of an optimiser that have gradients, where they are, and the layout and the strides of each.

    Attributes:
        averaged: names of the averages that move with their weights.
    """

    table: Table
    layouts: list[Any]
    strides: list[Any]
    averaged: frozenset[str]

    def fits(self, gradients: list[Tensor]) -> bool:
        """Whether the gradients lie in memory as their weights do."""
        if [*map(Tensor.stride, gradients)] == self.strides:
            return True
        return [*map(layout, gradients)] == self.layouts


@dataclass(frozen=True)
class Work:
    """One update: a plan with its gradients and its learning rates, float32 [groups]."""

    plan: Plan
    parameters: list[Tensor]
    gradients: list[Tensor]
    rates: Tensor


class FusedUpdates:
    """The updates of one step's optimisers that one pass makes."""

    def __init__(self) -> None:
        self._plans: dict[tuple, Plan | None] = {}
        self._rates: dict[int, tuple[list[float], Tensor]] = {}
        # {(average, parameters), by id: both, which keeps the ids theirs, and the averages' names}
        self._names: dict[tuple, tuple[WeightAverage, list[Tensor], list[str | None]]] = {}

    @torch.no_grad()
    def work(
        self,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
        copies: Copies | None = None,
        low: torch.dtype | None = None,
    ) -> Work | None:
        """What is to be done for the present gradients; None where the optimiser's own step is to make the update.

        State that the optimiser's first step would make is made.

        Args:
            average: of the optimiser's weights, or None.
            copies: 16-bit copies of weights, which the pass writes, too.
            low: the type that such copies have, whether or not there are any: one kernel is compiled for both.
        """
        if not _is_torchs(optimizer) or not _moving(optimizer) or not all(map(_fits, optimizer.param_groups)):
            return None
        rates = self._rates_of(optimizer)
        if rates is None:
            return None
        weights, gradients = _weights(optimizer)
        parameters = [w.parameter for w in weights]
        names = [None] * len(weights) if average is None else self._names_of(average, parameters)
        if average is not None:
            averages = [None if name is None else average.values[name] for name in names]
            weights = [w._replace(average=a) for w, a in zip(weights, averages, strict=True)]
        if copies is not None:
            low = copies.dtype
            weights = [w._replace(low=copies.of(w.parameter)) for w in weights]
        groups = tuple(_settings(optimizer, g) for g in optimizer.param_groups)
        plan = self._plan(weights, groups, average, names, low)
        if plan is None or not plan.fits(gradients):
            return None
        keep_for_graph((plan, rates))
        return Work(plan, parameters, gradients, rates)

    def _names_of(self, average: WeightAverage, parameters: list[Tensor]) -> list[str | None]:
        key = id(average), *map(id, parameters)
        if key not in self._names:
            _make_room(self._names)
            self._names[key] = average, parameters, average.names_of(parameters)
        return self._names[key][2]

    def _plan(
        self,
        weights: list[Weight],
        groups: tuple[Settings, ...],
        average: WeightAverage | None,
        names: list[str | None],
        low: torch.dtype | None,
    ) -> Plan | None:
        places = tuple(0 if t is None else t.data_ptr() for w in weights for t in (*w[:5], w.low))
        key = places, tuple((w.parameter.shape, w.group) for w in weights), groups, low
        if key not in self._plans:
            _make_room(self._plans)
            state = {} if average is None else average.module.state_dict()
            named = [(state[name], w.parameter) for name, w in zip(names, weights, strict=True) if name is not None]
            own = all(value.data_ptr() == parameter.data_ptr() for value, parameter in named)
            averaged = frozenset(name for name in names if name is not None)
            plan = _planned(weights, groups, averaged, low) if own else None
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                return plan  # its tables are written at every replay of this graph, and by no other
            self._plans[key] = plan
        else:
            self._plans[key] = self._plans.pop(key)  # the one that was used last is the last to go
        return self._plans[key]

    def _rates_of(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """The groups' learning rates on the device, float32. None where some are tensors elsewhere."""
        device, rates = _moving(optimizer)[0].device, [group["lr"] for group in optimizer.param_groups]
        if all(isinstance(rate, Tensor) and rate.device == device and rate.numel() == 1 for rate in rates):
            vectors = [rate.detach().reshape(1) for rate in rates]
            return (torch.cat(vectors) if len(vectors) > 1 else vectors[0]).to(torch.float32)
        if any(isinstance(rate, Tensor) for rate in rates):
            return None
        known, tensor = self._rates.get(id(optimizer), ([], torch.empty(0)))
        if len(known) != len(rates) or tensor.device != device:
            known, tensor = [float("nan")] * len(rates), torch.empty(len(rates), device=device)
        for i, (old, new) in enumerate(zip(known, rates, strict=True)):
            if old != new:
                tensor[i].fill_(new)
        self._rates[id(optimizer)] = list(rates), tensor
        return tensor


class ScaledMove:
    """What a `GradScaler` takes for an optimiser that unscales its gradients and leaves out steps itself.

    Args:
        optimizer: whose gradients the scaler looks at.
        move: takes 1 / scale, and 1 where the step is to be left out, else 0; both 0-d. None: no scaling.
    """

    _step_supports_amp_scaling = True

    def __init__(self, optimizer: torch.optim.Optimizer, move: Callable[[Tensor | None, Tensor | None], None]):
        self.param_groups, self._move = optimizer.param_groups, move
        self.grad_scale: Tensor
        self.found_inf: Tensor

    def step(self) -> None:
        """Move, by what the scaler has set."""
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        # as torch's own unscaling
        self._move(None if scale is None else scale.double().reciprocal().float(), found)


def _make_room(kept: dict[tuple, Any]) -> None:
    if len(kept) >= KEPT:
        kept.pop(next(iter(kept)))


def fuses(parameter: Tensor) -> bool:
    """Whether the pass is used for weights like this one: by Triton, as other operations. Not on a CPU by default."""
    return backend_for(parameter, "update_move") == "triton"


def note_step(optimizer: torch.optim.Optimizer) -> None:
    """Tell a scheduler of learning rates, which wraps `step`, that the optimiser has moved."""
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        optimizer._opt_called = True  # type: ignore[attr-defined]


def _is_torchs(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` would be that of Adam or AdamW and nothing else: no hook, no subclass, no replaced method."""
    if type(optimizer) not in (Adam, AdamW) or not isinstance(optimizer, Adam):
        return False  # before torch 2.7 AdamW was no Adam
    own = vars(optimizer).get("step")
    hooks = (
        *(getattr(torch_optimizer, f"_global_optimizer_{when}_hooks", {}) for when in ("pre", "post")),
        *(getattr(optimizer, f"_optimizer_step_{when}_hooks", {}) for when in ("pre", "post")),
    )
    return (own is None or hasattr(own, "_wrapped_by_lr_sched")) and not any(hooks)


def _moving(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _fits(group: dict[str, Any]) -> bool:
    """Whether the pass computes the updates of a group: its settings, and its parameters that have gradients."""
    if group["amsgrad"] or group["maximize"] or group["differentiable"] or not (group["fused"] or group["capturable"]):
        return False
    if any(isinstance(x, Tensor) for x in (*group["betas"], group["eps"], group["weight_decay"])):
        return False
    return all(
        _plain(p) and _plain(p.grad) and p.grad.device == p.device for p in group["params"] if p.grad is not None
    )


def _plain(tensor: Tensor) -> bool:
    """Whether it is a whole dense float32 tensor, and of no class of its own, as FSDP2's are."""
    of_torch = type(tensor) in (torch.nn.Parameter, Tensor)
    return of_torch and tensor.dtype == torch.float32 and tensor.layout == torch.strided


def _settings(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Settings:
    decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, AdamW))
    beta1, beta2 = group["betas"]
    return Settings(beta1, beta2, group["eps"], group["weight_decay"], decoupled)


def _weights(optimizer: torch.optim.Optimizer) -> tuple[list[Weight], list[Tensor]]:
    """The weights that have gradients, with the optimiser's state, and the gradients."""
    weights, gradients = [], []
    for number, group in enumerate(optimizer.param_groups):
        parameters, of_group, first, second, most, steps = [[] for _ in range(6)]
        optimizer._init_group(group, parameters, of_group, first, second, most, steps)  # type: ignore[attr-defined]
        weights += [Weight(*w, None, number) for w in zip(parameters, first, second, steps, strict=True)]
        gradients += of_group
    return weights, gradients


def _planned(
    weights: list[Weight], groups: Sequence[Settings], averaged: frozenset[str], low: torch.dtype | None
) -> Plan | None:
    """The plan, or None where not all of it lies in memory as the pass needs it."""
    device = weights[0].parameter.device
    for w in weights:
        place = layout(w.parameter)
        beside = [t for t in (w.first, w.second, w.average) if t is not None]
        alike = all(_plain(t) and layout(t) == place and t.numel() == w.parameter.numel() for t in beside)
        counted = _plain(w.step) and w.step.numel() == 1
        copied = w.low is None or (w.low.device == device and w.low.dtype == low and layout(w.low) == place)
        if place is None or not alike or not counted or not copied:
            return None
        if any(t.device != device for t in (w.parameter, w.step, *beside)):
            return None
    parameters = [w.parameter for w in weights]
    return Plan(Table(weights, groups, low), [*map(layout, parameters)], [p.stride() for p in parameters], averaged)
