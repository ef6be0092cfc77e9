"""What one evaluation of an objective gives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from engine.model.estimators import Estimate
from engine.model.term_estimators import TermEstimates
from engine.objective.terms import Sums


@dataclass
class ObjectiveOutput:
    """What one evaluation of an objective gives. All but `loss` is computed on first use.

    Attributes:
        loss: 0-d, to be minimised: the weighted sum of `losses`.
        terms: the estimates of the terms, as vectors.
        sums: computes expressions from terms; None in stage 1.
    """

    loss: Tensor
    terms: TermEstimates
    sums: Sums | None = None

    @property
    def names(self) -> list[str]:
        """Keys of `losses` and `values`: names of terms in stage 1, of expressions in stage 2."""
        return list(self.terms.names) if self.sums is None else self.sums.names

    @cached_property
    def stacked_values(self) -> Tensor:
        """`values` as one tensor, [names], detached, in nats."""
        with torch.no_grad():
            values = self.terms.surrogates().detach()
            return values if self.sums is None else self.sums(values)

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """Detached 0-d each, in nats, same keys as `losses`."""
        return dict(zip(self.names, self.stacked_values.unbind(), strict=True))

    @cached_property
    def losses(self) -> dict[str, Tensor]:
        """0-d each, unweighted, with gradients: per term in stage 1, per expression in stage 2."""
        if self.sums is None:
            return {name: estimate.loss for name, estimate in self.estimates.items()}
        with torch.set_grad_enabled(self.loss.requires_grad):
            return dict(zip(self.names, (-self.sums(self.terms.surrogates())).unbind(), strict=True))

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Every term's `Estimate`."""
        with torch.set_grad_enabled(self.loss.requires_grad):
            return self.terms.by_term
