"""Statistics of rows as functions that autograd knows."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.contrastive import registration  # noqa: F401  (registers the operations)
from engine.kernels.contrastive.reference import own_scores
from engine.kernels.gradients import differentiable_once, transformed
from engine.kernels.registry import call

# Bytes of the products that scores of rows' own keys are the sums of, at a time.
CHUNK_BYTES = 8 << 20


class RowStatistics(torch.autograd.Function):
    """`cpu.statistics`, [7, G, B]. State is O(B); the backward pass computes the scores again."""

    @staticmethod
    def forward(ctx, q, k, scale, bias, hardness, with_total, *pairs):
        ctx.settings = hardness, pairs[-1]
        found = call("contrastive_statistics", q, k, scale, bias, hardness, with_total, *pairs)
        ctx.save_for_backward(q, k, scale, bias, found, *pairs[:-1])
        return found

    @staticmethod
    @differentiable_once("infonce")
    def backward(ctx, grads):
        q, k, scale, bias, state, *pairs = ctx.saved_tensors
        hardness, exclude_self = ctx.settings
        dq, dk, sums = call(
            "contrastive_gradients", q, k, scale, bias, hardness, ctx.needs_input_grad[1], grads.contiguous(), state,
            *pairs, exclude_self,
        )  # fmt: skip
        of_scale = of_bias = None
        if ctx.needs_input_grad[2]:
            of_scale = (q.to(scale.dtype) * dq.to(scale.dtype)).sum() / scale
        if bias is not None and ctx.needs_input_grad[3]:
            of_bias = sums.sum()
        dk = dk if ctx.needs_input_grad[1] else None
        return dq, dk, of_scale, of_bias, *[None] * (2 + len(pairs) + 1)


class FusedLosses(torch.autograd.Function):
    """Sums of the losses of every group, and how many rows have one, [G] each.

    The forward pass also computes the gradients, while it has the scores.
    """

    @staticmethod
    def forward(ctx, q, k, scale, bias, joint, options, *pairs):
        with_keys = ctx.needs_input_grad[1]
        found, other, dq, dk, of_joint = call(
            "contrastive_fused", q, k, scale, bias, joint, *options, with_keys, *pairs
        )
        ctx.save_for_backward(q, k, scale, bias, joint, dq, dk, of_joint, other)
        count = found.new_full(found.shape[:1], found.shape[1]) if bias is not None else other.sum(1)
        ctx.mark_non_differentiable(count)
        return found.sum(1), count

    @staticmethod
    @differentiable_once("infonce")
    def backward(ctx, grad, _):
        q, _, scale, bias, joint, dq, dk, of_joint, other = ctx.saved_tensors
        factor = grad[:, None, None]
        dq = dq * factor
        of_scale = of_bias = None
        if ctx.needs_input_grad[2]:
            of_scale = (q * dq).sum() / scale
        if bias is not None and ctx.needs_input_grad[3]:
            of_bias = (other * grad[:, None]).sum()
        of_joint = None if joint is None else of_joint * grad[:, None]
        return dq, dk * factor if ctx.needs_input_grad[1] else None, of_scale, of_bias, of_joint, *[None] * 8


class OwnScores(torch.autograd.Function):
    """q_i . keys_ij, [G, B, d] and [G, B, n, d] to [G, B, n], a few rows at a time: no second [G, B, n, d] is made.

    The backward pass is made of torch's operations, and can be differentiated.
    """

    @staticmethod
    def forward(ctx, q, keys):
        ctx.save_for_backward(q, keys)
        return torch.cat([own_scores(q[:, part], keys[:, part]) for part in _parts(keys)], 1)

    @staticmethod
    def backward(ctx, grad):
        q, keys = ctx.saved_tensors
        of_q = of_keys = None
        if ctx.needs_input_grad[0]:
            sums = [(grad[:, part, :, None] * keys[:, part].to(grad.dtype)).sum(2) for part in _parts(keys)]
            of_q = torch.cat(sums, 1).to(q.dtype)
        if ctx.needs_input_grad[1]:
            of_keys = (grad[..., None] * q[:, :, None].to(grad.dtype)).to(keys.dtype)
        return of_q, of_keys


def _parts(keys: Tensor) -> list[slice]:
    groups, rows, count, width = keys.shape
    step = max(1, CHUNK_BYTES // (4 * groups * max(1, count) * width))
    return [slice(begin, begin + step) for begin in range(0, rows, step)]


def scores_of_own(q: Tensor, keys: Tensor) -> Tensor:
    """q_i . keys_ij, as `OwnScores`, or as the formula where torch transforms it."""
    if not torch.compiler.is_compiling() and transformed():
        return own_scores(q, keys)
    return OwnScores.apply(q, keys)
