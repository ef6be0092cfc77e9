"""The resident loader: a split's frames lie on the device once, and batches are gathered and padded there.

A step costs a few kernel launches, on a CPU a part of one call: order, widths, labels and lengths of an epoch's
batches are made when it begins.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from engine.kernels.ragged import Source, pad_batches
from engine.loaders.batch import Batch
from engine.loaders.loader import Loader, widths


class ResidentLoader(Loader):
    """See `Loader`. The tensors are shared by all resident loaders of a split."""

    kind = "resident"

    def _batches(self, pieces: list[Tensor]) -> Iterator[Batch]:
        if not pieces:
            return
        split, padding = self.split, self.padding
        held = {key: split.tensors(key, self.device) for key in ("audio", "vision")}
        tokenised = split.tokens is not None
        text_key = "tokens" if tokenised else "features"
        text = split.text_rows(self._draw())
        if text is getattr(split, text_key):
            values, offsets = split.tensors(text_key, self.device)
        else:
            values, offsets = (torch.from_numpy(a).to(self.device) for a in (text.values, text.offsets))
        sizes, order = [len(piece) for piece in pieces], torch.cat(pieces)
        ids = np.array(split.ids, object)[order.numpy()].tolist()
        rows = order.to(self.device)
        fill, closing = (padding.pad_id, padding.closing_id) if tokenised else (0, -1)
        sources = [
            Source(*held["audio"]),
            Source(*held["vision"]),
            Source(values, offsets, fill, closing, padding.time_len),
            Source(None, offsets, most=padding.time_len),
        ]
        text_widths = widths(text, order.numpy(), sizes, padding.time_len, padding.text_width)
        frames = [widths(ragged, order.numpy(), sizes) for ragged in (split.audio, split.vision)]
        # what is small is taken for the whole epoch at once
        small = [rows, self.label[rows], *(_lengths(offsets, rows) for _, offsets in held.values())]
        parts = zip(*(tensor.split(sizes) for tensor in small), strict=True)
        start = 0
        padded = pad_batches(sources, rows, sizes, list(zip(*frames, text_widths, text_widths, strict=True)))
        for size, tensors, (index, label, *lengths) in zip(sizes, padded, parts, strict=True):
            audio, vision, words, mask = tensors
            token_ids, features = (words, None) if tokenised else (None, words)
            names = ids[start : start + size]
            yield Batch(index, names, label, token_ids, mask, features, audio, lengths[0], vision, lengths[1])
            start += size


def _lengths(offsets: Tensor, rows: Tensor) -> Tensor:
    return offsets[rows + 1] - offsets[rows]
