"""Values of every batch of an epoch, noted on the device by a static step and read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.step.finite_flags import first_not_finite


class Notes:
    """One row of values for every batch of an epoch that trains.

    The rows are numbered through all passes. What a pass notes can be read while later passes run, so that the host
    does not wait for the device between them.
    """

    def __init__(self, device: torch.device):
        self._device, self._rows = device, 0
        self._tables: dict[str, tuple[list[str], Tensor]] = {}
        self._passes: dict[int, str] = {}  # by the number of their first row

    def begin_epoch(self, rows: int) -> bool:
        """Forget what was noted. Returns whether the rows lie elsewhere now, because there was no room."""
        self._passes.clear()
        for _, table in self._tables.values():
            table.zero_()
        return self._reserve(rows)

    def begin_pass(self, stage: str, first: int, batches: int) -> bool:
        """Begin a pass whose batches have the rows from `first` on. Returns the same as `begin_epoch`."""
        self._passes[first] = stage
        return self._reserve(first + batches)

    def _reserve(self, rows: int) -> bool:
        if rows <= self._rows:
            return False
        for name, (names, table) in self._tables.items():
            longer = table.new_zeros(rows, len(names))
            longer[: self._rows] = table
            self._tables[name] = names, longer
        self._rows = rows
        return True

    def note(self, name: str, names: Sequence[str], values: Tensor, row: Tensor) -> None:
        """Keep the values [names] of a batch in a row (int64 [1], on the device). It is one small copy."""
        if name not in self._tables:
            table = torch.zeros(self._rows, len(names), dtype=values.dtype, device=self._device)
            self._tables[name] = list(names), table
        self._tables[name][1].index_copy_(0, row, values[None])

    def first_not_finite(self) -> tuple[str, int, str] | None:
        """The first value that is not finite, as (stage, number of the batch in its pass, name); None where all are.

        Waits for the device.
        """
        tables = list(self._tables.values())
        if not tables or bool(torch.stack([table.isfinite().all() for _, table in tables]).all()):
            return None
        name, row = first_not_finite(tables)
        first = max(number for number in self._passes if number <= row)
        return self._passes[first], row - first, name
