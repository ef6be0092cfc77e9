"""Critics that are modules of a user's own, and two that wrap other networks.

A critic maps x [B, dim_x] and y [B, dim_y] to scores [B, B] with `scores[i, j] = f(x_j, y_i)`: a row per y.

    MIEstimator(dim_x=8, dim_y=4, critic=MyCritic())
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.errors import EstimatorError
from engine.kernels.mi_bounds.reference import full_precision
from engine.model.variational import conditional_net, learns


class CustomCritic(nn.Module):
    """Holds a user's critic and checks what it returns: the shape in every call, the orientation in the first one."""

    kind, has_infonce = "custom", False

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self._checked = False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[B, B], fp32 (fp64 for fp64).

        Raises:
            EstimatorError: the module returns something else.
        """
        scores = self.module(x, y)
        if not isinstance(scores, Tensor) or scores.shape != (len(y), len(x)):
            found = f"scores {list(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise EstimatorError(self._where(), found, f"scores [{len(y)}, {len(x)}]", "Score every x against every y.")
        return full_precision(scores)

    @torch.no_grad()
    def check_orientation(self, x: Tensor, y: Tensor) -> None:
        """In the first call, refuse scores that are certainly transposed: reversing y must reverse the rows."""
        if self._checked:
            return
        modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()  # dropout would change the scores
        try:
            before, after = self.module(x, y), self.module(x, y.flip(0))
        finally:
            for module, mode in modes:
                module.training = mode
        if torch.allclose(after, before.flip(1)) and not torch.allclose(after, before.flip(0)):
            raise EstimatorError(
                self._where(), "scores with a row per x", "a row per y: scores[i, j] = f(x_j, y_i)", "Transpose them."
            )
        self._checked = True

    def _where(self) -> str:
        return f"critic {type(self.module).__name__}"


class SoftplusCritic(nn.Module):
    """Another critic with softplus of its scores: every score is positive.

    InfoNCE critics with such a head are common. A density ratio below 1 then cannot be expressed by TUBA and NWJ.

    >>> from engine import MIEstimator
    >>> from engine.model.estimators import Critic
    >>> estimator = MIEstimator(4, 3, critic=SoftplusCritic(Critic(4, 3)))
    """

    def __init__(self, critic: nn.Module):
        super().__init__()
        self.critic = critic

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.softplus(self.critic(x, y))


class LikelihoodCritic(nn.Module):
    """A probabilistic classifier or regression as a critic: scores[i, j] = log q(y_i|x_j).

    log p(y|x) is the best critic of InfoNCE (Poole et al. 2019). For y of classes, q is a classifier.

    >>> from engine import MIEstimator
    >>> estimator = MIEstimator(4, 1, critic=LikelihoodCritic(4, 1, classes=3))

    Args:
        dim_x, dim_y, classes: as for `MIEstimator`.
        hidden, layers: of the network.
    """

    def __init__(self, dim_x: int, dim_y: int, classes: int | None = None, hidden: int = 256, layers: int = 2):
        super().__init__()
        self.q = conditional_net(dim_x, dim_y, classes, hidden, layers, "relu")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.q(x)
        with torch.autocast(x.device.type, enabled=False):
            scores = q.pairs(q.targets(y)).to(full_precision(x).dtype)
        if learns(self.q):
            self.q.observe(y)  # last, since q may read these buffers themselves
        return scores
