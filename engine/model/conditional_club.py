"""CLUB for conditional mutual information: what its two forms share.

They differ in the rows that a row is compared with: those of an equal condition (`engine.model.stratified`), or
those of the nearest conditions (`engine.model.neighbour_club`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.errors import EstimatorError
from engine.model.estimators import Estimate, finite, or_zero, own_type, raise_or_skip, readable
from engine.model.mlps import check_choice, xavier
from engine.model.variational import Conditional, check_classes, check_conditional, conditional_net, learns
from engine.vocabulary import ON_DEGENERATE


class ConditionalCLUB(nn.Module):
    """An upper bound of I(X;Y|Z): mean log q(y_i|x_i,z_i) minus the mean of log q(y_j|x_i,z_i) over other rows j.

    The conditional q(y|x,z) learns by likelihood. A subclass says how conditions are read (`conditions`), which rows j
    a row i is compared with (`excess`), and in which batches no rows can be compared (`problem`).

    Args:
        dim_x, dim_y: widths of x and y.
        given: width of what `conditions` returns.
        condition_widths: the widths that z may have.
        classes: as for `MIEstimator`.
        hidden, layers, activation: of the networks.
        on_degenerate: as for `MIEstimator`.
    """

    where = "conditional mutual information (club)"

    def __init__(
        self,
        dim_x: int,
        dim_y: int,
        given: int,
        condition_widths: tuple[int, ...],
        classes: int | None,
        hidden: int,
        layers: int,
        activation: str,
        on_degenerate: str,
    ):
        super().__init__()
        check_choice("on_degenerate", on_degenerate, ON_DEGENERATE)
        check_conditional("club", "separate", dim_y, classes)
        self.dim_x, self.dim_y, self.classes = dim_x, dim_y, classes
        self.condition_widths, self.on_degenerate = condition_widths, on_degenerate
        self.q = conditional_net(dim_x + given, dim_y, classes, hidden, layers, activation, xavier)

    @property
    def bound(self) -> str:
        return "club"

    def conditions(self, z: Tensor) -> Tensor:
        """z as the network and the comparison take it, [B, given].

        Raises:
            EstimatorError: a value that no condition can have.
        """
        raise NotImplementedError

    def problem(self, z: Tensor) -> tuple[str, str] | None:
        """What is wrong with a batch of these conditions, and what is expected; None where rows can be compared."""
        raise NotImplementedError

    def excess(self, q: Conditional, y: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The value, 0-d: the mean of `q.excess`, of each row against those that it is compared with. And details."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Estimate:
        """One estimate from x [B, dim_x], y [B, dim_y] and z [B, one of `condition_widths`].

        Raises:
            EstimatorError: shapes, types or devices that do not fit, a value that is no class; a degenerate batch under
                on_degenerate="raise".
        """
        x, y, z = own_type(self.where, self, x, y, z)
        self._check_shapes(x, y, z)
        if self.classes is not None and readable(y):
            check_classes(self.where, y, self.classes)
        with torch.autocast(x.device.type, enabled=False):
            z = self.conditions(z)
        if (problem := self.problem(z)) is not None:
            return raise_or_skip(self, self.where, *problem, x, y)
        q, given = self.q(torch.cat([x, z.to(x.dtype)], 1)), y
        with torch.autocast(x.device.type, enabled=False):
            y = q.targets(y)
            loss = -q.log_prob(y).mean()
            value, details = self.excess(q, y, z)
        if not finite(value, loss):
            what = f"the estimate {value.item()} and the log-likelihood {-loss.item()}"
            return raise_or_skip(self, self.where, what, "finite numbers", x, y)
        if learns(self.q):
            self.q.observe(given)
        value, loss = (or_zero(t, self.on_degenerate) for t in (value, loss))
        return Estimate(value.detach(), value, loss, details)

    def _check_shapes(self, x: Tensor, y: Tensor, z: Tensor) -> None:
        fits = x.dim() == y.dim() == z.dim() == 2 and len(x) == len(y) == len(z)
        fits = fits and x.shape[1] == self.dim_x and y.shape[1] == self.dim_y and z.shape[1] in self.condition_widths
        if not fits:
            of_z = " or ".join(f"[B, {width}]" for width in self.condition_widths)
            raise EstimatorError(
                self.where, f"x {list(x.shape)}, y {list(y.shape)} and z {list(z.shape)}",
                f"x [B, {self.dim_x}], y [B, {self.dim_y}] and z {of_z}",
                "Give the three features of the same samples, at the widths the estimator was built for.",
            )  # fmt: skip
