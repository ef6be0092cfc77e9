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
    """y [N, C] of the weight's dtype, and y of the dtype `low` (empty without `low`)."""
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
    """Gradients of x, of the residual, and of weight, shift and bias [3, C]. One that does not exist is empty."""
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
    """Gradients of x, and of the bias [C] (empty without `parameters`)."""
    dx = torch.ops.aten.gelu_backward(grad.to(bias.dtype), x.to(bias.dtype) + bias)
    return dx.to(x.dtype, copy=True), dx.sum(0) if parameters else bias.new_empty(0)


def attention(
    qkv: Tensor, q_bias: Tensor, k_bias: Tensor, v_bias: Tensor, mask: Tensor, seed: Tensor | None, p: float,
    heads: int, number: int,
) -> Tensor:  # fmt: skip
    """As `reference.attention`."""
    q, k, v = reference.with_bias(qkv, q_bias, k_bias, v_bias, mask, heads)
    weights = _dropped(_softmax(q, k, mask), seed, p, number)
    return (weights @ v).transpose(1, 2).reshape(len(qkv), -1).to(qkv.dtype, copy=True)


def attention_backward(
    grad: Tensor, qkv: Tensor, q_bias: Tensor, k_bias: Tensor, v_bias: Tensor, mask: Tensor, seed: Tensor | None,
    p: float, heads: int, number: int, parameters: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv, and of the biases [3, C] (empty without `parameters`)."""
    q, k, v = reference.with_bias(qkv, q_bias, k_bias, v_bias, mask, heads)
    g = grad.to(q.dtype).view(*q.transpose(1, 2).shape).transpose(1, 2)
    weights = _softmax(q, k, mask)
    dweights = _dropped(g @ v.transpose(-1, -2), seed, p, number)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dv = _dropped(weights, seed, p, number).transpose(-1, -2) @ g
    each = (dscores @ k, dscores.transpose(-1, -2) @ q, dv)
    dqkv = torch.stack([part.transpose(1, 2).reshape(len(qkv), -1) for part in each], dim=1)
    sums = dqkv.sum(0) if parameters else q_bias.new_empty(0)
    return dqkv.flatten(1).to(qkv.dtype, copy=True), sums


def _softmax(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + mask.to(q.dtype)).softmax(-1)
