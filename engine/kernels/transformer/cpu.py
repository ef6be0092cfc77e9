"""Host functions on CPU tensors: torch's own loops, with the compiled dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.dropout import cpu as dropout
from engine.kernels.transformer import reference


def _dropped(x: Tensor, seed: Tensor, p: float, number: int) -> Tensor:
    return dropout.apply(x, seed + number, p) if p > 0 else x


def _total(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, weight: Tensor, seed: Tensor | None, p: float, number: int
) -> Tensor:
    """What LayerNorm reads."""
    total = x.to(weight.dtype)
    if bias is not None:
        total = total + bias
    total = _dropped(total, seed, p, number)
    return total if residual is None else total + residual


def add_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, weight: Tensor, shift: Tensor, seed: Tensor | None,
    p: float, after: bool, eps: float, number: int, low: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [N, C] of the weight's type, and y of the type `low` where there is one (else of no element)."""
    total = _total(x, bias, residual, weight, seed, 0 if after else p, number)
    y = _dropped(F.layer_norm(total, (total.shape[-1],), weight, shift, eps), seed, p if after else 0, number)
    return y, x.new_empty(0) if low is None else y.to(low, copy=True)


def _layer_norm_backward(grad: Tensor, total: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Of LayerNorm's input `total` [N, C]: its gradient, and `total` normalised; `grad` is of the output."""
    centred = total - total.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normal = centred * scale
    g = grad * weight
    return scale * (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True)), normal


def add_norm_backward(
    grad: Tensor | None, grad_low: Tensor | None, x: Tensor, bias: Tensor | None, residual: Tensor | None,
    weight: Tensor, seed: Tensor | None, p: float, after: bool, eps: float, number: int, parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of the residual, and of weight, shift and bias [3, C]; of no element where there is none."""
    total = _total(x, bias, residual, weight, seed, 0 if after else p, number)
    whole = sum(g.to(weight.dtype) for g in (grad, grad_low) if g is not None)
    whole = _dropped(whole, seed, p if after else 0, number)
    inner, normal = _layer_norm_backward(whole, total, weight, eps)
    dx = _dropped(inner, seed, 0 if after else p, number)
    sums = torch.stack([(whole * normal).sum(0), whole.sum(0), dx.sum(0)]) if parameters else weight.new_empty(0)
    dresidual = x.new_empty(0) if residual is None else inner.to(residual.dtype, copy=True)
    return dx.to(x.dtype, copy=True), dresidual, sums


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """As `reference.bias_gelu`."""
    return reference.bias_gelu(x, bias)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, parameters: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of the bias [C] where `parameters` asks for it (else of no element)."""
    dx = torch.ops.aten.gelu_backward(grad.to(bias.dtype), x.to(bias.dtype) + bias)
    return dx.to(x.dtype, copy=True), dx.sum(0) if parameters else bias.new_empty(0)
