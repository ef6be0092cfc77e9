"""Where a static step reads its batches: buffers whose addresses and shapes stay the same while the step is replayed.

`ResidentFeed` gathers and pads a batch by its row numbers, from a split that lies on the device. `CopyFeed` copies the
finished batches of any loader into buffers. Both pad to one of a few widths (buckets), so that a step has few shapes.
Both name a batch's shape by a key: (rows, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from engine.errors import ConfigError
from engine.kernels.ragged import Source, pad
from engine.loaders.batch import Batch
from engine.loaders.loader import FRAMES, Loader, widths

BUCKETS = 4
ROUNDED_TO = 8  # tensor cores and fused attention like widths that are multiples of it
SAMPLED_EPOCHS = 4  # the buckets are chosen from the batches of so many epochs

Key = tuple[Hashable, ...]


class Feed(Protocol):
    """One training set as static batches."""

    def steps(self) -> Iterator[Key]:
        """One pass. Yields the key of every batch once its data can be read; the key's first entry is the number of
        rows.
        """

    def batch(self, key: Key, number: Tensor) -> tuple[Any, Tensor, Tensor]:
        """(inputs, target, index) of the pass's batch `number` (int64 [1], on the device). May be called inside a
        graph.
        """


def send(to: Tensor, values: Tensor) -> None:
    """Copy values of the host into a buffer on the device, without waiting for what the device does."""
    to.copy_(values.pin_memory() if to.is_cuda and not values.is_cuda else values, non_blocking=True)


class Buckets:
    """A few combinations of widths. Each one holds all smaller ones.

    Args:
        longest: int64 [batches, m], the longest of m sequences in each of some typical batches.
        most: int64 [m], the longest that can occur.
        count: largest number of buckets.
    """

    def __init__(self, longest: np.ndarray, most: np.ndarray, count: int = BUCKETS):
        shares = np.arange(1, count) / count
        typical = np.quantile(longest, shares, axis=0, method="higher") if len(longest) else np.empty((0, len(most)))
        rounded = -(-typical.astype(np.int64) // ROUNDED_TO) * ROUNDED_TO
        self.levels = np.unique(np.vstack([np.minimum(rounded, most), most]), axis=0)

    def __len__(self) -> int:
        return len(self.levels)

    def of(self, longest: Iterable[int]) -> int:
        """The number of the smallest bucket that holds sequences of these lengths.

        Raises:
            ConfigError: no bucket does.
        """
        return self.of_each(np.array([list(longest)]))[0]

    def of_each(self, longest: np.ndarray) -> list[int]:
        """The same for many batches at once: int [batches, m]."""
        fits = (longest[:, None] <= self.levels).all(2)
        if not fits[:, -1].all():
            found = longest[fits[:, -1].argmin()].tolist()
            raise ConfigError(
                "batch", f"sequences of up to {found} positions", f"at most {self.levels[-1].tolist()}",
                "Open the data whose longest sequences the step was built for.",
            )  # fmt: skip
        return fits.argmax(1).tolist()


def buckets_of(loader: Loader) -> Buckets:
    """Buckets of text, audio and vision widths for the batches of `loader`."""
    lengths = _lengths(loader)
    columns = [[] for _ in lengths]
    for epoch in range(SAMPLED_EPOCHS if loader.sampler.shuffle else 1):
        pieces = loader.sampler.batches(epoch)
        order, sizes = torch.cat(pieces).numpy(), [len(piece) for piece in pieces]
        for column, length in zip(columns, lengths, strict=True):
            column += widths(length[order], sizes)
    return Buckets(np.array(columns).T, np.array([length.max() for length in lengths]))


def _lengths(loader: Loader) -> list[np.ndarray]:
    """Positions of every sample's text (a fixed width, if there is one), audio and vision."""
    split, padding = loader.split, loader.padding
    text = np.clip(split.text_rows().lengths, 1, padding.time_len)
    if padding.text_width is not None:
        text = np.full_like(text, padding.text_width)
    return [text, *(np.maximum(split.lengths(key), 1) for key in FRAMES)]


class ResidentFeed:
    """Batches gathered from a resident split by row numbers that lie on the device.

    Args:
        loader: a resident loader.
        begin: starts a pass and returns its batches' rows, the number of the loader's epoch, and that of the first
            batch that is left.
        exact: also give the widths that a batch would have without buckets. The published mathematics depend on them.
    """

    def __init__(self, loader: Loader, begin: Callable[[], tuple[list[Tensor], int, int]], exact: bool = False):
        self._loader, self._begin, self._exact = loader, begin, exact
        split, device = loader.split, loader.device
        self._frames = [split.source(key, device) for key in FRAMES]
        self._text, _ = loader.padding.text(split.source("text", device))
        self._lengths = np.stack(_lengths(loader), 1)
        self._buckets = buckets_of(loader)
        size = loader.sampler.batch_size
        self._order = torch.zeros(-(-len(split) // size), size, dtype=torch.int64, device=device)
        augmentation = loader.augmentation
        self._keys = (
            None if augmentation is None else torch.zeros(augmentation.STREAMS, dtype=torch.int64, device=device)
        )

    def steps(self) -> Iterator[Key]:
        pieces, epoch, first = self._begin()
        order = torch.zeros(self._order.shape, dtype=torch.int64)
        lengths = np.array([len(piece) for piece in pieces])
        if pieces:
            inside = np.arange(order.shape[1]) < lengths[:, None]
            order.numpy()[: len(pieces)][inside] = torch.cat(pieces).numpy()
        send(self._order, order)
        if self._keys is not None:
            send(self._keys, torch.tensor(self._loader.augmentation.keys(epoch)))
        if pieces[first:]:
            starts = np.cumsum(lengths[first:]) - lengths[first:]
            longest = np.maximum.reduceat(self._lengths[torch.cat(pieces[first:]).numpy()], starts, axis=0)
            yield from zip(lengths[first:].tolist(), self._buckets.of_each(longest), strict=True)

    def batch(self, key: Key, number: Tensor) -> tuple[Batch, Tensor, Tensor]:
        size, bucket = key
        rows = self._order.index_select(0, number)[0, :size]
        text_width, *frame_widths = self._buckets.levels[bucket].tolist()
        audio, vision = (_padded(source, rows, width) for source, width in zip(self._frames, frame_widths, strict=True))
        text, text_length = _padded(self._text, rows, text_width)
        mask = (torch.arange(text_width, device=rows.device) < text_length[:, None]).long()
        label = self._loader.label.index_select(0, rows)
        batch = Batch.of(rows, [""] * size, label, (text, mask), audio, vision, static=True)
        if self._exact:
            batch.audio_width, batch.vision_width = batch.audio_length.amax(), batch.vision_length.amax()
        if self._keys is not None:
            batch = self._loader.augmentation.apply(batch, self._keys)
        return batch, batch.label, batch.index


def _padded(source: Source, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Sequences `rows` padded to `width`, and their lengths. Nothing is read on the host."""
    cut = min(width, source.most)
    out, length = pad(source.values, source.offsets, rows, cut, fill=source.fill, closing=source.closing)
    if cut < width:
        out = pad_tensor(out, (*[0] * (2 * out.dim() - 4), 0, width - cut), value=source.fill)
    return out, length


class CopyFeed:
    """Batches of any loader, copied into one set of buffers per shape.

    Args:
        batches: starts a pass: an iterable of `Batch` or (inputs, target, index), inputs a tensor or a nest of them.
        device: where the buffers are.
        buckets: of text, audio and vision widths, for `Batch`es. None: buffers have the batches' own shapes.
        exact: as for `ResidentFeed`.
    """

    def __init__(
        self,
        batches: Callable[[], Iterable[Batch | tuple]],
        device: torch.device,
        buckets: Buckets | None = None,
        exact: bool = False,
    ):
        self._batches, self._device, self._buckets, self._exact = batches, device, buckets, exact
        self._held: dict[Key, Any] = {}

    def steps(self) -> Iterator[Key]:
        for item in self._batches():
            yield self._take_batch(item) if isinstance(item, Batch) else self._take(item)

    def batch(self, key: Key, number: Tensor) -> tuple[Any, Tensor, Tensor]:
        held = self._held[key]
        return (held, held.label, held.index) if isinstance(held, Batch) else held

    def _take(self, item: tuple) -> Key:
        leaves, spec = tree_flatten(item)
        others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        if others:
            raise ConfigError(
                "a static step's batch", f"{type(others[0]).__name__} among its inputs", "tensors alone",
                "Give tensors, or train without graphs.",
            )  # fmt: skip
        key = (len(item[1]), *(((*t.shape,), t.dtype) for t in leaves), str(spec))
        if key not in self._held:
            self._held[key] = tree_unflatten([torch.empty_like(t, device=self._device) for t in leaves], spec)
        for held, leaf in zip(tree_flatten(self._held[key])[0], leaves, strict=True):
            held.copy_(leaf, non_blocking=True)
        return key

    def _take_batch(self, batch: Batch) -> Key:
        widest = [(batch.text if batch.token_ids is None else batch.token_ids).shape[1]]
        widest += [batch.audio.shape[1], batch.vision.shape[1]]
        bucket = None if self._buckets is None else self._buckets.of(widest)
        size = len(batch)
        key = (size, *widest) if bucket is None else (size, bucket)
        text_width, audio_width, vision_width = widest if bucket is None else self._buckets.levels[bucket].tolist()
        width = {
            "token_ids": text_width, "token_mask": text_width, "text": text_width, "audio": audio_width,
            "vision": vision_width,
        }  # fmt: skip
        tensors = {f.name: t for f in fields(batch) if isinstance(t := getattr(batch, f.name), Tensor)}
        if self._exact:
            lengths = {"audio_width": widest[1], "vision_width": widest[2]}
            tensors |= {name: torch.tensor(n) for name, n in lengths.items()}
        if key not in self._held:
            held = {
                name: t.new_zeros(
                    (len(t), width[name], *t.shape[2:]) if name in width else t.shape, device=self._device
                )
                for name, t in tensors.items()
            }
            self._held[key] = replace(batch, ids=[""] * size, packed=None, static=True, **held)
        for name, tensor in tensors.items():
            held = getattr(self._held[key], name)
            if name in width and tensor.shape[1] < width[name]:
                held.zero_()
                held = held[:, : tensor.shape[1]]
            held.copy_(tensor, non_blocking=True)
        return key
