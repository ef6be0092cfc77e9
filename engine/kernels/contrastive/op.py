"""Contrastive losses with the options of practice, streaming: memory is O(B d) and a bounded chunk of scores.

    infonce(q, k, labels=...)       the options of `engine.kernels.infonce` that its own fast path does not have
    siglip(q, k, temperature, bias) the sigmoid loss

The backends give a few statistics of every row and differentiate them (`autograd.RowStatistics`). Losses are formulas
of these numbers (`losses.py`). The reference takes the formulas over all scores.
"""

from __future__ import annotations

import logging
import math
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.arguments import check_number, exact_type, looks_at, wants_gradient
from engine.kernels.contrastive import autograd, plan, reference
from engine.kernels.contrastive.losses import Options, Statistics, losses, with_more_negatives, without_keys
from engine.kernels.contrastive.pairs import Pairs
from engine.kernels.mi_bounds.embeddings import (
    check_pair,
    check_temperature,
    grouped,
    normalised,
    prepared,
    wrong_shapes,
)
from engine.kernels.registry import backend_for, is_static

REDUCTIONS = ("mean", "sum", "none")

log = logging.getLogger("engine")
_told: set[str] = set()


class Given(NamedTuple):
    """Arguments of `infonce` and `siglip` that say which pairs are what, as they were given."""

    positives: Tensor | None = None
    labels: Tensor | None = None
    key_labels: Tensor | None = None
    mask: Tensor | None = None
    row_ids: Tensor | None = None
    key_ids: Tensor | None = None
    exclude_self: bool = False


class Keys(NamedTuple):
    """Embeddings with a first dimension of groups, in one dtype.

    Attributes:
        q: [G, B, d].
        shared: [G, M, d], keys of all rows, or None.
        own_positive: [G, B, d], each row's positive if it is not among the shared keys.
        own_negatives: [G, B, n, d], each row's own negatives, or None.
        scale: 0-d, 1 / temperature.
    """

    q: Tensor
    shared: Tensor | None
    own_positive: Tensor | None
    own_negatives: Tensor | None
    scale: Tensor


def extended_infonce(
    q: Tensor, k: Tensor, negatives: Tensor | None, temperature: float | Tensor, given: Given, in_batch: bool | None,
    symmetric: bool, options: Options, reduction: str,
) -> Tensor:  # fmt: skip
    """`engine.kernels.infonce` where one of its later options is used. q, k and negatives are normalised if need be."""
    where, own = "infonce", negatives is not None and negatives.dim() == q.dim() + 1
    in_batch = not own if in_batch is None else in_batch
    _check_options(where, options)
    _check_combination(where, given, negatives, own, in_batch, symmetric)
    keys = _keys(where, q, k, negatives, own, in_batch, temperature)
    if symmetric and q.shape[-2] != k.shape[-2]:
        raise _unpaired(q, k)
    # without the keys of the batch no shared key is a positive
    pairs, own_mask = _pairs(where, keys, given, alone=in_batch and (own or negatives is None), listed=in_batch)
    pairs, keys = _in_range(where, pairs, keys)
    found = _reduced_losses(where, keys, pairs, own_mask, options, reduction, q.dim() == 3)
    if symmetric:
        turned = keys._replace(q=keys.shared, shared=keys.q)
        other = _reduced_losses(where, turned, pairs.transposed(), None, options, reduction, q.dim() == 3)
        found = (found + other) / 2
    return found


def check_arguments(
    where: str, q: Tensor, k: Tensor, negatives: Tensor | None, temperature: float | Tensor, given: Given,
    in_batch: bool | None = True, symmetric: bool = False, options: Options | None = None,
) -> None:  # fmt: skip
    """Raise what `infonce` or `siglip` would raise for these arguments, without computing anything.

    The host reads values only where it may (`looks_at`).
    """
    own = negatives is not None and negatives.dim() == q.dim() + 1
    in_batch = not own if in_batch is None else in_batch
    _check_options(where, options or Options())
    _check_combination(where, given, negatives, own, in_batch, symmetric)
    check_pair(where, q, k)
    _check_keys(where, q, k, negatives, own, in_batch)
    if symmetric and q.shape[-2] != k.shape[-2]:
        raise _unpaired(q, k)
    check_temperature(where, temperature, q.device)
    blank, count = q.detach().new_empty(1), 0 if negatives is None else negatives.shape[-2]
    shared = (k.shape[-2] if in_batch else 0) + (0 if own else count)
    keys = Keys(
        blank.expand(1, q.shape[-2], 1), blank.expand(1, shared, 1) if shared else None, None,
        blank.expand(1, q.shape[-2], count, 1) if own else None, blank,
    )  # fmt: skip
    pairs, _ = _pairs(where, keys, given, alone=in_batch and (own or negatives is None), listed=in_batch)
    if pairs.positives is not None and looks_at(pairs.positives):
        _in_range(where, pairs, keys)


def _unpaired(q: Tensor, k: Tensor) -> EstimatorError:
    what = f"{q.shape[-2]} rows, {k.shape[-2]} keys"
    do = "Leave out what does not fit, or add the losses of both directions yourself."
    return EstimatorError("infonce(symmetric=True)", what, "as many keys as rows", do)


def siglip(
    q: Tensor,
    k: Tensor,
    temperature: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    *,
    cosine: bool = False,
    negatives: Tensor | None = None,
    positives: Tensor | None = None,
    labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    mask: Tensor | None = None,
    row_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    exclude_self: bool = False,
    reduction: str = "mean",
    gather: bool | str = False,
    group: Any = None,
    local_loss: bool = False,
) -> Tensor:
    """The sigmoid loss: mean over i of the sum over j of -log sigmoid(z_ij (q_i . k_j / temperature + bias)).

    z_ij is 1 at positives and -1 at negatives. Every pair is a decision of its own, so there is no softmax and no bound
    on mutual information. SigLIP starts with cosine=True, temperature 0.1 and bias -10, and learns both. Its paper and
    open_clip divide the sum over all pairs by B, as "mean" does.

    Args:
        q: Queries [B, d], or [G, B, d] for G losses at once. float16, bfloat16, float32 or float64.
        k: Keys [M, d] or [G, M, d]. Row i of k is the positive of row i of q, unless `positives` or `labels` are given.
        temperature: One positive number, as for `infonce`. A tensor receives its gradient.
        bias: One number, a float or a tensor of one element. A tensor receives its gradient.
        cosine: As for `infonce`; and so are `negatives` [M', d], `positives`, `labels`, `key_labels`, `mask`,
            `row_ids`, `key_ids` and `exclude_self`. A row without a positive has its negatives' terms.
        reduction: "mean" over rows, "sum" or "none".
        gather, group, local_loss: As for `infonce`: the loss of the joined batch of all ranks. "ring" refuses labels,
            ids, masks and several positives.

    Returns:
        The loss in nats: 0-d, or [G] for groups; for "none" [B] or [G, B]. float32 (float64 for float64 inputs).

    Raises:
        EstimatorError: Shapes, types, devices, indices or options that do not fit, or no rows.
        ConfigError: As for `infonce`.

    Source:
        Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023.

    Example:
        >>> q = torch.eye(4)
        >>> round(float(siglip(q, q, temperature=0.1, bias=-5.0)), 4)  # three negatives and one positive a row
        0.0269
    """
    where = "siglip"
    if gather is not False or group is not None or local_loss:
        from engine.kernels.ranks.group import ranks_of_loss
        from engine.kernels.ranks.siglip import siglip_over_ranks

        ranks = ranks_of_loss(where, gather, group, local_loss)
        if ranks is not None:
            options = {
                "temperature": temperature, "bias": bias, "cosine": cosine, "negatives": negatives,
                "positives": positives, "labels": labels, "key_labels": key_labels, "mask": mask, "row_ids": row_ids,
                "key_ids": key_ids, "exclude_self": exclude_self, "reduction": reduction,
            }  # fmt: skip
            return siglip_over_ranks(q, k, ranks, local_loss, options)
    check_reduction(where, reduction)
    exact_type(where, q, k, negatives, needed=2)
    check_positives_type(where, positives)
    if cosine:
        q, k, negatives = (None if x is None else normalised(x) for x in (q, k, negatives))
    if negatives is not None and negatives.dim() != q.dim():
        raise wrong_shapes(where, negatives, k, "negatives [M', d], which all rows share")
    given = Given(positives, labels, key_labels, mask, row_ids, key_ids, exclude_self)
    _check_combination(where, given, negatives, False, True, False)
    keys = _keys(where, q, k, negatives, False, True, temperature)
    pairs, _ = _pairs(where, keys, given, alone=negatives is None, listed=True)
    pairs, keys = _in_range(where, pairs, keys)
    with torch.autocast(keys.q.device.type, enabled=False):
        bias = check_bias(where, bias, keys.scale.device).to(keys.scale.dtype)
        return _reduced_sigmoid(keys, pairs, bias, reduction, q.dim() == 3)


def _reduced_sigmoid(keys: Keys, pairs: Pairs, bias: Tensor, reduction: str, groups: bool) -> Tensor:
    backend, embeddings = _backend(keys.q, keys.shared), (keys.q, keys.shared, keys.scale, bias)
    if backend == "cpu" and reduction != "none" and wants_gradient(*embeddings):
        found, _ = autograd.FusedLosses.apply(*embeddings, None, Options(), *pairs)
        found = found / keys.q.shape[1] if reduction == "mean" else found
        return found if groups else found[0]
    if backend == "reference":
        found = reference.sigmoid_losses(*embeddings, pairs)
    else:
        found = autograd.RowStatistics.apply(*embeddings, 0.0, False, *pairs)[0]
    if reduction != "none":
        found = found.mean(-1) if reduction == "mean" else found.sum(-1)
    return found if groups else found[0]


def row_losses(keys: Keys, pairs: Pairs, own_mask: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """Losses of rows [G, B], and which rows have one. own_mask: bool [B, n], own negatives that are left out."""
    q, shared, own_positive, own_negatives, scale = keys
    if _backend(q, shared) == "reference":
        return reference.softmax_losses(q, shared, scale, pairs, own_positive, own_negatives, own_mask, options)
    if shared is None:
        found = without_keys(*q.shape[:2], scale)
    else:
        settings = options.hardness, options.smoothing > 0
        found = Statistics(*autograd.RowStatistics.apply(q, shared, scale, None, *settings, *pairs).unbind(0))
    if own_negatives is not None:
        found = with_more_negatives(found, scale * autograd.scores_of_own(q, own_negatives), own_mask, options)
    if own_positive is not None:
        joint = _joint(keys)
        spread = (joint - joint).detach()  # 0, or NaN where it is not finite
        found = found._replace(positives=joint, spread=spread, positive_count=torch.ones_like(joint))
    return losses(found, options)


def _joint(keys: Keys) -> Tensor | None:
    """Scores of positives that are not among the shared keys, [G, B]."""
    if keys.own_positive is None:
        return None
    return keys.scale * autograd.scores_of_own(keys.q, keys.own_positive[:, :, None])[..., 0]


def _reduced_losses(
    where: str, keys: Keys, pairs: Pairs, own_mask: Tensor | None, options: Options, reduction: str, groups: bool
) -> Tensor:
    """The loss in its last form; `groups`: whether the caller gave a first dimension of groups."""
    with torch.autocast(keys.q.device.type, enabled=False):
        fused = keys.shared is not None and keys.own_negatives is None and reduction != "none"
        gradient = wants_gradient(keys.q, keys.shared, keys.own_positive, keys.scale)
        if fused and gradient and _backend(keys.q, keys.shared) == "cpu":
            total, count = autograd.FusedLosses.apply(
                keys.q, keys.shared, keys.scale, None, _joint(keys), options, *pairs
            )
            _tell_of_missing(where, count, keys.q.shape[1], reduction)
            found = total / count if reduction == "mean" else total
            return found if groups else found[0]
        found, has = row_losses(keys, pairs, own_mask, options)
        has = has.expand(found.shape)
        _tell_of_missing(where, has.sum(-1), keys.q.shape[1], reduction)
        if reduction != "none":
            found = found.sum(-1) / has.sum(-1) if reduction == "mean" else found.sum(-1)
        return found if groups else found[0]


def check_reduction(where: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise EstimatorError(where, f"reduction {reduction!r}", f"one of {', '.join(REDUCTIONS)}", "Choose one.")


def check_positives_type(where: str, positives: Tensor | None) -> None:
    if positives is not None and not isinstance(positives, Tensor):
        what = f"positives, a {type(positives).__name__}"
        raise EstimatorError(where, what, "int64 [B] or [B, P]", "Call torch.as_tensor on it.")


def _check_options(where: str, options: Options) -> None:
    check_number(where, "hardness", options.hardness, 0)
    check_number(where, "label_smoothing", options.smoothing, 0, 1)
    if options.smoothing and (options.decoupled or options.hardness):
        what = "label_smoothing with decoupled or hardness, which make the shares of the keys no distribution"
        raise EstimatorError(where, what, "one of them", "Leave out label_smoothing.")


def _check_combination(
    where: str, given: Given, negatives: Tensor | None, own: bool, in_batch: bool, symmetric: bool
) -> None:
    """Refuse arguments that contradict each other."""

    def refuse(what: str, expected: str, do: str) -> EstimatorError:
        return EstimatorError(where, what, expected, do)

    chosen = given.positives is not None or given.labels is not None
    if given.positives is not None and given.labels is not None:
        raise refuse("positives and labels", "one of them", "Leave one out.")
    if given.key_labels is not None and given.labels is None:
        raise refuse("key_labels without labels", "both", "Give the rows' labels, too.")
    if given.key_ids is not None and given.row_ids is None:
        raise refuse("key_ids without row_ids", "both", "Give the rows' ids, too.")
    if given.exclude_self and not chosen:
        raise refuse("exclude_self without positives or labels", "a positive for every row", "Give one of them.")
    if not in_batch:
        if negatives is None:
            raise refuse("in_batch=False without negatives", "negatives", "Give a queue, or each row's own negatives.")
        if chosen or given.exclude_self or symmetric:
            what = "positives, labels, exclude_self or symmetric without the keys of the batch"
            raise refuse(what, "row i of k as the only positive", "Leave them out, or set in_batch=True.")
        if own and given.row_ids is not None:
            raise refuse("row_ids with negatives of each row's own", "mask, bool [B, n]", "Give the mask.")
    if symmetric and (negatives is not None or given.positives is not None or given.exclude_self):
        what = "symmetric with negatives, positives or exclude_self"
        do = "Leave out what does not fit, or add the losses of both directions yourself."
        raise refuse(what, "as many keys as rows and none of these", do)


def _keys(
    where: str, q: Tensor, k: Tensor, negatives: Tensor | None, own: bool, in_batch: bool, temperature: float | Tensor
) -> Keys:
    """The embeddings in one form."""
    first, _, scale = prepared(where, q, k, temperature)
    _check_keys(where, q, k, negatives, own, in_batch)
    dtype = first.dtype if negatives is None else torch.promote_types(first.dtype, negatives.dtype)
    scale = scale.to(exact_type(where, q, k, negatives))
    q, k = grouped(q.to(dtype)), grouped(k.to(dtype))
    own_negatives = shared = None
    if own:
        own_negatives = (negatives if negatives.dim() == 4 else negatives[None]).to(dtype)
    elif negatives is not None:
        shared = grouped(negatives.to(dtype))
    if in_batch:
        with torch.autocast(q.device.type, enabled=False):  # whose cat refuses the other type of 16 bits
            shared = k if shared is None else torch.cat([k, shared], 1)
    return Keys(q, shared, None if in_batch else k, own_negatives, scale)


def _check_keys(where: str, q: Tensor, k: Tensor, negatives: Tensor | None, own: bool, in_batch: bool) -> None:
    if 0 in k.shape and negatives is None:
        raise wrong_shapes(where, q, k, "at least one key")
    if not in_batch and k.shape != q.shape:
        raise wrong_shapes(where, q, k, "q and k of one shape, row i of k the positive of row i of q")
    if negatives is not None:
        lead = (q.shape[:-1] if own else q.shape[:-2]) if negatives.dim() >= 2 else None
        if negatives.shape[:-2] != lead or negatives.shape[-1] != q.shape[-1] or 0 in negatives.shape:
            expected = "negatives [M', d] or [B, n, d], of the width and groups of q, at least one"
            raise wrong_shapes(where, negatives, q, expected)


def _pairs(where: str, keys: Keys, given: Given, alone: bool, listed: bool) -> tuple[Pairs, Tensor | None]:
    """The roles of the shared keys, and the mask of the rows' own negatives.

    Args:
        alone: whether k is all that is shared, so that what is given for rows may stand for keys.
        listed: whether a shared key may be a positive.
    """
    rows = keys.q.shape[1]
    count = 0 if keys.shared is None else keys.shared.shape[1]
    own = 0 if keys.own_negatives is None else keys.own_negatives.shape[2]
    device, as_rows = keys.q.device, alone and count == rows

    def integers(name: str, tensor: Tensor | None, shape: tuple[int, ...], stands_in: Tensor | None) -> Tensor | None:
        if tensor is None and stands_in is not None and not as_rows:
            expected = f"{name}, int64 {list(shape)}, because there are {count} keys"
            raise EstimatorError(where, f"no {name}", expected, "Give them for k, then for negatives.")
        tensor = stands_in if tensor is None else tensor
        # a view, because torch.compile takes no tensor twice
        return tensor if tensor is None else _checked(where, name, tensor, torch.int64, shape, device).view(shape)

    labels = integers("labels", given.labels, (rows,), None)
    row_ids = integers("row_ids", given.row_ids, (rows,), None)
    key_labels = integers("key_labels", given.key_labels, (count,), labels)
    key_ids = integers("key_ids", given.key_ids, (count,), row_ids)
    positives, mask, own_mask = given.positives, given.mask, None
    if positives is not None:
        shape = (rows, positives.shape[1]) if positives.dim() == 2 else (rows,)
        _checked(where, "positives", positives, torch.int64, shape, device)
    elif not listed:
        positives = torch.empty(rows, 0, dtype=torch.int64, device=device)
    elif labels is None and count < rows:
        raise EstimatorError(where, f"{rows} rows of q, {count} keys", "a positive for every row", "Give `positives`.")
    if mask is not None:
        mask = _checked(where, "mask", mask, torch.bool, (rows, count + own), device)
        mask, own_mask = mask[:, :count] if count else None, mask[:, count:] if own else None
    return Pairs(positives, labels, key_labels, row_ids, key_ids, mask, given.exclude_self), own_mask


def _checked(
    where: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    right = isinstance(tensor, Tensor) and tensor.dtype == dtype and tensor.device == device
    if not right or tuple(tensor.shape) != shape:
        kind = str(dtype).removeprefix("torch.")
        what = (
            f"{name} {list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            if isinstance(tensor, Tensor)
            else (f"{name}, a {type(tensor).__name__}")
        )
        raise EstimatorError(where, what, f"{kind} {list(shape)} on {device}", f"Change {name}.")
    return tensor


def _in_range(where: str, pairs: Pairs, keys: Keys) -> tuple[Pairs, Keys]:
    """Positives as [B, P], in range; where the host may not read them, the scale is NaN if they were not."""
    positives = pairs.positives
    if positives is None or 0 in positives.shape:
        return pairs, keys
    count, least = keys.shared.shape[1], -1 if positives.dim() == 2 else 0
    own = torch.arange(len(positives), device=positives.device)
    listed = positives if positives.dim() == 2 else positives[:, None]
    wrong = (listed < least) | (listed >= count)
    itself = listed == own[:, None]
    if looks_at(positives):
        if wrong.any():
            found = f"positives from {int(listed.min())} to {int(listed.max())}"
            raise EstimatorError(where, found, f"{least} to {count - 1}", "Give columns of [k; negatives].")
        if pairs.exclude_self and itself.any():
            found = f"row {int(itself.any(1).nonzero()[0])} as its own positive"
            do = "Give the other views' columns."
            raise EstimatorError(f"{where}(exclude_self=True)", found, "another column", do)
    else:
        wrong = wrong | itself if pairs.exclude_self else wrong
        keys = keys._replace(scale=torch.where(wrong.any(), math.nan, keys.scale))
        listed = listed.clamp(-1, count - 1)
    return pairs._replace(positives=listed), keys


def check_bias(where: str, bias: float | Tensor, device: torch.device) -> Tensor:
    """The bias on a device, 0-d; a number in fp64.

    Raises:
        EstimatorError: it is not one finite number.
    """
    if not isinstance(bias, Tensor):
        if not isinstance(bias, Real) or isinstance(bias, bool) or not math.isfinite(bias):
            raise EstimatorError(where, f"bias {bias!r}", "one finite number", "Give one such as -10.")
        return torch.full((), float(bias), dtype=torch.float64, device=device)
    near = bias.device.type == "cpu" or bias.device == device
    if bias.numel() != 1 or not bias.dtype.is_floating_point or not near:
        what = f"bias {bias.dtype} {list(bias.shape)} on {bias.device}"
        raise EstimatorError(where, what, f"one number, on the CPU or on {device}", "Give one such as -10.")
    return bias.reshape(()).to(device=device)


def _tell_of_missing(where: str, count: Tensor, rows: int, reduction: str) -> None:
    """Say once that rows have no loss, and refuse a mean of none. count: how many rows of each group have one, [G]."""
    if is_static() or not looks_at(count) or (count == rows).all():
        return
    if reduction == "mean" and not count.all():
        do = "Draw batches that hold several samples of a class."
        raise EstimatorError(where, "no row with a positive", "one at least", do)
    if where not in _told:
        _told.add(where)
        log.warning(
            "%s: %d of %d rows have no positive (or lack the negatives that are their denominator). They have the loss "
            "0, and the mean leaves them out. This is said once.",
            where, int((rows - count).sum()), rows * len(count),
        )  # fmt: skip


def _backend(q: Tensor, shared: Tensor | None) -> str:
    """The backend; "reference" also where it is the algorithm to take on a GPU."""
    backend = backend_for(q, "contrastive_statistics")
    if backend != "triton":
        return backend
    # the Triton kernels accumulate in fp32
    eager = q.dtype == torch.float64 or (shared is not None and plan.choose(q, shared) == "eager")
    return "reference" if eager else backend
