"""How a step moves its optimisers: gradients of one or several micro-batches, clipping, scaling, the average."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.kernels.update import Settings, Table, inspect, move
from engine.kernels.update.reference import Weight
from engine.model.lowered import LOW, in_use
from engine.objective import Objective
from engine.profile import part
from engine.sharded import clip_norm, clip_values, is_sharded, local
from engine.step.averages import WeightAverage
from engine.step.checks import check_optimizer
from engine.step.finite import NonFinite
from engine.step.fused import FusedUpdates, ScaledMove, Work, fuses, note_step
from engine.step.graph_state import DeviceNumbers


class Accumulation:
    """Counts the micro-batches of one update, and weights their losses by rows.

    A micro-batch's loss is a mean over its rows. The sum of gradients is that of the mean over all rows of the group.
    Its weight is first taken relative to a full group of batches like the group's first one. `correction` is the factor
    that is left when the group ends otherwise: after a smaller batch, or too early.

    Args:
        count: micro-batches per update.

    >>> group = Accumulation(2)
    >>> group.weight(10), group.add(10), group.weight(5), group.add(5)
    (0.5, False, 0.25, True)
    >>> round(group.correction, 3)  # 2/3 · 10/10 and 1/3 · 5/5 of the two means
    1.333
    """

    def __init__(self, count: int):
        if not isinstance(count, int) or count < 1:
            raise ConfigError(
                "TwoStageStep", f"accumulate={count}", "a whole number of micro-batches >= 1", "Change it."
            )
        self.count = count
        self.clear()

    def clear(self) -> None:
        """Begin a new group."""
        self.batches = self.rows = self.first = 0

    def weight(self, rows: int) -> float:
        """The weight of the next micro-batch's mean loss."""
        return rows / ((self.first or rows) * self.count)

    def add(self, rows: int) -> bool:
        """Count a micro-batch whose gradients were added. Returns whether the group is complete."""
        self.first = self.first or rows
        self.batches, self.rows = self.batches + 1, self.rows + rows
        return self.batches == self.count

    @property
    def correction(self) -> float:
        """The factor for the summed gradients. It is 1 for a full group of equal batches."""
        return self.first * self.count / self.rows

    def state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The counts and the gradients so far. Gradients are kept only within a group."""
        gradients = [None if p.grad is None else p.grad.clone() for p in _parameters(optimizer)] if self.batches else []
        return {"batches": self.batches, "rows": self.rows, "first": self.first, "gradients": gradients}

    def load_state_dict(self, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Put back what `state_dict` gave."""
        self.batches, self.rows, self.first = state["batches"], state["rows"], state["first"]
        if state["gradients"]:
            for p, gradient in zip(_parameters(optimizer), state["gradients"], strict=True):
                p.grad = None if gradient is None else gradient.to(p.device, copy=True)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class Updates:
    """The updates of a `TwoStageStep`, which is a subclass."""

    model: nn.Module
    objective: Objective | None
    main_optimizer: torch.optim.Optimizer | None
    estimator_optimizer: torch.optim.Optimizer | None
    clip_value: float | None
    clip_norm: float | None
    average: WeightAverage | None
    scaler: torch.amp.GradScaler | None
    autocast: torch.dtype | None
    held: DeviceNumbers | None
    finite: NonFinite
    accumulate: int
    backward: Callable[[Tensor], None]
    groups: dict[str, Accumulation]
    _checked: dict[str, torch.optim.Optimizer]
    # set by one pass that has moved averages, too: the rate, and their names
    _moved: tuple[float | Tensor, frozenset[str]] | None = None

    def _optimizer(self, name: str) -> torch.optim.Optimizer:
        optimizer = getattr(self, name)
        if optimizer is None:
            raise ConfigError(
                "TwoStageStep", f"no {name}", "one, to train with", f"Pass {name}=, or only evaluate with this step.",
            )  # fmt: skip
        if self._checked.get(name) is not optimizer:
            main = name == "main_optimizer"
            module, other = (self.model, "estimator_optimizer") if main else (self.objective, "main_optimizer")
            if module is not None:
                check_optimizer(name, optimizer, module, getattr(self, other))
            self._checked[name] = optimizer
        return optimizer

    def _update(
        self, loss: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None, rows: int = 1
    ) -> bool:
        """Add the gradients of a batch's mean loss. Move the optimiser if its group of micro-batches is complete.

        Returns:
            whether the optimiser moved.
        """
        group = self._group(optimizer)
        if group.batches == 0:
            optimizer.zero_grad(set_to_none=True)
        if self.accumulate > 1:
            loss = loss * group.weight(rows)
        if loss.requires_grad or optimizer is self.main_optimizer:  # estimators may all be frozen
            with part("backward"):
                self.backward(loss if scaler is None else scaler.scale(loss))
        if not group.add(rows):
            return False
        self._finish(optimizer, scaler)
        return True

    def _group(self, optimizer: torch.optim.Optimizer) -> Accumulation:
        return self.groups["main" if optimizer is self.main_optimizer else "estimators"]

    def _finish(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        """Move an optimiser by the gradients of its group of micro-batches, and begin a new group."""
        group = self._group(optimizer)
        if group.correction != 1:
            gradients = [local(p.grad) for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, group.correction)
        group.clear()
        with part("update"):
            self._apply(optimizer, scaler)

    def flush(self) -> None:
        """Update with the micro-batches of a group that is not complete, as at the end of a pass.

        `train_epoch` does this itself. Call it in a loop of your own before you evaluate, save or end.
        """
        if self.groups["estimators"].batches:
            self._finish(self._optimizer("estimator_optimizer"), None)
        if self.groups["main"].batches:
            self._finish(self._optimizer("main_optimizer"), self.scaler)
            self._update_average()

    def _update_average(self) -> None:
        if self.average is not None:
            with part("average"):
                (rate, moved), self._moved = self._moved or (self._average_rate(self.average), frozenset()), None
                self.average.update(rate, moved)

    def _average_rate(self, average: WeightAverage) -> float | Tensor:
        return average.rate(average.next_rate() if self.held is None else self.held.tensor("average"))

    def _apply(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        self._moved = None  # of a step that an error ended
        work = self._fused_work(optimizer)
        if work is None:
            self._apply_in_parts(optimizer, scaler)
        elif scaler is None:
            self._move(work, optimizer, None, None)
        else:
            scaled = ScaledMove(optimizer, partial(self._move, work, optimizer))
            scaler.step(scaled)
            scaler.update()

    def _apply_in_parts(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        """Unscale, clip, check and move, one pass over the gradients after another."""
        if scaler is not None:
            scaler.unscale_(optimizer)
        parameters = _parameters(optimizer)
        if self.clip_value is not None:
            clip_values(parameters, self.clip_value)
        if self.clip_norm is not None:
            clip_norm(parameters, self.clip_norm)
        self.finite.check_gradients(optimizer)
        with contextlib.nullcontext() if self.held is None else self.held.rates(optimizer):
            if scaler is None:
                optimizer.step()
            else:
                if self.average is not None and optimizer is self.main_optimizer:
                    self.average.hold = _overflowed(scaler, optimizer)
                scaler.step(optimizer)
                scaler.update()
        if (copies := in_use()) is not None:
            copies.refresh(parameters)

    # -- the same in one pass --

    @functools.cached_property
    def _fused(self) -> FusedUpdates:
        return FusedUpdates()

    def _fused_work(self, optimizer: torch.optim.Optimizer) -> Work | None:
        """What one pass over the weights is to do; None where it is not used, or would not do the same."""
        first = next((p for p in _parameters(optimizer) if p.grad is not None), None)
        if first is None or is_sharded(first) or not fuses(first) or self.finite.host_looks(first):
            return None
        average = self.average if optimizer is self.main_optimizer else None
        with contextlib.nullcontext() if self.held is None else self.held.rates(optimizer):
            return self._fused.work(optimizer, average, in_use(), self._low)

    @property
    def _low(self) -> torch.dtype | None:
        """The type of 16-bit copies of weights, where some are kept."""
        return self.autocast if self.autocast in LOW else None

    def try_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Launch what one pass launches, but on a weight of its own, as `engine.kernels.warm_up` needs it."""
        parameter = _parameters(optimizer)[0]
        if not isinstance(optimizer, torch.optim.Adam) or not fuses(parameter):
            return
        one, number = torch.zeros(1, device=parameter.device), torch.zeros((), device=parameter.device)
        main, leaves_out = optimizer is self.main_optimizer, self.finite.on_device(parameter)
        scaled = number if main and self.scaler is not None else None
        averaged = self.average is not None and main
        weight = Weight(one, one.clone(), one.clone(), number.clone(), one.clone() if averaged else None, 0)
        table = Table([weight], [Settings()], self._low)
        gradients = table.gradients([one.clone()])
        norm, stats = math.inf if self.clip_norm is None else self.clip_norm, None
        if leaves_out or self.clip_norm is not None:
            stats = inspect(table, gradients, inverse=scaled)
        skip = number if leaves_out else scaled
        rates, average = one.clone(), number if averaged else None
        move(table, gradients, rates, norm=norm, stats=stats, inverse=scaled, skip=skip, average=average)

    def _move(self, work: Work, optimizer: torch.optim.Optimizer, inverse: Tensor | None, skip: Tensor | None) -> None:
        """Unscale, clip, check, move, average and copy in one pass; before it look at the gradients where need be."""
        table, device = work.plan.table, work.gradients[0].device
        gradients = table.gradients(work.gradients)
        limit = math.inf if self.clip_value is None else self.clip_value
        norm, stats = math.inf if self.clip_norm is None else self.clip_norm, None
        leaves_out = self.finite.on_device(work.gradients[0])
        if leaves_out or self.clip_norm is not None:
            stats = inspect(table, gradients, limit=limit, inverse=inverse)
            if leaves_out:
                skip = self.finite.note_found(stats[0])
        rate = None
        if self.average is not None and optimizer is self.main_optimizer:
            self.average.hold = skip
            self._moved = self._average_rate(self.average), work.plan.averaged
            rate = _on_device(self._moved[0], device)
        move(
            table, gradients, work.rates, limit=limit, norm=norm, stats=stats, inverse=inverse, skip=skip, average=rate
        )
        for parameter in work.parameters:
            torch.autograd.graph.increment_version(parameter)
        note_step(optimizer)


def _overflowed(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> Tensor | None:
    """0-d: 1 if the scaler found a gradient that is not finite, and will leave out the step, else 0."""
    found = list(scaler._found_inf_per_device(optimizer).values())
    return torch.stack([f.to(found[0].device) for f in found]).amax() if found else None


def _on_device(number: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(torch.float32)
    return torch.full((), number, dtype=torch.float32, device=device)


@contextlib.contextmanager
def without_grad(module: nn.Module) -> Iterator[None]:
    """Within the context no parameter of the module requires gradients."""
    needing = [p for p in module.parameters() if p.requires_grad]
    for p in needing:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in needing:
            p.requires_grad_(True)
