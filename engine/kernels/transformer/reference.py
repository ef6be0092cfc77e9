"""The operations by formula, in plain torch, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.dropout import reference as dropout

HIDDEN = -30000.0  # what is added to the score of a key that is not to be seen; exp of it is 0, and fp16 holds it


def add_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, weight: Tensor, shift: Tensor, seed: Tensor | None,
    p: float, after: bool, eps: float, number: int,
) -> Tensor:  # fmt: skip
    """LayerNorm(residual + dropout(x + bias)), or dropout(LayerNorm(residual + x + bias)) with `after`."""
    total = x.to(weight.dtype)
    if bias is not None:
        total = total + bias
    if p > 0 and not after:
        total = dropout.dropout(total, seed + number, p)
    if residual is not None:
        total = total + residual
    y = F.layer_norm(total, (total.shape[-1],), weight, shift, eps)
    return dropout.dropout(y, seed + number, p) if p > 0 and after else y


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias), by the error function."""
    return F.gelu(x.to(bias.dtype) + bias).to(x.dtype)


def attention(
    qkv: Tensor, q_bias: Tensor, k_bias: Tensor, v_bias: Tensor, mask: Tensor, seed: Tensor | None, p: float,
    heads: int, number: int,
) -> Tensor:  # fmt: skip
    """dropout(softmax(q k' / sqrt(d) + mask)) v of every head; see `op.attention`."""
    q, k, v = with_bias(qkv, q_bias, k_bias, v_bias, mask, heads)
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + added(mask, q.dtype)).softmax(-1)
    if p > 0:
        weights = dropout.dropout(weights, seed + number, p)
    return (weights @ v).transpose(1, 2).reshape(len(qkv), -1).to(qkv.dtype)


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to scores: itself, or, of integers, nothing where it is not 0."""
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask == 0, HIDDEN)


def with_bias(
    qkv: Tensor, q_bias: Tensor, k_bias: Tensor, v_bias: Tensor, mask: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [B, heads, L, d], of the biases' type."""
    biases = (q_bias, k_bias, v_bias)
    parts = (part.to(q_bias.dtype) + b for part, b in zip(qkv.chunk(3, dim=1), biases, strict=True))
    return tuple(part.view(len(mask), -1, heads, q_bias.shape[0] // heads).transpose(1, 2) for part in parts)
