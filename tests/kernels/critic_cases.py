"""Cases shared by the tests of the critics' operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.kernels.critics import reference
from engine.kernels.critics.reference import Layers


def draw(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def linear(*weight: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight [..., out, in], which keeps the size of its input, and bias [..., out]."""
    return (
        draw(*weight, seed=seed, scale=weight[-1] ** -0.5, dtype=dtype),
        draw(*weight[:-1], seed=seed + 1, scale=0.3, dtype=dtype),
    )


Grouped = tuple[list[Tensor], list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]


def grouped(
    rows: int, dims: Sequence[int], counts: Sequence[int], hidden: int, out: int, layers: int = 2, dtype=torch.float64
) -> Grouped:
    """Inputs, first and further layers of sum(counts) MLPs with `layers` + 1 hidden layers."""
    count = sum(counts)
    inputs = [draw(rows, d, seed=i, dtype=dtype) for i, d in enumerate(dims)]
    first = [
        linear(n, hidden, d, seed=20 + 2 * i, dtype=dtype) for i, (n, d) in enumerate(zip(counts, dims, strict=True))
    ]
    widths = [hidden] * layers + [out]
    return inputs, first, [linear(count, width, hidden, seed=40 + 2 * i, dtype=dtype) for i, width in enumerate(widths)]


Concat = tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]


def concat(rows: int, columns: int, dims: tuple[int, int], hidden: int, layers: int = 2, dtype=torch.float64) -> Concat:
    """x [columns, dims[0]], y [rows, dims[1]] and the layers of an MLP over both with `layers` + 1 hidden layers."""
    found = [linear(hidden, sum(dims), seed=60, dtype=dtype)]
    found += [linear(hidden, hidden, seed=62 + 2 * i, dtype=dtype) for i in range(layers)]
    found.append(linear(1, hidden, seed=90, dtype=dtype))
    return draw(columns, dims[0], seed=1, dtype=dtype), draw(rows, dims[1], seed=2, dtype=dtype), found


def tensors(*parts: Tensor | Sequence) -> list[Tensor]:
    """All tensors of nested lists, in order."""
    return [t for part in parts for t in ([part] if isinstance(part, Tensor) else tensors(*part))]


def by_tensors(function: Callable[..., Tensor], nested) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """`function` as one of the nested lists' tensors, and these tensors."""

    def of_flat(*flat: Tensor) -> Tensor:
        left = iter(flat)

        def rebuild(part):
            return next(left) if isinstance(part, Tensor) else type(part)(map(rebuild, part))

        return function(*rebuild(nested))

    return of_flat, tensors(nested)


def cast(part, dtype: torch.dtype):
    """The same nested lists with tensors of another dtype."""
    return part.to(dtype) if isinstance(part, Tensor) else type(part)(cast(p, dtype) for p in part)


def leaves(part):
    """The same nested lists with leaves that require gradients, of the same strides."""
    if isinstance(part, Tensor):
        return part.detach().requires_grad_()
    return type(part)(leaves(p) for p in part)


def value_and_grads(function: Callable, case, seed: int = 7) -> list[Tensor]:
    """Output and gradients, for a random upstream gradient, of every tensor of the case."""
    case = leaves(case)
    out = function(*case)
    upstream = draw(*out.shape, seed=seed, dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors(case), upstream)]


def infonce(transpose: bool = False) -> Callable[[Tensor, Tensor, Layers], Tensor]:
    """Of `reference.concat_scores`, by torch."""

    def of_case(x: Tensor, y: Tensor, layers: Layers) -> Tensor:
        scores = reference.concat_scores(x, y, layers)
        scores = scores.t() if transpose else scores
        return math.log(len(x)) + scores.log_softmax(1).diagonal().mean()

    return of_case


def assert_as_good_as_torch(
    found: list[Tensor], torchs: list[Tensor], exact: list[Tensor], tolerance: float = 1e-5, summands: float = 0.0
):
    """Elementwise |found - exact| <= |torch's fp32 - exact| + tolerance · the tensor's largest element.

    `summands`: the size of the terms that the value is a sum of: a bound near 0 is a difference of numbers of log B,
    and carries their rounding, up to four units in the last place.
    """
    for n, (f, t, e) in enumerate(zip(found, torchs, exact, strict=True)):
        assert f.dtype == torch.float32 and f.shape == e.shape
        slack = tolerance * max(e.abs().max().item(), 1e-3) if e.numel() else 0.0
        slack = max(slack, 4 * torch.finfo(torch.float32).eps * summands) if n == 0 else slack
        excess = (f.double() - e).abs() - (t.double() - e).abs() - slack
        assert e.numel() == 0 or excess.max() <= 0, f"tensor {n} is off by {excess.max().item() + slack:.3g}"
