"""Host functions on CPU tensors: torch's own loops, with the compiled dropout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.dropout import cpu as dropout
from engine.kernels.transformer import plan, reference


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
    weight: Tensor, seed: Tensor | None, p: float, after: bool, eps: float, number: int, parameters: bool, apart: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of the residual, and of weight, shift and bias [3, C]. One that does not exist is empty.

    apart: the last as parts [programs, 3, C] that are yet to be added up. Here all parts but the first are 0.
    """
    total = _total(x, bias, residual, weight, seed, 0 if after else p, number)
    whole = sum(g.to(weight.dtype) for g in (grad, grad_low) if g is not None)
    whole = _dropped(whole, seed, p if after else 0, number)
    inner, normal = _layer_norm_backward(whole, total, weight, eps)
    dx = _dropped(inner, seed, 0 if after else p, number)
    sums = torch.stack([(whole * normal).sum(0), whole.sum(0), dx.sum(0)]) if parameters else weight.new_empty(0)
    dresidual = x.new_empty(0) if residual is None else inner.to(residual.dtype, copy=True)
    return dx.to(x.dtype, copy=True), dresidual, _as_parts(sums, apart and plan.norm_programs(*x.shape))


def _as_parts(sums: Tensor, parts: int) -> Tensor:
    """Sums [vectors, C] as so many parts, of which all but the first are 0; as they are for 0 parts or if empty."""
    return F.pad(sums[None], (0, 0, 0, 0, 0, parts - 1)) if parts and sums.dim() == 2 else sums


def sum_parts(first: Tensor, others: Sequence[Tensor]) -> Tensor:
    """The sums over the first axis of tensors of one shape, stacked."""
    return torch.stack([part.sum(0) for part in (first, *others)])


def embed(token_ids: Tensor, position: Tensor | None, words: Tensor, positions: Tensor, types: Tensor) -> Tensor:
    """word + (position + type 0) of every token, [B · L, C]. position: [B, L]; None counts from 0 in every row."""
    place = positions[: token_ids.shape[1]] if position is None else positions[position]
    return (words[token_ids] + (place + types[0])).flatten(0, 1)


def embed_backward(
    grad: Tensor, token_ids: Tensor, position: Tensor | None, parts: Tensor, words: int, positions: int, types: int,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the three tables, of words, positions and types rows. `parts` is of add_norm's backward pass.

    padding: a token that gets no gradient, or -1.
    """
    if position is None:
        position = torch.arange(token_ids.shape[1], device=grad.device).expand_as(token_ids)
    dwords = torch.ops.aten.embedding_dense_backward(grad, token_ids.flatten(), words, padding, False)
    of_places = torch.ops.aten.embedding_dense_backward(grad, position.flatten(), positions, -1, False)
    return dwords, of_places, F.pad(parts[:, 2].sum(0)[None], (0, 0, 0, types - 1))


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """As `reference.bias_gelu`."""
    return reference.bias_gelu(x, bias)


def bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor, parameters: bool, apart: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x, and of the bias: [C], its parts [programs, 1, C], or empty without `parameters`."""
    dx = torch.ops.aten.gelu_backward(grad.to(bias.dtype), x.to(bias.dtype) + bias)
    sums = dx.sum(0) if parameters else bias.new_empty(0)
    if parameters and apart:
        sums = _as_parts(sums[None], plan.gelu_programs(len(x)))
    return dx.to(x.dtype, copy=True), sums


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
    p: float, heads: int, number: int, parameters: bool, apart: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv, and of the biases: [3, C], their parts [B, 3, C], or empty without `parameters`."""
    q, k, v = reference.with_bias(qkv, q_bias, k_bias, v_bias, mask, heads)
    g = grad.to(q.dtype).view(*q.transpose(1, 2).shape).transpose(1, 2)
    weights = _softmax(q, k, mask)
    dweights = _dropped(g @ v.transpose(-1, -2), seed, p, number)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dv = _dropped(weights, seed, p, number).transpose(-1, -2) @ g
    each = (dscores @ k, dscores.transpose(-1, -2) @ q, dv)
    dqkv = torch.stack([part.transpose(1, 2).reshape(len(qkv), -1) for part in each], dim=1)
    sums = dqkv.sum(0) if parameters else q_bias.new_empty(0)
    return dqkv.flatten(1).to(qkv.dtype, copy=True), _as_parts(sums, apart and len(mask))


def _softmax(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + reference.added(mask, q.dtype)).softmax(-1)
