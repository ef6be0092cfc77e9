"""CLUB for conditional mutual information, where the condition is continuous."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.errors import EstimatorError
from engine.kernels.arguments import check_count
from engine.kernels.mi_bounds.reference import full_precision
from engine.model.estimators import Estimate, finite, or_zero, own_type, raise_or_skip, readable
from engine.model.mlps import check_choice, xavier
from engine.model.variational import check_classes, check_conditional, conditional_net, learns
from engine.vocabulary import ON_DEGENERATE

SEARCHED = 1024
"""Rows whose distances to all rows are held at once."""


class NeighbourCLUB(nn.Module):
    """An upper bound of I(X;Y|Z) for any Z: CLUB among the rows with the nearest z.

    A conditional q(y|x,z) learns by likelihood. The value is the mean of log q(y_i|x_i,z_i) minus the mean of
    log q(y_j|x_i,z_i) over the k rows j, other than i, whose z_j are nearest to z_i. No product rows are drawn, and
    gradients reach all rows.

    Why it is a bound: let q be p(y|x,z), and let r(y|z) be the distribution of a neighbour's y. By Jensen, the mean of
    log p(y|x,z) over p(x|z) is at most log p(y|z). So the value is at least I(X;Y|Z), plus the mean over z of
    KL(r(·|z) ‖ p(·|z)), plus the entropy of r less that of p. r mixes the p(y|z_j) of neighbours, and a mixture has at
    least the mean entropy of its parts. So neighbours that are not near make the bound looser, and never turn it into a
    lower one. (All rows must be neighbours about equally often, and y must be independent of a neighbour's x given z.)

    How loose: of a y that z explains to one half, with nothing left to x, 64 rows and k = 5 read 0.02 nats for a z of
    one column, 0.1 for two and 0.26 for five; 1,024 rows read 0.00, 0.01 and 0.09. A classifier's estimate,
    `CMIEstimator`, errs less there, but not to one side.

    Source: Cheng et al., CLUB, ICML 2020, for the bound without a condition.

    >>> estimator = NeighbourCLUB(dim_x=4, dim_y=2, dim_z=3)
    >>> estimator(torch.randn(12, 4), torch.randn(12, 2), torch.randn(12, 3)).value.shape
    torch.Size([])

    Args:
        dim_x, dim_y, dim_z: widths of x, y and z.
        classes: as for `MIEstimator`.
        k: the number of neighbours; all other rows where the batch has fewer.
        hidden, layers, activation: of the networks.
        on_degenerate: as for `MIEstimator`. A batch of one is degenerate.
    """

    def __init__(
        self,
        dim_x: int,
        dim_y: int,
        dim_z: int,
        classes: int | None = None,
        k: int = 5,
        hidden: int = 256,
        layers: int = 2,
        activation: str = "relu",
        on_degenerate: str = "raise",
    ):
        super().__init__()
        check_choice("on_degenerate", on_degenerate, ON_DEGENERATE)
        check_count("NeighbourCLUB", "k", k)
        check_conditional("club", "separate", dim_y, classes)
        self.dim_x, self.dim_y, self.dim_z, self.classes, self.k = dim_x, dim_y, dim_z, classes, k
        self.on_degenerate = on_degenerate
        self.q = conditional_net(dim_x + dim_z, dim_y, classes, hidden, layers, activation, xavier)

    @property
    def bound(self) -> str:
        return "club"

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Estimate:
        """One estimate from x [B, dim_x], y [B, dim_y] and z [B, dim_z].

        Raises:
            EstimatorError: shapes, types or devices that do not fit; a degenerate batch under on_degenerate="raise".
        """
        where = "conditional mutual information (club)"
        x, y, z = own_type(where, self, x, y, z)
        widths = self.dim_x, self.dim_y, self.dim_z
        if any(list(t.shape) != [len(x), width] for t, width in zip((x, y, z), widths, strict=True)):
            raise EstimatorError(
                where, f"x {list(x.shape)}, y {list(y.shape)} and z {list(z.shape)}",
                f"x [B, {self.dim_x}], y [B, {self.dim_y}] and z [B, {self.dim_z}]",
                "Give the three features of the same samples, at the widths the estimator was built for.",
            )  # fmt: skip
        if len(x) < 2:
            return raise_or_skip(self, where, f"a batch of {len(x)}", "at least 2 samples", x, y)
        if self.classes is not None and readable(y):
            check_classes(where, y, self.classes)
        q, given = self.q(torch.cat([x, z.to(x.dtype)], 1)), y
        with torch.autocast(x.device.type, enabled=False):
            y = q.targets(y)
            loss = -q.log_prob(y).mean()
            others = y[nearest_others(z, min(self.k, len(z) - 1))]  # [B, k, dim_y]
            means = others.mean(1)
            moments = (means,) if self.classes is not None else (means, others.var(1, correction=0))
            value = q.excess(y, moments).mean()
        if not finite(value, loss):
            what = f"the estimate {value.item()} and the log-likelihood {-loss.item()}"
            return raise_or_skip(self, where, what, "finite numbers", x, y)
        if learns(self.q):
            self.q.observe(given)
        value, loss = (or_zero(t, self.on_degenerate) for t in (value, loss))
        return Estimate(value.detach(), value, loss)


@torch.no_grad()
def nearest_others(z: Tensor, k: int) -> Tensor:
    """The k rows nearest to each row of z [B, d] without the row itself, int64 [B, k]. Takes O(B) memory.

    Of rows at equal distances those come first that follow the row in the batch, which begins again after its end. So
    all rows of one z are neighbours about equally often.

    >>> nearest_others(torch.tensor([[0.0], [1.0], [5.0], [1.0]]), 1)[:, 0]
    tensor([1, 3, 3, 1])
    """
    z = full_precision(z)
    rows = torch.arange(len(z), device=z.device)
    found = []
    for some, own in zip(z.split(SEARCHED), rows.split(SEARCHED), strict=True):
        distance = torch.cdist(some, z, compute_mode="donot_use_mm_for_euclid_dist")
        distance = torch.where(own[:, None] == rows, torch.inf, distance)
        least = distance.topk(k + 1, 1, largest=False)
        last, following = least.values[:, k - 1 : k], least.values[:, k:]
        if readable(z) and not bool((last == following).any()):
            found.append(least.indices[:, :k])
            continue
        after = (rows - own[:, None] - 1) % len(z)  # the row itself is the last one
        place = torch.where(distance < last, after - len(z), torch.where(distance > last, after + len(z), after))
        found.append(place.topk(k, 1, largest=False).indices)
    return torch.cat(found)
