"""CLUB for conditional mutual information, where the condition is continuous."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.arguments import check_count
from engine.kernels.mi_bounds.reference import full_precision
from engine.model.conditional_club import ConditionalCLUB
from engine.model.estimators import readable
from engine.model.variational import Conditional

SEARCHED = 1024
"""Rows whose distances to all rows are held at once."""


class NeighbourCLUB(ConditionalCLUB):
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
        check_count("NeighbourCLUB", "k", k)
        super().__init__(dim_x, dim_y, dim_z, (dim_z,), classes, hidden, layers, activation, on_degenerate)
        self.dim_z, self.k = dim_z, k

    def conditions(self, z: Tensor) -> Tensor:
        return z

    def problem(self, z: Tensor) -> tuple[str, str] | None:
        return (f"a batch of {len(z)}", "at least 2 samples") if len(z) < 2 else None

    def excess(self, q: Conditional, y: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        others = y[nearest_others(z, min(self.k, len(z) - 1))]  # [B, k, dim_y]
        means = others.mean(1)
        moments = (means,) if self.classes is not None else (means, others.var(1, correction=0))
        return q.excess(y, moments).mean(), {}


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
