"""Columns of samples as the estimators take them."""

from __future__ import annotations

import torch
from torch import Tensor

NORMAL_IQR = 1.349  # interquartile range of N(0, 1)


def normal_scores(values: Tensor) -> Tensor:
    """Each column's ranks as quantiles of N(0, 1): float64 [N, d] -> float32 [N, d]; equal values get equal scores.

    Monotone maps of single columns change neither information nor these scores, so outliers and heavy tails of single
    columns do no harm.
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
