"""BERT's and Electra's layers in few launches, from the parameters of the Hugging Face model that owns them.

A layer takes eight kernels forward: one product for query, key and value, `attention`, three more products, and between
them `add_norm` twice and `bias_gelu`. In float32, for long texts and for wide heads, torch's attention runs instead.
Hidden states keep the parameters' type, float32. The product that follows reads a copy in autocast's type. All weights
are cast at once (`engine.model.lowered`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.kernels import dropout as ops
from engine.kernels.transformer import (
    add_norm,
    attention,
    attention_fits,
    bias_gelu,
    draw_seed,
    embed_norm,
    parts_of,
    plan,
    runs_kernels,
)
from engine.kernels.transformer.op import NARROW
from engine.kernels.transformer.reference import HIDDEN
from engine.model.lowered import autocast_type, lower

TYPES = ("bert", "electra")
ALIGNED = 16  # torch's attention copies a bias whose rows do not begin at multiples of it


Parts = list[Tensor | None]  # of a layer's attention, two LayerNorms and GELU: see `engine.kernels.transformer.sums`


class Weights(NamedTuple):
    """The weights of a layer in the products' type. Those of query, key and value are one tensor."""

    qkv: Tensor
    out: Tensor
    up: Tensor
    down: Tensor


def fusable(model: nn.Module) -> bool:
    """Whether `last_hidden_state` can compute this model: BERT or Electra as an encoder, with GELU.

    False where a part was replaced or parametrised, has a hook, or is checkpointed.
    """
    config = model.config
    return (
        config.model_type in TYPES
        and config.hidden_act == "gelu"
        and not getattr(config, "is_decoder", False)
        and not getattr(config, "add_cross_attention", False)
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
        and not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        and all(type(part) in kinds for part, *kinds in _used(model))
        and not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    )


def last_hidden_state(
    model: nn.Module,
    token_ids: Tensor,
    bias: Tensor,
    position: Tensor | None = None,
    projection: Tensor | None = None,
) -> Tensor:
    """The hidden states of the last layer. In training, dropout uses one seed that is drawn on the device.

    Products run in autocast's type where autocast is on, everything else in the parameters' type. Nothing is read back
    and no size depends on values, so that a CUDA graph can hold it.

    Args:
        model: for which `fusable` holds.
        token_ids: int64 [B, L].
        bias: what is added to the scores of attention, of the products' type (`score_bias`), [B, 1, 1 or L, L]; or, of
            integers, 0 for keys that are not seen.
        position: int64 [B, L]; None counts from 0 in every row.
        projection: [d, dim], by which the hidden states are multiplied.

    Returns:
        [B, L, dim] of the parameters' type; with a projection [B, L, d] of the products' type.

    Raises:
        ConfigError: more tokens than the model has positions.
    """
    batch, length = token_ids.shape
    layers = model.encoder.layer
    dtype = product_type(model, token_ids.device)
    with torch.autocast(token_ids.device.type, enabled=False):
        project = getattr(model, "embeddings_project", None)
        own = [] if project is None else [(project.weight,), (project.bias,)]
        behind = [] if projection is None else [(projection,)]
        lowered = lower([*own, *(group for layer in layers for group in _groups(layer)), *behind], dtype)
        parts = _parts(model, batch, length, dtype)
        seed = draw_seed(token_ids.device) if _drops(model) else None
        x, low = _embedded(model.embeddings, token_ids, position, seed, dtype, parts[0][0])
        if project is not None:
            x = low = F.linear(low, lowered[0], lowered[1])
        factors = iter(lowered[len(own) :])
        for i, layer in enumerate(layers):
            weights = Weights(*(next(factors) for _ in Weights._fields))
            again = dtype if i + 1 < len(layers) or projection is not None else None
            x, low = _layer(layer, x, low, (batch, length), bias, weights, seed, 3 * i + 1, again, parts[i + 1])
        x = x if projection is None else F.linear(low, next(factors))
    return x.view(batch, length, -1)


def _parts(model: nn.Module, batch: int, length: int, dtype: torch.dtype) -> list[Parts]:
    """Of the embeddings' LayerNorm, then of every layer; None where kernels do not run, or nothing is trained."""
    n, layers = batch * length, model.encoder.layer
    norm = model.embeddings.LayerNorm
    if not runs_kernels(norm.weight) or not runs_kernels(layers[0].output.LayerNorm.weight):
        return [[None], *[[None] * 4 for _ in layers]]
    groups = [(plan.norm_programs(n, len(norm.weight)), (norm.weight, norm.bias, None))]
    for layer in layers:
        inner, first, second = layer.attention.self, layer.attention.output, layer.output
        biases = (inner.query.bias, inner.key.bias, inner.value.bias)
        fits = attention_fits(dtype, length, len(biases[0]) // inner.num_attention_heads)
        norms = [(output.LayerNorm.weight, output.LayerNorm.bias, output.dense.bias) for output in (first, second)]
        programs = plan.norm_programs(n, len(norms[0][0]))
        groups += [(batch, biases if fits else ()), (programs, norms[0]), (programs, norms[1])]
        groups += [(plan.gelu_programs(n), (layer.intermediate.dense.bias,))]
    first, *rest = parts_of(groups)
    return [[first], *(rest[i : i + 4] for i in range(0, len(rest), 4))]


def mask_of(model: nn.Module, token_mask: Tensor) -> Tensor:
    """A token mask [B, L] as `last_hidden_state` reads it. For narrow heads attention's kernel takes it as it is."""
    dtype = product_type(model, token_mask.device)
    inner = model.encoder.layer[0].attention.self
    width = inner.query.out_features // inner.num_attention_heads
    mask = token_mask[:, None, None, :]
    integers = not token_mask.is_floating_point()
    if (
        integers
        and width <= NARROW
        and runs_kernels(inner.query.weight)
        and attention_fits(dtype, token_mask.shape[1], width)
    ):
        return mask
    return score_bias(mask == 0, dtype)


def product_type(model: nn.Module, device: torch.device) -> torch.dtype:
    """The type in which `last_hidden_state` multiplies: autocast's, or the parameters'."""
    return autocast_type(device) or model.embeddings.word_embeddings.weight.dtype


def score_bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a query may see a key, else a number that leaves nothing of its weight; bool [..., L] -> [..., L]."""
    width = hidden.shape[-1]
    bias = torch.zeros(*hidden.shape[:-1], -(-width // ALIGNED) * ALIGNED, dtype=dtype, device=hidden.device)
    bias = bias[..., :width]
    return bias.masked_fill_(hidden, HIDDEN)


def attention_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, p: float, scale: float
) -> Tensor:
    """Attention [B, heads, L, d] on a CPU, whose weights `engine.kernels.dropout` drops: torch draws masks slowly."""
    scores = (query * scale) @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores.masked_fill(~bias, torch.finfo(scores.dtype).min) if bias.dtype == torch.bool else scores + bias
    return ops.dropout(scores.softmax(-1), p) @ value


def _used(model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """The parts whose parameters are read here, each with the classes for which that is right."""
    dropout = (nn.Dropout, ops.Dropout)
    e = model.embeddings
    yield from ((part, nn.Embedding) for part in (e.word_embeddings, e.position_embeddings, e.token_type_embeddings))
    yield from ((e.LayerNorm, nn.LayerNorm), (e.dropout, *dropout))
    if hasattr(model, "embeddings_project"):
        yield model.embeddings_project, nn.Linear
    for layer in model.encoder.layer:
        inner, first, second = layer.attention.self, layer.attention.output, layer.output
        linears = (inner.query, inner.key, inner.value, first.dense, layer.intermediate.dense, second.dense)
        yield from ((part, nn.Linear) for part in linears)
        yield from ((part.LayerNorm, nn.LayerNorm) for part in (first, second))
        yield from ((part.dropout, *dropout) for part in (inner, first, second))


def _groups(layer: nn.Module) -> list[tuple[Tensor, ...]]:
    """The parameters of which `Weights` are made, in its order."""
    inner = layer.attention.self
    qkv = (inner.query, inner.key, inner.value)
    single = (layer.attention.output.dense, layer.intermediate.dense, layer.output.dense)
    return [tuple(m.weight for m in qkv), *((m.weight,) for m in single)]


def _p(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


def _drops(model: nn.Module) -> bool:
    return any(m.training and m.p > 0 for m in model.modules() if isinstance(m, nn.Dropout))


def _embedded(
    embeddings: nn.Module, token_ids: Tensor, position: Tensor | None, seed: Tensor | None, dtype: torch.dtype,
    parts: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Word + position + type through LayerNorm and dropout, [B · L, width], in float32 and in the products' type."""
    length, table = token_ids.shape[1], embeddings.position_embeddings.weight
    if length > len(table):
        raise ConfigError("text", f"{length} tokens", f"at most {len(table)}, the model's positions", "Cut the texts.")
    words, norm = embeddings.word_embeddings, embeddings.LayerNorm
    tables = (words.weight, table, embeddings.token_type_embeddings.weight)
    settings = {"seed": seed, "p": _p(embeddings.dropout), "eps": norm.eps, "padding": words.padding_idx}
    low = None if dtype == norm.weight.dtype else dtype
    y, again = embed_norm(token_ids, position, tables, norm.weight, norm.bias, **settings, low=low, parts=parts)
    return y, y if again is None else again


def _layer(
    layer: nn.Module, x: Tensor, low: Tensor, shape: tuple[int, int], bias: Tensor, weights: Weights,
    seed: Tensor | None, number: int, again: torch.dtype | None, parts: Parts,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One layer on hidden states x [B · L, dim], of which `low` is a copy in the products' type; so its result.

    number: of its first dropout, of three. again: the second result's type, None where nothing needs it.
    """
    of_attention, of_first, of_second, of_gelu = parts
    seen = _attended(layer.attention.self, F.linear(low, weights.qkv), shape, bias, seed, number, of_attention)
    x, low = _add_norm(layer.attention.output, F.linear(seen, weights.out), x, seed, number + 1, low.dtype, of_first)
    inside = bias_gelu(F.linear(low, weights.up), layer.intermediate.dense.bias, of_gelu)
    return _add_norm(layer.output, F.linear(inside, weights.down), x, seed, number + 2, again, of_second)


def _attended(
    inner: nn.Module, qkv: Tensor, shape: tuple[int, int], bias: Tensor, seed: Tensor | None, number: int,
    parts: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention [B · L, dim] on the products of queries, keys and values [B · L, 3 · dim]."""
    p, heads = _p(inner.dropout), inner.num_attention_heads
    biases = (inner.query.bias, inner.key.bias, inner.value.bias)
    width = len(biases[0]) // heads
    if attention_fits(qkv.dtype, shape[1], width):
        return attention(qkv, *biases, bias, heads=heads, seed=seed, p=p, number=number, parts=parts)
    qkv = (qkv + torch.cat(biases).to(qkv.dtype)).view(*shape, 3, heads, width)
    query, key, value = (t.transpose(1, 2) for t in qkv.unbind(2))
    if p > 0 and qkv.device.type == "cpu":
        seen = attention_with_dropout(query, key, value, bias, p, width**-0.5)
    else:
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=p)
    return seen.transpose(1, 2).reshape(shape[0] * shape[1], -1)


def _add_norm(
    output: nn.Module, x: Tensor, residual: Tensor, seed: Tensor | None, number: int, low: torch.dtype | None,
    parts: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What BERT's output modules do behind their product x: bias, dropout, residual, LayerNorm."""
    norm = output.LayerNorm
    settings = {"seed": seed, "p": _p(output.dropout), "eps": norm.eps, "number": number, "parts": parts}
    settings |= {"bias": output.dense.bias, "residual": residual, "low": None if low == norm.weight.dtype else low}
    y, again = add_norm(x, norm.weight, norm.bias, **settings)
    return y, y if again is None else again
