"""Which steps were not finite, noted on the device, so that the host does not wait for every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Flags:
    """Notes of the steps on one device. All of them can be taken within a CUDA graph.

    Attributes:
        bad: float32 0-d, 1 where the present step is to be left out, else 0.
        number: int64 [1], the present batch.
    """

    def __init__(self, device: torch.device):
        self.bad, self._one = torch.zeros((), device=device), torch.ones((), device=device)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)
        # steps left out since they were last read, in a row until now, and most in a row
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._first: dict[tuple[str, ...], Tensor] = {}

    def note_losses(self, names: Sequence[str], values: Tensor) -> None:
        """Note which of a step's losses [names] are not finite."""
        key = tuple(names)
        if key not in self._first:
            self._first[key] = torch.full_like(values, -1, dtype=torch.int64)
        wrong, first = ~values.isfinite(), self._first[key]
        self.bad.copy_(wrong.any())
        first.copy_(torch.where(wrong & (first < 0), self.number, first))

    def note_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Note whether a gradient of the step is not finite."""
        for tensors in by_kind(gradients):
            torch._amp_foreach_non_finite_check_and_unscale_(tensors, self.bad, self._one)

    def count(self) -> None:
        """Count the step, if it is left out."""
        left = self.bad.long()
        in_a_row = (self._counts[1] + left) * left
        most = torch.maximum(self._counts[2], in_a_row)
        self._counts.copy_(torch.stack([self._counts[0] + left, in_a_row, most]))

    def read_first(self) -> tuple[str, int] | None:
        """The first loss that was not finite, and its batch; None: all were. Waits for the device, and begins anew."""
        found = [
            (number, name)
            for names, first in self._first.items()
            for name, number in zip(names, first.tolist(), strict=True)
            if number >= 0
        ]
        for first in self._first.values():
            first.fill_(-1)
        return None if not found else min(found, key=lambda pair: pair[0])[::-1]

    def read_counts(self) -> tuple[int, int]:
        """Steps left out since the last reading, and the most in a row. Waits for the device."""
        left, in_a_row, most = self._counts.tolist()
        self._counts.copy_(torch.tensor([0, in_a_row, in_a_row]))
        return left, most


def by_kind(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Dense values in groups of one device and type."""
    of_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        dense = tensor.coalesce().values() if tensor.is_sparse else tensor
        of_kind.setdefault((dense.device, dense.dtype), []).append(dense)
    return list(of_kind.values())
