"""Scores of up to 1e8, and how far rounding may take their gradient from its value in fp64.

A probability e^(S - L) is computed from a score S and a log-sum-exp L that are both rounded. Where S - L is off by r,
it is p e^r, and at most 1. So it is off by at most 1 - e^-|r|, and |r| is a few times the distance of neighbours in
fp32, which is 8 near 1e8. Without "at most 1" it would be off by up to e^|r| - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.kernels import infonce, mi_lower_bound, use_backend
from engine.kernels.critics.op import concat_infonce, grouped_infonce
from tests.kernels.mi_cases import cast, draw, evaluate

SIZES = (1e2, 1e5, 1e8)
COUNT = 40
LABELS = torch.arange(COUNT) // 2


def _bound(**settings: Any) -> Callable[..., Tensor]:
    return lambda q, k: COUNT * mi_lower_bound(q, k, **settings)


# name -> (function of q and k, which sums over the rows; the most that the gradient of one score can be)
CASES: dict[str, tuple[Callable[..., Tensor], float]] = {
    "sum": (lambda q, k: infonce(q, k, reduction="sum"), 1),
    "none": (lambda q, k: infonce(q, k, reduction="none"), 1),
    "symmetric": (lambda q, k: infonce(q, k, symmetric=True, reduction="sum"), 1),
    "labels": (lambda q, k: infonce(q, k, labels=LABELS, reduction="none"), 1),
    "hard": (lambda q, k: infonce(q, k, labels=LABELS, hardness=0.5, reduction="none"), 2),
    "dv": (_bound(bound="dv"), COUNT),
    "mine": (_bound(bound="mine"), COUNT),
    "interpolate": (_bound(bound="interpolate", alpha=0.5), 3),
}


def error_of_a_share(scores: Tensor) -> float:
    """How far one probability may be off: 1 - e^-r for an r of eight times the distance of neighbours in fp32."""
    return -math.expm1(-8 * 2.0 ** (math.floor(math.log2(scores.abs().max())) - 23))


def check_scores(name: str, size: float, backend: str) -> None:
    """With q or k the identity, the gradient of the other one is that of the scores."""
    function, most = CASES[name]
    scores, identity = (size * draw((COUNT, COUNT), 3)).float(), torch.eye(COUNT)
    allowed = most * (error_of_a_share(scores) + 1e-5)
    for inputs, other in (({"q": identity, "k": scores.T}, "k"), ({"q": scores, "k": identity}, "q")):
        found, exact = gradients(function, inputs, backend)
        assert (found[other] - exact[other]).abs().max() <= allowed, (name, size, other)


def check_products(name: str, backend: str) -> None:
    """Of embeddings whose scores are rounded in every product: a row's gradient is that of its few largest scores."""
    function, most = CASES[name]
    inputs = {"q": (1.5e7 * draw((COUNT, 48), 0)).float(), "k": draw((COUNT, 48), 1).float()}
    scores = inputs["q"].double() @ inputs["k"].double().T
    assert 1e8 < scores.abs().max() < 1e9
    large = torch.zeros_like(scores)
    for dim in (0, 1):
        large.scatter_(dim, scores.topk(3, dim).indices, 1.0)
    found, exact = gradients(function, inputs, backend)
    for own, other, near in (("q", "k", large), ("k", "q", large.T)):
        allowed = most * (near @ inputs[other].abs().double()) + 1e-6 * exact[own].abs().max()
        assert ((found[own] - exact[own]).abs() <= allowed).all(), (name, own)


def check_joint(name: str, backend: str) -> None:
    """Shares keep their digits where the joint scores alone are large."""
    function, most = CASES[name]
    for joint in (-1e8, -1e4, 1e8):
        scores = draw((COUNT, COUNT), 6).float().fill_diagonal_(joint)
        found, exact = gradients(function, {"q": torch.eye(COUNT), "k": scores.T}, backend)
        assert (found["k"] - exact["k"]).abs().max() <= 1e-4 * most, (name, joint)


def check_interpolated(backend: str) -> None:
    """Without one of two equal scores the other is left. No score's gradient is above its limit."""
    two, many = ((1e8 * draw((count, count), 7)).float() for count in (6, 70))
    two[1, 2] = two[1, 3] = 5e8

    def bound(scores: Tensor) -> Tensor:
        return mi_lower_bound(scores, bound="interpolate", alpha=0.5)

    for scores in (two, many):
        with use_backend("reference"):
            exact = bound(scores.double())
        result = evaluate(bound, {"scores": scores}, backend)
        torch.testing.assert_close(result.value, exact)
        assert result.grads["scores"].abs().max() <= (1 + 1 / 0.5) / len(scores)


def gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], backend: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By the backend, and by the formula in fp64."""

    def total(**tensors: Tensor) -> Tensor:
        return function(**tensors).sum()

    found = evaluate(total, inputs, backend)
    return found.grads, evaluate(total, cast(inputs, torch.float64), "reference").grads


def by_the_concat_critic(scores: Tensor) -> Tensor:
    """Gradient of `concat_infonce` by scores [B, B], which a critic of two features for every row gives exactly."""
    count, far = len(scores), 4 * scores.abs().max()
    identity = torch.eye(count, dtype=scores.dtype)
    of_y = far * (identity - 1).repeat(2, 1)  # only a row's own features are above 0
    weight = torch.cat([torch.cat([scores.relu(), (-scores).relu()]), of_y], 1).requires_grad_()
    last = torch.cat([identity[:1] * 0 + 1, identity[:1] * 0 - 1], 1)
    value = concat_infonce(identity, identity, [(weight, of_y[:, 0] * 0), (last, last[0, :1] * 0)])
    (found,) = torch.autograd.grad(value, weight)
    return found[:count, :count] - found[count:, :count]


def by_towers(scores: Tensor) -> Tensor:
    """Gradient of `grouped_infonce` by scores [B, B] and their own embeddings: the rows, and the identity."""
    count, identity = len(scores), torch.eye(len(scores), dtype=scores.dtype)
    both_signs = torch.cat([identity, -identity])[None]
    first = [(both_signs, both_signs[:, :, 0] * 0)] * 2
    last = both_signs.mT.expand(2, count, 2 * count).contiguous(), identity.new_zeros(2, count)
    scores = scores.clone().requires_grad_()
    (found,) = torch.autograd.grad(grouped_infonce([scores, identity], first, [last], [0], [1]).sum(), scores)
    return found


def check_critic(gradient: Callable[[Tensor], Tensor]) -> None:
    """Every row's gradients have their digits, whatever the sizes of its scores are."""
    others = draw((12, 12), 6)
    joint = torch.eye(12, dtype=torch.bool)
    cases = [others.masked_fill(joint, value) for value in (-1e8, -1e4, 1.0, 1e8)]
    for scores in (*cases, *(size * others for size in SIZES)):
        exact = scores.float().double().requires_grad_()
        (expected,) = torch.autograd.grad(exact.log_softmax(1).diagonal().mean(), exact)
        found = gradient(scores.float())
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)
