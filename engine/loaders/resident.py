"""The resident loader: a split's frames lie on the device once, and batches are gathered and padded there.

A step costs a few kernel launches and no work on the host that grows with the batch: order and widths of an epoch's
batches are known when it begins.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.kernels.ragged import pad
from engine.loaders.batch import Batch
from engine.loaders.loader import Loader, pad_text, widths


class ResidentLoader(Loader):
    """See `Loader`. The tensors are shared by all resident loaders of a split."""

    kind = "resident"

    def _batches(self, pieces: list[Tensor]) -> Iterator[Batch]:
        if not pieces:
            return
        split, padding = self.split, self.padding
        held = {key: split.tensors(key, self.device) for key in ("audio", "vision")}
        text_key = "tokens" if split.tokens is not None else "features"
        text = split.text_rows(self._draw())
        if text is getattr(split, text_key):
            values, offsets = split.tensors(text_key, self.device)
        else:
            values, offsets = (torch.from_numpy(a).to(self.device) for a in (text.values, text.offsets))
        tokens, features = (values, None) if text_key == "tokens" else (None, values)
        order = torch.cat(pieces).to(self.device)
        sizes = zip(
            widths(split.audio, pieces),
            widths(split.vision, pieces),
            widths(text, pieces, padding.time_len, padding.text_width),
            strict=True,
        )
        start = 0
        for piece, (audio, vision, text_width) in zip(pieces, sizes, strict=True):
            rows = order[start : start + len(piece)]
            start += len(piece)
            yield self._batch(
                piece,
                rows,
                pad_text(tokens, features, offsets, rows, text_width, padding),
                pad(*held["audio"], rows, audio),
                pad(*held["vision"], rows, vision),
            )
