"""The bounds as autograd.Functions: what the forward pass keeps, and how it becomes gradients.

The operations that they call are registered with torch (`registration.py`) and know nothing of autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from engine.kernels.gradients import differentiable_once
from engine.kernels.mi_bounds import registration  # noqa: F401  (registers the operations)
from engine.kernels.mi_bounds.embeddings import grouped
from engine.kernels.mi_bounds.statistics import SIGMOID_GRADIENT, add_positives_, finish, interpolated
from engine.kernels.registry import call


class InfoNCE(torch.autograd.Function):
    """Losses of q [B, d] or [G, B, d], reduced; state is O(B).

    `gradients` says what the forward pass computes beside the losses, in fp32. "both": dq and dk of the losses' sum,
    which one factor turns into the gradients. "rows": dq alone, whose rows have factors of their own. "none": neither.
    """

    @staticmethod
    def forward(ctx, q, k, scale, positives, exclude_self, algorithm, gradients, reduction):
        ctx.settings = exclude_self, gradients, reduction
        losses, state, dq, dk = call(
            "mi_infonce", grouped(q), grouped(k), scale, positives, exclude_self, algorithm, gradients
        )
        ctx.save_for_backward(q, k, scale, positives, state, dq, dk)
        if q.dim() == 2:
            losses = losses.view(-1)
        if reduction == "none":
            return losses
        return losses.mean(-1) if reduction == "mean" else losses.sum(-1)

    @staticmethod
    @differentiable_once("infonce")
    def backward(ctx, grad):
        q, k, scale, positives, state, dq, dk = ctx.saved_tensors
        exclude_self, gradients, reduction = ctx.settings
        rows = q.shape[-2]
        grad = grad.view(-1, rows if reduction == "none" else 1)
        if reduction == "mean":
            grad = grad / rows
        if gradients == "both":
            dq, dk = _times(dq, grad, q), _times(dk, grad, k)
        else:
            weight = grad.expand(state.shape[1:]).contiguous()
            arguments = (grouped(q), grouped(k), scale, positives, exclude_self, weight, state)
            if gradients == "rows":
                dq, dk = _times(dq, grad, q), call("mi_infonce_keys", *arguments)
            else:
                dq, dk = call("mi_infonce_gradients", *arguments)
        scale_grad = _scale_grad(ctx, q, dq.view_as(q), scale)
        return dq.view_as(q), dk.view_as(k), scale_grad, None, None, None, None, None


class SymmetricInfoNCE(torch.autograd.Function):
    """Mean of the losses of every row and of every column, [G, B]. The backward pass computes the scores again."""

    @staticmethod
    def forward(ctx, q, k, scale):
        joint, rest, rest_columns = call("mi_symmetric_statistics", q, k, scale)
        ctx.save_for_backward(q, k, scale, joint, rest, rest_columns)
        return (-logsigmoid(joint - rest) - logsigmoid(joint - rest_columns)) / 2

    @staticmethod
    @differentiable_once("infonce")
    def backward(ctx, grad):
        q, k, scale, joint, rest, rest_columns = ctx.saved_tensors
        weight = grad / -2
        diagonal = weight * (torch.sigmoid(rest - joint) + torch.sigmoid(rest_columns - joint))
        rows, columns = torch.logaddexp(rest, joint), torch.logaddexp(rest_columns, joint)
        dq, dk = call("mi_gradients", q, k, scale, None, False, weight, rows, weight, columns, diagonal)
        return dq, dk, _scale_grad(ctx, q, dq, scale)


class FusedInfoNCE(torch.autograd.Function):
    """Mean loss of every group. The forward pass also computes the gradient's sums, while it has the scores."""

    @staticmethod
    def forward(ctx, q, k, scale, positives, exclude_self):
        joint, rest, _, sum_q, sum_k = call(
            "mi_fused", q, k, scale, positives, exclude_self, "lse", 0.0, "softmax", None
        )
        ctx.save_for_backward(q, k, scale, positives, sum_q, sum_k, torch.sigmoid(rest - joint))
        return -logsigmoid(joint - rest).mean(-1)

    @staticmethod
    @differentiable_once("infonce")
    def backward(ctx, grad):
        q, k, scale, positives, sum_q, sum_k, share = ctx.saved_tensors
        grad = grad / q.shape[1]
        dq, dk = _from_sums(q, k, scale, positives, sum_q, sum_k, grad, -grad[:, None] * share)
        return dq, dk, _scale_grad(ctx, q, dq, scale), None, None


class Bound(torch.autograd.Function):
    """A bound from embeddings, [G], and MINE's moving average, [G]."""

    @staticmethod
    def forward(ctx, q, k, scale, a, log_ema, bound, alpha, smile_tau, ema_rate, fused):
        ctx.bound, ctx.alpha, ctx.fused, ctx.has_baseline = bound, alpha, fused, a is not None
        if bound == "interpolate":
            a = _zeros(q) if a is None else a
            joint, rest, excess, shares = call("mi_mixture", q, k, scale, a, alpha)
            value, weight, grad_a = interpolated(joint, rest, excess, shares, a, alpha)
            ctx.save_for_backward(q, k, scale, a, rest, weight, grad_a)
            return value, log_ema.clone()
        kind = _kind(bound)
        if fused:
            weighting = "sigmoid" if bound in SIGMOID_GRADIENT else "offset"
            joint, rest, maximum, sum_q, sum_k = call(
                "mi_fused", q, k, scale, None, False, kind, smile_tau, weighting, a
            )
            done = finish(bound, joint, rest, a, log_ema, ema_rate)
            factor = (maximum - done.constant).exp()
            ctx.save_for_backward(q, k, scale, a, sum_q, sum_k, factor, done.diagonal, done.baseline)
        else:
            joint, rest = call("mi_statistics", q, k, scale, None, False, kind, smile_tau)
            done = finish(bound, joint, rest, a, log_ema, ema_rate)
            # relative to the row's own log-sum-exp, e^(S - shift) is at most 1 and fits into 16 bits
            shift = None if done.log_weight is None else rest.clamp(min=torch.finfo(rest.dtype).min)
            ctx.save_for_backward(q, k, scale, a, done.constant, done.log_weight, shift, done.diagonal, done.baseline)
        ctx.mark_non_differentiable(done.log_ema)
        return done.value, done.log_ema.clone()

    @staticmethod
    @differentiable_once("mi_lower_bound")
    def backward(ctx, grad, _):
        q, k, scale, a, *state = ctx.saved_tensors
        if ctx.bound == "interpolate":
            rest, weight, grad_a = state
            dq, dk = call("mi_mixture_gradients", q, k, scale, a, ctx.alpha, rest, weight, grad)
        elif ctx.fused:
            sum_q, sum_k, factor, diagonal, grad_a = state
            dq, dk = _from_sums(q, k, scale, None, sum_q, sum_k, -factor * grad, grad[:, None] * diagonal)
        else:
            constant, log_weight, shift, diagonal, grad_a = state
            log_weight = -constant[:, None] if log_weight is None else log_weight
            weight = (grad[:, None] * log_weight.exp()).expand_as(diagonal).contiguous()
            diagonal = grad[:, None] * diagonal
            dq, dk = call("mi_gradients", q, k, scale, None, False, weight, shift, None, None, diagonal)
        da = grad[:, None] * grad_a if ctx.has_baseline and grad_a is not None else None
        return dq, dk, _scale_grad(ctx, q, dq, scale), da, None, None, None, None, None, None


class ScoreBound(torch.autograd.Function):
    """A bound from scores [G, B, B], [G], and MINE's moving average, [G]."""

    @staticmethod
    def forward(ctx, scores, a, log_ema, bound, alpha, smile_tau, ema_rate):
        ctx.bound, ctx.alpha, ctx.has_baseline = bound, alpha, a is not None
        if bound == "interpolate":
            a = _zeros(scores) if a is None else a
            joint, rest, excess, shares = call("mi_score_mixture", scores, a, alpha)
            value, weight, grad_a = interpolated(joint, rest, excess, shares, a, alpha)
            ctx.save_for_backward(scores, a, rest, weight, grad_a)
            return value, log_ema.clone()
        joint, rest = call("mi_score_statistics", scores, _kind(bound), smile_tau)
        done = finish(bound, joint, rest, a, log_ema, ema_rate)
        weight = shift = None
        if done.log_weight is None:
            weight = (-done.constant).exp()[:, None]
        else:
            # a weight above 1 becomes part of the shift: an infinite one times a share of 0 would be NaN
            excess = done.log_weight.clamp(min=0)
            weight = (done.log_weight - excess).exp()
            shift = rest.clamp(min=torch.finfo(rest.dtype).min) - excess
        ctx.save_for_backward(scores, a, weight, shift, done.diagonal, done.baseline)
        return done.value, done.log_ema.clone()

    @staticmethod
    @differentiable_once("mi_lower_bound")
    def backward(ctx, grad, _):
        scores, a, *state = ctx.saved_tensors
        if ctx.bound == "interpolate":
            rest, weight, grad_a = state
            gradient = call("mi_score_mixture_gradients", scores, a, ctx.alpha, rest, weight, grad)
        else:
            weight, shift, diagonal, grad_a = state
            weight = (grad[:, None] * weight).expand_as(diagonal).contiguous()
            gradient = call("mi_score_gradients", scores, weight, shift, grad[:, None] * diagonal)
        da = grad[:, None] * grad_a if ctx.has_baseline and grad_a is not None else None
        return gradient, da, None, None, None, None, None


def _from_sums(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, sum_q: Tensor, sum_k: Tensor, factor: Tensor,
    diagonal: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients from the sums of `mi_fused`: factor [G] times those, plus the positives' part."""
    factor = factor[:, None, None]
    dq, dk = sum_q * (factor * scale), sum_k * factor
    add_positives_(dq, dk, q.to(dq.dtype), k.to(dk.dtype), positives, diagonal * scale)
    return dq.to(q.dtype), dk.to(k.dtype)


def _scale_grad(ctx, q: Tensor, dq: Tensor, scale: Tensor) -> Tensor | None:
    """dV / dscale = sum over ij of dS_ij S_ij / scale = sum over i of q_i . dq_i / scale; None if it is not wanted."""
    if not ctx.needs_input_grad[2]:
        return None
    return (q.to(scale.dtype) * dq.to(scale.dtype)).sum() / scale


def _times(gradient: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    """gradient [G, n, d] times factor [G, n] or [G, 1], in the dtype of `like`."""
    if gradient.dtype == like.dtype or torch.compiler.is_compiling():
        return (gradient * factor[..., None]).to(like.dtype)
    return torch.mul(gradient, factor[..., None], out=torch.empty_like(gradient, dtype=like.dtype))


def _kind(bound: str) -> str:
    return {"js_fgan": "softplus", "smile": "clipped"}.get(bound, "lse")


def _zeros(first: Tensor) -> Tensor:
    return torch.zeros(first.shape[:2], dtype=statistics_dtype(first), device=first.device)


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
