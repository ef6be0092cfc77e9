"""Which pairs of rows and keys are positives, which are negatives, and which are left out, without a [B, M] tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """The roles of keys [M] for rows [B]; the same for all groups.

    A pair is first left out by `exclude_self`, then positive, then left out by ids or mask; else it is negative.

    Attributes:
        positives: int64 [B, P], each row's positive columns, filled up with -1. None: column i, or the labels decide.
            [B, 0]: there are none.
        labels, key_labels: int64 [B] and [M]. Keys of a row's label are its positives.
        row_ids, key_ids: int64 [B] and [M]. Keys of a row's id are no negatives.
        mask: bool [B, M]. True: no negative.
        exclude_self: Leave out column i for row i.
    """

    positives: Tensor | None = None
    labels: Tensor | None = None
    key_labels: Tensor | None = None
    row_ids: Tensor | None = None
    key_ids: Tensor | None = None
    mask: Tensor | None = None
    exclude_self: bool = False

    def transposed(self) -> Pairs:
        """The roles of rows for keys, where there are no positives that are listed."""
        mask = None if self.mask is None else self.mask.T
        return Pairs(None, self.key_labels, self.labels, self.key_ids, self.row_ids, mask)

    def positive(self, begin: int, end: int, keys: int, device: torch.device) -> Tensor:
        """Where the pairs of the rows from `begin` to `end` are positive, bool [end - begin, keys]."""
        if self.labels is not None:
            found = self.labels[begin:end, None] == self.key_labels
        elif self.positives is None:
            found = _own(begin, end, keys, device)
        else:
            # what fills up goes to one column more
            listed = self.positives[begin:end]
            listed = torch.where(listed < 0, keys, listed)
            found = torch.zeros(end - begin, keys + 1, dtype=torch.bool, device=device)
            found = found.scatter(1, listed, 1)[:, :keys]
        return found & ~_own(begin, end, keys, device) if self.exclude_self else found

    def left_out(self, begin: int, end: int, keys: int, device: torch.device) -> Tensor | None:
        """Where pairs are no negatives, as for `positive`; positives may be among them. None: nowhere."""
        found = _own(begin, end, keys, device) if self.exclude_self else None
        if self.row_ids is not None:
            of_one_id = self.row_ids[begin:end, None] == self.key_ids
            found = of_one_id if found is None else found | of_one_id
        if self.mask is not None:
            found = self.mask[begin:end].clone() if found is None else found | self.mask[begin:end]
        return found


def _own(begin: int, end: int, keys: int, device: torch.device) -> Tensor:
    return torch.arange(begin, end, device=device)[:, None] == torch.arange(keys, device=device)


class PositiveLists:
    """The positive columns of rows one after the other, without looking at all pairs."""

    def __init__(self, pairs: Pairs):
        self.pairs = pairs
        if pairs.labels is not None:
            found, self.order = pairs.key_labels.sort(stable=True)
            labels = pairs.labels.contiguous()
            self.begin = torch.searchsorted(found, labels)
            self.count = torch.searchsorted(found, labels, right=True) - self.begin
        elif pairs.positives is not None:
            # a column that is listed twice is one positive
            self.listed = pairs.positives.sort(1).values
            self.kept = self.listed >= 0
            self.kept[:, 1:] &= self.listed[:, 1:] != self.listed[:, :-1]

    def of(self, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """For rows from `begin` to `end`: the row less `begin` and the column of every positive, and their counts."""
        if self.pairs.labels is not None:
            count = self.count[begin:end]
            rows = torch.arange(end - begin, device=count.device).repeat_interleave(count)
            place = torch.arange(len(rows), device=count.device) - (count.cumsum(0) - count)[rows]
            columns = self.order[self.begin[begin:end][rows] + place]
        elif self.pairs.positives is not None:
            kept = self.kept[begin:end]
            rows, columns = kept.nonzero()[:, 0], self.listed[begin:end][kept]
            count = kept.sum(1)
        else:
            columns = torch.arange(begin, end)
            rows, count = columns - begin, torch.ones_like(columns)
        if self.pairs.exclude_self:
            other = columns != rows + begin
            rows, columns = rows[other], columns[other]
            count = torch.zeros_like(count).scatter_add_(0, rows, torch.ones_like(rows))
        return rows, columns, count
