"""The sigmoid loss of the batch that all ranks hold together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.contrastive.op import check_bias
from engine.kernels.mi_bounds.embeddings import grouped, normalised, positives_in_range, prepared, wrong_shapes
from engine.kernels.mi_bounds.reference import embedding_scores
from engine.kernels.ranks.agreement import checked
from engine.kernels.ranks.autograd import SigmoidRowLosses
from engine.kernels.ranks.collectives import own_first
from engine.kernels.ranks.columns import Columns, agree_on, check_own
from engine.kernels.ranks.group import Ranks
from engine.kernels.ranks.infonce import over_all
from engine.kernels.ranks.streaming import Scoring

RING_OPTIONS = ("temperature", "bias", "cosine", "negatives", "positives", "exclude_self", "reduction")
"""The options of `engine.kernels.siglip` that work with keys that travel."""

OPTIONS = (*RING_OPTIONS, "labels", "key_labels", "mask", "row_ids", "key_ids")
"""Those that work with gathered keys."""


def siglip_over_ranks(q: Tensor, k: Tensor, ranks: Ranks, local_loss: bool, options: Mapping[str, Any]) -> Tensor:
    """`engine.kernels.siglip` of the joined batch. Arguments and errors are those of `infonce_over_ranks`."""
    with checked(ranks, q, k):
        check_own("siglip", q, k, options, RING_OPTIONS if ranks.ring else OPTIONS, True)
        negatives, positives = options["negatives"], options["positives"]
        if negatives is not None and negatives.dim() != q.dim():
            raise wrong_shapes("siglip", negatives, k, "negatives [M', d], which all rows share")
        if ranks.ring and positives is not None and positives.dim() == 2:
            what = "several positives of each row with keys that travel"
            raise EstimatorError("siglip with gather", what, "int64 [B]", "Set gather=True.")
        check_bias("siglip", options["bias"], q.device)
    sizes = agree_on("siglip", q, k, ranks, options, local_loss, True)
    given = dict(options) | {"reduction": "none" if options["reduction"] == "none" else "sum"}
    result = _over_ring(q, k, ranks, sizes.keys, given) if ranks.ring else _gathered(q, k, ranks, sizes.keys, given)
    return over_all(result, q.shape[-2], ranks, sizes.rows, options["reduction"], local_loss)


def _gathered(q: Tensor, k: Tensor, ranks: Ranks, keys: list[int], options: dict[str, Any]) -> Tensor:
    """Losses of this rank's rows, or their sum, by `siglip` itself on all keys."""
    from engine.kernels.contrastive.op import siglip

    columns = Columns(ranks, keys, 0 if options["negatives"] is None else options["negatives"].shape[-2])
    options["key_labels"] = columns.values(options["key_labels"], options["labels"])
    options["key_ids"] = columns.values(options["key_ids"], options["row_ids"])
    options["mask"], options["positives"] = columns.mask(options["mask"]), columns.numbers(options["positives"])
    return siglip(q, own_first(k, ranks, keys, -2), **options)


def _over_ring(q: Tensor, k: Tensor, ranks: Ranks, keys: list[int], options: Mapping[str, Any]) -> Tensor:
    """Losses of this rank's rows, or their sum, with keys that travel."""
    negatives, positives, exclude_self = (options[name] for name in ("negatives", "positives", "exclude_self"))
    if options["cosine"]:
        q, k, negatives = (None if x is None else normalised(x) for x in (q, k, negatives))
    one = q.dim() == 2
    q, k, scale = prepared("siglip", q, k, options["temperature"])
    bias = check_bias("siglip", options["bias"], scale.device).to(scale.dtype)
    if negatives is not None:
        negatives = grouped(negatives.to(k.dtype))
    if positives is not None:
        columns = k.shape[-2] + (0 if negatives is None else negatives.shape[-2])
        positives, scale = positives_in_range(positives, q.shape[-2], columns, exclude_self, scale)
    q, k = grouped(q), grouped(k)
    scoring = Scoring(_products, ranks, keys, q.shape[1], 0, positives, exclude_self)
    place = torch.empty(q.shape[:2], dtype=scale.dtype, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        result = SigmoidRowLosses.apply(scoring, place, q, k, negatives, scale, bias)
    result = result[0] if one else result
    return result if options["reduction"] == "none" else result.sum(-1)


def _products(rows: Tensor, columns: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Scores of embeddings [G, b, d] and [G, c, d]; the parameters are their scale and their bias."""
    scale, bias = parameters
    return embedding_scores(rows, columns, scale) + bias
