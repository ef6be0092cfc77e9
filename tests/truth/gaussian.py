"""Correlated Gaussians: x ~ N(0, I_d), y = rho x + sqrt(1 - rho^2) noise, I(X;Y) = -(d/2) log(1 - rho^2) nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.kernels.mi_bounds import bound_value
from engine.model.estimators import MIEstimator

DIM = 20


def correlation(information: float, dim: int = DIM) -> float:
    return math.sqrt(1 - math.exp(-2 * information / dim))


def sample(rho: float, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(shape, generator=generator)
    return x, rho * x + math.sqrt(1 - rho * rho) * torch.randn(shape, generator=generator)


def log_ratio(x: Tensor, y: Tensor, rho: float) -> Tensor:
    """The exact critic, log p(x,y) / p(x)p(y): x, y [..., B, d] -> [..., B, B], `[i, j]` for (x_j, y_i)."""
    variance = 1 - rho * rho
    cross = y @ x.transpose(-1, -2)
    squares = y.square().sum(-1)[..., :, None] + x.square().sum(-1)[..., None, :]
    dim = x.shape[-1]
    return -0.5 * dim * math.log(variance) + (rho * cross - 0.5 * rho * rho * squares) / variance


def staircase(
    train: dict, read: dict[str, dict], levels: list[float], steps_a_level: int, seed: int = 0, batch: int = 64
) -> dict[str, Tensor]:
    """Train one separate critic through rising levels of information; {reading: [levels, steps], nats}.

    Settings of the SMILE demo: d = 20, B = 64, Adam 5e-4, hidden 256, embed 32, ReLU. `train` is the bound with
    its settings; `read` names the bounds to read from the same scores, so that SMILE at several tau, which all have one
    gradient, cost one training.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MIEstimator(DIM, DIM, hidden=256, embed=32, **train)
    scores: list[Tensor] = []
    model.critic.register_forward_hook(lambda _module, _inputs, output: scores.append(output.detach()))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    values = {name: torch.empty(len(levels), steps_a_level) for name in read}
    for row, level in enumerate(levels):
        rho = correlation(level)
        for step in range(steps_a_level):
            loss = model(*sample(rho, (batch, DIM), generator)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            latest = scores.pop()
            for name, setting in read.items():
                values[name][row, step] = bound_value(latest, **setting)[0]
    return values


def plateau(values: Tensor) -> list[float]:
    """[levels, steps] -> the mean over the last 40 % of each level's steps."""
    return values[:, -round(0.4 * values.shape[1]) :].mean(1).tolist()
