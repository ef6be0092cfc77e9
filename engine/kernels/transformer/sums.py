"""Gradients of vectors, added up for many operations at once.

A backward kernel leaves one part of a vector's gradient per program, [programs, vectors, C]. Adding the parts up takes
one more launch after each such kernel. `parts_of` puts it off: it gives every call a tensor without data whose gradient
is the call's parts. When all of them have come in, one launch adds up all that have one shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.gradients import differentiable_once
from engine.kernels.registry import call, register_from

MOST = 16  # parts of one shape that one launch adds up; as many as `sum_parts_kernel` has arguments

Vectors = Sequence[Tensor | None]


def parts_of(groups: Sequence[tuple[int, Vectors]]) -> list[Tensor | None]:
    """For each call (number of its parts, its vectors [C] or None) a tensor [parts, vectors, C] without data.

    The gradient of such a tensor, summed over its parts, becomes the gradient of the call's vectors. None where no
    vector of a call requires a gradient.
    """
    moving = [i for i, (_, vectors) in enumerate(groups) if any(v is not None and v.requires_grad for v in vectors)]
    if not moving or not torch.is_grad_enabled():
        return [None] * len(groups)
    counts = [(groups[i][0], len(groups[i][1])) for i in moving]
    places = _Parts.apply(counts, *(v for i in moving for v in groups[i][1]))
    found = dict(zip(moving, places, strict=True))
    return [found.get(i) for i in range(len(groups))]


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, counts, *vectors):
        ctx.set_materialize_grads(False)
        ctx.counts = counts
        left, places = iter(vectors), []
        for parts, size in counts:
            given = next(v for v in [next(left) for _ in range(size)] if v is not None)
            places.append(given.new_empty(()).expand(parts, size, len(given)))
        return tuple(places)

    @staticmethod
    @differentiable_once("a sum of vectors' gradients")
    def backward(ctx, *parts):
        alike = {}  # places of each shape
        for i, part in enumerate(parts):
            if part is not None:
                alike.setdefault((part.shape, part.dtype), []).append(i)
        sums = {}
        for places in alike.values():
            first, *others = (parts[i].contiguous() for i in places)
            sums |= zip(places, call("sum_parts", first, others).unbind(), strict=True)
        gradients = [
            None if i not in sums else sums[i][row] for i, (_, size) in enumerate(ctx.counts) for row in range(size)
        ]
        return None, *(g if need else None for g, need in zip(gradients, ctx.needs_input_grad[1:], strict=True))


def _launches(first: Tensor, others: Sequence[Tensor]) -> int:
    return -(-(1 + len(others)) // MOST)


register_from("engine.kernels.transformer")(
    "sum_parts", "(Tensor first, Tensor[] others) -> Tensor", "triton",
    lambda first, others: first.new_empty((1 + len(others), *first.shape[1:])), _launches,
)  # fmt: skip
