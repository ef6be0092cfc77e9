"""What every loader is: an iterable of batches, one epoch an iteration, whichever way the batches are made.

`resident`, `dali` and `torch` loaders give the same batches, bit for bit, for the same seed and epoch; they differ in
where the frames lie and who gathers them.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from engine.errors import CheckpointError, ConfigError
from engine.kernels.ragged import Source, pad, pad_batches
from engine.loaders.batch import Batch
from engine.loaders.sampler import Sampler

if TYPE_CHECKING:
    from engine.loaders.augment import Augmentation
    from engine.loaders.dataset import Split

Kind = Literal["auto", "resident", "dali", "torch"]
FRAMES = ("audio", "vision")
SHARE = 0.5  # of the free memory that `auto` gives to resident frames

log = logging.getLogger("engine")


@dataclass(frozen=True)
class Padding:
    """How sequences of a batch are padded.

    Attributes:
        time_len: cap on text tokens and text features.
        pad_id, closing_id: what fills token ids, and the token that a cut text keeps at its end (-1: none).
        text_width: width of the text's axis; None pads to the longest of the batch.
    """

    time_len: int
    pad_id: int
    closing_id: int
    text_width: int | None = None


class Loader:
    """Batches of one split; each iteration is one epoch of the order that `set_epoch` chose.

    Attributes:
        kind: resident, dali or torch.
        why: why it was chosen, in words.
        draws_words: texts change from epoch to epoch.
    """

    kind: str

    def __init__(
        self,
        split: Split,
        sampler: Sampler,
        padding: Padding,
        label: Tensor,
        device: torch.device | str = "cpu",
        augmentation: Augmentation | None = None,
        draw_words: bool = False,
        why: str = "",
    ):
        self.draws_words = draw_words and split.draws_words
        self.split, self.sampler, self.padding, self.why = split, sampler, padding, why
        self.device, self.augmentation = torch.device(device), augmentation
        self.label = label.to(self.device)
        self._epoch, self._start, self._delivered = 0, 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; it begins at the first batch."""
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
        """The position: plain values. Batches that were made ahead but not handed out do not count."""
        return {"epoch": self._epoch, "batch": self._delivered, "sampler": self.sampler.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken: the next iteration gives the rest of that epoch, the ones after it whole
        epochs.

        Raises:
            CheckpointError: the position is one of other data or another order.
        """
        own = self.sampler.state()
        wrong = [k for k, v in own.items() if state["sampler"].get(k) != v]
        if wrong:
            raise CheckpointError(
                "loader position",
                ", ".join(f"{k} {state['sampler'].get(k)}" for k in wrong),
                ", ".join(f"{k} {own[k]}" for k in wrong),
                "Use the data and the settings that it was taken with.",
            )
        self._epoch, self._start = int(state["epoch"]), int(state["batch"])
        self._delivered = self._start

    # what the kinds share

    def _gathered(
        self,
        pieces: list[Tensor],
        frames: Sequence[Source] | Iterator[Sequence[Tensor]],
        held: Callable[[str], tuple[Tensor, Tensor]],
    ) -> Iterator[Batch]:
        """The batches of rows `pieces`. Order, widths, labels and lengths of all of them are made at once.

        Args:
            frames: audio and vision: where this process gathers them from, or batch by batch, on the loader's device.
            held: values and offsets of the split's `tokens` or `features`, on the device of the frames to gather; on
                any where there are none.
        """
        if not pieces:
            return
        split, padding = self.split, self.padding
        tokenised = split.tokens is not None
        text_key = "tokens" if tokenised else "features"
        text = split.text_rows(self._draw())
        if text is getattr(split, text_key):
            values, offsets = held(text_key)
        else:
            values, offsets = (torch.from_numpy(a).to(self.device) for a in (text.values, text.offsets))
        fill, closing = (padding.pad_id, padding.closing_id) if tokenised else (0, -1)
        sources = [
            Source(values, offsets, fill, closing, padding.time_len),
            Source(None, offsets, most=padding.time_len),
        ]
        sizes, rows = [len(piece) for piece in pieces], torch.cat(pieces)
        order = rows.numpy()
        ids = np.array(split.ids, object)[order].tolist()
        lengths = [split.lengths(key)[order] for key in FRAMES]
        text_widths = widths(text.lengths[order], sizes, padding.time_len, padding.text_width)
        of_batches = [text_widths, text_widths]
        if isinstance(frames, Sequence):
            sources = [*frames, *sources]
            of_batches = [*(widths(n, sizes) for n in lengths), *of_batches]
            frames = itertools.repeat(())
        rows = rows.to(self.device)
        small = [rows, self.label[rows], *(torch.from_numpy(n).to(self.device) for n in lengths)]
        parts = zip(*(tensor.split(sizes) for tensor in small), strict=True)
        padded = pad_batches(sources, rows.to(values.device), sizes, list(zip(*of_batches, strict=True)))
        start = 0
        for size, tensors, made, (index, label, *length) in zip(sizes, padded, frames, parts, strict=False):
            audio, vision, words, mask = *made, *(t.to(self.device, non_blocking=True) for t in tensors)
            token_ids, features = (words, None) if tokenised else (None, words)
            names = ids[start : start + size]
            yield Batch(index, names, label, token_ids, mask, features, audio, length[0], vision, length[1])
            start += size

    def _draw(self) -> tuple[int, int] | None:
        """What words are drawn with this epoch (see `Split.text_rows`)."""
        return (self.sampler.seed, self._epoch) if self.draws_words else None

    def _batch(self, piece: Tensor, rows: Tensor, text: Text, audio: Padded, vision: Padded) -> Batch:
        """`piece` are the rows on the host, `rows` on the device."""
        ids = self.split.ids
        return Batch(
            rows, [ids[i] for i in piece.tolist()], self.label[rows], text.token_ids, text.mask, text.features,
            *audio, *vision,
        )  # fmt: skip


Padded = tuple[Tensor, Tensor]  # sequences [B, L, d] and lengths [B]


@dataclass
class Text:
    token_ids: Tensor | None
    mask: Tensor
    features: Tensor | None


def widths(lengths: np.ndarray, sizes: Sequence[int], cap: int | None = None, width: int | None = None) -> list[int]:
    """The width of every batch's tensor: that of its longest sequence (at most `cap`), or `width`.

    Args:
        lengths: of the sequences of all batches, end to end. sizes: rows of each batch.
    """
    if width is not None:
        return [width] * len(sizes)
    longest = np.maximum.reduceat(lengths, np.cumsum([0, *sizes[:-1]]))
    return np.maximum(longest if cap is None else np.minimum(longest, cap), 1).tolist()


def checked(batches: Iterator[Batch], check: Callable[[], None]) -> Iterator[Batch]:
    """The same batches; `check` is called before one is made and after it."""
    while True:
        check()
        batch = next(batches, None)
        check()
        if batch is None:
            return
        yield batch


def pad_text(
    tokens: Tensor | None, features: Tensor | None, offsets: Tensor, rows: Tensor, width: int, padding: Padding
) -> Text:
    """Text of a batch: token ids cut to the width with their closing token kept, or precomputed features."""
    cut = min(width, padding.time_len)
    values = features if tokens is None else tokens
    fill, closing = (0, -1) if tokens is None else (padding.pad_id, padding.closing_id)
    out, length = pad(values, offsets, rows, cut, fill=fill, closing=closing)
    if cut < width:
        out = torch.nn.functional.pad(
            out, (0, width - cut) if tokens is not None else (0, 0, 0, width - cut), value=fill
        )
    mask = (torch.arange(width, device=out.device) < length[:, None]).long()
    return Text(None, mask, out) if tokens is None else Text(out, mask, None)


# -- which kind ------------------------------------------------------------------------------------


def has_dali() -> bool:
    """Whether NVIDIA DALI is installed; does not import it."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device: of a GPU what CUDA says, else what the system calls available, within
    the limit of a container; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    if not found and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found) if found else None


def choose(kind: Kind, size: int, device: torch.device) -> tuple[str, str]:
    """(kind, why) for frames of `size` bytes.

    Raises:
        ConfigError: dali where it is not installed.
    """
    if kind == "dali" and not has_dali():
        raise ConfigError(
            "data.loader", "dali, which is not installed", "auto, resident or torch", "pip install 'engine[dali]'."
        )
    if kind != "auto":
        return kind, "as data.loader says"
    free = free_memory(device)
    frames = f"{size / 1e6:.0f} MB of frames"
    if free is None or size <= SHARE * free:
        room = "" if free is None else f" fit into the {free / 1e6:.0f} MB free on {device.type}"
        return "resident", frames + room
    why = f"{frames} do not fit into {SHARE:.0%} of the {free / 1e6:.0f} MB free on {device.type}"
    if device.type == "cpu":
        return "torch", f"{why}, and without a GPU it is faster than dali"
    if sys.platform == "linux" and has_dali():
        return "dali", why
    return "torch", f"{why}, and DALI is not installed"


def build(kind: str, *args: Any, workers: int | None = None, **options: Any) -> Loader:
    """The loader of a kind."""
    if kind == "resident":
        from engine.loaders.resident import ResidentLoader

        return ResidentLoader(*args, **options)
    if kind == "dali":
        from engine.loaders.dali import DaliLoader

        return DaliLoader(*args, workers=workers, **options)
    from engine.loaders.torch import TorchLoader

    return TorchLoader(*args, workers=workers, **options)
