"""Which steps are to be left out, noted on the device, so that the host does not wait for every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Flags:
    """Notes of the steps on one device. All of them can be taken within a CUDA graph.

    Attributes:
        bad: float32 0-d, 1 where the present step is to be left out, else 0.
    """

    def __init__(self, device: torch.device):
        self.bad, self._one = (torch.full((), n, device=device, dtype=torch.float32) for n in (0.0, 1.0))
        # steps left out since they were last read, in a row until now, and most in a row
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)

    def note_loss(self, loss: Tensor) -> None:
        """Note whether the loss of the step is not finite."""
        self.bad.copy_(~loss.detach().isfinite())

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


def first_not_finite(
    noted: Sequence[tuple[Sequence[str], Tensor]], numbers: Sequence[Sequence[int]] | None = None
) -> tuple[str, int] | None:
    """The first value that is not finite, as (name, batch). None: all are finite. Waits for the device.

    Args:
        noted: names and the values of some batches, [batches, names]. Of one batch the first counts.
        numbers: of these batches; None: from 0.

    >>> first_not_finite([(["a", "b"], torch.tensor([[1.0, 2.0], [3.0, float("inf")]]))])
    ('b', 1)
    """
    found = []
    for place, (names, values) in enumerate(noted):
        for name, wrong in zip(names, (~values.isfinite()).T.cpu(), strict=True):
            if wrong.any():
                row = int(wrong.nonzero()[0])
                found.append((row if numbers is None else numbers[place][row], place, name))
    return None if not found else min(found, key=lambda f: f[:2])[::-2]
