"""The two operations by formula, in plain torch, differentiated by autograd."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from engine.kernels.dropout import reference as dropout


def add_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    seed: Tensor | None,
    p: float,
    after: bool,
    eps: float,
    number: int,
) -> Tensor:
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
