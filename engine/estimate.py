"""Mutual information between two arrays of samples: train a critic on one half, read the bound on the other."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.arguments import check_count, check_number
from engine.kernels.mi_bounds import bound_value
from engine.model.estimators import MIEstimator
from engine.samples import as_samples

WHERE = "estimate_mi"
CHECKS = 20


def estimate_mi(
    x: Any,
    y: Any,
    *,
    bound: str = "infonce",
    critic: str = "separate",
    baseline: str = "constant",
    hidden: int = 256,
    embed: int = 32,
    layers: int = 2,
    alpha: float = 0.01,
    smile_tau: float = 5.0,
    ema_rate: float = 0.01,
    steps: int = 2000,
    batch_size: int = 64,
    lr: float = 5e-4,
    seed: int = 0,
) -> dict[str, Any]:
    """Estimate I(X;Y) in nats from paired samples.

    Half of the samples are held out and only read at the end. Of the other half, four fifths train the critic (Adam)
    and one fifth chooses the step whose critic is kept, so that few samples do not end in an overfitted critic. Columns
    are standardised by the training part, which changes no mutual information.

    Args:
        x, y: [N, dx] and [N, dy], or [N]: arrays, data frames, tensors or sequences of numbers; row i of both is one
            sample, whatever an index says. Both continuous: I(X;X) is infinite then, and an estimate of it only shows
            the bound's ceiling.
        bound, critic, baseline, hidden, embed, layers, alpha, smile_tau, ema_rate: see `MIEstimator`.
        steps, batch_size, lr: of the training. InfoNCE and the interpolated bound are capped by the batch size.
        seed: makes the split, the critic's start and the batches; equal seeds give equal results on one CPU.

    Returns:
        value: mean of the bound over the held-out batches, nats; never clipped, so it may be negative.
        standard_error: of that mean, over the held-out batches, for the critic as trained.
        ceiling: what the bound cannot exceed with this batch size, nats; None where there is no such limit.
        batches: number of held-out batches.
        trained_critic: the `MIEstimator`, in eval mode; it expects columns standardised as here (`scale`).
        scale: {"x": (mean, std), "y": (mean, std)}, float64 [d] each: standardise in float64, then cast to float32.

    Raises:
        EstimatorError: arrays that do not pair up or hold no numbers (text, objects), non-finite entries, an option out
            of range, fewer than 10 batches' worth of samples, a training that diverges to non-finite scores.
    """
    x, y = as_samples(WHERE, "x", x), as_samples(WHERE, "y", y)
    if len(x) != len(y):
        raise EstimatorError(WHERE, f"{len(x)} rows of x and {len(y)} of y", "as many of both", "Pair the samples up.")
    for name, value in {"steps": steps, "batch_size": batch_size, "hidden": hidden, "embed": embed}.items():
        check_count(WHERE, name, value)
    check_count(WHERE, "layers", layers, 0)
    check_number(WHERE, "lr", lr, 0, above=True)
    if batch_size < 2 or len(x) < 10 * batch_size:
        raise EstimatorError(
            WHERE,
            f"{len(x)} samples at batch_size {batch_size}",
            "batch_size >= 2 and at least 10 batches of samples",
            "Give more samples or a smaller batch_size.",
        )

    generator = torch.Generator().manual_seed(seed)
    held_out, validation, training = _split(torch.randperm(len(x), generator=generator))
    scale = {"x": _scale(x[training]), "y": _scale(y[training])}
    x, y = _standardise(x, scale["x"]).float(), _standardise(y, scale["y"]).float()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        estimator = MIEstimator(
            x.shape[1],
            y.shape[1],
            critic,
            bound,
            baseline,
            hidden,
            embed,
            layers,
            alpha=alpha,
            smile_tau=smile_tau,
            ema_rate=ema_rate,
        )
    optimizer = torch.optim.Adam(estimator.parameters(), lr=lr)
    best, best_state = -math.inf, copy.deepcopy(estimator.state_dict())
    for step in range(1, steps + 1):
        rows = training[torch.randint(len(training), (batch_size,), generator=generator)]
        estimate = estimator(x[rows], y[rows])
        optimizer.zero_grad()
        estimate.loss.backward()
        optimizer.step()
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            score = _objective(estimator, x, y, validation, batch_size).mean().item()
            if score > best:
                best, best_state = score, copy.deepcopy(estimator.state_dict())
    estimator.load_state_dict(best_state)
    estimator.eval()

    with torch.no_grad():
        values = torch.stack([estimator(x[rows], y[rows]).value for rows in _batches(held_out, batch_size)])
    return {
        "value": values.mean().item(),
        "standard_error": (values.std() / math.sqrt(len(values))).item(),
        "ceiling": ceiling(bound, batch_size, alpha),
        "batches": len(values),
        "trained_critic": estimator,
        "scale": scale,
    }


def ceiling(bound: str, batch_size: int, alpha: float = 0.01) -> float | None:
    """What a bound cannot exceed at a batch size, in nats: log B, or 1 + log((B - 1) / alpha); None if unlimited."""
    if bound == "infonce":
        return math.log(batch_size)
    if bound == "interpolate":
        return 1 + math.log((batch_size - 1) / alpha)
    return None


@torch.no_grad()
def _objective(estimator: MIEstimator, x: Tensor, y: Tensor, rows: Tensor, batch_size: int) -> Tensor:
    """What training maximises, on rows it has not seen. For SMILE and JS that is the f-GAN bound: SMILE's own value is
    not a lower bound, and choosing its largest would choose the largest overestimate."""
    bound = "js_fgan" if estimator.bound in ("js", "smile") else estimator.bound
    values = []
    for batch in _batches(rows, batch_size):
        scores = estimator.critic(x[batch], y[batch])
        values.append(bound_value(scores, bound, estimator.baseline(y[batch]), alpha=estimator.alpha)[0])
    return torch.stack(values)


def _batches(rows: Tensor, batch_size: int) -> list[Tensor]:
    """Disjoint full batches: the bounds depend on the batch size, so a shorter one would not be comparable."""
    return list(rows[: len(rows) // batch_size * batch_size].split(batch_size))


def _split(order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Held-out half, then a fifth of the rest for validation, then the training rows."""
    half = len(order) // 2
    fifth = -(-(len(order) - half) // 5)
    return order[:half], order[half : half + fifth], order[half + fifth :]


def _scale(values: Tensor) -> tuple[Tensor, Tensor]:
    std = values.std(0)
    return values.mean(0), torch.where(std > 0, std, 1.0)


def _standardise(values: Tensor, scale: tuple[Tensor, Tensor]) -> Tensor:
    mean, std = scale
    return (values - mean) / std
