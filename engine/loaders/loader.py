"""What every loader is: an iterable of batches, one epoch per iteration.

All loaders give the same batches, bit for bit, for the same seed and epoch. They differ in where the frames lie and in
who gathers them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.kernels.ragged import Source, pad_batches
from engine.loaders.batch import Batch
from engine.loaders.sampler import Sampler
from engine.vocabulary import ModelTask

if TYPE_CHECKING:
    from engine.loaders.augment import Augmentation
    from engine.loaders.split import Split

FRAMES = ("audio", "vision")


@dataclass(frozen=True)
class Padding:
    """How sequences of a batch are padded.

    Attributes:
        time_len: cap on text tokens and text features.
        pad_id: fills token ids. closing_id: the token that a cut text keeps at its end; -1: none.
        text_width: width of the text's axis; None pads to the longest of the batch.
    """

    time_len: int
    pad_id: int
    closing_id: int
    text_width: int | None = None

    def text(self, source: Source) -> tuple[Source, Source]:
        """Tokens or text features with their padding, and the source of their mask."""
        tokens = not source.values.is_floating_point()
        fill, closing = (self.pad_id, self.closing_id) if tokens else (0, -1)
        text = replace(source, fill=fill, closing=closing, most=self.time_len)
        return text, Source(None, source.offsets, most=self.time_len)


class Loader:
    """Batches of one split. Each iteration is one epoch, in the order that `set_epoch` chose.

    Attributes:
        kind: name of the subclass, as `data.loader` has it.
        why: why this kind was chosen, in words.
        draws_words: texts change from epoch to epoch.
    """

    kind: str

    def __init__(
        self,
        split: Split,
        sampler: Sampler,
        padding: Padding,
        device: torch.device | str = "cpu",
        augmentation: Augmentation | None = None,
        draw_words: bool = False,
        task: ModelTask = "regression",
        why: str = "",
    ):
        self.draws_words = draw_words and split.draws_words
        self.split, self.sampler, self.padding, self.why = split, sampler, padding, why
        self.device, self.augmentation = torch.device(device), augmentation
        self.label = split.labels(task).to(self.device)
        self._ids = np.array(split.ids, object)
        self._epoch, self._start, self._delivered = 0, 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, which begins at the first batch."""
        if epoch != self._epoch:
            self._start = self._delivered = 0
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler.batches(self._epoch))

    def __iter__(self) -> Iterator[Batch]:
        pieces, start = self.sampler.batches(self._epoch), self._start
        epoch, self._start, self._delivered = self._epoch, 0, start
        for batch in self._batches(pieces[start:]):
            self._delivered += 1
            if self.augmentation is not None:
                batch = self.augmentation.apply(batch, self.augmentation.keys(epoch))
            yield batch

    def _batches(self, pieces: list[Tensor]) -> Iterator[Batch]:
        """The batches of rows `pieces`, on the loader's device."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain values. Batches that were made ahead but not handed out do not count."""
        return {"epoch": self._epoch, "batch": self._delivered, "sampler": self.sampler.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken: the next iteration gives the rest of that epoch, later ones whole epochs.

        Raises:
            CheckpointError: it is no position, or belongs to other data or another order.
        """
        own = self.sampler.state()
        if not isinstance(state, dict) or not {"sampler", "epoch", "batch"} <= set(state):
            found = f"a {type(state).__name__} without sampler, epoch and batch"
            raise CheckpointError("loader position", found, "what state_dict gave", "Use it as it was.")
        wrong = [k for k, v in own.items() if state["sampler"].get(k) != v]
        if wrong:
            raise CheckpointError(
                "loader position", ", ".join(f"{k} {state['sampler'].get(k)}" for k in wrong),
                ", ".join(f"{k} {own[k]}" for k in wrong), "Use the data and the settings that it was taken with.",
            )  # fmt: skip
        self._epoch, self._start = int(state["epoch"]), int(state["batch"])
        self._delivered = self._start

    # what the kinds share

    def _padded(
        self,
        pieces: list[Tensor],
        frames: Sequence[Source] | Iterator[Sequence[Tensor]],
        text: Source,
        text_lengths: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        """The padded batches of rows `pieces`. Order, widths, labels and lengths of all batches are made at once.

        Args:
            frames: audio and vision. Either sources, or one pair of padded tensors per batch on the loader's device.
            text: tokens or features. They are padded where they lie.
            text_lengths: given if the sources hold only the rows of `pieces`, one after another; None if they hold the
                whole split.
        """
        if not pieces:
            return
        padding, sizes, rows = self.padding, [len(piece) for piece in pieces], torch.cat(pieces)
        order = rows.numpy()
        ids = self._ids[order].tolist()
        lengths = [self.split.lengths(key)[order] for key in FRAMES]
        whole = text_lengths is None
        if whole:
            text_lengths = self.split.text_rows(self._draw()).lengths[order]
        text_widths = widths(text_lengths, sizes, padding.time_len, padding.text_width)
        sources, of_batches = [*padding.text(text)], [text_widths, text_widths]
        if isinstance(frames, Sequence):
            sources, of_batches = [*frames, *sources], [*(widths(n, sizes) for n in lengths), *of_batches]
            frames = itertools.repeat(())
        index = rows.to(self.device, non_blocking=True)
        small = [index, self.label[index], *(torch.from_numpy(n).to(self.device) for n in lengths)]
        parts = zip(*(tensor.split(sizes) for tensor in small), strict=True)
        places = rows if whole else torch.arange(len(rows))
        padded = pad_batches(sources, places.to(text.values.device), sizes, list(zip(*of_batches, strict=True)))
        start = 0
        for size, tensors, made, (index, label, *length) in zip(sizes, padded, frames, parts, strict=False):
            audio, vision, *words = *made, *(t.to(self.device, non_blocking=True) for t in tensors)
            names = ids[start : start + size]
            yield Batch.of(index, names, label, tuple(words), (audio, length[0]), (vision, length[1]))
            start += size

    def _draw(self) -> tuple[int, int] | None:
        """Seed and epoch of the words that are drawn (see `Split.text_rows`)."""
        return (self.sampler.seed, self._epoch) if self.draws_words else None


def widths(lengths: np.ndarray, sizes: Sequence[int], cap: int | None = None, width: int | None = None) -> list[int]:
    """The width of every batch's tensor: that of its longest sequence (at most `cap`), or `width`.

    Args:
        lengths: of the sequences of all batches, end to end. sizes: rows of each batch.

    >>> widths(np.array([3, 5, 2]), [2, 1])
    [5, 2]
    """
    if width is not None:
        return [width] * len(sizes)
    longest = np.maximum.reduceat(lengths, np.cumsum([0, *sizes[:-1]]))
    return np.maximum(longest if cap is None else np.minimum(longest, cap), 1).tolist()


def checked(batches: Iterator[Batch], check: Callable[[], None]) -> Iterator[Batch]:
    """The same batches. `check` is called before and after each one is made."""
    while True:
        check()
        batch = next(batches, None)
        check()
        if batch is None:
            return
        yield batch
