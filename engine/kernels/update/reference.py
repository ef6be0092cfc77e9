"""What the fused update computes, in plain torch: the definition.

The order is that of the separate passes. A gradient is unscaled, its elements are clipped, then the norm of all of them
together is. Adam or AdamW moves the weights. The average moves towards the new weights. A 16-bit copy becomes the new
weights, rounded to nearest, ties to even, as `Tensor.to` rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Settings(NamedTuple):
    """The settings of a group of parameters, as of `torch.optim.Adam`, without the learning rate.

    Attributes:
        decoupled: weight decay as in AdamW.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False


class Weight(NamedTuple):
    """A parameter with what its update reads and writes. All but `step` are of one shape.

    Attributes:
        step: 0-d, the number of updates so far.
        average: the moving average of the parameter; None for none.
        group: the number of its group.
        low: the parameter in float16 or bfloat16; None for none.
    """

    parameter: Tensor
    first: Tensor
    second: Tensor
    step: Tensor
    average: Tensor | None
    group: int
    low: Tensor | None = None


def clipped(gradient: Tensor, limit: float, inverse: Tensor | None) -> Tensor:
    """The unscaled gradient with its elements clipped to ±limit. NaN stays NaN.

    Args:
        limit: infinity for no clipping.
        inverse: 0-d, 1 / the scale of the loss; None for 1.
    """
    unscaled = gradient if inverse is None else gradient * inverse
    return unscaled.clamp(-limit, limit) if math.isfinite(limit) else unscaled


@torch.no_grad()
def inspect(gradients: Sequence[Tensor], limit: float, inverse: Tensor | None) -> Tensor:
    """[2]: 1 if a value of the clipped gradients is not finite, else 0; and the sum of their squares."""
    values = [clipped(g, limit, inverse) for g in gradients]
    bad = torch.stack([(~v.isfinite()).any() for v in values]).any()
    squares = torch.stack([v.square().sum() for v in values]).sum()
    return torch.stack([bad.to(squares.dtype), squares])


@torch.no_grad()
def move(
    weights: Sequence[Weight], gradients: Sequence[Tensor], groups: Sequence[Settings], rates: Tensor, limit: float,
    norm: float, stats: Tensor | None, inverse: Tensor | None, skip: Tensor | None, average: Tensor | None,
) -> Tensor:  # fmt: skip
    """Update the weights, their moments, their step counters, their averages and their 16-bit copies in place.

    Args:
        gradients: of the weights, in their order. They are not changed.
        rates: learning rates, one per group.
        norm: most that the norm of all clipped gradients may be; infinity for no such bound.
        stats: of `inspect`; needed for a finite `norm`.
        skip: 0-d, 1 where nothing is to be changed, else 0; None for 0.
        average: 0-d, the weight of the new parameters in their average; None leaves the averages.

    Returns:
        [2]: 1 where nothing was changed, else 0; and the factor of the gradients that bounds their norm.
    """
    factor = torch.ones_like(rates[0]) if stats is None else (norm / (stats[1].sqrt() + 1e-6)).clamp(max=1.0)
    kept = torch.ones_like(factor) if skip is None else 1 - skip.to(factor)
    for w, gradient in zip(weights, gradients, strict=True):
        s, rate = groups[w.group], rates[w.group].to(w.parameter)
        g, step = clipped(gradient, limit, inverse) * factor, w.step.double() + 1
        p = w.parameter * (1 - rate * s.weight_decay) if s.decoupled else w.parameter
        if s.weight_decay and not s.decoupled:
            g = g + s.weight_decay * p
        first = w.first + (1 - s.beta1) * (g - w.first)
        second = s.beta2 * w.second + (1 - s.beta2) * g * g
        size = rate / (1 - s.beta1**step).to(w.parameter)
        root = (1 - s.beta2**step).sqrt().to(w.parameter)
        p = p - size * first / (second.sqrt() / root + s.eps)
        changed = [(w.first, first), (w.second, second), (w.parameter, p), (w.step, step.to(w.step.dtype))]
        if average is not None and w.average is not None:
            changed.append((w.average, w.average + average.to(p) * (p - w.average)))
        if w.low is not None:
            changed.append((w.low, p))
        for old, new in changed:
            old.copy_(torch.where(kept > 0, new, old))
    return torch.stack([1 - kept, factor])
