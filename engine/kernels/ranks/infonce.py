"""The InfoNCE loss of the batch that all ranks hold together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.arguments import looks_at
from engine.kernels.mi_bounds.embeddings import grouped, normalised, positives_in_range, prepared, wrong_shapes
from engine.kernels.mi_bounds.reference import embedding_scores
from engine.kernels.ranks.autograd import RowLosses
from engine.kernels.ranks.collectives import own_first, sum_over_ranks
from engine.kernels.ranks.group import Ranks, agree, like
from engine.kernels.ranks.streaming import Scoring

RING_OPTIONS = ("temperature", "cosine", "symmetric", "negatives", "positives", "exclude_self", "reduction")
"""The options of `engine.kernels.infonce` that work with keys that travel."""

OPTIONS = (
    *RING_OPTIONS, "labels", "key_labels", "row_ids", "key_ids", "decoupled", "hardness", "label_smoothing"
)  # fmt: skip
"""Those that work with gathered keys."""


def infonce_over_ranks(q: Tensor, k: Tensor, ranks: Ranks, local_loss: bool, options: Mapping[str, Any]) -> Tensor:
    """`engine.kernels.infonce` of the joined batch.

    Args:
        q, k: of this rank; see `infonce`.
        ranks: from `find_ranks`.
        local_loss: the loss of this rank's rows against all keys, instead of that of all rows.
        options: the options of `infonce` by name. `negatives` are the same on every rank. `positives` are numbers in
            [this rank's k; negatives].

    Raises:
        EstimatorError: options that do not work over ranks, or whatever `infonce` raises.
    """
    known = RING_OPTIONS if ranks.ring else OPTIONS
    given = {name: options.get(name) for name in known}
    if q.dim() not in (2, 3) or k.dim() != q.dim():
        raise wrong_shapes("infonce", q, k, "[B, d] and [M, d], or [G, B, d] and [G, M, d]")
    if options.get("in_batch") is False:
        raise EstimatorError(
            "infonce with gather", "in_batch=False", "the keys of the batch as negatives: they are what is gathered",
            "Set gather=False: DDP averages the ranks' losses.",
        )  # fmt: skip
    _check_options(q, given, [n for n, v in options.items() if n not in known and _is_given(v)], known)
    shapes = {"rows of q": q.shape[-2], "rows of k": k.shape[-2]}
    same = {
        "width of q": q.shape[-1], "width of k": k.shape[-1], "groups": len(q) if q.dim() == 3 else 1,
        "bytes of a number of k": k.element_size(), "gradients of q": like(q), "gradients of k": like(k),
        "further negatives": 0 if given["negatives"] is None else given["negatives"].shape[-2],
    }  # fmt: skip
    same |= {f"presence of {name}": int(_is_given(options.get(name))) for name in ("positives", "labels", "row_ids")}
    counts = agree("infonce with gather", ranks, q.device, shapes, same)
    rows, keys = counts["rows of q"], counts["rows of k"]
    short = (
        given["positives"] is None
        and given.get("labels") is None
        and any(n > m for n, m in zip(rows, keys, strict=True))
    )
    if short or (given["symmetric"] and rows != keys):
        expected = "as many keys as rows" if given["symmetric"] else "a positive for every row"
        raise EstimatorError("infonce with gather", f"{rows} rows, {keys} keys on the ranks", expected, "Give pairs.")
    losses = _over_ring if ranks.ring else _gathered
    reduction = given.pop("reduction")
    result, taking_part = losses(q, k, ranks, rows, keys, **given, reduction="none" if reduction == "none" else "sum")
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


def _is_given(value: Any) -> bool:
    """Whether an option has another value than its default of None, False or 0."""
    return value is not None and (isinstance(value, Tensor) or value not in (False, 0))


def _check_options(q: Tensor, given: Mapping[str, Any], others: Sequence[str], known: Sequence[str]) -> None:
    where = "infonce with gather"
    if others:
        raise EstimatorError(where, f"option {others[0]}", f"none but {', '.join(known)}", "Set gather=False for it.")
    negatives = given["negatives"]
    if negatives is not None and negatives.dim() == q.dim() + 1:
        raise EstimatorError(
            where, "negatives of each row's own", "negatives of other ranks, which rows with their own do not have",
            "Set gather=False: DDP averages the ranks' losses.",
        )  # fmt: skip
    if given["exclude_self"] and given["positives"] is None and given.get("labels") is None:
        raise EstimatorError(where, "exclude_self without positives", "a positive for every row", "Give `positives`.")
    more = ("negatives", "positives", "exclude_self", "key_labels", "key_ids")
    extra = [name for name in more if _is_given(given.get(name))]
    if given["symmetric"] and extra:
        raise EstimatorError(
            f"{where}, symmetric=True", extra[0], "as many keys as rows and nothing else", "Leave it out."
        )
    several = given["positives"] is not None and given["positives"].dim() == 2
    if given.get("decoupled") and (several or given.get("labels") is not None or given.get("row_ids") is not None):
        raise EstimatorError(
            f"{where}, decoupled=True", "labels, ids or several positives", "negatives for every row", "Leave one out."
        )


def _gathered(
    q: Tensor, k: Tensor, ranks: Ranks, rows: list[int], keys: list[int], *, symmetric: bool,
    negatives: Tensor | None, positives: Tensor | None, exclude_self: bool, labels: Tensor | None,
    key_labels: Tensor | None, row_ids: Tensor | None, key_ids: Tensor | None, **options: Any,
) -> tuple[Tensor, int | Tensor]:  # fmt: skip
    """Losses of this rank's rows, or their sum, by `infonce` itself on all keys; and how many rows have a positive."""
    from engine.kernels.mi_bounds.op import infonce

    columns = _Columns(ranks, keys, k, negatives)
    key_labels, key_ids = columns("key_labels", key_labels, labels), columns("key_ids", key_ids, row_ids)
    options |= {"labels": labels, "key_labels": key_labels, "row_ids": row_ids, "key_ids": key_ids}
    if symmetric:
        all_k, all_q = own_first(k, ranks, keys, -2), own_first(q, ranks, rows, -2)
        return (infonce(q, all_k, **options) + infonce(k, all_q, **options)) / 2, q.shape[-2]
    if positives is not None:
        positives = _numbers_of_all(positives, k.shape[-2], keys, negatives)
    all_k = own_first(k, ranks, keys, -2)
    found = infonce(q, all_k, negatives=negatives, positives=positives, exclude_self=exclude_self, **options)
    return found, _with_positive(q.shape[-2], positives, labels, key_labels, exclude_self)


class _Columns:
    """What belongs to this rank's columns [k; negatives], for those of all ranks: own first, then `negatives`."""

    def __init__(self, ranks: Ranks, keys: list[int], k: Tensor, negatives: Tensor | None):
        self.ranks, self.keys, self.rows = ranks, keys, k.shape[-2]
        self.count = self.rows + (0 if negatives is None else negatives.shape[-2])

    def __call__(self, name: str, of_columns: Tensor | None, of_rows: Tensor | None) -> Tensor | None:
        value = of_rows if of_columns is None else of_columns
        if value is None:
            return None
        if not isinstance(value, Tensor) or value.dtype != torch.int64 or tuple(value.shape) != (self.count,):
            what = f"{name} {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"no {name}"
            expected = f"int64 [{self.count}], of this rank's [k; negatives]"
            raise EstimatorError("infonce with gather", what, expected, f"Give {name}.")
        return torch.cat([own_first(value[: self.rows], self.ranks, self.keys), value[self.rows :]])


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


def _numbers_of_all(positives: Tensor, own: int, keys: list[int], negatives: Tensor | None) -> Tensor:
    """Numbers in [own keys; negatives] as numbers in [all keys, own first; negatives]."""
    _check_type(positives)
    if looks_at(positives) and positives.numel():
        columns = own + (0 if negatives is None else negatives.shape[-2])
        lowest = -1 if positives.dim() == 2 else 0
        least, most = (int(v) for v in positives.aminmax())
        if least < lowest or most >= columns:
            raise EstimatorError(
                "infonce with gather", f"positives from {least} to {most}", f"{lowest} to {columns - 1}",
                "Give columns of [this rank's k; negatives].",
            )  # fmt: skip
    everything = sum(keys)
    # one too large would fall among the keys of other ranks: it is moved beyond all
    return torch.where(positives < own, positives, positives + everything - own)


def _check_type(positives: Tensor, most: int = 2) -> None:
    if not isinstance(positives, Tensor) or positives.dtype != torch.int64 or positives.dim() not in (1, most):
        what = f"positives {list(positives.shape)} of {positives.dtype}" if isinstance(positives, Tensor) else "none"
        raise EstimatorError("infonce with gather", what, "int64 [B]", "Give one column per row.")


def _over_ring(
    q: Tensor, k: Tensor, ranks: Ranks, rows: list[int], keys: list[int], *, temperature: Any, cosine: bool,
    symmetric: bool, negatives: Tensor | None, positives: Tensor | None, exclude_self: bool, reduction: str,
) -> tuple[Tensor, int]:  # fmt: skip
    """Losses of this rank's rows, or their sum, with keys that travel; and how many rows have a positive."""
    if cosine:
        q, k, negatives = (None if x is None else normalised(x) for x in (q, k, negatives))
    one = q.dim() == 2
    q, k, scale = prepared("infonce", q, k, temperature)
    if negatives is not None:
        negatives = grouped(negatives.to(k.dtype))
    if positives is not None:
        _check_type(positives, 1)
        columns = k.shape[-2] + (0 if negatives is None else negatives.shape[-2])
        positives, scale = positives_in_range(positives, q.shape[-2], columns, exclude_self, scale)
    q, k = grouped(q), grouped(k)

    def losses(queries: Tensor, others: Tensor, counts: list[int]) -> Tensor:
        numbers = len(queries[0])
        scoring = Scoring(_products, ranks, counts, numbers, sum(rows), positives, exclude_self)
        place = torch.empty(queries.shape[:2], dtype=scale.dtype, device=q.device)
        return RowLosses.apply(scoring, place, queries, others, negatives, scale)

    result = losses(q, k, keys)
    if symmetric:
        result = (result + losses(k, q, rows)) / 2
    result = result[0] if one else result
    return (result if reduction == "none" else result.sum(-1)), q.shape[1]


def _products(rows: Tensor, columns: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Scores of embeddings [G, b, d] and [G, c, d]; the one parameter is their scale."""
    return embedding_scores(rows, columns, parameters[0])
