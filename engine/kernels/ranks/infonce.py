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

OPTIONS = ("temperature", "cosine", "symmetric", "negatives", "positives", "exclude_self", "reduction")
"""The options of `engine.kernels.infonce` that work over ranks."""


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
    given = {name: options.get(name) for name in OPTIONS}
    if q.dim() not in (2, 3) or k.dim() != q.dim():
        raise wrong_shapes("infonce", q, k, "[B, d] and [M, d], or [G, B, d] and [G, M, d]")
    _check_options(q, given, [n for n, v in options.items() if n not in OPTIONS and v is not None and v is not False])
    shapes = {"rows of q": q.shape[-2], "rows of k": k.shape[-2]}
    same = {
        "width of q": q.shape[-1], "width of k": k.shape[-1], "groups": len(q) if q.dim() == 3 else 1,
        "bytes of a number of k": k.element_size(), "gradients of q": like(q), "gradients of k": like(k),
        "further negatives": 0 if given["negatives"] is None else given["negatives"].shape[-2],
    }  # fmt: skip
    counts = agree("infonce with gather", ranks, q.device, shapes, same)
    rows, keys = counts["rows of q"], counts["rows of k"]
    short = given["positives"] is None and any(n > m for n, m in zip(rows, keys, strict=True))
    if short or (given["symmetric"] and rows != keys):
        expected = "as many keys as rows" if given["symmetric"] else "a positive for every row"
        raise EstimatorError("infonce with gather", f"{rows} rows, {keys} keys on the ranks", expected, "Give pairs.")
    losses = _over_ring if ranks.ring else _gathered
    reduction = given.pop("reduction")
    result = losses(q, k, ranks, rows, keys, **given, reduction="none" if reduction == "none" else "sum")
    if reduction == "none":
        return result
    if local_loss:
        return result / rows[ranks.rank] if reduction == "mean" else result
    result = sum_over_ranks(result, ranks)
    return result / sum(rows) if reduction == "mean" else result


def _check_options(q: Tensor, given: Mapping[str, Any], others: Sequence[str]) -> None:
    where = "infonce with gather"
    if others:
        raise EstimatorError(where, f"option {others[0]}", f"none but {', '.join(OPTIONS)}", "Set gather=False for it.")
    negatives = given["negatives"]
    if negatives is not None and negatives.dim() == q.dim() + 1:
        raise EstimatorError(
            where, "negatives of each row's own", "negatives of other ranks, which rows with their own do not have",
            "Set gather=False: DDP averages the ranks' losses.",
        )  # fmt: skip
    if given["exclude_self"] and given["positives"] is None:
        raise EstimatorError(where, "exclude_self without positives", "a positive for every row", "Give `positives`.")
    extra = [
        name
        for name in ("negatives", "positives", "exclude_self")
        if given[name] is not None and given[name] is not False
    ]
    if given["symmetric"] and extra:
        raise EstimatorError(f"{where}, symmetric=True", extra[0], "as many keys as rows and nothing else", "Leave it.")


def _gathered(
    q: Tensor, k: Tensor, ranks: Ranks, rows: list[int], keys: list[int], *, symmetric: bool,
    negatives: Tensor | None, positives: Tensor | None, exclude_self: bool, **options: Any,
) -> Tensor:  # fmt: skip
    """Losses of this rank's rows, or their sum, by `infonce` itself on all keys."""
    from engine.kernels.mi_bounds.op import infonce

    if symmetric:
        all_k, all_q = own_first(k, ranks, keys, -2), own_first(q, ranks, rows, -2)
        return (infonce(q, all_k, **options) + infonce(k, all_q, **options)) / 2
    if positives is not None:
        positives = _numbers_of_all(positives, k.shape[-2], keys, negatives)
    k = own_first(k, ranks, keys, -2)
    return infonce(q, k, negatives=negatives, positives=positives, exclude_self=exclude_self, **options)


def _numbers_of_all(positives: Tensor, own: int, keys: list[int], negatives: Tensor | None) -> Tensor:
    """Numbers in [own keys; negatives] as numbers in [all keys, own first; negatives]."""
    _check_type(positives)
    if looks_at(positives) and len(positives):
        columns = own + (0 if negatives is None else negatives.shape[-2])
        least, most = (int(v) for v in positives.aminmax())
        if least < 0 or most >= columns:
            raise EstimatorError(
                "infonce with gather", f"positives from {least} to {most}", f"0 to {columns - 1}",
                "Give columns of [this rank's k; negatives].",
            )  # fmt: skip
    everything = sum(keys)
    # one too large would fall among the keys of other ranks: it is moved beyond all
    return torch.where(positives < own, positives, positives + everything - own)


def _check_type(positives: Tensor) -> None:
    if not isinstance(positives, Tensor) or positives.dtype != torch.int64 or positives.dim() != 1:
        what = f"positives {list(positives.shape)} of {positives.dtype}" if isinstance(positives, Tensor) else "none"
        raise EstimatorError("infonce with gather", what, "int64 [B]", "Give one column per row.")


def _over_ring(
    q: Tensor, k: Tensor, ranks: Ranks, rows: list[int], keys: list[int], *, temperature: Any, cosine: bool,
    symmetric: bool, negatives: Tensor | None, positives: Tensor | None, exclude_self: bool, reduction: str,
) -> Tensor:  # fmt: skip
    """Losses of this rank's rows, or their sum, with keys that travel."""
    if cosine:
        q, k, negatives = (None if x is None else normalised(x) for x in (q, k, negatives))
    one = q.dim() == 2
    q, k, scale = prepared("infonce", q, k, temperature)
    if negatives is not None:
        negatives = grouped(negatives.to(k.dtype))
    if positives is not None:
        _check_type(positives)
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
    return result if reduction == "none" else result.sum(-1)


def _products(rows: Tensor, columns: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Scores of embeddings [G, b, d] and [G, c, d]; the one parameter is their scale."""
    return embedding_scores(rows, columns, parameters[0])
