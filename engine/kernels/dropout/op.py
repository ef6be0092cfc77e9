"""Dropout as a differentiable operation.

    y = dropout(x, 0.1)          # in training; torch.manual_seed makes it repeatable

On the CPU torch draws a mask number by number on one core. That costs more than the layers around it, an eighth of a
two-stage epoch. Here a call draws one seed, and a hash of the seed and of an element's place decides about the element.
Only the seed is kept for the backward pass. On a GPU torch's own fused dropout runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import EstimatorError
from engine.kernels.dropout import reference
from engine.kernels.gradients import batched, transformed
from engine.kernels.registry import backend_for, call, lazy, register

SEEDS = (1 << 63) - 1

register(
    "dropout",
    "(Tensor x, Tensor seed, float p) -> Tensor",
    cpu=lazy("engine.kernels.dropout.cpu", "apply"),
    fake=lambda x, seed, p: torch.empty_like(x, memory_format=torch.contiguous_format),
)


def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Zero each element with probability p and scale the others by 1 / (1 - p), as `torch.nn.functional.dropout`.

    The mask depends on torch's default generator alone, not on the number of threads or the processor. It is not the
    mask that torch's own dropout draws from the same seed.

    Args:
        x: Float tensor of any shape. On the CPU, float32, float64 and bfloat16 take the compiled kernel.
        p: Probability, in [0, 1].
        training: False returns x itself.

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        EstimatorError: p outside [0, 1].

    Example:
        >>> dropout(torch.ones(1000), 0.5).unique()
        tensor([0., 2.])
    """
    if not 0 <= p <= 1:
        raise EstimatorError("dropout", f"p = {p}", "a probability from 0 to 1", "Choose one such as 0.1.")
    if not training or p == 0:
        return x
    if p == 1 or _is_torchs(x):
        return F.dropout(x, p, training)
    seed = torch.randint(SEEDS, (1,))
    if backend_for(x) == "reference":
        return reference.dropout(x, seed.to(x.device), p)
    return _Dropout.apply(x, seed, p)


def _is_torchs(x: Tensor) -> bool:
    """Whether torch's own dropout is used for tensors like x."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return True
    if backend_for(x) == "reference" or torch.compiler.is_compiling():
        return False
    from engine.kernels.dropout.cpu import library

    return library(torch.float64 if x.dtype == torch.float64 else torch.float32) is None


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seed, p):
        ctx.p = p
        ctx.save_for_backward(seed)
        return call("dropout", x, seed, p)

    @staticmethod
    def backward(ctx, grad):
        (seed,) = ctx.saved_tensors
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or transformed() or batched(grad)):
            return call("dropout", grad, seed, ctx.p), None, None
        return reference.dropout(grad, seed, ctx.p), None, None  # by the same mask; torch goes on from there


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` with this operation; not in place."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)
