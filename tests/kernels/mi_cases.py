"""Inputs and comparisons that the tests of mi_bounds share between the CPU and the interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels import infonce, mi_lower_bound, use_backend
from engine.kernels.mi_bounds.reference import BOUNDS


@dataclass
class Result:
    value: Tensor
    grads: dict[str, Tensor]
    # Size of the summands of a gradient that is one number: its error goes with them, they may cancel.
    summands: dict[str, float]


def evaluate(function: Callable[..., Tensor], inputs: dict[str, Tensor], backend: str, clone: bool = True) -> Result:
    """Value of `function(**inputs)` and gradients of an uneven weighting of it, fp64 for comparison.

    clone: False leaves the inputs in their memory, so that what lies around it is what a kernel finds there.
    """
    inputs = {name: x.detach() for name, x in inputs.items()}
    if clone:
        inputs = {name: x.clone(memory_format=torch.preserve_format) for name, x in inputs.items()}
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    with use_backend(backend):
        value = function(**inputs)
        weights = torch.linspace(0.5, -1.5, value.numel(), dtype=value.dtype).view(value.shape)
        grads = torch.autograd.grad((value * weights).sum(), list(inputs.values()), allow_unused=True)
    zeros = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs.values(), grads, strict=True)]
    grads = {n: g.double() for n, g in zip(inputs, zeros, strict=True)}
    summands = {}
    if "temperature" in inputs:
        terms = (inputs["q"].detach().double() * grads["q"]).sum(-1) / inputs["temperature"].item()
        summands["temperature"] = terms.abs().sum().item()
    return Result(value.detach().double(), grads, summands)


def draw(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bound_inputs(groups: int, count: int, width: int, embeddings: bool) -> dict[str, Tensor]:
    """Inputs of `bound_function`, fp64; scores of order 3."""
    a = draw((groups, count, 1), 2)
    if not embeddings:
        return {"scores": draw((groups, count, count), 0, 3), "a": a}
    scale = (9 / width) ** 0.25
    q, k = draw((groups, count, width), 0, scale), draw((groups, count, width), 1, scale)
    return {"q": q, "k": k, "temperature": torch.tensor(0.8, dtype=torch.float64), "a": a}


def bound_function(bound: str, groups: int) -> Callable[..., Tensor]:
    log_ema = torch.linspace(-0.5, 0.5, groups, dtype=torch.float64)
    log_ema[0] = -math.inf

    def function(scores=None, q=None, k=None, temperature=1.0, a=None) -> Tensor:
        source = (scores,) if q is None else (q, k)
        settings = {"bound": bound, "log_baseline": a, "alpha": 0.2, "smile_tau": 1.5, "temperature": temperature}
        return mi_lower_bound(*source, **settings, log_ema=log_ema, ema_rate=0.1)[0]

    return function


# name -> (rows, keys, options); "positives" and "negatives" are filled in by `infonce_case`
INFONCE = {
    "square": (0, {}),
    "symmetric": (0, {"symmetric": True}),
    "more keys": (5, {}),
    "negatives": (0, {"negatives": True}),
    "positives": (-3, {"positives": True}),
    "positives and negatives": (1, {"positives": True, "negatives": True}),
    "one set of samples": (0, {"positives": True, "exclude_self": True}),
    "part of one set as keys": (-3, {"positives": True, "exclude_self": True}),
    "cosine": (0, {"cosine": True}),
}


def infonce_case(name: str, rows: int, width: int, reduction: str) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """Function and fp64 inputs of one InfoNCE case."""
    more, options = INFONCE[name]
    columns, options = max(2 if options.get("exclude_self") else 1, rows + more), dict(options)
    scale = (9 / width) ** 0.25
    inputs = {
        "q": draw((rows, width), 0, scale),
        "k": draw((columns, width), 1, scale),
        "temperature": torch.tensor(0.7, dtype=torch.float64),
    }
    if options.pop("negatives", False):
        inputs["negatives"] = draw((9, width), 2, scale)
    if options.pop("positives", False):
        options["positives"] = (torch.arange(rows) + max(1, columns // 2)) % columns
    return (lambda **tensors: infonce(**tensors, reduction=reduction, **options)), inputs


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) for name, x in inputs.items()}


def assert_as_good_as_torch(found: Result, plain: Result, exact: Result, tolerance: float) -> None:
    """Cut-cross-entropy's rule, elementwise: error <= error of the same-dtype reference + tolerance * size."""
    pairs = [("value", found.value, plain.value, exact.value)]
    pairs += [(n, found.grads[n], plain.grads[n], exact.grads[n]) for n in exact.grads]
    for name, ours, theirs, truth in pairs:
        size = max(truth.abs().max().item(), exact.summands.get(name, 0.0), 1e-30)
        excess = ((ours - truth).abs() - (theirs - truth).abs()).max() / size
        assert ours.isfinite().all() and excess <= tolerance, f"{name}: {excess.item():.2g} of the largest element"


__all__ = [
    "BOUNDS", "INFONCE", "Result", "assert_as_good_as_torch", "bound_function", "bound_inputs", "cast", "draw",
    "evaluate", "infonce_case",
]  # fmt: skip
