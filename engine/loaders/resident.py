"""The resident loader: a split's frames lie on the device once, and batches are gathered and padded there.

A batch costs a few kernel launches; on a CPU it costs one call.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from engine.loaders.batch import Batch
from engine.loaders.loader import FRAMES, Loader


class ResidentLoader(Loader):
    """See `Loader`. All resident loaders of a split share its tensors."""

    kind = "resident"

    def _batches(self, pieces: list[Tensor]) -> Iterator[Batch]:
        frames = [self.split.source(key, self.device) for key in FRAMES]
        return self._padded(pieces, frames, self.split.source("text", self.device, self._draw()))
