"""Columns of samples as the estimators read them, and the flags of columns that are hard to read."""

from __future__ import annotations

import torch
from torch import Tensor

NORMAL_IQR = 1.349  # interquartile range of N(0, 1)
FEW_VALUES = 10  # a column of no more distinct values can be read as categories
TIED_SHARE = 0.1  # a column of fewer distinct values per row is flagged where it is read by rank
CONTINUOUS_SHARE = 0.05  # a column of more distinct values per row is continuous, if they are not few
REPEATED_SHARE = 0.01  # of the rows that may be copies without a flag
HEAVY = 30  # robust standard deviations from the median


def normal_scores(values: Tensor) -> Tensor:
    """Each column's ranks as quantiles of N(0, 1): float64 [N, d] -> float32 [N, d]; equal values get equal scores.

    Monotone maps of single columns change neither information nor these scores, so outliers and heavy tails of single
    columns do no harm.

    >>> normal_scores(torch.tensor([[10.0], [-5.0], [900.0]]))[:, 0]
    tensor([ 0.0000, -0.9674,  0.9674])
    """
    count = len(values)
    ordered = values.sort(0).values.T.contiguous()
    columns = values.T.contiguous()
    below = torch.searchsorted(ordered, columns)
    upto = torch.searchsorted(ordered, columns, right=True)
    middle = (below + upto).double() / 2  # 0.5 for the least of distinct values
    return torch.special.ndtri(middle / count).T.contiguous().float()


def robust(values: Tensor) -> Tensor:
    """Distance from the column's median in robust standard deviations, [N, d].

    Where half of a column's values are equal, the ordinary standard deviation stands in.
    """
    if values.shape[1] == 0:
        return values
    ordered = values.sort(0).values
    low, middle, high = (ordered[len(values) * quarter // 4] for quarter in (1, 2, 3))
    scale = torch.where(high > low, (high - low) / NORMAL_IQR, values.std(0, correction=0))
    return (values - middle) / torch.where(scale > 0, scale, 1.0)


def varying(values: Tensor) -> Tensor:
    """The columns that are not constant."""
    return values[:, (values != values[:1]).any(0)]


def copies(values: Tensor) -> Tensor:
    """A number for each row, from 0, the same for copies of a row.

    Copies must not lie in several folds, or a held-out row would not be new. Where no column is continuous, rows that
    are equal are no copies.
    """
    count = len(values)
    distinct = [len(column.unique()) for column in values.T]
    if max(distinct, default=0) <= max(CONTINUOUS_SHARE * count, min(FEW_VALUES, TIED_SHARE * count)):
        return torch.arange(count)
    return values.unique(dim=0, return_inverse=True)[1]


def column_flags(values: Tensor, by_rank: Tensor) -> list[str]:
    """What makes columns hard to read, as keys of `engine.information.estimate.ADVICE`.

    Args:
        values: all columns, [N, d].
        by_rank: those that are read by rank, and not as categories.
    """
    changing = varying(values)
    said = {
        "constant columns": changing.shape[1] < values.shape[1],
        "discrete columns": any(len(column.unique()) < TIED_SHARE * len(values) for column in varying(by_rank).T),
        "heavy tails": bool((robust(changing).abs() > HEAVY).any()),
        "repeated rows": int(copies(changing).max()) + 1 < (1 - REPEATED_SHARE) * len(values),
    }
    return [flag for flag, is_so in said.items() if is_so]
