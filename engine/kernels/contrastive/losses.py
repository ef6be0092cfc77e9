"""From statistics of the rows to the losses of the rows, in plain torch, which autograd differentiates.

All are [G, B]. P are a row's positives, N its negatives, S the scores.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


class Options(NamedTuple):
    """What the loss of a row is.

    Attributes:
        decoupled: Leave the positives out of the denominator.
        hardness: Negatives are weighted in proportion to e^(hardness * S); 0: alike.
        smoothing: The share of the target that is spread over all keys that take part.
    """

    decoupled: bool = False
    hardness: float = 0.0
    smoothing: float = 0.0


class Statistics(NamedTuple):
    """Statistics of rows.

    Attributes:
        positives: LSE of S over P; -inf without any.
        spread: This less the mean of S over P; 0 without any.
        negatives: LSE of (1 + hardness) S over N; -inf without any.
        weights: LSE of hardness * S over N; unused without hardness.
        total: Sum of S over N; unused without smoothing.
        positive_count, negative_count: How many.
    """

    positives: Tensor
    spread: Tensor
    negatives: Tensor
    weights: Tensor
    total: Tensor
    positive_count: Tensor
    negative_count: Tensor


# Rows of what `contrastive_statistics` returns.
POSITIVES, SPREAD, NEGATIVES, WEIGHTS, TOTAL, POSITIVE_COUNT, NEGATIVE_COUNT = range(7)
ROWS = 7


def losses(statistics: Statistics, options: Options) -> tuple[Tensor, Tensor]:
    """Losses of rows, and which rows have one.

    The mean over P of -log(e^S_p / (sum over P of e^S + Z)), where Z = sum over N of e^S. With hardness, Z is |N| times
    the mean of e^S with weights e^(hardness * S). A row without positives has the loss 0, and so has a row without
    negatives if these are the whole denominator.
    """
    has = statistics.positive_count > 0
    if options.decoupled:
        has = has & (statistics.negative_count > 0)
    # what stands in for a missing row keeps gradients free of NaN
    positives = torch.where(has, statistics.positives, 0.0)
    spread = torch.where(has, statistics.spread, 0.0)
    log_z = _log_denominator(statistics, options)
    if options.decoupled:
        found = torch.where(has, log_z, 0.0) - positives + spread
    else:
        # this form keeps its digits where the loss is small
        found = spread + softplus(log_z - positives)
    if options.smoothing:
        mean = positives - spread
        count = (statistics.positive_count + statistics.negative_count).clamp(min=1)
        others = statistics.total - statistics.negative_count * mean
        found = found - options.smoothing * others / count
    return torch.where(has, found, 0.0), has


def gradients(statistics: Statistics, options: Options) -> Statistics:
    """Derivatives of each row's loss with respect to its statistics, as autograd takes them of `losses`."""
    found, has = losses(statistics, options)
    one = has.to(found.dtype)
    if options.decoupled:
        of_z, of_positives = one, -one
    else:
        of_z = one * torch.sigmoid(_log_denominator(statistics, options) - torch.where(has, statistics.positives, 0.0))
        of_positives = -of_z
    of_spread, zero = one, torch.zeros_like(one)
    of_total = zero
    if options.smoothing:
        count = statistics.positive_count + statistics.negative_count
        of_total = one * -options.smoothing / count.clamp(min=1)
        # of the positives' mean, which is `positives` less `spread`
        of_positives = of_positives - of_total * statistics.negative_count
        of_spread = of_spread + of_total * statistics.negative_count
    return Statistics(of_positives, of_spread, of_z, -of_z if options.hardness else zero, of_total, zero, zero)


def _log_denominator(statistics: Statistics, options: Options) -> Tensor:
    """log Z; -inf without negatives."""
    if not options.hardness:
        return statistics.negatives
    has = statistics.negative_count > 0
    negatives, weights = (torch.where(has, x, 0.0) for x in (statistics.negatives, statistics.weights))
    found = negatives - weights + torch.where(has, statistics.negative_count, 1.0).log()
    return torch.where(has, found, -math.inf)


def with_more_negatives(
    statistics: Statistics, scores: Tensor, left_out: Tensor | None, options: Options
) -> Statistics:
    """The statistics with further negatives of each row, scores [G, B, n].

    Args:
        left_out: bool [B, n]; None: all count.
    """
    kept = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device) if left_out is None else ~left_out
    negatives = masked_lse((1 + options.hardness) * scores, kept, statistics.negatives)
    weights, total = statistics.weights, statistics.total
    if options.hardness:
        weights = masked_lse(options.hardness * scores, kept, weights)
    if options.smoothing:
        total = total + torch.where(kept, scores, 0.0).sum(-1)
    count = statistics.negative_count + kept.sum(-1)
    return statistics._replace(negatives=negatives, weights=weights, total=total, negative_count=count)


def masked_lse(scores: Tensor, kept: Tensor, first: Tensor | None = None) -> Tensor:
    """Log-sum-exp of the scores [..., n] that are kept and of `first` [...]; -inf, without a gradient, of none."""
    scores = torch.where(kept, scores, -math.inf)
    if first is not None:
        scores = torch.cat([first[..., None], scores], -1)
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], -math.inf)
    some = (scores != -math.inf).any(-1)  # NaN, too
    found = torch.where(some[..., None], scores, 0.0).logsumexp(-1)
    return torch.where(some, found, -math.inf)


def without_keys(groups: int, rows: int, like: Tensor) -> Statistics:
    """Statistics of no keys."""
    zero = like.new_zeros(groups, rows)
    none = zero - math.inf
    return Statistics(none, zero, none, none, zero, zero, zero)
