"""The resident loader: a split's frames lie on the device once, and batches are gathered and padded there.

A step costs a few kernel launches, on a CPU one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from engine.kernels.ragged import Source
from engine.loaders.batch import Batch
from engine.loaders.loader import FRAMES, Loader


class ResidentLoader(Loader):
    """See `Loader`. The tensors are shared by all resident loaders of a split."""

    kind = "resident"

    def _batches(self, pieces: list[Tensor]) -> Iterator[Batch]:
        held = partial(self.split.tensors, device=self.device)
        return self._gathered(pieces, [Source(*held(key)) for key in FRAMES], held)
