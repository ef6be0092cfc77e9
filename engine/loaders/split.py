"""One split of a data set, in the form that every loader takes: sequences end to end, and how frames are normalised."""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from engine.errors import DataError
from engine.kernels.ragged import Source
from engine.loaders.content import SplitData
from engine.loaders.normalize import Normalizer
from engine.loaders.ragged import Ragged
from engine.loaders.text import Tokenizer
from engine.vocabulary import ModelTask

Modality = Literal["audio", "vision"]
Part = Literal["audio", "vision", "text"]
Draw = tuple[int, int]  # seed and epoch of the words that are drawn


class Split:
    """One split, normalised, in file order.

    A loader gets sequences in two ways. `rows` gives those of some samples. `source` gives all of them as the padding
    kernel takes them: on a device, or where they lie in the store. Both give the same numbers.

    Attributes:
        ids: N names. text: N transcripts ("" where the data has none).
        label: float32 [N, 1]; NaN where a sample has none.
        tokens: ragged int32 or None; features: ragged float32 or None.
        precision: dtype of normalised frames, "float32" or "float16".
    """

    def __init__(
        self,
        data: SplitData,
        normalizer: Normalizer,
        tokenizer: Tokenizer | None,
        draws_words: bool = False,
        cut: int | None = None,
        precision: str = "float32",
    ):
        self._data, self._normalizer, self._cut, self.precision = data, normalizer, cut, precision
        self._draws_with = tokenizer if draws_words else None
        self._drawn: tuple[Draw, Ragged] | None = None
        self._shortened: dict[str, Ragged] = {}  # frames cut to `cut`
        self._on_device: dict[tuple[str, torch.device], Source] = {}
        tokenised = tokenizer is not None
        self.ids = data.ids
        self.text = data.text if data.text is not None else [""] * len(data)
        self.label = torch.from_numpy(np.array(data.label, np.float32))
        self.tokens = data.tokens if tokenised else None
        self.features = None if tokenised else data.features

    def __len__(self) -> int:
        return len(self.ids)

    def __getstate__(self) -> dict[str, Any]:
        """Another process makes its own normalised frames and tensors."""
        return {k: v for k, v in self.__dict__.items() if k not in ("audio", "vision")} | {"_on_device": {}}

    @cached_property
    def audio(self) -> Ragged:
        """All normalised frames in memory, made on first use."""
        return self._all_rows("audio")

    @cached_property
    def vision(self) -> Ragged:
        """All normalised frames in memory, made on first use."""
        return self._all_rows("vision")

    @property
    def draws_words(self) -> bool:
        """Whether `text_rows` depends on `draw`."""
        return self._draws_with is not None

    def labels(self, task: ModelTask) -> Tensor:
        """float32 [N, 1] for regression; class numbers int64 [N] for classification, -1 where a sample has none.

        Raises:
            DataError: a label is not a class number.
        """
        if task == "regression":
            return self.label
        label = self.label[:, 0].nan_to_num(-1.0)
        wrong = torch.nonzero(~self.label[:, 0].isnan() & ((label != label.round()) | (label < 0)))
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"label, row {row} (id {self.ids[row]})", f"{float(label[row]):g}", "a class number 0, 1, 2, ...",
                "Use model.task=regression, or name the labels that hold classes (data.label_key, data.label_column).",
            )  # fmt: skip
        return label.long()

    def lengths(self, key: Modality) -> np.ndarray:
        """Frames of every sample, int64 [N]."""
        lengths = getattr(self._data, key).lengths
        return lengths if self._cut is None else np.minimum(lengths, self._cut)

    def text_rows(self, draw: Draw | None = None) -> Ragged:
        """Tokens or text features of all samples. Where the data draws words (AVEC2019), those of `draw`."""
        if self.tokens is None:
            self.check()
            return self.features
        if self._draws_with is None or draw is None:
            return self.tokens
        if self._drawn is None or self._drawn[0] != draw:
            self._drawn = (draw, self._draws_with.encode(self.text, True, *draw))
        return self._drawn[1]

    def rows(self, key: Part, index: np.ndarray, draw: Draw | None = None) -> list[np.ndarray]:
        """Sequences of some samples. Frames are normalised, in this split's precision.

        They may be views of the store: copy them at once, and call `check` then.

        Raises:
            DataError: the store has changed since it was opened, or float16 cannot hold a value.
        """
        if key == "text":
            return self.text_rows(draw).pieces(index)
        self.check()
        stored, column = self._stored(key), getattr(self._normalizer, key)
        if column.keeps(stored.values, self._dtype):
            return stored.pieces(index)
        copy = stored.take(index)
        self.check()
        return Ragged(column.apply(copy.values, self._dtype, owned=True), copy.offsets).pieces()

    def _all_rows(self, key: Modality) -> Ragged:
        stored, column = self._stored(key), getattr(self._normalizer, key)
        return Ragged(column.apply(stored.values, self._dtype, self.check), np.asarray(stored.offsets))

    @property
    def _dtype(self) -> type:
        return np.float16 if self.precision == "float16" else np.float32

    @property
    def normalises_in_place(self) -> bool:
        """Whether the padding kernel can normalise stored frames. A logarithm and float16 need numpy."""
        return self.precision == "float32" and not (self._normalizer.audio.log or self._normalizer.vision.log)

    def source(self, key: Part, device: torch.device | None = None, draw: Draw | None = None) -> Source:
        """All sequences as the padding kernel takes them.

        Args:
            device: where normalised copies are put, on first use. None gives what is stored, where it lies, and how
                frames are to be scaled. Only where `normalises_in_place`. The caller calls `check` before the source is
                read and after it.

        Raises:
            DataError: the store has changed since it was opened, or has another number of columns than train.
        """
        text = self.text_rows(draw) if key == "text" else None
        if text is not None and (device is None or draw is not None):
            return _as_source(text, device)
        if device is None:
            stored = self._stored(key)
            return _as_source(stored, None, getattr(self._normalizer, key).linear(stored.values))
        if (key, device) not in self._on_device:
            ragged = getattr(self, key) if text is None else text
            self.check()
            owned = Ragged(_owned(ragged.values), _owned(ragged.offsets))
            self.check()
            self._on_device[key, device] = _as_source(owned, device)
        return self._on_device[key, device]

    def check(self) -> None:
        """Raise DataError if the store has changed since it was opened."""
        self._data.check()

    @property
    def frame_bytes(self) -> int:
        """Memory that the resident loader needs for this split; 0 if it has it already."""
        if any(key == "audio" for key, _ in self._on_device) or "audio" in self.__dict__:
            return 0
        numbers = sum(int(self.lengths(k).sum()) * getattr(self._data, k).dim for k in ("audio", "vision"))
        return numbers * np.dtype(self._dtype).itemsize

    def _stored(self, key: Modality) -> Ragged:
        """Frames as they are stored, cut."""
        stored = getattr(self._data, key)
        if self._cut is None:
            return stored
        if key not in self._shortened:
            self._shortened[key] = stored.cut(self._cut)
        return self._shortened[key]


def _as_source(
    ragged: Ragged, device: torch.device | None, scale: tuple[Tensor, Tensor, float] | None = None
) -> Source:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of read-only arrays; nobody writes to these
        values, offsets = torch.from_numpy(ragged.values), torch.from_numpy(ragged.offsets)
    if device is not None:
        values, offsets = values.to(device), offsets.to(device)
    return Source(values, offsets, scale=scale)


def _owned(array: np.ndarray) -> np.ndarray:
    """The array, or a copy if it is a read-only view of a mapped file, which may change or end."""
    return array if array.flags.writeable else np.array(array)
