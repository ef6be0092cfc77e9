"""CLUB for conditional mutual information, where the condition has few values."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model.conditional_club import ConditionalCLUB
from engine.model.estimators import readable
from engine.model.variational import Conditional, check_classes, one_hot


class StratifiedCLUB(ConditionalCLUB):
    """An upper bound of I(X;Y|Z) for a Z of classes: CLUB among the rows of equal z.

    A conditional q(y|x,z) learns by likelihood. The value is the mean of log q(y_i|x_i,z_i) minus the mean of
    log q(y_j|x_i,z_i) over the other rows j with z_j = z_i. Its expectation is at least I(X;Y|Z) where q is p(y|x,z). A
    row whose z no other row has is left out of the value; `details["left_out"]` counts such rows. No product rows are
    drawn, and gradients reach all rows.

    >>> estimator = StratifiedCLUB(dim_x=4, dim_y=2, strata=3)
    >>> z = torch.arange(12).remainder(3)[:, None]
    >>> estimator(torch.randn(12, 4), torch.randn(12, 2), z).details["left_out"]
    tensor(0)

    Args:
        dim_x, dim_y: widths of x and y.
        strata: number of values of z, which is [B, 1] with 0 ... strata - 1, or [B, strata] with one-hot rows.
        classes: as for `MIEstimator`.
        hidden, layers, activation: of the networks.
        on_degenerate: as for `MIEstimator`. A batch in which no two rows have one z is degenerate.
    """

    def __init__(
        self,
        dim_x: int,
        dim_y: int,
        strata: int,
        classes: int | None = None,
        hidden: int = 256,
        layers: int = 2,
        activation: str = "relu",
        on_degenerate: str = "raise",
    ):
        widths = tuple(dict.fromkeys((1, strata)))
        super().__init__(dim_x, dim_y, strata, widths, classes, hidden, layers, activation, on_degenerate)
        self.strata = strata

    def conditions(self, z: Tensor) -> Tensor:
        if readable(z):
            check_classes(f"{self.where}, condition", z, self.strata)
        return one_hot(z, self.strata)

    def problem(self, z: Tensor) -> tuple[str, str] | None:
        if readable(z) and not bool((z.sum(0) > 1).any()):
            return f"{len(z)} rows of different z", "two rows of one z"
        return None

    def excess(self, q: Conditional, y: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        counts = z.sum(0)
        shares = z / counts.clamp(min=1)  # [B, strata]
        means = z @ (shares.T @ y)  # of the row's stratum
        moments = (means,) if self.classes is not None else (means, z @ (shares.T @ (y - means).square()))
        own = z @ counts
        paired = own > 1
        excess = q.excess(y, moments) * own / (own - 1).clamp(min=1)
        return torch.where(paired, excess, 0.0).sum() / paired.sum(), {"left_out": (~paired).sum()}
