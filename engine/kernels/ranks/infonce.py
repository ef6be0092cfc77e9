"""The InfoNCE loss of the batch that all ranks hold together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.arguments import looks_at
from engine.kernels.mi_bounds.embeddings import grouped, normalised, positives_in_range, prepared
from engine.kernels.mi_bounds.reference import embedding_scores
from engine.kernels.ranks.agreement import checked
from engine.kernels.ranks.autograd import RowLosses
from engine.kernels.ranks.collectives import own_first, sum_over_ranks
from engine.kernels.ranks.columns import Columns, agree_on, check_own
from engine.kernels.ranks.group import Ranks
from engine.kernels.ranks.streaming import Scoring

RING_OPTIONS = ("temperature", "cosine", "symmetric", "negatives", "positives", "exclude_self", "in_batch", "reduction")
"""The options of `engine.kernels.infonce` that work with keys that travel."""

OPTIONS = (
    *RING_OPTIONS, "labels", "key_labels", "mask", "row_ids", "key_ids", "decoupled", "hardness", "label_smoothing"
)  # fmt: skip
"""Those that work with gathered keys, or without keys of the batch."""


def infonce_over_ranks(q: Tensor, k: Tensor, ranks: Ranks, local_loss: bool, options: Mapping[str, Any]) -> Tensor:
    """`engine.kernels.infonce` of the joined batch.

    Args:
        q, k: of this rank; see `infonce`.
        ranks: from `find_ranks`.
        local_loss: the loss of this rank's rows against all keys, instead of that of all rows.
        options: the options of `infonce` by name. `negatives` that rows share are the same on every rank. `positives`
            are numbers in [this rank's k; negatives].

    Raises:
        EstimatorError: options that do not work over ranks, or whatever `infonce` raises.
        OtherRankFailed: another rank has raised it.
    """
    with checked(ranks, q, k):
        negatives, in_batch = options["negatives"], options["in_batch"]
        own = isinstance(negatives, Tensor) and isinstance(q, Tensor) and negatives.dim() == q.dim() + 1
        in_batch = not own if in_batch is None else in_batch
        _check(q, k, ranks, options, own, in_batch)
    sizes = agree_on("infonce", q, k, ranks, options, local_loss, in_batch)
    given = dict(options) | {"reduction": "none" if options["reduction"] == "none" else "sum"}
    if not in_batch:
        from engine.kernels.mi_bounds.op import infonce

        result, taking_part = infonce(q, k, **given), q.shape[-2]
    elif ranks.ring:
        result, taking_part = _over_ring(q, k, ranks, sizes.rows, sizes.keys, given), q.shape[-2]
    else:
        result, taking_part = _gathered(q, k, ranks, sizes.rows, sizes.keys, own, given)
    return over_all(result, taking_part, ranks, sizes.rows, options["reduction"], local_loss)


def over_all(
    result: Tensor, taking_part: int | Tensor, ranks: Ranks, rows: list[int], reduction: str, local_loss: bool
) -> Tensor:
    """The loss of all ranks' rows from this rank's: losses of rows for "none", else their sum.

    Args:
        result: losses [b] or [G, b] for "none", else their sums.
        taking_part: how many of this rank's rows have a positive.
        ranks: the ranks.
        rows: how many rows every rank has.
        reduction, local_loss: as for `infonce`.
    """
    if reduction == "none":
        return result
    if not local_loss:
        result = sum_over_ranks(result, ranks)
        taking_part = sum(rows) if isinstance(taking_part, int) else sum_over_ranks(taking_part, ranks)
    if reduction == "sum":
        return result
    if local_loss:  # one rank alone may have no positive: its loss is 0, because others would wait for an error
        return result / max(1, taking_part) if isinstance(taking_part, int) else result / taking_part.clamp(min=1)
    if isinstance(taking_part, Tensor) and looks_at(taking_part) and not taking_part:
        do = "Draw batches that hold several samples of a class."
        raise EstimatorError("infonce with gather", "no row with a positive", "one at least", do)
    return result / taking_part


def _check(q: Tensor, k: Tensor, ranks: Ranks, options: Mapping[str, Any], own: bool, in_batch: bool) -> None:
    where = "infonce with gather"
    check_own("infonce", q, k, options, RING_OPTIONS if ranks.ring and in_batch else OPTIONS, in_batch)
    if ranks.ring and in_batch and own:
        raise EstimatorError(
            where, "negatives of each row's own and keys of the batch that travel", "one of them",
            "Set gather=True, or in_batch=False.",
        )  # fmt: skip
    if ranks.ring and in_batch and options["positives"] is not None and options["positives"].dim() == 2:
        what = "several positives of each row with keys that travel"
        raise EstimatorError(where, what, "int64 [B]", "Set gather=True.")
    for name in ("key_labels", "key_ids"):
        if options["symmetric"] and options[name] is not None:
            raise EstimatorError(f"{where}, symmetric=True", name, "rows and keys of the same samples", "Leave it out.")
    few = [options["positives"] is not None and options["positives"].dim() == 2]
    few += [options[name] is not None for name in ("labels", "row_ids", "mask")]
    if options["decoupled"] and any(few):
        raise EstimatorError(
            f"{where}, decoupled=True", "labels, ids, a mask or several positives", "negatives for every row",
            "Leave one out.",
        )  # fmt: skip


def _gathered(
    q: Tensor, k: Tensor, ranks: Ranks, rows: list[int], keys: list[int], own: bool, options: dict[str, Any]
) -> tuple[Tensor, int | Tensor]:
    """Losses of this rank's rows, or their sum, by `infonce` itself on all keys; and how many rows have a positive."""
    from engine.kernels.mi_bounds.op import infonce

    negatives = options["negatives"]
    columns = Columns(ranks, keys, 0 if negatives is None or own else negatives.shape[-2])
    labels, row_ids = options["labels"], options["row_ids"]
    options["key_labels"] = key_labels = columns.values(options["key_labels"], labels)
    options["key_ids"] = columns.values(options["key_ids"], row_ids)
    options["mask"], options["positives"] = columns.mask(options["mask"]), columns.numbers(options["positives"])
    all_k = own_first(k, ranks, keys, -2)
    if options.pop("symmetric"):
        all_q = own_first(q, ranks, rows, -2)
        return (infonce(q, all_k, **options) + infonce(k, all_q, **options)) / 2, q.shape[-2]
    found = infonce(q, all_k, **options)
    return found, _with_positive(q.shape[-2], options["positives"], labels, key_labels, options["exclude_self"])


def _with_positive(
    rows: int, positives: Tensor | None, labels: Tensor | None, key_labels: Tensor | None, exclude_self: bool
) -> int | Tensor:
    """How many rows have a positive: others are left out of the mean."""
    if labels is not None and key_labels is not None:
        ordered = key_labels.sort().values
        count = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
        if exclude_self:
            count = count - (key_labels[:rows] == labels).long()
        return (count > 0).sum()
    if positives is not None and positives.dim() == 2:
        return (positives >= 0).any(1).sum()
    return rows


def _over_ring(
    q: Tensor, k: Tensor, ranks: Ranks, rows: list[int], keys: list[int], options: Mapping[str, Any]
) -> Tensor:
    """Losses of this rank's rows, or their sum, with keys that travel."""
    negatives, positives, exclude_self = (options[name] for name in ("negatives", "positives", "exclude_self"))
    if options["cosine"]:
        q, k, negatives = (None if x is None else normalised(x) for x in (q, k, negatives))
    one = q.dim() == 2
    q, k, scale = prepared("infonce", q, k, options["temperature"])
    if negatives is not None:
        negatives = grouped(negatives.to(k.dtype))
    if positives is not None:
        columns = k.shape[-2] + (0 if negatives is None else negatives.shape[-2])
        positives, scale = positives_in_range(positives, q.shape[-2], columns, exclude_self, scale)
    q, k = grouped(q), grouped(k)

    def losses(queries: Tensor, others: Tensor, counts: list[int]) -> Tensor:
        numbers = len(queries[0])
        scoring = Scoring(_products, ranks, counts, numbers, sum(rows), positives, exclude_self)
        place = torch.empty(queries.shape[:2], dtype=scale.dtype, device=q.device)
        return RowLosses.apply(scoring, place, queries, others, negatives, scale)

    result = losses(q, k, keys)
    if options["symmetric"]:
        result = (result + losses(k, q, rows)) / 2
    result = result[0] if one else result
    return result if options["reduction"] == "none" else result.sum(-1)


def _products(rows: Tensor, columns: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Scores of embeddings [G, b, d] and [G, c, d]; the one parameter is their scale."""
    return embedding_scores(rows, columns, parameters[0])
