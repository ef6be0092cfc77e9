"""Networks of several folds, trained together. Each fold's rows are held out from its own network.

The parameters of all folds are stacked, so that one matrix product serves them all. At every check the networks are
read on training rows and on held-out rows, and their weights are kept. The other folds choose a fold's checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Rate = Callable[[int], float]
"""Maps the number of a step, from 1, to the learning rate of that step."""

Readings = tuple[Tensor, Tensor]
"""Mean readings of each fold's network on training rows and on held-out rows, [folds] each, nats."""


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training.

    Attributes:
        steps: most steps.
        batch_size: rows per step and fold.
        lr: learning rate of Adam at its highest.
        hidden: width of the hidden layers.
    """

    steps: int
    batch_size: int
    lr: float
    hidden: int


@dataclass(frozen=True)
class Check:
    """The networks after some steps: their readings [folds] in nats, and their weights, [folds, ...] each."""

    step: int
    training: Tensor
    held_out: Tensor
    weights: list[Tensor]


class FoldTrainer:
    """One training of the networks of all folds.

    Args:
        parameters: of the networks, [folds, ...] each.
        loss: maps rows [folds, B] to a loss, summed over the folds so that no fold changes another's steps.
        read: gives the readings of networks with the given weights.
        batches: rows [folds, B] of each fold's training rows.
        rate: learning rate of each step.
        every: steps from one check to the next.
        weight_decay: of AdamW.
        most_gradient: norm at which the gradient of all parameters is clipped; None to leave it as it is.
        average: decay of a moving average of the weights, which is then read and kept; None to keep the weights.
        before: readings before the first step; None to read the networks.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        loss: Callable[[Tensor], Tensor],
        read: Callable[[list[Tensor]], Readings],
        batches: Iterator[Tensor],
        rate: Rate,
        every: int,
        weight_decay: float,
        most_gradient: float | None = None,
        average: float | None = None,
        before: Readings | None = None,
    ):
        self.parameters, self.loss, self.read, self.batches, self.rate = parameters, loss, read, batches, rate
        self.every, self.most_gradient, self.decay = every, most_gradient, average
        self.optimizer = torch.optim.AdamW(parameters, weight_decay=weight_decay, foreach=True)
        self.average = None if average is None else [parameter.detach().clone() for parameter in parameters]
        self.checks: list[Check] = []
        self._check(0, before)

    def train(self, steps: int) -> None:
        """Train on for some steps, and check the networks after the last one, too."""
        last = self.checks[-1].step + steps
        for step in range(self.checks[-1].step + 1, last + 1):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step)
            loss = self.loss(next(self.batches))
            self.optimizer.zero_grad()
            loss.backward()
            if self.most_gradient is not None:
                nn.utils.clip_grad_norm_(self.parameters, self.most_gradient)
            self.optimizer.step()
            if self.average is not None:
                with torch.no_grad():
                    present = [parameter.detach() for parameter in self.parameters]
                    torch._foreach_lerp_(self.average, present, max(1 - self.decay, 1 / (step + 1)))
            if step % self.every == 0 or step == last:
                self._check(step)

    @torch.no_grad()
    def _check(self, step: int, readings: Readings | None = None) -> None:
        weights = self.parameters if self.average is None else self.average
        training, held_out = self.read(weights) if readings is None else readings
        kept = [weight.detach().clone() for weight in weights]
        self.checks.append(Check(step, training, held_out.nan_to_num(-math.inf), kept))

    @property
    def held_out(self) -> Tensor:
        """Readings on held-out rows, [checks, folds]."""
        return torch.stack([check.held_out for check in self.checks])

    def best(self) -> int:
        """The check that reads most on held-out rows, mean over folds."""
        return int(self.held_out.mean(1).argmax())

    def gain(self) -> float:
        """What training has added to the reading on held-out rows at the best check, nats."""
        means = self.held_out.mean(1)
        return (means.max() - means[0]).item()

    @torch.no_grad()
    def load(self, picks: list[int]) -> None:
        """Give each fold's network the weights of its own check."""
        for parameter, weights in zip(self.parameters, self.chosen(picks), strict=True):
            parameter.copy_(weights)

    def chosen(self, picks: list[int]) -> list[Tensor]:
        """The weights of each fold's own check, [folds, ...] each."""
        return [
            torch.stack([self.checks[pick].weights[i][fold] for fold, pick in enumerate(picks)])
            for i in range(len(self.parameters))
        ]

    def history(self) -> list[dict[str, float]]:
        """Means over folds at each check, as `Estimate.history` holds them."""
        return [
            {"step": check.step, "training": check.training.mean().item(), "held_out": check.held_out.mean().item()}
            for check in self.checks
        ]


def batches_of(training: list[Tensor], size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows [folds, size] of each fold's training rows, in passes over new orders."""
    queues = [torch.empty(0, dtype=torch.long)] * len(training)
    while True:
        for fold, rows in enumerate(training):
            if len(queues[fold]) < size:
                queues[fold] = rows[torch.randperm(len(rows), generator=generator)]
        yield torch.stack([queue[:size] for queue in queues])
        queues = [queue[size:] for queue in queues]


def best_on_others(readings: Tensor, margin: float = 0.0) -> list[int]:
    """For each fold the candidate that reads most on the other folds, of readings [candidates, folds].

    It is candidate 0 unless another one is clearly better: by more than `margin` times 1 nat more than its reading.
    """
    picks = []
    for fold in range(readings.shape[1]):
        others = torch.cat([readings[:, :fold], readings[:, fold + 1 :]], 1).mean(1)
        best = int(others.argmax())
        picks.append(best if others[best] > others[0] + margin * (1 + abs(others[0])) else 0)
    return picks
