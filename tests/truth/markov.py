"""X -> Y -> Z, a Gaussian chain with everything about its conditional information in closed form.

X ~ N(0, sx²), Y = X + N(0, s1²), Z = Y + N(0, s2²), d independent copies. I(X;Z|Y) = 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sample(sigma: tuple[float, float, float], n: int, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sx, s1, s2 = sigma
    x = sx * torch.randn(n, d, generator=generator)
    y = x + s1 * torch.randn(n, d, generator=generator)
    return x, y, y + s2 * torch.randn(n, d, generator=generator)


def truth(sigma: tuple[float, float, float], d: int) -> float:
    """I(X;Y|Z) in nats."""
    xx, ss1, ss2 = (s * s for s in sigma)
    return d / 2 * math.log((xx + ss1) * (ss1 + ss2) / (ss1 * (xx + ss1 + ss2)))


def log_ratio(x: Tensor, y: Tensor, z: Tensor, sigma: tuple[float, float, float]) -> Tensor:
    """log p(x,y,z) / p(x|z) p(y,z) = log p(x|y) − log p(x|z), [N]: X does not depend on Z once Y is known."""
    xx, ss1, ss2 = (s * s for s in sigma)
    return (_log_posterior(x, y, xx, ss1) - _log_posterior(x, z, xx, ss1 + ss2)).sum(1)


def exact_product(
    x: Tensor, y: Tensor, z: Tensor, sigma: tuple[float, float, float], seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of p(x|z) p(y,z), with x drawn from the true p(x|z)."""
    xx, ss1, ss2 = (s * s for s in sigma)
    mean, variance = _posterior(z, xx, ss1 + ss2)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return mean + math.sqrt(variance) * noise, y, z


def gaussian_cmi(covariance: Tensor, x: list[int], y: list[int], z: list[int]) -> float:
    """I(X;Y|Z) of a joint Gaussian: .5 [logdet S_XZ + logdet S_YZ − logdet S_Z − logdet S_XYZ]."""

    def logdet(columns: list[int]) -> float:
        return covariance[columns][:, columns].double().logdet().item()

    return 0.5 * (logdet(x + z) + logdet(y + z) - logdet(z) - logdet(x + y + z))


def _posterior(observed: Tensor, prior: float, noise: float) -> tuple[Tensor, float]:
    """Mean and variance of X ~ N(0, prior) given X + N(0, noise)."""
    return prior / (prior + noise) * observed, prior * noise / (prior + noise)


def _log_posterior(x: Tensor, observed: Tensor, prior: float, noise: float) -> Tensor:
    mean, variance = _posterior(observed, prior, noise)
    return -0.5 * ((x - mean).square() / variance + math.log(2 * math.pi * variance))
