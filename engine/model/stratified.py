"""CLUB for conditional mutual information, where the condition has few values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.errors import EstimatorError
from engine.model.estimators import Estimate, finite, or_zero, own_type, raise_or_skip, readable
from engine.model.mlps import check_choice, xavier
from engine.model.variational import check_classes, check_conditional, conditional_net, learns, one_hot
from engine.vocabulary import ON_DEGENERATE


class StratifiedCLUB(nn.Module):
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
        super().__init__()
        check_choice("on_degenerate", on_degenerate, ON_DEGENERATE)
        check_conditional("club", "separate", dim_y, classes)
        self.dim_x, self.dim_y, self.strata, self.classes = dim_x, dim_y, strata, classes
        self.on_degenerate = on_degenerate
        self.q = conditional_net(dim_x + strata, dim_y, classes, hidden, layers, activation, xavier)

    @property
    def bound(self) -> str:
        return "club"

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Estimate:
        """One estimate from x [B, dim_x], y [B, dim_y] and z [B, 1] or [B, strata].

        Raises:
            EstimatorError: shapes, types or devices that do not fit, a value that is no class; a degenerate batch under
                on_degenerate="raise".
        """
        x, y, z = own_type(self._where(), self, x, y, z)
        self._check_shapes(x, y, z)
        if readable(y):
            check_classes(f"{self._where()}, condition", z, self.strata)
            if self.classes is not None:
                check_classes(self._where(), y, self.classes)
        with torch.autocast(x.device.type, enabled=False):
            z = one_hot(z, self.strata)
        counts = z.sum(0)
        if readable(z) and not bool((counts > 1).any()):
            return raise_or_skip(self, self._where(), f"{len(z)} rows of different z", "two rows of one z", x, y)
        q, given = self.q(torch.cat([x, z.to(x.dtype)], 1)), y
        with torch.autocast(x.device.type, enabled=False):
            y = q.targets(y)
            loss = -q.log_prob(y).mean()
            shares = z / counts.clamp(min=1)  # [B, strata]
            means = z @ (shares.T @ y)  # of the row's stratum
            moments = (means,) if self.classes is not None else (means, z @ (shares.T @ (y - means).square()))
            own = z @ counts
            paired = own > 1
            excess = q.excess(y, moments) * own / (own - 1).clamp(min=1)
            value = torch.where(paired, excess, 0.0).sum() / paired.sum()
        if not finite(value, loss):
            what = f"the estimate {value.item()} and the log-likelihood {-loss.item()}"
            return raise_or_skip(self, self._where(), what, "finite numbers", x, y)
        if learns(self.q):
            self.q.observe(given)
        value, loss = (or_zero(t, self.on_degenerate) for t in (value, loss))
        return Estimate(value.detach(), value, loss, {"left_out": (~paired).sum()})

    def _check_shapes(self, x: Tensor, y: Tensor, z: Tensor) -> None:
        fits = x.dim() == y.dim() == z.dim() == 2 and len(x) == len(y) == len(z)
        fits = fits and x.shape[1] == self.dim_x and y.shape[1] == self.dim_y and z.shape[1] in (1, self.strata)
        if not fits:
            raise EstimatorError(
                self._where(), f"x {list(x.shape)}, y {list(y.shape)} and z {list(z.shape)}",
                f"x [B, {self.dim_x}], y [B, {self.dim_y}] and z [B, 1] or [B, {self.strata}]",
                "Give the three features of the same samples, at the widths the estimator was built for.",
            )  # fmt: skip

    def _where(self) -> str:
        return "conditional mutual information (club)"
