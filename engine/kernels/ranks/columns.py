"""Options of the contrastive losses that speak of columns: of this rank's keys, for those of all ranks.

A rank numbers its columns [its k; negatives]. The gathered columns are [its k; the k of the other ranks; negatives].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.arguments import exact_type
from engine.kernels.contrastive.losses import Options
from engine.kernels.contrastive.op import Given, check_arguments, check_positives_type, check_reduction
from engine.kernels.mi_bounds.embeddings import wrong_shapes
from engine.kernels.ranks.agreement import agree, checked, like
from engine.kernels.ranks.collectives import gather_rows, own_first
from engine.kernels.ranks.group import Ranks, find_ranks

NONE_WIDTH = -1
"""The width of a mask that there is not."""


def is_given(value: Any) -> bool:
    """Whether an option has another value than its default of None, False or 0."""
    return value is not None and (isinstance(value, Tensor) or value not in (False, 0))


def check_own(
    where: str, q: Tensor, k: Tensor, options: Mapping[str, Any], known: Sequence[str], in_batch: bool
) -> None:
    """Refuse arguments of this rank that one process would refuse, and those that `gather` does not take.

    Args:
        where: "infonce" or "siglip".
        options: the options by name.
        known: those that work in this way of gathering, of several ways.
        in_batch: whether keys of the batch are negatives.
    """
    over_ranks, negatives, positives = f"{where} with gather", options["negatives"], options["positives"]
    check_reduction(where, options["reduction"])
    exact_type(where, q, k, negatives, needed=2)
    check_positives_type(where, positives)
    if q.dim() not in (2, 3) or k.dim() != q.dim():
        raise wrong_shapes(where, q, k, "[B, d] and [M, d], or [G, B, d] and [G, M, d]")
    for name in (n for n, v in options.items() if n not in known and is_given(v)):
        raise EstimatorError(
            over_ranks, f"option {name}", f"none but {', '.join(known)}", "Set gather=True or gather=False for it."
        )
    if options["exclude_self"] and positives is None and options["labels"] is None:
        what, expected = "exclude_self without positives", "a positive for every row"
        raise EstimatorError(over_ranks, what, expected, "Give `positives`.")
    mask = options["mask"]
    if mask is not None and in_batch:
        _check_mask(over_ranks, mask, q, options.get("symmetric", False))
        mask = None  # its columns are those of all ranks: their number is not known yet
    given = Given(*(mask if name == "mask" else options[name] for name in Given._fields))
    weights = Options(*(options.get(name, 0) for name in ("decoupled", "hardness", "label_smoothing")))
    symmetric, temperature = options.get("symmetric", False), options["temperature"]
    check_arguments(where, q, k, negatives, temperature, given, in_batch, symmetric, weights)


def _check_mask(where: str, mask: Any, q: Tensor, symmetric: bool) -> None:
    rows = q.shape[-2]
    if symmetric:
        raise EstimatorError(
            where, "mask with symmetric=True", "no mask: that of the other direction is on the other ranks",
            "Give row_ids, which are gathered, or call infonce for both directions.",
        )  # fmt: skip
    right = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.device == q.device
    if not right or mask.dim() != 2 or len(mask) != rows:
        what = f"mask {list(mask.shape)} of {mask.dtype} on {mask.device}" if isinstance(mask, Tensor) else "no tensor"
        expected = f"bool [{rows}, columns of all ranks] on {q.device}"
        raise EstimatorError(where, what, expected, "Give this rank's rows of the mask of the joined batch.")


@dataclass(frozen=True)
class Sizes:
    """What the ranks told each other.

    Attributes:
        rows, keys: how many rows of q and of k every rank has.
    """

    rows: list[int]
    keys: list[int]


def agree_on(
    where: str, q: Tensor, k: Tensor, ranks: Ranks, options: Mapping[str, Any], local_loss: bool, in_batch: bool
) -> Sizes:
    """The ranks' sizes. They agree on everything else. Its arguments were checked by `check_own`.

    Raises:
        EstimatorError: ranks that differ, rows without a positive, or a mask of another width.
    """
    over_ranks, negatives, mask = f"{where} with gather", options["negatives"], options["mask"]
    own = negatives is not None and negatives.dim() == q.dim() + 1
    shapes = {"rows of q": q.shape[-2], "rows of k": k.shape[-2]}
    masked = in_batch and mask is not None
    widths = {"columns of mask": mask.shape[1] if masked else NONE_WIDTH}
    same = {
        "width of q": q.shape[-1], "width of k": k.shape[-1], "groups": len(q) if q.dim() == 3 else 1,
        "bytes of a number of k": k.element_size(), "gradients of q": like(q), "gradients of k": like(k),
        "further negatives": 0 if negatives is None else negatives.shape[-2],
        "reduction": ("mean", "sum", "none").index(options["reduction"]), "local_loss": int(local_loss),
    }  # fmt: skip
    told = ("positives", "labels", "row_ids", "symmetric", "decoupled")
    same |= {f"presence of {name}": int(is_given(options.get(name))) for name in told}
    same |= {"keys of the batch as negatives": int(in_batch), "negatives of rows' own": int(own)}
    counts = agree(over_ranks, ranks, q.device, shapes | widths, same)
    rows, keys = counts["rows of q"], counts["rows of k"]
    positive = options["positives"] is not None or options["labels"] is not None
    short = not positive and any(n > m for n, m in zip(rows, keys, strict=True))
    if short or (options.get("symmetric") and rows != keys):
        expected = "as many keys as rows" if options.get("symmetric") else "a positive for every row"
        raise EstimatorError(over_ranks, f"{rows} rows, {keys} keys on the ranks", expected, "Give pairs.")
    columns = sum(keys) + (0 if negatives is None else negatives.shape[-2])
    masks = counts["columns of mask"]
    if any(width not in (NONE_WIDTH, columns) for width in masks):
        raise EstimatorError(
            over_ranks, f"columns of mask on ranks {[None if w == NONE_WIDTH else w for w in masks]}",
            f"{columns}: the keys of all ranks, rank 0's first, then negatives",
            "Give this rank's rows of the mask of the joined batch.",
        )  # fmt: skip
    return Sizes(rows, keys)


def keys_of_all(where: str, keys: Tensor, width: int, gather: bool, group: Any) -> Tensor:
    """Keys [n, width] of all ranks, rank 0's first, without gradients; of one process its own.

    Raises:
        EstimatorError: keys of another shape, on any rank.
    """
    ranks = find_ranks(where, gather, group)
    if ranks is None:
        return keys
    with checked(ranks, keys):
        exact_type(where, keys)
        if keys.dim() != 2 or keys.shape[1] != width:
            raise EstimatorError(where, f"keys {list(keys.shape)}", f"[n, {width}]", "Push the keys of one batch.")
    same = {"bytes of a number": keys.element_size()}
    counts = agree(where, ranks, keys.device, {"keys": len(keys)}, same, empty=True)["keys"]
    return gather_rows(keys.detach(), ranks, counts)


class Columns:
    """This rank's options of columns, for the gathered columns.

    Args:
        ranks: the ranks.
        keys: how many keys every rank has.
        shared: how many negatives all rows share.
    """

    def __init__(self, ranks: Ranks, keys: list[int], shared: int):
        self.ranks, self.keys, self.own = ranks, keys, keys[ranks.rank]
        self.count = self.own + shared

    def numbers(self, positives: Tensor | None) -> Tensor | None:
        """Numbers in [own keys; negatives] as numbers in the gathered columns."""
        if positives is None:
            return None
        # one too large would fall among the keys of other ranks: it is moved beyond all
        return torch.where(positives < self.own, positives, positives + sum(self.keys) - self.own)

    def values(self, of_columns: Tensor | None, of_rows: Tensor | None) -> Tensor | None:
        """Labels or ids of the gathered columns."""
        value = of_rows if of_columns is None else of_columns
        if value is None:
            return None
        return torch.cat([own_first(value[: self.own], self.ranks, self.keys), value[self.own :]])

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """Columns in the order of the ranks, in that of the gathered ones."""
        if mask is None:
            return None
        everything = sum(self.keys)
        return torch.cat([mask[:, :everything].roll(-sum(self.keys[: self.ranks.rank]), 1), mask[:, everything:]], 1)
