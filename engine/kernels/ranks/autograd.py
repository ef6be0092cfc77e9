"""The streamed rows as autograd.Functions. Scores are computed again in the backward pass, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from engine.kernels.gradients import differentiable_once
from engine.kernels.mi_bounds.statistics import SIGMOID_GRADIENT, finish, interpolated
from engine.kernels.ranks.streaming import AllRows, Block, Mixture, Scoring, Statistics, positive_scores

REMEDY = "Gather the embeddings yourself (engine.kernels.ranks.collectives) and call the operation without gather."

Coefficients = Callable[[Tensor, Block], Tensor]
"""The gradient of scores [G, b, c] of one block."""


@dataclass(frozen=True)
class BoundSettings:
    """A bound and its numbers; see `engine.kernels.mi_lower_bound`."""

    bound: str
    alpha: float = 0.01
    smile_tau: float = 5.0
    ema_rate: float = 1.0

    @property
    def kind(self) -> str:
        return {"js_fgan": "softplus", "smile": "clipped"}.get(self.bound, "lse")


class RowLosses(torch.autograd.Function):
    """InfoNCE's losses of this rank's rows, [G, b].

    Arguments: scoring, like [G, b], rows, columns, further columns or None, parameters of the scores.
    """

    @staticmethod
    def forward(ctx, scoring, like, rows, columns, more, *parameters):
        statistics = Statistics("lse", like)
        for scores, block in _scored(scoring, like, rows, columns, more, parameters):
            statistics.add(scores, block)
        joint, rest = statistics.joint, statistics.rest
        ctx.scoring = scoring
        ctx.save_for_backward(rows, columns, more, joint, rest, *parameters)
        return -logsigmoid(joint - rest)

    @staticmethod
    @differentiable_once("infonce", REMEDY)
    def backward(ctx, grad):
        rows, columns, more, joint, rest, *parameters = ctx.saved_tensors
        whole, share = torch.logaddexp(rest, joint)[..., None], torch.sigmoid(rest - joint)

        def coefficients(scores: Tensor, block: Block) -> Tensor:
            # no score is above its log-sum-exp, but for products that are rounded otherwise here
            others = block.only_others(grad[..., None] * (scores - whole).clamp(max=0).exp(), 0)
            return _with_positives(others, block, (-grad * share)[..., None])

        return _gradients(ctx, (rows, columns, more, parameters), grad, coefficients)


class SigmoidRowLosses(torch.autograd.Function):
    """The sigmoid losses of this rank's rows, [G, b]. Arguments: as for `RowLosses`."""

    @staticmethod
    def forward(ctx, scoring, like, rows, columns, more, *parameters):
        losses = torch.zeros_like(like)
        for scores, block in _scored(scoring, like, rows, columns, more, parameters):
            terms = _with_positives(block.only_others(softplus(scores), 0), block, softplus(-scores))
            losses = losses + terms.sum(-1)
        ctx.scoring = scoring
        ctx.save_for_backward(rows, columns, more, *parameters)
        return losses

    @staticmethod
    @differentiable_once("siglip", REMEDY)
    def backward(ctx, grad):
        rows, columns, more, *parameters = ctx.saved_tensors

        def coefficients(scores: Tensor, block: Block) -> Tensor:
            others = block.only_others(torch.sigmoid(scores), 0)
            return grad[..., None] * _with_positives(others, block, -torch.sigmoid(-scores))

        return _gradients(ctx, (rows, columns, more, parameters), grad, coefficients)


class BoundOverRanks(torch.autograd.Function):
    """A bound of all ranks' rows, [G], and MINE's moving average, [G]. The same on every rank.

    Arguments: scoring, settings, log-baseline [G, b] or None, log_ema [G], like [G, b], and as for `RowLosses`.
    """

    @staticmethod
    def forward(ctx, scoring, settings, a, log_ema, like, rows, columns, more, *parameters):
        of_all = AllRows(scoring.ranks, scoring.total)
        arguments = scoring, like, rows, columns, more, parameters
        ctx.scoring, ctx.settings, ctx.has_baseline, ctx.mixture = scoring, settings, a is not None, None
        if settings.bound == "interpolate":
            a = torch.zeros_like(like) if a is None else a
            ctx.mixture = mixture = _mixture(arguments, a, settings.alpha)
            parts = mixture.joint, mixture.rest, mixture.excess, mixture.shares
            value, marginal, grad_a = interpolated(*parts, a, settings.alpha, of_all)
            log_ema, state = log_ema.clone(), (None, None, None, marginal, grad_a)
        else:
            statistics = Statistics(settings.kind, like, settings.smile_tau)
            for scores, block in _scored(*arguments):
                statistics.add(scores, block)
            joint, rest = statistics.joint, statistics.rest
            done = finish(settings.bound, joint, rest, a, log_ema, settings.ema_rate, of_all)
            shift = None if done.log_weight is None else rest.clamp(min=torch.finfo(rest.dtype).min)
            value, log_ema, state = done.value, done.log_ema.clone(), (
                done.constant, done.log_weight, shift, done.diagonal, done.baseline
            )  # fmt: skip
        ctx.save_for_backward(rows, columns, more, *state, *parameters)
        ctx.mark_non_differentiable(log_ema)
        return value, log_ema

    @staticmethod
    @differentiable_once("mi_lower_bound", REMEDY)
    def backward(ctx, grad, _):
        rows, columns, more, constant, log_weight, shift, diagonal, grad_a, *parameters = ctx.saved_tensors
        settings, scoring = ctx.settings, ctx.scoring
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=scoring.ranks.group)  # every rank's result is the same function of all rows
        factor = grad[:, None, None]

        def coefficients(scores: Tensor, block: Block) -> Tensor:
            if ctx.mixture is not None:
                return factor * ctx.mixture.gradient(scores, block, diagonal, scoring.total)
            if settings.bound in SIGMOID_GRADIENT:
                others = -(factor * (-constant).exp()[:, None, None]) * torch.sigmoid(scores)
            else:
                # as in `RowLosses`
                others = -factor * ((scores - shift[..., None]).clamp(max=0) + log_weight[..., None]).exp()
            return _with_positives(block.only_others(others, 0), block, (grad[:, None] * diagonal)[..., None])

        gradients = _gradients(ctx, (rows, columns, more, parameters), grad, coefficients, before=3)
        da = grad[:, None] * grad_a if ctx.has_baseline and grad_a is not None else None
        return gradients[0], None, da, None, *gradients[1:]


def _with_positives(others: Tensor, block: Block, of_positives: Tensor) -> Tensor:
    """`others` [G, b, c] with what stands for positives, [G, b, c], in their places."""
    return others if block.positive is None else torch.where(block.positive, of_positives, others)


def _scored(
    scoring: Scoring, like: Tensor, rows: Tensor, columns: Tensor, more: Tensor | None, parameters: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Block]]:
    for block in scoring.blocks(columns, more, len(like), (None, None)):
        yield scoring.score(rows, block.keys, parameters), block


def _mixture(arguments: tuple, a: Tensor, alpha: float) -> Mixture:
    scoring, like, rows, columns, _, parameters = arguments
    joint = torch.zeros_like(like)  # first, because everything else is taken relative to them
    for block in scoring.own_blocks(columns, len(like)):
        joint = positive_scores(scoring.score(rows, block.keys, parameters), block, joint)
    mixture = Mixture(joint, a, alpha, scoring.total)
    for scores, block in _scored(*arguments):
        mixture.add(scores, block)
    for scores, block in _scored(*arguments):
        mixture.add_again(scores, block)
    return mixture


def _gradients(ctx, tensors: tuple, grad: Tensor, coefficients: Coefficients, before: int = 0) -> tuple:
    """Gradients for the arguments of `RowLosses`: of rows, columns, further columns and parameters, where wanted.

    before: how many arguments `BoundOverRanks` has more before `like`.
    """
    rows, columns, more, parameters = tensors
    wanted = ctx.needs_input_grad[2 + before :]
    exact = [None if t is None else torch.promote_types(t.dtype, torch.float32) for t in (rows, columns, more)]
    sums = [
        torch.zeros_like(t, dtype=dtype, memory_format=torch.contiguous_format) if want else None
        for t, dtype, want in zip((rows, columns, more), exact, wanted, strict=False)
    ]
    of_parameters = [torch.zeros_like(p) if want else None for p, want in zip(parameters, wanted[3:], strict=True)]
    for block in ctx.scoring.blocks(columns, more, len(grad), (sums[1], sums[2])):
        places = [sums[0], block.gradient, *of_parameters]
        _add_gradients(ctx.scoring, block, (rows, block.keys, *parameters), places, coefficients)
    given = (rows, columns, more)
    of_tensors = [None if s is None else s.to(t.dtype) for s, t in zip(sums, given, strict=True)]
    return None, None, *of_tensors, *of_parameters


def _add_gradients(
    scoring: Scoring, block: Block, tensors: Sequence[Tensor], places: Sequence[Tensor | None],
    coefficients: Coefficients,
) -> None:  # fmt: skip
    """Add one block's gradients of rows, columns and parameters in their places; None for those that are not wanted."""
    if all(place is None for place in places):
        return
    leaves = [t.detach().requires_grad_(place is not None) for t, place in zip(tensors, places, strict=True)]
    with torch.enable_grad():
        scores = scoring.score(leaves[0], leaves[1], leaves[2:])
    used = [(leaf, place) for leaf, place in zip(leaves, places, strict=True) if place is not None]
    of_scores = coefficients(scores.detach(), block).to(scores.dtype)
    found = torch.autograd.grad(scores, [leaf for leaf, _ in used], of_scores, allow_unused=True)
    for (_, place), gradient in zip(used, found, strict=True):
        if gradient is not None:
            place += gradient
