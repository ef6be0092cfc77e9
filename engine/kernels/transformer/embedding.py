"""BERT's embeddings: word, position and type, through LayerNorm and dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.gradients import differentiable_once
from engine.kernels.registry import call, register_from
from engine.kernels.transformer.op import add_norm, runs_kernels

# Rows that the backward kernel takes. Each of its programs looks through all of them; torch's sorts them first.
MOST_ROWS = 4096

Settings = tuple[Tensor | None, float, float, int | None, torch.dtype | None]


def embed_norm(
    token_ids: Tensor,
    position: Tensor | None,
    tables: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    shift: Tensor,
    *,
    seed: Tensor | None = None,
    p: float = 0.0,
    eps: float = 1e-5,
    padding: int | None = None,
    low: torch.dtype | None = None,
    parts: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dropout(LayerNorm(word + position + type)) of texts of the first type, [B · L, C].

    On a GPU the embeddings' gradients are added up in one kernel, in the order of the rows: bitwise the same every
    time, and without sorting the tokens. A token without an embedding gives NaN there.

    Args:
        token_ids: int64 [B, L].
        position: int64 [B, L]; None counts from 0 in every row.
        tables: of words [V, C], positions [P, C] with P >= L, and types [T, C].
        weight: LayerNorm's, [C]. All of these have one dtype, float32 (or float64).
        shift: LayerNorm's, [C].
        seed: as for `add_norm`, with p, eps and low.
        padding: a token that gets no gradient.
        parts: from `parts_of` for (weight, shift, None), where `runs_kernels` holds; they then get their gradients by
            it.

    Returns:
        As `add_norm`.
    """
    words, positions, types = tables
    length, given = token_ids.shape[1], (words, positions, types, weight, shift)
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if (trained and parts is None) or token_ids.numel() > MOST_ROWS or not runs_kernels(words):
        place = positions[:length] if position is None else F.embedding(position, positions)
        x = F.embedding(token_ids, words, padding) + (place + types[0])
        settings = {"seed": seed, "p": p, "after": True, "eps": eps, "low": low, "parts": parts}
        return add_norm(x.flatten(0, 1), weight, shift, **settings)
    settings = (seed, p, eps, padding, low)
    return _EmbedNorm.apply(token_ids, position, words, positions, types, weight, shift, parts, settings)


class _EmbedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token_ids, position, words, positions, types, weight, shift, parts, settings):
        ctx.set_materialize_grads(False)
        seed, p, eps, padding, low = settings
        ctx.settings, ctx.padding, ctx.sizes = (p, True, eps, 0), padding, (len(words), len(positions), len(types))
        x = call("embed", token_ids, position, words, positions, types)
        ctx.save_for_backward(x, weight, seed, token_ids, position)
        y, small = call("add_norm", x, None, None, weight, shift, seed, *ctx.settings, low)
        return y, None if low is None else small

    @staticmethod
    @differentiable_once("the embeddings")
    def backward(ctx, grad, grad_low):
        if grad is None and grad_low is None:
            return (None,) * 9
        x, weight, seed, token_ids, position = ctx.saved_tensors
        arguments = (x, None, None, weight, seed, *ctx.settings, True, True)
        dx, _, parts = call("add_norm_backward", grad, grad_low, *arguments)
        gradients = (None,) * 3
        if any(ctx.needs_input_grad[2:5]):
            padding = -1 if ctx.padding is None else ctx.padding
            gradients = call("embed_backward", dx, token_ids, position, parts, *ctx.sizes, padding)
        of_tables = (g if need else None for g, need in zip(gradients, ctx.needs_input_grad[2:5], strict=True))
        return None, None, *of_tables, None, None, parts if ctx.needs_input_grad[7] else None, None


def _fake_embed_backward(grad, token_ids, position, parts, words, positions, types, padding):
    return tuple(grad.new_empty((size, grad.shape[1])) for size in (words, positions, types))


_add = register_from("engine.kernels.transformer")
_add(
    "embed", "(Tensor token_ids, Tensor? position, Tensor words, Tensor positions, Tensor types) -> Tensor", "triton",
    lambda token_ids, position, words, positions, types: words.new_empty((token_ids.numel(), words.shape[1])), None,
)  # fmt: skip
_add(
    "embed_backward",
    "(Tensor grad, Tensor token_ids, Tensor? position, Tensor parts, int words, int positions, int types, int padding)"
    " -> (Tensor, Tensor, Tensor)",
    "triton", _fake_embed_backward, 2,
)  # fmt: skip
