"""The bounds from O(B) statistics of the score rows: what cpu.py and triton.py share.

For every bound but the interpolated one, the value needs D_i (the score of row i's positive) and one statistic R_i of
the row's other scores, and the gradient is, for every score that is not a positive,

    dV / dS_ij = -exp(S_ij - c_i)        infonce, dv, mine, nwj, tuba
    dV / dS_ij = -sigmoid(S_ij) / M      js, js_fgan, smile           M = B (B - 1)

with one c_i per row. These are the functions R, M -> value and R - c. Everything is in nats and vectorised over groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

SIGMOID_GRADIENT = ("js", "js_fgan", "smile")

# Rows of InfoNCE's state [4, G, B]: the positive's score, log-sum-exp of the other scores, of all, and 1 - the
# probability of the positive.
JOINT, REST, LSE, SHARE = range(4)


class Rows:
    """Sums over rows, [..., B] -> [...]: here over those of this process. `engine.kernels.ranks` sums over ranks."""

    @staticmethod
    def count(x: Tensor) -> int:
        return x.shape[-1]

    @staticmethod
    def mean(x: Tensor) -> Tensor:
        return x.mean(-1)

    @staticmethod
    def sum(x: Tensor) -> Tensor:
        return x.sum(-1)

    @staticmethod
    def logsumexp(x: Tensor) -> Tensor:
        return x.logsumexp(-1)


OWN_ROWS = Rows()


@dataclass
class Finish:
    """Value and gradient of one bound from its row statistics, for every group.

    Attributes:
        value: [G].
        log_ema: [G], MINE's moving average, this batch included; for the other bounds as it was given.
        constant: [G]; for a gradient that is a sigmoid, its weight is e^-constant.
        log_weight: [G, B], R_i - c_i: the gradients of row i's other scores add up to -e^(R_i - c_i). None where the
            gradient is a sigmoid. Not c_i, which is rounded where scores are large: near 1e8 by up to 4.
        diagonal: [G, B], dV / dS_ii.
        baseline: [G, B], dV / da_i; None where the bound has no log-baseline.
    """

    value: Tensor
    log_ema: Tensor
    constant: Tensor
    log_weight: Tensor | None
    diagonal: Tensor
    baseline: Tensor | None


def finish(
    bound: str, joint: Tensor, rest: Tensor, log_baseline: Tensor | None, log_ema: Tensor, ema_rate: float,
    rows: Rows = OWN_ROWS,
) -> Finish:  # fmt: skip
    """Value and gradient coefficients from row statistics.

    Args:
        bound: any but "interpolate".
        joint: [G, B], D_i.
        rest: [G, B]: for `js_fgan` the sum over j != i of softplus(S_ij), for `smile` the LSE of clipped scores, else
            the LSE R_i.
        log_baseline: [G, B] or None; used by `tuba`.
        log_ema: [G], MINE's moving average before this batch; -inf if it has not begun.
        ema_rate: weight of this batch in the average.
        rows: how sums over all rows are taken.
    """
    count = rows.count(joint)
    pairs = count * (count - 1)
    log_pairs = math.log(pairs)
    mean_joint = rows.mean(joint)
    baseline = None

    if bound in SIGMOID_GRADIENT:
        if bound == "js_fgan":
            value = -rows.mean(softplus(-joint)) - rows.sum(rest) / pairs
        elif bound == "js":
            # the JS critic tends to log r, NWJ's to 1 + log r: the value is NWJ's at 1 + f
            value = 1 + mean_joint - (rows.logsumexp(rest) - log_pairs).exp()
        else:
            value = mean_joint - (rows.logsumexp(rest) - log_pairs)
        return Finish(value, log_ema, torch.full_like(value, log_pairs), None, torch.sigmoid(-joint) / count, None)

    diagonal = torch.full_like(joint, 1 / count)
    if bound == "infonce":
        # D_i - logaddexp(R_i, D_i), in the form that keeps its digits where one of the two dominates
        value = math.log(count) + rows.mean(logsigmoid(joint - rest))
        constant = torch.full_like(value, math.log(count))
        log_weight = logsigmoid(rest - joint) - math.log(count)
        diagonal = torch.sigmoid(rest - joint) / count
    elif bound == "tuba":
        a = torch.zeros_like(joint) if log_baseline is None else log_baseline
        value = 1 + rows.mean(joint - a) - (rows.logsumexp(rest - a) - log_pairs).exp()
        constant = torch.full_like(value, log_pairs)
        log_weight = rest - a - log_pairs
        baseline = log_weight.exp() - 1 / count
    else:
        log_sum = rows.logsumexp(rest)
        if bound == "nwj":
            value = mean_joint - (log_sum - 1 - log_pairs).exp()
            constant = torch.full_like(log_sum, 1 + log_pairs)
        else:
            value = mean_joint - (log_sum - log_pairs)
            constant = log_sum
            if bound == "mine":
                log_ema = mix_ema(log_ema, log_sum - log_pairs, ema_rate)
                constant = log_pairs + log_ema
        log_weight = rest - constant[:, None]
    return Finish(value, log_ema, constant, log_weight, diagonal, baseline)


def mix_ema(log_ema: Tensor, log_mean: Tensor, rate: float) -> Tensor:
    """log of (1 - rate) e^log_ema + rate e^log_mean; log_mean where the average has not begun (-inf)."""
    if rate >= 1:
        return log_mean
    mixed = torch.logaddexp(log_ema + math.log1p(-rate), log_mean + math.log(rate))
    return torch.where(log_ema == -math.inf, log_mean, mixed)


def log_weights(alpha: float) -> tuple[float, float]:
    """log alpha and log(1 - alpha)."""
    return (math.log(alpha) if alpha > 0 else -math.inf), (math.log1p(-alpha) if alpha < 1 else -math.inf)


def interpolated(
    joint: Tensor, rest: Tensor, excess: Tensor, shares: Tensor, a: Tensor, alpha: float, rows: Rows = OWN_ROWS
) -> tuple[Tensor, Tensor, Tensor]:
    """The interpolated bound from its row statistics.

    Args:
        joint, rest: [G, B], D_i and R_i.
        excess: [G, B], sum over j != i of A_ij - D_i.
        shares: [G, B], sum over j != i of 1 - p_ij, the share of A_ij that comes from the log-baseline.
        a: [G, B], log-baseline.
        rows: how sums over all rows are taken.

    Returns:
        value [G]; log m_i + log(1 - p_ii) [G, B], the weight of row i in the marginal term; dV / da_i [G, B].
    """
    count = rows.count(joint)
    pairs = count * (count - 1)
    log_alpha, log_beta = log_weights(alpha)
    log_mean = rest - math.log(count - 1)
    log_m = log_mean - torch.logaddexp(log_alpha + log_mean, log_beta + a)
    # relative to the log-mean, so that alpha = 1 gives exactly 0
    log_marginal = -torch.logaddexp(torch.full_like(a, log_alpha), log_beta + a - log_mean)
    value = 1 - rows.sum(excess) / pairs - rows.mean(log_marginal.exp())
    weight = log_m + logsigmoid(-(log_alpha + log_mean - log_beta - a))
    return value, weight, weight.exp() / count - shares / pairs


def add_positives_(dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, positives: Tensor | None, diagonal: Tensor) -> None:
    """Add the positives' part: dq_i += diagonal_i k_pos(i), dk_pos(i) += diagonal_i q_i. Deterministic."""
    if positives is None:
        rows = q.shape[1]
        dq.addcmul_(diagonal[..., None], k[:, :rows])
        dk[:, :rows].addcmul_(diagonal[..., None], q)
    else:
        dq.addcmul_(diagonal[..., None], k.index_select(1, positives))
        dk.index_add_(1, positives, diagonal[..., None] * q)
