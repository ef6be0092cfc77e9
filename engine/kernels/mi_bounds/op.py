"""InfoNCE and lower bounds on mutual information as differentiable operations, streaming where there are embeddings.

    infonce(q, k)                       the contrastive loss of SimCLR, CLIP, MoCo and CPC; no [B, M] scores are kept
    mi_lower_bound(q, k, bound=...)     nine bounds, value and gradient, for many critics at once
    mi_lower_bound(scores, bound=...)   the same from scores that exist already

Memory is O(B d) and a bounded chunk of scores: 8 MiB on the CPU, at most 256 MiB on a GPU (`plan`). Where plain torch
was measured to be faster, all scores may be kept, up to 1 GiB. All statistics, sums and products accumulate in fp32
(fp64 for fp64 inputs), also under autocast. Embeddings of 16 bits are taken as they are, and their gradients have their
dtype. Every backend is bitwise deterministic. Gradients of gradients raise ConfigError, except by the reference.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.arguments import check_number, exact_type, wants_gradient
from engine.kernels.contrastive.autograd import CHUNK_BYTES, scores_of_own
from engine.kernels.contrastive.op import Given, Options, check_positives_type, check_reduction, extended_infonce
from engine.kernels.mi_bounds import autograd, plan, reference
from engine.kernels.mi_bounds.embeddings import grouped, normalised, positives_in_range, prepared, wrong_shapes
from engine.kernels.mi_bounds.reference import BOUNDS, check_settings, full_precision
from engine.kernels.registry import backend_for, log_size


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
    labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    mask: Tensor | None = None,
    row_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    in_batch: bool | None = None,
    decoupled: bool = False,
    hardness: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    gather: bool | str = False,
    group: Any = None,
    local_loss: bool = False,
) -> Tensor:
    """The InfoNCE loss, to be minimised: mean over i of -log softmax_j(q_i . k_j / temperature) at i's positive.

    With M keys, log M minus this loss is a lower bound on mutual information in nats, unless a later option changes the
    loss. SimCLR passes both views as q and as k, with `positives` and `exclude_self`. CLIP sets `symmetric` and
    `cosine` and learns the temperature. MoCo passes its queue as `negatives` and sets `in_batch=False`. Supervised
    contrastive learning gives `labels`.

    Args:
        q: Queries [B, d], or [G, B, d] for G losses at once. float16, bfloat16, float32 or float64.
        k: Keys [M, d] or [G, M, d], M >= B. Row i of k is the positive of row i of q; the others are its negatives.
        temperature: One positive number: a float, or a tensor of one element on the CPU or on q's device. A tensor
            receives its gradient. The host does not read a tensor on a GPU: if it is not positive, the loss is NaN.
        cosine: Scale q, k and negatives to length 1 first.
        symmetric: The mean of the losses of q against k and of k against q. Needs M = B, and none of `negatives`,
            `positives` and `exclude_self`.
        negatives: [M', d] or [G, M', d]: further keys for all rows, such as a queue. Or [B, n, d] or [G, B, n, d]: each
            row's own n negatives, which are then its only ones unless `in_batch=True`; k must have q's shape then.
            Negatives receive gradients if they need them.
        positives: int64 [B], the column of each row's positive in [k; negatives]. Default: the row's own number. A
            column out of range, or one that `exclude_self` leaves out, raises an error on the CPU and gives NaN on a
            GPU. Or int64 [B, P], several positives of each row, filled up with -1: the loss of a row is the mean over
            its positives (L_out), whose denominators hold all keys.
        exclude_self: Leave out column i for row i, for q and k that are the same samples.
        labels: int64 [B]. A row's positives are the keys of its label, in place of `positives`.
        key_labels: int64, the labels of the columns of [k; negatives]. Default: `labels`, where k is all and M = B.
        mask: bool. True: this key is no negative of this row; positives stay what they are. Its columns are those of
            [k; negatives], and with `in_batch=False` those of negatives; a row's own negatives come last.
        row_ids: int64 [B]. Keys of a row's id that are not its positives are left out: false negatives, without a
            [B, M] mask.
        key_ids: int64, the ids of the columns that all rows share. Default: `row_ids`, where k is all and M = B.
        in_batch: Whether the keys of the batch are negatives. False needs `negatives`: these alone are negatives, and
            row i of k is the positive. Default: True, or False where rows have their own negatives.
        decoupled: Leave the positives out of the denominator (decoupled contrastive learning). Can be negative.
        hardness: Weigh negatives in proportion to e^(hardness * score), their mean weight being 1; 0 weighs all alike.
            The gradient goes through the weights.
        label_smoothing: The share of the target, in [0, 1], that is spread evenly over all keys that take part.
        reduction: "mean", "sum" or "none". A row without a positive (or, decoupled, without a negative) has the loss 0,
            and the mean leaves it out. On the CPU the log says once how many there were, and a mean of none is an
            error; on a GPU it is NaN.
        gather: Of several processes, take the keys of all ranks: True gathers them, "ring" passes them around and never
            holds all. The loss is that of one process on the joined batch, rank 0's rows first, and gradients that are
            averaged over ranks (DDP) are its gradients. `negatives` that rows share are the same on every rank; a row's
            own stay with it. `positives` stay numbers in this rank's [k; negatives], and so do the columns of
            `key_labels` and `key_ids`. `mask` has this rank's rows and the columns of all ranks. With `in_batch=False`
            no keys are gathered. "none" gives the losses of this rank's rows. "ring" takes no labels, ids, mask,
            several positives, `decoupled`, `hardness` and `label_smoothing`, unless `in_batch=False`. A mistake of one
            rank is raised on all, in the others as an error that names the rank.
        group: The process group of `gather`; None for the default one.
        local_loss: With `gather`, the mean or sum over this rank's rows, against the keys of all ranks.

    Returns:
        The loss in nats: 0-d, or [G] for groups; for "none" [B] or [G, B]. float32 (float64 for float64 inputs).

    Raises:
        EstimatorError: Shapes, types, devices, indices or options that do not fit, or no rows.
        ConfigError: `gather` where WORLD_SIZE is above 1 and there is no process group.

    Source:
        van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018. Khosla et al.,
        Supervised Contrastive Learning, NeurIPS 2020 (labels). He et al., Momentum Contrast, CVPR 2020 (in_batch). Yeh
        et al., Decoupled Contrastive Learning, ECCV 2022. Robinson et al., Contrastive Learning with Hard Negative
        Samples, ICLR 2021 (hardness, without its debiasing).

    Example:
        >>> q = torch.eye(4)
        >>> float(infonce(q, q, temperature=0.1)) < 0.001  # every row is most like its own positive
        True
        >>> round(float(infonce(q, 0 * q)), 4)  # all scores are equal: log 4
        1.3863
        >>> round(float(infonce(q, q, labels=torch.tensor([0, 0, 1, 1]), exclude_self=True)), 4)  # log 3
        1.0986
    """
    if gather is not False or group is not None or local_loss:
        given = {
            "temperature": temperature, "cosine": cosine, "symmetric": symmetric, "negatives": negatives,
            "positives": positives, "exclude_self": exclude_self, "labels": labels, "key_labels": key_labels,
            "mask": mask, "row_ids": row_ids, "key_ids": key_ids, "in_batch": in_batch, "decoupled": decoupled,
            "hardness": hardness, "label_smoothing": label_smoothing, "reduction": reduction,
        }  # fmt: skip
        over_ranks = _infonce_over_ranks(q, k, gather, group, local_loss, given)
        if over_ranks is not None:
            return over_ranks
    check_reduction("infonce", reduction)
    exact_type("infonce", q, k, negatives, needed=2)
    check_positives_type("infonce", positives)
    if cosine:
        q, k, negatives = (None if x is None else normalised(x) for x in (q, k, negatives))
    given = Given(positives, labels, key_labels, mask, row_ids, key_ids, exclude_self)
    for name, number in (("hardness", hardness), ("label_smoothing", label_smoothing)):
        if isinstance(number, Tensor):
            check_number("infonce", name, number, 0)  # which refuses it
    options = Options(decoupled, hardness, label_smoothing)
    own = negatives is not None and negatives.dim() == q.dim() + 1
    several = positives is not None and positives.dim() == 2
    # by default the keys of the batch are negatives, unless rows have their own
    if several or in_batch is own or any(x is not None for x in given[1:-1]) or options != Options():
        return extended_infonce(q, k, negatives, temperature, given, in_batch, symmetric, options, reduction)
    if own:
        if symmetric or exclude_self or positives is not None:
            what = "symmetric, exclude_self or positives with negatives of each row's own"
            raise EstimatorError("infonce", what, "own negatives without these", "Leave out these options.")
        return _reduced(_losses_of_own_negatives(q, k, negatives, temperature), reduction)
    if negatives is not None:
        if negatives.dim() != k.dim() or negatives.shape[:-2] != k.shape[:-2] or negatives.shape[-1] != k.shape[-1]:
            raise wrong_shapes("infonce", negatives, k, "negatives with the width and groups of k")
        with torch.autocast(k.device.type, enabled=False):  # whose cat refuses the other type of 16 bits
            k = torch.cat([k, negatives], dim=-2)
    q, k, scale = prepared("infonce", q, k, temperature)
    _check_options(q, k, negatives is not None, positives, exclude_self, symmetric)
    return _infonce(q, k, scale, positives, exclude_self, symmetric, reduction)


def _infonce_over_ranks(
    q: Tensor, k: Tensor, gather: bool | str, group: Any, local_loss: bool, options: dict[str, Any]
) -> Tensor | None:
    """`infonce` of the joined batch; None if this process is alone."""
    from engine.kernels.ranks.group import ranks_of_loss
    from engine.kernels.ranks.infonce import infonce_over_ranks

    ranks = ranks_of_loss("infonce", gather, group, local_loss)
    return None if ranks is None else infonce_over_ranks(q, k, ranks, local_loss, options)


def _check_options(
    q: Tensor, k: Tensor, more_keys: bool, positives: Tensor | None, exclude_self: bool, symmetric: bool
) -> None:
    """Refuse options of `infonce` that do not fit the embeddings or each other."""
    rows, columns = q.shape[-2], k.shape[-2]
    plain = not more_keys and positives is None and not exclude_self
    if symmetric and not (plain and rows == columns):
        raise EstimatorError(
            "infonce(symmetric=True)",
            f"{rows} rows, {columns} keys" if plain else "negatives, positives or exclude_self",
            "as many keys as rows and nothing else",
            "Leave out what does not fit, or add the losses of both directions yourself.",
        )
    if positives is None and (columns < rows or exclude_self):
        what = "no positives" if exclude_self else f"{rows} rows of q, {columns} keys"
        raise EstimatorError("infonce", what, "a positive for every row", "Give `positives`.")
    if positives is not None and (
        positives.dtype != torch.int64 or positives.shape != (rows,) or positives.device != q.device
    ):
        what = f"positives {list(positives.shape)} of {positives.dtype} on {positives.device}"
        do = "Give one column of [k; negatives] per row."
        raise EstimatorError("infonce", what, f"int64 [{rows}] on {q.device}", do)


def _infonce(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, symmetric: bool, reduction: str
) -> Tensor:
    """`infonce` of prepared embeddings, by the backend and the algorithm that are to be taken."""
    backend, with_gradient = _backend(q), wants_gradient(q, k, scale)
    if positives is not None and backend != "cpu":  # the CPU kernels check them
        positives, scale = positives_in_range(positives, q.shape[-2], k.shape[-2], exclude_self, scale)
    q3, k3 = grouped(q), grouped(k)
    algorithm = backend
    if backend == "triton":
        algorithm = plan.choose("mi_bound" if symmetric else "infonce", q3, k3)
    if algorithm == "reference":
        losses = reference.infonce_losses(q3, k3, scale, positives, exclude_self, symmetric)
    elif algorithm == "eager":
        losses = reference.cross_entropies(q3, k3, scale, positives, exclude_self, symmetric)
    elif symmetric:
        losses = autograd.SymmetricInfoNCE.apply(q3, k3, scale)
    elif algorithm == "cpu" and reduction != "none" and with_gradient:
        mean = autograd.FusedInfoNCE.apply(q3, k3, scale, positives, exclude_self)
        result = mean * q.shape[-2] if reduction == "sum" else mean
        return result if q.dim() == 3 else result[0]
    else:
        gradients = "none"
        if with_gradient and algorithm == "fused":
            gradients = "rows"
        elif with_gradient and algorithm == "chunked" and reduction != "none":
            gradients = "both"
        return autograd.InfoNCE.apply(q, k, scale, positives, exclude_self, algorithm, gradients, reduction)
    return _reduced(losses if q.dim() == 3 else losses[0], reduction)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.mean(-1) if reduction == "mean" else losses.sum(-1)


def _losses_of_own_negatives(q: Tensor, k: Tensor, negatives: Tensor, temperature: float | Tensor) -> Tensor:
    """Losses [B] or [G, B] of rows with their own negatives [B, n, d] or [G, B, n, d]: B (1 + n) scores in all."""
    if k.shape != q.shape or negatives.shape[:-2] != q.shape[:-1] or negatives.shape[-1] != q.shape[-1]:
        what = f"q {list(q.shape)}, k {list(k.shape)} and negatives {list(negatives.shape)}"
        raise EstimatorError("infonce", what, "[B, d], [B, d] and [B, n, d]", "Give every row one positive, n others.")
    exact = exact_type("infonce", q, k, negatives)
    q, k, scale = prepared("infonce", q, k, temperature)
    with torch.autocast(q.device.type, enabled=False):
        if 4 * negatives.numel() > CHUNK_BYTES:
            # a few rows at a time, without copies of all negatives
            own = negatives if q.dim() == 3 else negatives[None]
            parts = [scores_of_own(grouped(q), keys) for keys in (grouped(k)[:, :, None], own)]
            scores = scale * torch.cat([part.to(exact) for part in parts], -1)
            scores = scores if q.dim() == 3 else scores[0]
        else:
            # sums, not matrix products, which may be tf32 on a GPU
            q, keys = q.to(exact), torch.cat([k.to(exact)[..., None, :], negatives.to(exact)], -2)
            scores = scale * (q[..., None, :] * keys).sum(-1)
        first = torch.zeros(q.shape[-2], dtype=torch.int64, device=q.device)
        return reference.infonce_of_scores(scores, positives=first)


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
    gather: bool | str = False,
    group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A lower bound on I(X;Y) from a batch, to be maximised, of one critic or of many at once.

    Its gradient is that of the surrogate of `engine.kernels.mi_bounds.reference.bound_value`, which for some bounds is
    not the gradient of the value.

    Args:
        scores_or_q: Scores [B, B] or [G, B, B] with scores[i, j] = f(x_j, y_i). Or embeddings of y, [B, d] or
            [G, B, d], together with `k`. B >= 2.
        k: Embeddings of x, of the same shape: f(x_j, y_i) = q_i . k_j / temperature.
        bound: infonce, dv, mine, tuba, nwj, js, js_fgan, smile or interpolate.
        log_baseline: log a(y_i), [B], [B, 1], or with groups before; None is 0. `tuba` and `interpolate` use it.
        alpha: For interpolate: weight of the multi-sample baseline, in [0, 1].
        smile_tau: For smile: scores are clipped to ±tau in the partition function.
        temperature: Of embeddings, as for `infonce`.
        log_ema: For mine: 0-d or [G], log of the moving average of mean e^S before this batch; -inf begins it. Without
            it mine has the gradient of dv.
        ema_rate: For mine: weight of this batch in the moving average, in (0, 1].
        gather: As for `infonce`: the bound of the joined batch of all ranks. Embeddings and `log_baseline` are this
            rank's; `log_ema` is the same on every rank. Scores are this rank's rows against the columns of all ranks in
            their order, [b, N] or [G, b, N].
        group: As for `infonce`.

    Returns:
        The bound in nats, 0-d or [G], float32 (float64 for float64 inputs). With `log_ema` a pair: the bound, and the
        updated moving average, which is detached.

    Raises:
        EstimatorError: Shapes, types or devices that do not fit, B < 2, an unknown bound, or numbers out of range.
        ConfigError: As for `infonce`.

    Source:
        Poole et al., On Variational Bounds of Mutual Information, ICML 2019; Song and Ermon, Understanding the
        Limitations of Variational Mutual Information Estimators, ICLR 2020 (smile); Belghazi et al., Mutual Information
        Neural Estimation, ICML 2018 (mine).

    Example:
        >>> scores = 5 * torch.eye(8)
        >>> round(float(mi_lower_bound(scores)), 4)  # at most log 8
        2.0334
        >>> round(float(mi_lower_bound(scores, bound="dv")), 4)
        5.0
    """
    where, settings = f"bound {bound}", (bound, alpha, smile_tau, ema_rate)
    if gather is not False or group is not None:
        over_ranks = _bound_over_ranks(scores_or_q, k, gather, group, settings, temperature, log_baseline, log_ema)
        if over_ranks is not None:
            return over_ranks[0] if log_ema is None else over_ranks
    settings = check_bound(where, settings, log_ema, scores_or_q, k, log_baseline)
    q = scale = None
    if k is None:
        first = scores = _square(where, scores_or_q)
    else:
        q, k, scale = prepared(where, scores_or_q, k, temperature)
        first, k = q, k = grouped(q), grouped(k)
        if k.shape != q.shape:
            what, expected = f"{q.shape[1]} rows and {k.shape[1]}", "as many rows in both"
            raise EstimatorError(where, what, expected, "Give x and y of the same samples.")
    if first.shape[1] < 2:
        what = f"a batch of {first.shape[1]}"
        raise EstimatorError(where, what, "at least 2 samples", "Drop the last short batch.")
    one = scores_or_q.dim() != 3
    a = _log_baseline(where, first, log_baseline, one) if bound in ("tuba", "interpolate") else None
    ema = _log_average(where, first, log_ema)
    if k is None:
        value, ema = _bound_of_scores(scores, a, ema, settings)
    else:
        value, ema = _bound_of_embeddings(q, k, scale, a, ema, settings)
    if one:
        value, ema = value[0], ema[0]
    return value if log_ema is None else (value, ema.detach())


def check_bound(where: str, settings: _Settings, log_ema: Tensor | None, *tensors: Tensor | None) -> _Settings:
    """The settings as floats; without an average a batch is all of it.

    Refuses an unknown bound, numbers out of range, and tensors of other types.
    """
    bound, *numbers = settings
    if bound not in BOUNDS:
        raise EstimatorError(where, "an unknown bound", f"one of {', '.join(BOUNDS)}", "Choose one of these.")
    exact_type(where, *tensors, log_ema)
    check_settings(where, *numbers)
    alpha, smile_tau, ema_rate = (float(number) for number in numbers)
    return bound, alpha, smile_tau, 1.0 if log_ema is None else ema_rate


def _bound_over_ranks(
    scores_or_q: Tensor, k: Tensor | None, gather: bool | str, group: Any, settings: _Settings,
    temperature: float | Tensor, log_baseline: Tensor | None, log_ema: Tensor | None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """The bound of the joined batch and MINE's average; None if this process is alone."""
    from engine.kernels.ranks.bounds import bound_over_ranks
    from engine.kernels.ranks.group import find_ranks

    ranks = find_ranks("mi_lower_bound", gather, group)
    if ranks is None:
        return None
    return bound_over_ranks(scores_or_q, k, ranks, settings, temperature, log_baseline, log_ema)


def _square(where: str, scores: Tensor) -> Tensor:
    """Scores [G, B, B] in full precision; [B, B] is one group."""
    scores = full_precision(scores)
    square = scores if scores.dim() == 3 else scores[None]
    if square.dim() != 3 or square.shape[1] != square.shape[2] or len(square) == 0:
        raise EstimatorError(where, f"scores {list(scores.shape)}", "[B, B] or [G, B, B]", "Score all pairs.")
    return square


def _log_baseline(where: str, first: Tensor, log_baseline: Tensor | None, one: bool) -> Tensor | None:
    """log a(y_i), [G, B]. `one`: the caller gave no first dimension of groups."""
    if log_baseline is None:
        return None
    groups, count = first.shape[:2]
    shapes = [(count,), (count, 1)] if one else [(groups, count), (groups, count, 1)]
    if tuple(log_baseline.shape) not in shapes:
        raise EstimatorError(
            where, f"log_baseline {list(log_baseline.shape)}", f"{list(shapes[1])}", "Give one value per row."
        )
    return log_baseline.reshape(groups, count).to(autograd.statistics_dtype(first))


def _log_average(where: str, first: Tensor, log_ema: Tensor | None) -> Tensor:
    """MINE's moving average before this batch, [G]; -inf if there is none."""
    groups, dtype = first.shape[0], autograd.statistics_dtype(first)
    if log_ema is None:
        return torch.full((groups,), -math.inf, dtype=dtype, device=first.device)
    if tuple(log_ema.shape) not in ((), (1,), (groups,)):
        expected = "one value" if groups == 1 else f"one value, or [{groups}]"
        raise EstimatorError(where, f"log_ema {list(log_ema.shape)}", expected, "Give one value per critic.")
    return log_ema.detach().to(dtype).expand(groups).contiguous()


# The bound's name, alpha, SMILE's tau and the rate of MINE's average.
_Settings = tuple[str, float, float, float]


def _bound_of_scores(scores: Tensor, a: Tensor | None, ema: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
    """The bound [G] and MINE's average [G] from scores [G, B, B]."""
    if _backend(scores) == "reference":
        return reference.grouped_bound(scores, a, ema, *settings)
    return autograd.ScoreBound.apply(scores, a, ema, *settings)


def _bound_of_embeddings(
    q: Tensor, k: Tensor, scale: Tensor, a: Tensor | None, ema: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor]:
    """The bound [G] and MINE's average [G] from embeddings [G, B, d]."""
    backend, bound = _backend(q), settings[0]
    eager = backend == "triton" and bound != "infonce" and plan.choose("mi_bound", q, k) == "eager"
    if backend == "reference" or eager:
        return reference.grouped_bound(reference.embedding_scores(q, k, scale), a, ema, *settings)
    if bound == "infonce":
        loss = _infonce(q, k, scale, None, False, False, "mean")
        return log_size(q.shape[1], loss) - loss, ema
    fused = bound != "interpolate" and wants_gradient(q, k, scale, a) and backend == "cpu"
    return autograd.Bound.apply(q, k, scale, a, ema, *settings, fused)


def _backend(first: Tensor) -> str:
    backend = backend_for(first, "mi_statistics")
    # the Triton kernels accumulate in fp32
    return "reference" if backend == "triton" and first.dtype == torch.float64 else backend
