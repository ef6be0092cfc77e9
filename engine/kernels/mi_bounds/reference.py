"""The nine variational bounds of mutual information as functions of a score matrix, in plain torch.

Notation, everywhere: `scores[i, j] = f(x_j, y_i)`, so that rows are y and columns are x. The diagonal holds the joint
samples. The M = B (B - 1) other pairs stand for the product of the marginals. D_i = scores[i, i], R_i = LSE over j != i
of scores[i, j], a_i = log a(y_i). All values are in nats. The arithmetic is fp32 (fp64 for fp64 scores), also under
autocast, and takes exponentials of differences only. InfoNCE has one definition for all its forms, `infonce_of_scores`.

Sources: Barber & Agakov 2003 and Poole et al. 2019 (TUBA, NWJ, InfoNCE, interpolated), Donsker & Varadhan 1983 (DV),
Belghazi et al. 2018 (MINE), Nowozin et al. 2016 (f-GAN JS), Song & Ermon 2020 (SMILE).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from engine.errors import EstimatorError
from engine.kernels.arguments import check_number, exact_type
from engine.vocabulary import BOUNDS

MOST_OF_ONE = 0.75
"""The most that the softmax probability of a score can be that is not its row's largest: 1/2, and room for rounding.

Without this limit, large scores that are nearly equal would get the probability 1. The log-sum-exp of the others would
then have no digits left.
"""


def bound_value(
    scores: Tensor,
    bound: str,
    log_baseline: Tensor | None = None,
    *,
    alpha: float = 0.01,
    smile_tau: float = 5.0,
    log_ema: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One bound on I(X;Y) from one batch of scores.

    >>> bound_value(100 * torch.eye(4), "infonce")[0]  # log 4, the ceiling
    tensor(1.3863)

    Args:
        scores: [B, B], `scores[i, j] = f(x_j, y_i)`, B >= 2.
        bound: one of `BOUNDS`.
        log_baseline: [B, 1], log a(y_i); zero if None. Used by `tuba` and `interpolate` only.
        alpha: interpolate: weight in [0, 1] of the multi-sample baseline (1: InfoNCE-like, 0: TUBA).
        smile_tau: smile: scores are clipped to +-tau in the partition function.
        log_ema: mine: 0-d, log of the moving average of mean e^S, this batch included (`update_log_ema`).
            None takes this batch alone, which gives the gradient of DV.

    Returns:
        `(value, surrogate)`, 0-d, in nats, numerically equal. `value` is detached. `surrogate` is to be increased. Its
        gradient is the bound's own, except for `js` and `smile` (that of `js_fgan`) and `mine` (the moving average
        normalises the marginal weights).

    Raises:
        EstimatorError: scores not [B, B] with B >= 2, a log-baseline not [B, 1], types or devices that do not fit, an
            unknown bound, or a setting out of range.
    """
    _check(scores, bound, log_baseline)
    check_settings(f"bound {bound}", alpha, smile_tau)
    with torch.autocast(scores.device.type, enabled=False):
        scores = full_precision(scores)
        a = scores.new_zeros(len(scores)) if log_baseline is None else log_baseline[:, 0].to(scores.dtype)
        value, objective = _value_and_objective(scores, bound, a, alpha, smile_tau, log_ema)
        if objective is None:
            return value.detach(), value
        return value.detach(), value.detach() + (objective - objective.detach())


def _value_and_objective(
    scores: Tensor, bound: str, a: Tensor, alpha: float, smile_tau: float, log_ema: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A bound's value, and what is maximised in its place, if that is something else."""
    joint = scores.diagonal()
    count = len(scores)
    log_pairs = math.log(count * (count - 1))
    if bound == "infonce":
        return math.log(count) - infonce_of_scores(scores).mean(), None
    if bound == "dv" or (bound == "mine" and log_ema is None):
        return _dv(scores), None
    if bound == "mine":
        log_mean = _off(scores).logsumexp((0, 1)) - log_pairs
        return _dv(scores), joint.mean() - (log_mean - log_ema.to(scores.dtype)).exp()
    if bound == "tuba":
        return 1 + (joint - a).mean() - ((_row_lse(scores) - a).logsumexp(0) - log_pairs).exp(), None
    if bound == "nwj":
        return _nwj(scores), None
    if bound == "js_fgan":
        return _js_fgan(scores), None
    if bound == "js":
        # the JS critic tends to log r, NWJ's to 1 + log r: the value is NWJ's at 1 + f
        return _nwj(scores + 1), _js_fgan(scores)
    if bound == "smile":
        clipped = scores.clamp(-smile_tau, smile_tau)
        return joint.mean() - (_off(clipped).logsumexp((0, 1)) - log_pairs), _js_fgan(scores)
    return _interpolate(scores, a, alpha), None


def update_log_ema(log_ema: Tensor, scores: Tensor, rate: float) -> Tensor:
    """log of (1 - rate) e^log_ema + rate * mean over i != j of e^scores[i, j]; detached, 0-d.

    -inf stands for an average that has not started: the first batch then *is* the average. Because the average includes
    the current batch, MINE's marginal weight cannot exceed 1/rate.
    """
    check_number("bound mine", "ema_rate", rate, 0, 1, above=True)
    with torch.autocast(scores.device.type, enabled=False):
        scores = full_precision(scores.detach())
        count = len(scores)
        log_mean = _off(scores).logsumexp((0, 1)) - math.log(count * (count - 1))
        log_ema = log_ema.to(scores.dtype)
        if rate >= 1:
            return log_mean
        mixed = torch.logaddexp(log_ema + math.log1p(-rate), log_mean + math.log(rate))
        return torch.where(log_ema == -math.inf, log_mean, mixed)


def leave_one_out(scores: Tensor) -> Tensor:
    """LSE over l != j of scores[i, l], for every (i, j): [B, B] -> [B, B].

    For a column that is not the row's largest, e^(S_ij - LSE_i) <= 1/2, so LSE_i + log1p(-e^(S_ij - LSE_i)) loses no
    digits; for the largest the sum of the others is accumulated directly. The usual S + log(expm1(LSE - S)) has no
    digits left there, and is undefined once LSE rounds to S.
    """
    columns = torch.arange(scores.shape[1], device=scores.device)
    largest = columns == scores.argmax(1, keepdim=True)
    total = scores.logsumexp(1, keepdim=True)
    without_largest = scores.masked_fill(largest, -math.inf).logsumexp(1, keepdim=True)
    share = (scores - total).exp().masked_fill(largest, 0).clamp(max=MOST_OF_ONE)
    return torch.where(largest, without_largest, total + torch.log1p(-share))


def embedding_scores(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    """scale * q k^T, [G, B, d] and [G, M, d] -> [G, B, M]."""
    with torch.autocast(q.device.type, enabled=False):
        return scale * torch.matmul(full_precision(q), full_precision(k).transpose(1, 2))


def infonce_of_scores(scores: Tensor, positives: Tensor | None = None) -> Tensor:
    """InfoNCE loss of every row, -log softmax of its scores at its positive: [..., B, M] -> [..., B].

    softplus(R_i - D_i), where D_i is the positive's score and R_i the LSE of the others. Unlike LSE_i - D_i this form
    stays right for an infinite D_i.

    Args:
        positives: int64 [B], the column of each row's positive; by default the row's own number.
    """
    rows, columns = scores.shape[-2:]
    if positives is None:
        positives = torch.arange(rows, device=scores.device)
    is_positive = torch.arange(columns, device=scores.device) == positives[:, None]
    rest = scores.masked_fill(is_positive, -math.inf).logsumexp(-1)
    joint = scores.gather(-1, positives.expand(scores.shape[:-1])[..., None])[..., 0]
    return softplus(rest - joint)


def infonce_losses(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, symmetric: bool
) -> Tensor:
    """InfoNCE loss of every row of embeddings, [G, B]. Arguments as for `op.infonce`, with groups."""
    scores = embedding_scores(q, k, scale)
    if exclude_self:
        scores = scores.masked_fill(torch.eye(*scores.shape[1:], dtype=torch.bool, device=q.device), -math.inf)
    losses = infonce_of_scores(scores, positives)
    return (losses + infonce_of_scores(scores.mT)) / 2 if symmetric else losses


def check_positives(positives: Tensor, columns: int, exclude_self: bool) -> None:
    """Refuse positives, int64 [B] on the CPU, that are out of range or that `exclude_self` leaves out."""
    if not len(positives):
        return
    least, most = (int(v) for v in positives.aminmax())
    if least < 0 or most >= columns:
        found = f"positives from {least} to {most}"
        raise EstimatorError("infonce", found, f"0 to {columns - 1}", "Give columns of [k; negatives].")
    own = torch.nonzero(positives == torch.arange(len(positives))) if exclude_self else ()
    if len(own):
        found = f"row {own[0].item()} as its own positive"
        raise EstimatorError("infonce(exclude_self=True)", found, "another column", "Give the other view's column.")


def cross_entropies(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, symmetric: bool
) -> Tensor:
    """`infonce_losses` by torch's cross-entropy, in few kernels: for sizes where launches take most of the time."""
    groups, rows, _ = q.shape
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.matmul(scale * full_precision(q), full_precision(k).transpose(1, 2))
    if exclude_self:
        scores = scores.masked_fill(torch.eye(*scores.shape[1:], dtype=torch.bool, device=q.device), -math.inf)
    positives = torch.arange(rows, device=q.device) if positives is None else positives
    target = positives.expand(groups, rows).reshape(-1)
    losses = cross_entropy(scores.flatten(0, 1), target, reduction="none")
    if symmetric:
        losses = (losses + cross_entropy(scores.transpose(1, 2).flatten(0, 1), target, reduction="none")) / 2
    return losses.view(groups, rows)


def grouped_bound(
    scores: Tensor,
    log_baseline: Tensor | None,
    log_ema: Tensor,
    bound: str,
    alpha: float,
    smile_tau: float,
    ema_rate: float,
) -> tuple[Tensor, Tensor]:
    """`bound_value`'s surrogate for every group of scores [G, B, B], [G], and MINE's updated moving average, [G].

    log_baseline: [G, B]; log_ema: [G], before this batch.
    """
    values, averages = [], []
    for group, table in enumerate(scores):
        average = update_log_ema(log_ema[group], table, ema_rate) if bound == "mine" else log_ema[group]
        a = None if log_baseline is None else log_baseline[group][:, None]
        values.append(bound_value(table, bound, a, alpha=alpha, smile_tau=smile_tau, log_ema=average)[1])
        averages.append(average)
    return torch.stack(values), torch.stack(averages)


def full_precision(tensor: Tensor) -> Tensor:
    """fp32, or fp64 left as it is: scores of 16 bits leave no digits to a log-sum-exp."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_settings(where: str, alpha: float, smile_tau: float, ema_rate: float = 1.0) -> None:
    """Refuse settings of bounds that are out of range."""
    check_number(where, "alpha", alpha, 0, 1)
    check_number(where, "smile_tau", smile_tau, 0, above=True)
    check_number(where, "ema_rate", ema_rate, 0, 1, above=True)


def _check(scores: Tensor, bound: str, log_baseline: Tensor | None) -> None:
    where = f"bound {bound}"
    if bound not in BOUNDS:
        raise EstimatorError(where, "an unknown bound", f"one of {', '.join(BOUNDS)}", "Choose one of these.")
    exact_type(where, scores, log_baseline)
    if scores.dim() != 2 or scores.shape[0] != scores.shape[1]:
        raise EstimatorError(where, f"scores {list(scores.shape)}", "[B, B]", "Score every x against every y.")
    if len(scores) < 2:
        raise EstimatorError(
            where,
            f"a batch of {len(scores)}",
            "at least 2 samples: one alone has no product samples",
            'Drop the last short batch, or set on_degenerate="skip".',
        )
    if log_baseline is not None and log_baseline.shape != (len(scores), 1):
        raise EstimatorError(
            where,
            f"log_baseline {list(log_baseline.shape)}",
            f"[{len(scores)}, 1]",
            "Give one value per row of scores.",
        )


def _off(scores: Tensor) -> Tensor:
    """Scores with a diagonal of -inf: a fill, not a subtraction, so that an infinite diagonal gives no NaN."""
    eye = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    return scores.masked_fill(eye, -math.inf)


def _row_lse(scores: Tensor) -> Tensor:
    """R_i, [B]."""
    return _off(scores).logsumexp(1)


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0 else -math.inf


def _dv(scores: Tensor) -> Tensor:
    count = len(scores)
    return scores.diagonal().mean() - (_off(scores).logsumexp((0, 1)) - math.log(count * (count - 1)))


def _nwj(scores: Tensor) -> Tensor:
    count = len(scores)
    return scores.diagonal().mean() - (_off(scores).logsumexp((0, 1)) - 1 - math.log(count * (count - 1))).exp()


def _js_fgan(scores: Tensor) -> Tensor:
    count = len(scores)
    return -softplus(-scores.diagonal()).mean() - softplus(_off(scores)).sum() / (count * (count - 1))


def _interpolate(scores: Tensor, a: Tensor, alpha: float) -> Tensor:
    """1 + mean D - mean over i != j of A_ij - marg (Poole et al. 2019, eq. 14), both terms in bounded form.

    L_ij = log of the mean of e^S_il over l != j, A_ij = logaddexp(log alpha + L_ij, log(1 - alpha) + a_i). The marginal
    term summed over the columns of row i has the factor (B - 1) e^(L_ii), so that
    marg = mean_i 1 / (alpha + (1 - alpha) e^(a_i - L_ii)), at most 1/alpha.
    """
    count = len(scores)
    joint = scores.diagonal()
    eye = torch.eye(count, dtype=torch.bool, device=scores.device)
    # rows relative to their joint score: D_i - A_ij is then small numbers, even where D_i is huge or infinite
    shifted = (scores.masked_fill(eye, 0) - joint[:, None]).masked_fill(eye, 0)
    loo = leave_one_out(shifted) - math.log(count - 1)
    excess = torch.logaddexp(_log(alpha) + loo, (_log(1 - alpha) + a - joint)[:, None]).masked_fill(eye, 0)
    log_mean = _row_lse(scores) - math.log(count - 1)
    log_marginal = -torch.logaddexp(torch.full_like(a, _log(alpha)), _log(1 - alpha) + a - log_mean)
    return 1 - excess.sum() / (count * (count - 1)) - log_marginal.exp().mean()
