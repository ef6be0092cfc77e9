"""Columns of samples as the estimators read them, and the flags of columns that are hard to read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NORMAL_IQR = 1.349  # interquartile range of N(0, 1)
FEW_VALUES = 10  # a column of no more distinct values can be read as categories
TIED_SHARE = 0.1  # a column of fewer distinct values per row is flagged where it is read by rank
CONTINUOUS_SHARE = 0.05  # a column of more distinct values per row is continuous, if they are not few
REPEATED_SHARE = 0.01  # of the rows that may be copies without a flag
LEAST_SD = 0.2  # by which the indicator of a rare category is divided
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


def untied_scores(values: Tensor, generator: torch.Generator) -> Tensor:
    """Normal scores of one column [N, 1], float64 [N], with equal values in random order.

    A place among equal values is noise that knows nothing of any other column, and the value can be told from it. So no
    information changes, and distances between scores have no ties, as neighbour estimates need. Without equal values
    nothing is drawn.

    >>> untied_scores(torch.tensor([[1.0], [1.0], [2.0]]), torch.Generator().manual_seed(0)).unique().numel()
    3
    """
    if len(values.unique()) < len(values):
        shuffled = torch.randperm(len(values), generator=generator)
        order = shuffled[values[shuffled, 0].argsort(stable=True)]
        values = torch.empty(len(values), 1, dtype=torch.float64)
        values[order, 0] = torch.arange(len(order), dtype=torch.float64)
    return normal_scores(values)[:, 0].double()


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


def indicators(values: Tensor) -> Tensor:
    """For each column of categories, a centred indicator of each of its values but the first, float64.

    Rare categories are not scaled up to unit variance: networks learn badly from single large inputs.
    """
    parts = [torch.empty(len(values), 0, dtype=torch.float64)]
    for column in values.T:
        one_hot = torch.nn.functional.one_hot(column.unique(return_inverse=True)[1])[:, 1:].double()
        share = one_hot.mean(0)
        parts.append((one_hot - share) / (share * (1 - share)).sqrt().clamp(min=LEAST_SD))
    return torch.cat(parts, 1)


def standard_error(shares: Tensor, group: Tensor | None = None) -> float:
    """Of the mean of rows' shares [N]. Only groups are independent where there are any."""
    if group is None:
        return (shares.std() / math.sqrt(len(shares))).item()
    count = int(group.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, group, shares.double() - shares.double().mean())
    return (sums.square().sum() * count / (count - 1)).sqrt().item() / len(shares)


def column_flags(values: Tensor, by_rank: Tensor, categories: Tensor | None = None) -> list[str]:
    """What makes columns hard to read, as keys of `engine.information.estimate.ADVICE`.

    Args:
        values: all columns, [N, d].
        by_rank: those that are read by rank, and not as categories.
        categories: [d] bool, columns whose numbers mean nothing, so that none of them is far out.
    """
    changing = varying(values)
    measured = changing if categories is None else varying(values[:, ~categories])
    said = {
        "constant columns": changing.shape[1] < values.shape[1],
        "discrete columns": any(len(column.unique()) < TIED_SHARE * len(values) for column in varying(by_rank).T),
        "heavy tails": bool((robust(measured).abs() > HEAVY).any()),
        "repeated rows": int(copies(changing).max()) + 1 < (1 - REPEATED_SHARE) * len(values),
    }
    return [flag for flag, is_so in said.items() if is_so]
