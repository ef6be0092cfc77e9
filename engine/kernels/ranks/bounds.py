"""Lower bounds on mutual information of the batch that all ranks hold together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.arguments import exact_type
from engine.kernels.mi_bounds.embeddings import grouped, prepared, wrong_shapes
from engine.kernels.mi_bounds.reference import embedding_scores, full_precision
from engine.kernels.ranks.agreement import agree, checked, like
from engine.kernels.ranks.autograd import BoundOverRanks, BoundSettings
from engine.kernels.ranks.collectives import own_first, sum_over_ranks
from engine.kernels.ranks.group import Ranks
from engine.kernels.ranks.streaming import Scoring

if TYPE_CHECKING:
    from engine.kernels.critics.reference import Layers


def bound_over_ranks(
    scores_or_q: Tensor, k: Tensor | None, ranks: Ranks, settings: tuple[str, float, float, float],
    temperature: float | Tensor, log_baseline: Tensor | None, log_ema: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`engine.kernels.mi_lower_bound` of the joined batch: the bound, and MINE's moving average, 0-d or [G].

    Args:
        scores_or_q: embeddings of y of this rank, [b, d] or [G, b, d], together with `k`; or its rows of scores,
            [b, N] or [G, b, N], against the columns of all ranks in their order.
        k: embeddings of x of this rank, as many as of y.
        ranks: from `find_ranks`.
        settings: the bound, alpha, smile_tau and ema_rate.
        temperature: as for `mi_lower_bound`.
        log_baseline: of this rank's rows.
        log_ema: as for `mi_lower_bound`; the same on every rank.
    """
    from engine.kernels.mi_bounds.op import check_bound, infonce

    where = f"bound {settings[0]} with gather"
    with checked(ranks, scores_or_q, k):
        numbers = BoundSettings(*check_bound(where, settings, log_ema, scores_or_q, k, log_baseline))
        if k is None:
            rows = _checked_scores(where, scores_or_q, ranks)
        else:
            _check_pairs(where, scores_or_q, k)
            q, keys, scale = prepared(where, scores_or_q, k, temperature)
            rows = q = grouped(q)
        state = _state(where, numbers, rows.shape[:2], rows, log_baseline, log_ema)
    one = scores_or_q.dim() == 2
    if k is None:
        value, average = _of_scores(where, rows, ranks, state)
        return (value[0], average[0]) if one else (value, average)
    counts = _counts(where, ranks, scores_or_q, k)
    columns = grouped(keys) if ranks.ring else own_first(grouped(keys), ranks, counts, 1)
    if numbers.bound == "infonce" and not ranks.ring and log_ema is None:  # has faster kernels
        losses = sum_over_ranks(infonce(q, columns, temperature=temperature, reduction="sum"), ranks)
        value = math.log(sum(counts)) - losses / sum(counts)
        return (value[0], value[0]) if one else (value, value)
    scoring = Scoring(_products, ranks, counts, q.shape[1], sum(counts))
    value, average = _bound(where, scoring, state, q, columns, [scale])
    return (value[0], average[0]) if one else (value, average)


def concat_bound(
    x: Tensor, y: Tensor, layers: Layers, activation: str, ranks: Ranks, settings: BoundSettings, *,
    transpose: bool = False, log_baseline: Tensor | None = None, log_ema: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A bound, 0-d, of a concat critic's scores f([x_j; y_i]), and MINE's moving average. Each rank scores its own y
    against the x of all ranks. With `transpose` the parts of x and y change places.

    Args: as for `engine.kernels.concat_scores` and `bound_over_ranks`.
    """
    from engine.kernels.critics.op import concat_scores

    where = f"bound {settings.bound} of a concat critic with gather"
    flat = [t for layer in layers for t in layer]
    with checked(ranks, x, y):
        _check_pairs(where, y, x)
        dtype = exact_type(where, x, y, *flat, integers=True)
        rows, columns = (part.to(dtype) for part in ((x, y) if transpose else (y, x)))
        state = _state(where, settings, (1, len(rows)), rows, log_baseline, log_ema)
    counts = _counts(where, ranks, y, x)

    def score(of_rows: Tensor, of_columns: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        pairs = list(zip(parameters[::2], parameters[1::2], strict=True))
        if transpose:
            return concat_scores(of_rows, of_columns, pairs, activation).t()[None]
        return concat_scores(of_columns, of_rows, pairs, activation)[None]

    if not ranks.ring:
        columns = own_first(columns, ranks, counts)
    scoring = Scoring(score, ranks, counts, len(rows), sum(counts))
    value, average = _bound(where, scoring, state, rows, columns, [t.to(dtype) for t in flat])
    return value[0], average[0]


def _checked_scores(where: str, scores: Tensor, ranks: Ranks) -> Tensor:
    """This rank's rows of scores, [G, b, N], in full precision."""
    if ranks.ring:
        raise EstimatorError(
            where, "scores with gather='ring'", "embeddings, which can travel", "Give embeddings, or set gather=True."
        )
    if scores.dim() not in (2, 3):
        raise EstimatorError(where, f"scores {list(scores.shape)}", "[b, N] or [G, b, N]", "Give rows of scores.")
    return grouped(full_precision(scores))


def _of_scores(where: str, scores: Tensor, ranks: Ranks, state: _State) -> tuple[Tensor, Tensor]:
    """From this rank's rows of scores [G, b, N] against the columns of all ranks."""
    same = {"columns": scores.shape[2], "groups": len(scores)}
    counts = agree(where, ranks, scores.device, {"rows of scores": scores.shape[1]}, same)["rows of scores"]
    if scores.shape[2] != sum(counts):
        raise EstimatorError(
            where, f"scores {list(scores.shape[1:])}",
            f"[{scores.shape[1]}, {sum(counts)}]: own rows, all ranks' columns",
            "Score this rank's rows against the gathered columns, or give embeddings.",
        )  # fmt: skip
    # The columns are what scores are made of; the rows have nothing to add.
    columns = scores.mT.roll(-sum(counts[: ranks.rank]), 1)
    scoring = Scoring(_as_they_are, ranks, counts, scores.shape[1], sum(counts))
    return _bound(where, scoring, state, scores.new_zeros(len(scores), scores.shape[1], 0), columns, [])


class _State(NamedTuple):
    """What a bound needs beside scores.

    Attributes:
        settings: the bound and its numbers.
        like: [G, b], for dtype and device.
        baseline: log a(y_i) [G, b], or None.
        average: MINE's moving average [G]; -inf begins it.
    """

    settings: BoundSettings
    like: Tensor
    baseline: Tensor | None
    average: Tensor


def _state(
    where: str, settings: BoundSettings, shape: Sequence[int], rows: Tensor, log_baseline: Tensor | None,
    log_ema: Tensor | None,
) -> _State:  # fmt: skip
    """Baseline and average of a bound of scores [G, b, N], checked."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    like_rows = torch.empty(tuple(shape), dtype=dtype, device=rows.device)
    a = None
    if log_baseline is not None and settings.bound in ("tuba", "interpolate"):
        if log_baseline.numel() != like_rows.numel() or log_baseline.dim() > 3:
            raise EstimatorError(
                where, f"log_baseline {list(log_baseline.shape)}", f"{list(shape)}", "Give one value per row."
            )
        a = log_baseline.reshape(like_rows.shape).to(dtype)
    if log_ema is None:
        average = like_rows.new_full((shape[0],), -math.inf)
    elif tuple(log_ema.shape) in ((), (1,), (shape[0],)):
        average = log_ema.detach().to(dtype).expand(shape[0]).contiguous()
    else:
        raise EstimatorError(where, f"log_ema {list(log_ema.shape)}", f"[{shape[0]}]", "Give one value per critic.")
    return _State(settings, like_rows, a, average)


def _bound(
    where: str, scoring: Scoring, state: _State, rows: Tensor, columns: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The bound [G] and MINE's moving average [G] of scores [G, b, N]."""
    if scoring.total < 2:
        raise EstimatorError(where, f"a batch of {scoring.total}", "at least 2 samples", "Drop the last short batch.")
    settings, like_rows, a, average = state
    with torch.autocast(rows.device.type, enabled=False):
        return BoundOverRanks.apply(scoring, settings, a, average, like_rows, rows, columns, None, *parameters)


def _check_pairs(where: str, first: Tensor, second: Tensor) -> None:
    if first.dim() not in (2, 3) or second.dim() != first.dim():
        raise wrong_shapes(where, first, second, "[b, d] and [b, d], or [G, b, d] and [G, b, d]")


def _counts(where: str, ranks: Ranks, first: Tensor, second: Tensor) -> list[int]:
    """The numbers of rows of all ranks, which agree on everything else."""
    same = {
        "width": first.shape[-1], "width of the columns": second.shape[-1],
        "groups": len(first) if first.dim() == 3 else 1, "bytes of a number": second.element_size(),
        "gradients of the rows": like(first), "gradients of the columns": like(second),
    }  # fmt: skip
    rows = {"rows": first.shape[-2], "columns": second.shape[-2]}
    counts = agree(where, ranks, first.device, rows, same)
    if counts["rows"] != counts["columns"]:
        what = f"{counts['rows']} rows on the ranks, and {counts['columns']} to go with them"
        raise EstimatorError(where, what, "as many rows in both", "Give x and y of the same samples.")
    return counts["rows"]


def _products(rows: Tensor, columns: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    return embedding_scores(rows, columns, parameters[0])


def _as_they_are(rows: Tensor, columns: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    return columns.mT
