"""InfoNCE and lower bounds on mutual information as differentiable operations, streaming where there are embeddings.

    infonce(q, k)                       the contrastive loss of SimCLR, CLIP, MoCo, CPC; no [B, M] scores are kept
    mi_lower_bound(q, k, bound=...)     nine bounds, value and gradient, for many critics at once
    mi_lower_bound(scores, bound=...)   the same from scores that exist already

Memory is O(B d) and a bounded chunk of scores: 8 MiB on the CPU, at most 256 MiB on a GPU (`plan`). Where plain torch
was measured to be faster, it may be all scores, up to 1 GiB. All statistics, sums and products accumulate in fp32 (fp64
for fp64 inputs), also under autocast: embeddings of 16 bits are taken as they are, and gradients come back in their
dtype. Every backend is bitwise deterministic. Gradients of gradients raise ConfigError, but for the reference's.

The autograd.Functions are here; what they call is registered with torch (`engine.kernels.registry`) and knows nothing
of autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from engine.errors import EstimatorError
from engine.kernels import dispatch
from engine.kernels.arguments import exact_type, looks_at
from engine.kernels.gradients import differentiable_once
from engine.kernels.mi_bounds import plan, reference
from engine.kernels.mi_bounds.reference import BOUNDS, check_settings, full_precision
from engine.kernels.mi_bounds.statistics import SIGMOID_GRADIENT, add_positives_, finish, interpolated
from engine.kernels.registry import backend_for, call, interpreting, lazy, log_size, register

REDUCTIONS = ("mean", "sum", "none")


def infonce(
    q: Tensor,
    k: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    cosine: bool = False,
    symmetric: bool = False,
    negatives: Tensor | None = None,
    positives: Tensor | None = None,
    exclude_self: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """The InfoNCE loss, to be minimised: mean over i of -log softmax_j(q_i . k_j / temperature) at i's positive.

    log M minus this loss is a lower bound on mutual information in nats (M keys). Oord et al. 2018; SimCLR: q = k =
    both views, `positives`, `exclude_self`; CLIP: `symmetric`, `cosine`, a learnable temperature; MoCo: `negatives`.

    Args:
        q: [B, d] or [G, B, d]: G losses at once.
        k: [M, d] or [G, M, d], M >= B; row i of k is the positive of row i of q, the others are its negatives.
        temperature: one positive number: float, or a tensor of one element, on the CPU or on q's device, which receives
            its gradient. The value of a tensor on a GPU is not looked at: one that is not positive gives NaN.
        cosine: scale q, k and negatives to length 1 first.
        symmetric: mean of the losses of q against k and of k against q; M = B, without the next three.
        negatives: [M', d] (or [G, M', d]): further keys, such as a queue. Or [B, n, d] (or [G, B, n, d]): n negatives
            of each row's own, its only ones; then k has the shape of q, and symmetric, positives and exclude_self are
            not allowed. Negatives receive gradients if they need them.
        positives: int64 [B]: the column of each row's positive in [k; negatives], where it is not the row's own number.
            Out of range, or excluded by `exclude_self`, they raise an error on the CPU and give NaN on a GPU.
        exclude_self: column i does not exist for row i, as where q and k are the same samples: it is no positive.
        reduction: "mean", "sum" or "none".

    Returns:
        0-d, or [G] for groups; for "none" [B] or [G, B]. In nats, fp32 (fp64 for fp64 inputs).

    Raises:
        EstimatorError: shapes, types, devices, indices or options that do not fit; no rows.
    """
    if reduction not in REDUCTIONS:
        raise EstimatorError("infonce", f"reduction {reduction!r}", f"one of {', '.join(REDUCTIONS)}", "Choose one.")
    exact_type("infonce", q, k, negatives)
    if cosine:
        q, k = _normalise(q), _normalise(k)
        negatives = None if negatives is None else _normalise(negatives)
    if negatives is not None and negatives.dim() == q.dim() + 1:
        if symmetric or exclude_self or positives is not None:
            found = "symmetric, exclude_self or positives with negatives of each row's own"
            raise EstimatorError("infonce", found, "none of these", "Leave them out.")
        return _reduced(_own_negatives(q, k, negatives, temperature), reduction)
    if negatives is not None:
        if negatives.shape[:-2] != k.shape[:-2] or negatives.shape[-1] != k.shape[-1]:
            raise _shapes("infonce", negatives, k, "negatives with the width and groups of k")
        k = torch.cat([k, negatives], dim=-2)
    q, k, scale = _prepare("infonce", q, k, temperature)
    rows, columns = q.shape[-2], k.shape[-2]
    plain = negatives is None and positives is None and not exclude_self
    if symmetric and not (plain and rows == columns):
        raise EstimatorError(
            "infonce(symmetric=True)",
            f"{rows} rows, {columns} keys" if plain else "negatives, positives or exclude_self",
            "as many keys as rows and nothing else",
            "Leave out what does not fit, or add the losses of both directions yourself.",
        )
    if positives is None and (columns < rows or exclude_self):
        found = "no positives" if exclude_self else f"{rows} rows of q, {columns} keys"
        raise EstimatorError("infonce", found, "a positive for every row", "Give `positives`.")
    if positives is not None and (
        positives.dtype != torch.int64 or positives.shape != (rows,) or positives.device != q.device
    ):
        found = f"positives {list(positives.shape)} of {positives.dtype} on {positives.device}"
        raise EstimatorError(
            "infonce", found, f"int64 [{rows}] on {q.device}", "Give one column of [k; negatives] a row."
        )
    return _infonce(q, k, scale, positives, exclude_self, symmetric, reduction)


def _infonce(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, symmetric: bool, reduction: str
) -> Tensor:
    """`infonce` of what `_prepare` gives, by the backend and the algorithm that are to be taken."""
    backend, wants_grad = _backend(q), _wants_grad(q, k, scale)
    if positives is not None and backend != "cpu":  # whose kernels check them
        positives, scale = _within(positives, q.shape[-2], k.shape[-2], exclude_self, scale)
    q3, k3 = _grouped(q), _grouped(k)
    if backend == "cpu":
        algorithm = "cpu"
    elif backend == "triton":
        algorithm = plan.choose("mi_bound" if symmetric else "infonce", q3, k3)
    if backend == "reference":
        losses = reference.infonce_losses(q3, k3, scale, positives, exclude_self, symmetric)
    elif algorithm == "eager":
        losses = reference.cross_entropies(q3, k3, scale, positives, exclude_self, symmetric)
    elif symmetric:
        losses = _SymmetricInfoNCE.apply(q3, k3, scale)
    elif backend == "cpu" and reduction != "none" and wants_grad:
        mean = _FusedInfoNCE.apply(q3, k3, scale, positives, exclude_self)
        result = mean * q.shape[-2] if reduction == "sum" else mean
        return result if q.dim() == 3 else result[0]
    else:
        gradients = "none"
        if wants_grad and algorithm == "fused":
            gradients = "rows"
        elif wants_grad and algorithm == "chunked" and reduction != "none":
            gradients = "both"
        return _InfoNCE.apply(q, k, scale, positives, exclude_self, algorithm, gradients, reduction)
    return _reduced(losses if q.dim() == 3 else losses[0], reduction)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.mean(-1) if reduction == "mean" else losses.sum(-1)


def _own_negatives(q: Tensor, k: Tensor, negatives: Tensor, temperature: float | Tensor) -> Tensor:
    """Losses [B] or [G, B] of every row with its own negatives [B, n, d] or [G, B, n, d]: B (1 + n) scores in all."""
    if k.shape != q.shape or negatives.shape[:-2] != q.shape[:-1] or negatives.shape[-1] != q.shape[-1]:
        found = f"q {list(q.shape)}, k {list(k.shape)} and negatives {list(negatives.shape)}"
        raise EstimatorError("infonce", found, "[B, d], [B, d] and [B, n, d]", "Give every row one positive, n others.")
    exact = exact_type("infonce", q, k, negatives)
    q, k, scale = _prepare("infonce", q, k, temperature)
    with torch.autocast(q.device.type, enabled=False):
        # sums, not matrix products: those may be of tf32 on a GPU
        q, keys = q.to(exact), torch.cat([k.to(exact)[..., None, :], negatives.to(exact)], -2)
        scores = scale * (q[..., None, :] * keys).sum(-1)
        first = torch.zeros(q.shape[-2], dtype=torch.int64, device=q.device)
        return reference.infonce_of_scores(scores, positives=first)


def _within(positives: Tensor, rows: int, columns: int, exclude_self: bool, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Positives that are in range, and a scale of NaN where they were not. Where they can be seen they are refused."""
    if looks_at(positives):
        reference.check_positives(positives, columns, exclude_self)
        return positives, scale
    inside = positives.clamp(0, columns - 1)
    right = inside == positives
    if exclude_self:
        right = right & (positives != torch.arange(rows, device=positives.device))
    return inside, torch.where(right.all(), scale, math.nan)


def mi_lower_bound(
    scores_or_q: Tensor,
    k: Tensor | None = None,
    *,
    bound: str = "infonce",
    log_baseline: Tensor | None = None,
    alpha: float = 0.01,
    smile_tau: float = 5.0,
    temperature: float | Tensor = 1.0,
    log_ema: Tensor | None = None,
    ema_rate: float = 0.01,
) -> Tensor | tuple[Tensor, Tensor]:
    """A bound on I(X;Y) from a batch, to be maximised; its gradient is that of `reference.bound_value`'s surrogate.

    Args:
        scores_or_q: scores [B, B] or [G, B, B] with scores[i, j] = f(x_j, y_i); or embeddings of y, [B, d] or
            [G, B, d], and then `k` those of x, of the same shape: f(x_j, y_i) = q_i . k_j / temperature. B >= 2; G
            critics at once.
        bound: one of `BOUNDS`: infonce, dv, mine, tuba, nwj, js, js_fgan, smile, interpolate.
        log_baseline: log a(y_i), [B], [B, 1] or with groups before; 0 if None. `tuba` and `interpolate` use it.
        alpha: interpolate: weight in [0, 1] of the multi-sample baseline.
        smile_tau: smile: scores are clipped to ±tau in the partition function.
        temperature: of embeddings; as for `infonce`.
        log_ema: mine: 0-d or [G], log of the moving average of mean e^S before this batch, -inf to begin it. Without it
            mine has the gradient of dv.
        ema_rate: mine: weight of this batch in the moving average.

    Returns:
        0-d, or [G]: the bound in nats, fp32 (fp64 for fp64). With `log_ema`: that and the updated moving average, which
        is detached.

    Raises:
        EstimatorError: shapes, types or devices that do not fit, B < 2, an unknown bound, or numbers out of range.
    """
    where = f"bound {bound}"
    if bound not in BOUNDS:
        raise EstimatorError(where, "an unknown bound", f"one of {', '.join(BOUNDS)}", "Choose one of these.")
    exact_type(where, scores_or_q, k, log_baseline, log_ema)
    check_settings(where, alpha, smile_tau, ema_rate)
    grouped = scores_or_q.dim() == 3
    if k is None:
        scores = full_precision(scores_or_q if grouped else scores_or_q[None])
        if scores.dim() != 3 or scores.shape[1] != scores.shape[2]:
            raise EstimatorError(where, f"scores {list(scores_or_q.shape)}", "[B, B] or [G, B, B]", "Score all pairs.")
        groups, count, _ = scores.shape
    else:
        q, k, scale = _prepare(where, scores_or_q, k, temperature)
        q, k = _grouped(q), _grouped(k)
        groups, count, _ = q.shape
        if k.shape != q.shape:
            expected = "as many rows in both"
            raise EstimatorError(where, f"{count} rows and {k.shape[1]}", expected, "Give x and y of the same samples.")
    if count < 2:
        raise EstimatorError(where, f"a batch of {count}", "at least 2 samples", "Drop the last short batch.")
    first = scores if k is None else q
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    a = None
    if log_baseline is not None and bound in ("tuba", "interpolate"):
        shapes = [(count,), (count, 1)] if not grouped else [(groups, count), (groups, count, 1)]
        if tuple(log_baseline.shape) not in shapes:
            raise EstimatorError(where, f"log_baseline {list(log_baseline.shape)}", f"{list(shapes[1])}", "One a row.")
        a = log_baseline.reshape(groups, count).to(dtype)
    ema = torch.full((groups,), -math.inf, dtype=dtype, device=first.device)
    if log_ema is not None:
        if tuple(log_ema.shape) not in ((), (1,), (groups,)):
            expected = "one value" if groups == 1 else f"one value, or [{groups}]"
            raise EstimatorError(where, f"log_ema {list(log_ema.shape)}", expected, "Give one a critic.")
        ema = log_ema.detach().to(dtype).expand(groups).contiguous()

    backend = _backend(first)
    settings = (bound, float(alpha), float(smile_tau), 1.0 if log_ema is None else float(ema_rate))
    eager = backend == "triton" and k is not None and bound != "infonce" and plan.choose("mi_bound", q, k) == "eager"
    if backend == "reference" or eager:
        if k is not None:
            scores = reference.embedding_scores(q, k, scale)
        value, ema = reference.grouped_bound(scores, a, ema, *settings)
    elif k is None:
        value, ema = _ScoreBound.apply(scores, a, ema, *settings)
    elif bound == "infonce":
        loss = _infonce(q, k, scale, None, False, False, "mean")
        value = log_size(count, loss) - loss
    else:
        fused = bound != "interpolate" and _wants_grad(q, k, scale, a) and backend == "cpu"
        value, ema = _Bound.apply(q, k, scale, a, ema, *settings, fused)
    if not grouped:
        value, ema = value[0], ema[0]
    return value if log_ema is None else (value, ema.detach())


class _InfoNCE(torch.autograd.Function):
    """Losses of q [B, d] or [G, B, d], reduced; state is O(B).

    `gradients` says what the forward pass finds beside the losses, in fp32: "both" dq and dk of their sum, where one
    factor will turn these into the gradients; "rows" dq only, whose rows have factors of their own; or "none".
    """

    @staticmethod
    def forward(ctx, q, k, scale, positives, exclude_self, algorithm, gradients, reduction):
        ctx.settings = exclude_self, gradients, reduction
        losses, state, dq, dk = call(
            "mi_infonce", _grouped(q), _grouped(k), scale, positives, exclude_self, algorithm, gradients
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
            arguments = (_grouped(q), _grouped(k), scale, positives, exclude_self, weight, state)
            if gradients == "rows":
                dq, dk = _times(dq, grad, q), call("mi_infonce_keys", *arguments)
            else:
                dq, dk = call("mi_infonce_gradients", *arguments)
        scale_grad = _scale_grad(ctx, q, dq.view_as(q), scale)
        return dq.view_as(q), dk.view_as(k), scale_grad, None, None, None, None, None


class _SymmetricInfoNCE(torch.autograd.Function):
    """Mean of the losses of every row and of every column, [G, B]; the backward recomputes the scores."""

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


class _FusedInfoNCE(torch.autograd.Function):
    """Mean loss of every group; the forward computes the gradient's sums too, from the scores it has at hand."""

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


class _Bound(torch.autograd.Function):
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
            log_weight = shift = None
            if done.shift is not None:
                # relative to the row's own log-sum-exp, e^(S - shift) is at most 1 and fits into 16 bits
                shift = rest.clamp(min=torch.finfo(rest.dtype).min)
                log_weight = shift - done.shift
            ctx.save_for_backward(q, k, scale, a, done.constant, log_weight, shift, done.diagonal, done.baseline)
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


class _ScoreBound(torch.autograd.Function):
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
        ctx.save_for_backward(scores, a, done.constant, done.shift, done.diagonal, done.baseline)
        return done.value, done.log_ema.clone()

    @staticmethod
    @differentiable_once("mi_lower_bound")
    def backward(ctx, grad, _):
        scores, a, *state = ctx.saved_tensors
        if ctx.bound == "interpolate":
            rest, weight, grad_a = state
            gradient = call("mi_score_mixture_gradients", scores, a, ctx.alpha, rest, weight, grad)
        else:
            constant, shift, diagonal, grad_a = state
            weight = grad if shift is not None else grad * (-constant).exp()
            weight = weight[:, None].expand_as(diagonal).contiguous()
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
    """dV / dscale = sum over ij of dS_ij S_ij / scale = sum over i of q_i . dq_i / scale; None where nobody asks."""
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
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    return torch.zeros(first.shape[:2], dtype=dtype, device=first.device)


def _normalise(x: Tensor) -> Tensor:
    """Rows of length 1. A row of zeros has no direction: it stays zero and gets no gradient, where
    `torch.nn.functional.normalize` alone would give it one of 1e12 (infinite in fp16)."""
    x = full_precision(x)
    return torch.where(x.eq(0).all(-1, keepdim=True), 0.0, torch.nn.functional.normalize(x, dim=-1))


def _prepare(where: str, q: Tensor, k: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, d] or [G, B, d] and k of one dtype, and the scale of their products."""
    if 0 in q.shape:
        raise EstimatorError(where, f"embeddings {list(q.shape)}", "rows and columns", "Leave out empty batches.")
    if q.dim() not in (2, 3) or k.dim() != q.dim() or q.shape[-1] != k.shape[-1] or q.shape[:-2] != k.shape[:-2]:
        raise _shapes(where, q, k, "[B, d] and [M, d], or [G, B, d] and [G, M, d]")
    exact, dtype = exact_type(where, q, k), torch.promote_types(q.dtype, k.dtype)
    # products of 16-bit embeddings are exact in fp32; the CPU has nothing to gain from 16 bits
    dtype = exact if q.device.type == "cpu" and not interpreting() else dtype
    return q.to(dtype), k.to(dtype), _scale(where, temperature, q.device, exact)


def _scale(where: str, temperature: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """1 / temperature, 0-d. NaN where a tensor that is not looked at holds no positive number."""
    seen = check_temperature(where, temperature, device)
    if not isinstance(temperature, Tensor):
        return torch.full((), 1 / float(temperature), dtype=dtype, device=device)
    temperature = temperature.reshape(()).to(device=device, dtype=dtype)
    if not seen:
        positive = (temperature > 0) & (temperature < math.inf)
        temperature = torch.where(positive, temperature, math.nan)
    return 1 / temperature


def _grouped(x: Tensor) -> Tensor:
    """[G, B, d], of one group if there are none."""
    return x if x.dim() == 3 else x.unsqueeze(0)


def check_temperature(where: str, temperature: float | Tensor, device: torch.device | None = None) -> bool:
    """Refuse what is not one positive number. False if the value was not looked at: on a GPU, or in a graph.

    Args:
        device: of the embeddings; a tensor has to be there, or on the CPU. None: anywhere.
    """
    if isinstance(temperature, Tensor):
        real = not (temperature.is_complex() or temperature.dtype == torch.bool)
        near = device is None or temperature.device.type == "cpu" or temperature.device == device
        if temperature.numel() == 1 and real and near:
            if not looks_at(temperature):
                return False
            if 0 < temperature.item() < math.inf:
                return True
            found = repr(temperature.item())
        else:
            found = f"{temperature.dtype} {list(temperature.shape)} on {temperature.device}"
    elif isinstance(temperature, Real) and not isinstance(temperature, bool) and 0 < temperature < math.inf:
        return True
    else:
        found = repr(temperature)
    near = "" if device is None or device.type == "cpu" else f", on the CPU or on {device}"
    raise EstimatorError(where, f"temperature {found}", f"one positive number{near}", "Give one such as 0.07.")


def _shapes(where: str, q: Tensor, k: Tensor, expected: str) -> EstimatorError:
    return EstimatorError(where, f"{list(q.shape)} and {list(k.shape)}", expected, "Check the embeddings.")


def _backend(first: Tensor) -> str:
    backend = backend_for(first, "mi_statistics")
    # the Triton kernels accumulate in fp32
    return "reference" if backend == "triton" and first.dtype == torch.float64 else backend


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _like(tensor: Tensor, *shape: int) -> Tensor:
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.new_empty(shape, dtype=dtype)


def _fake_statistics(q, k, scale, positives, exclude_self, kind, tau):
    return _like(q, *q.shape[:2]), _like(q, *q.shape[:2])


def _fake_infonce(q, k, scale, positives, exclude_self, algorithm, gradients):
    dq = q.shape if gradients in ("rows", "both") else (0,)
    dk = k.shape if gradients == "both" else (0,)
    return _like(q, *q.shape[:2]), _like(q, 4, *q.shape[:2]), _like(q, *dq), _like(k, *dk)


def _fake_gradients(q, k, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_fused(q, k, *rest):
    rows = q.shape[:2]
    return _like(q, *rows), _like(q, *rows), _like(q, q.shape[0]), _like(q, *q.shape), _like(k, *k.shape)


def _fake_mixture(first, *rest):
    return tuple(_like(first, *first.shape[:2]) for _ in range(4))


# Launches: kernels that a call of the GPU's host function launches; see plan.py.
_FOLDER = "engine.kernels.mi_bounds"


def _register(name: str, function: str, schema: str, fake, cuda: str | None, launches) -> None:
    register(
        name,
        schema,
        cpu=lazy(f"{_FOLDER}.cpu", function),
        cuda=None if cuda is None else lazy(f"{_FOLDER}.{cuda}", function),
        fake=fake,
        launches=launches,
    )


_PAIR = "Tensor q, Tensor k, Tensor scale"
_SOURCE = f"{_PAIR}, Tensor? positives, bool exclude_self"
_register(
    "mi_infonce",
    "infonce",
    f"({_SOURCE}, str algorithm, str gradients) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_infonce,
    "cuda",
    plan.infonce_launches,
)
_register(
    "mi_infonce_keys",
    "infonce_keys",
    f"({_SOURCE}, Tensor weight, Tensor state) -> Tensor",
    lambda q, k, *rest: k.new_empty(k.shape),
    "cuda",
    plan.infonce_keys_launches,
)
_register(
    "mi_infonce_gradients",
    "infonce_gradients",
    f"({_SOURCE}, Tensor weight, Tensor state) -> (Tensor, Tensor)",
    _fake_gradients,
    "cuda",
    plan.infonce_gradients_launches,
)
_register(
    "mi_symmetric_statistics",
    "symmetric_statistics",
    f"({_PAIR}) -> (Tensor, Tensor, Tensor)",
    lambda q, k, scale: tuple(_like(q, *q.shape[:2]) for _ in range(3)),
    "cuda",
    plan.symmetric_launches,
)
_register(
    "mi_statistics",
    "statistics",
    f"({_SOURCE}, str kind, float tau) -> (Tensor, Tensor)",
    _fake_statistics,
    "cuda",
    plan.statistics_launches,
)
_register(
    "mi_gradients",
    "gradients",
    f"({_SOURCE}, Tensor row_weight, Tensor? row_shift, Tensor? col_weight, Tensor? col_shift, Tensor diagonal)"
    " -> (Tensor, Tensor)",
    _fake_gradients,
    "cuda",
    plan.gradients_launches,
)
# one GPU program that owns all rows of a group would not fit in its registers; mi_infonce does there what this does
_register(
    "mi_fused",
    "fused",
    f"({_SOURCE}, str kind, float tau, str weighting, Tensor? offset) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_fused,
    None,
    1,
)
_register(
    "mi_mixture",
    "mixture",
    f"({_PAIR}, Tensor log_baseline, float alpha) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_mixture,
    "chunked",
    plan.mixture_launches,
)
_register(
    "mi_mixture_gradients",
    "mixture_gradients",
    f"({_PAIR}, Tensor log_baseline, float alpha, Tensor rest, Tensor weight, Tensor grad) -> (Tensor, Tensor)",
    _fake_gradients,
    "chunked",
    plan.mixture_gradient_launches,
)
_register(
    "mi_score_statistics",
    "score_statistics",
    "(Tensor scores, str kind, float tau) -> (Tensor, Tensor)",
    lambda scores, kind, tau: (_like(scores, *scores.shape[:2]), _like(scores, *scores.shape[:2])),
    "scores",
    1,
)
_register(
    "mi_score_gradients",
    "score_gradients",
    "(Tensor scores, Tensor row_weight, Tensor? row_shift, Tensor diagonal) -> Tensor",
    lambda scores, *rest: scores.new_empty(scores.shape),
    "scores",
    1,
)
_register(
    "mi_score_mixture",
    "score_mixture",
    "(Tensor scores, Tensor log_baseline, float alpha) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_mixture,
    "scores",
    1,
)
_register(
    "mi_score_mixture_gradients",
    "score_mixture_gradients",
    "(Tensor scores, Tensor log_baseline, float alpha, Tensor rest, Tensor weight, Tensor grad) -> Tensor",
    lambda scores, *rest: scores.new_empty(scores.shape),
    "scores",
    3,
)


def _work(operation: str):
    """What dispatch.measure times."""

    def prepare(device: torch.device, dtype: torch.dtype, sizes) -> Callable[[], None]:
        generator = torch.Generator(device).manual_seed(0)
        shape = sizes["groups"], sizes["rows"], sizes["width"]
        q = torch.randn(shape, generator=generator, device=device)
        k = (q + torch.randn(shape, generator=generator, device=device)) / math.sqrt(2)
        q, k = ((sizes["width"] ** -0.25 * x).to(dtype).requires_grad_() for x in (q, k))

        def run() -> None:
            result = infonce(q, k) if operation == "infonce" else mi_lower_bound(q, k, bound="dv")
            torch.autograd.grad(result.sum(), (q, k))

        return run

    return prepare


for _operation in ("infonce", "mi_bound"):
    dispatch.register(_operation, plan.ORDER, plan.CANDIDATES, plan.rule, work=_work(_operation), classes=plan.CLASSES)
