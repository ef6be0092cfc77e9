"""How a step moves its optimisers: gradients of one or several micro-batches, clipping, scaling, the average."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.objective import Objective
from engine.profile import part
from engine.sharded import clip_norm, clip_values, local
from engine.step.averages import WeightAverage
from engine.step.checks import check_optimizer
from engine.step.finite import NonFinite
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
                "TwoStageStep", f"accumulate={count}", "a whole number of micro-batches >= 1", "Correct it."
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
    held: DeviceNumbers | None
    finite: NonFinite
    accumulate: int
    backward: Callable[[Tensor], None]
    groups: dict[str, Accumulation]
    _checked: dict[str, torch.optim.Optimizer]

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
                self.average.update(self.average.next_rate() if self.held is None else self.held.tensor("average"))

    def _apply(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self.clip_value is not None:
            clip_values(parameters, self.clip_value)
        if self.clip_norm is not None:
            clip_norm(parameters, self.clip_norm)
        self.finite.check_gradients(optimizer)
        with contextlib.nullcontext() if self.held is None else self.held.rates(optimizer):
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()


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
