"""Estimators of mutual information as modules: critic, log-baseline, bound. All values are in nats."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Estimate:
    """One estimate from one batch; value and loss are told apart because their signs differ.

    Attributes:
        value: the estimate in nats, detached, 0-d.
        surrogate: 0-d, numerically equal to `value`, carries the gradient that *increases* the information.
        loss: 0-d, what the estimator's own parameters minimise.
        details: detached extras by name; `details["skipped"]` = 1 where a degenerate batch was skipped.
    """

    value: Tensor
    surrogate: Tensor
    loss: Tensor
    details: dict[str, Tensor] = field(default_factory=dict)
