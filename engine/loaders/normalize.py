"""Feature normalisation, with statistics of the training split only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from engine.allocator import large_pages
from engine.config import DataConfig
from engine.errors import DataError
from engine.files import atomic_path, parse_json
from engine.kernels.ragged import scale
from engine.loaders.formats.checks import listed
from engine.vocabulary import Normalization

if TYPE_CHECKING:
    from engine.loaders.content import SplitData

SQUEEZED = 0.01  # of a standard deviation, or of half the range: with less, a column is as good as constant
LOOKED_AT = 1 << 12  # frames that are enough to tell it
BLOCK = 1 << 16  # frames read at a time: bounds temporary copies of a memory-mapped array


@dataclass
class ColumnNormalizer:
    """Normalises the columns of one modality: `(g - shift) * scale`, where g is the feature or its logarithm.

    A column that is constant on train has scale 0. Frames that are all zero (a missing modality) stay all zero.

    Attributes:
        kind: none; zscore (mean 0, standard deviation 1, then clipped to +-clip); minmax (to [-1, 1] on train).
        log: g = log(f - low + 1); features below low count as low.
        low, shift, scale: float64 [d].

    >>> column = ColumnNormalizer.fit(np.array([[1.0], [3.0]], np.float32), "minmax")
    >>> column.apply(np.array([[2.0], [3.0]], np.float32)).tolist()
    [[0.0], [1.0]]
    """

    kind: Normalization
    log: bool
    clip: float | None
    low: np.ndarray
    shift: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(
        cls, values: np.ndarray, kind: Normalization, log: bool = False, clip: float | None = None
    ) -> ColumnNormalizer:
        """Statistics of `values` [frames, d] in float64. Frames that are all zero do not count."""
        dim = values.shape[1]
        result = cls(kind, log, clip, np.zeros(dim), np.zeros(dim), np.ones(dim))
        if kind == "none" and not log:
            return result
        low, high = np.full(dim, np.inf), np.full(dim, -np.inf)
        for block in _present(values):
            low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
        if not np.isfinite(low).all():
            low, high = np.zeros(dim), np.zeros(dim)  # no frame is present
        if log:
            result.low = low
            low, high = np.zeros(dim), np.log(high - low + 1)
        varies = high > low
        if kind == "minmax":
            result.shift = (low + high) / 2
            result.scale = np.divide(2, high - low, out=np.zeros(dim), where=varies)
        elif kind == "zscore":
            count, first, second = 0, np.zeros(dim), np.zeros(dim)
            middle = (low + high) / 2  # sums around the middle keep the squares small
            for block in _present(values):
                centred = result._logarithm(block) - middle
                count += len(block)
                first += centred.sum(0)
                second += np.square(centred).sum(0)
            mean = first / max(count, 1)
            deviation = np.sqrt(np.maximum(second / max(count, 1) - mean**2, 0))
            result.shift = middle + mean
            result.scale = np.divide(1, deviation, out=np.zeros(dim), where=varies & (deviation > 0))
        return result

    def squeezed(self, values: np.ndarray) -> list[int]:
        """Columns of `values`, on which this was fitted, that hardly differ once normalised, as few are so large.

        Nine tenths of the frames that are looked at, at most `LOOKED_AT`, lie within `SQUEEZED`.
        """
        looked_at = np.asarray(values[:: max(1, -(-len(values) // LOOKED_AT))], np.float64)
        looked_at = looked_at[looked_at.any(1)]
        if self.kind == "none" or not len(looked_at):
            return []
        low, high = np.quantile(self._logarithm(looked_at), (0.05, 0.95), axis=0)
        spread = (high - low) * self.scale
        return np.flatnonzero((spread > 0) & (spread < SQUEEZED)).tolist()

    def check(self) -> None:
        """Raise ValueError unless the statistics, which may come from a file, are such as `fit` makes."""
        arrays = (self.low, self.shift, self.scale)
        if any(a.dtype != np.float64 or a.ndim != 1 or len(a) != self.dim for a in arrays):
            raise ValueError("statistics that are not float64 [d]")
        if not all(np.isfinite(a).all() for a in arrays):
            raise ValueError("statistics that are not finite")
        clipped = self.clip is None or (isinstance(self.clip, (int, float)) and 0 < self.clip < np.inf)
        if self.kind not in get_args(Normalization) or type(self.log) is not bool or not clipped:
            raise ValueError("settings of another form")

    @property
    def dim(self) -> int:
        """Number of feature columns."""
        return len(self.shift)

    def _logarithm(self, values: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(values - self.low, 0) + 1) if self.log else values

    def apply(
        self, values: np.ndarray, dtype: type = np.float32, check: Callable[[], None] | None = None, owned: bool = False
    ) -> np.ndarray:
        """Normalised `values` [frames, d], as `dtype` (float32 or float16).

        Args:
            check: called before and after a block of `values` is read.
            owned: `values` are a copy that only the caller has. The result may share their memory.

        Raises:
            DataError: the number of columns is not that of train, or float16 cannot hold a value.
        """
        self._check_columns(values)
        if owned:
            return self._block(values, dtype)
        out = large_pages(values.shape, dtype)
        for start in range(0, len(values), BLOCK):
            if check is not None:
                check()
            out[start : start + BLOCK] = self._block(values[start : start + BLOCK], dtype)
            if check is not None:
                check()
        return out

    def keeps(self, values: np.ndarray, dtype: type) -> bool:
        """Whether `apply` would give the numbers as they are. Raises as `apply` does."""
        self._check_columns(values)
        return self.kind == "none" and not self.log and values.dtype == dtype

    def linear(self, values: np.ndarray) -> tuple[Tensor, Tensor, float] | None:
        """Shift, factor and clip, with which the padding kernel normalises `values`; None: nothing is to be done.

        Only without `log`. Raises as `apply` does.
        """
        self._check_columns(values)
        if self.kind == "none":
            return None
        return torch.from_numpy(self.shift), torch.from_numpy(self.scale), self._most

    def _check_columns(self, values: np.ndarray) -> None:
        if values.shape[1] != len(self.shift):
            raise DataError(
                "normaliser", f"{values.shape[1]} feature columns", f"{len(self.shift)} as fitted",
                "Use data with the features of the training data.",
            )  # fmt: skip

    @property
    def _most(self) -> float:
        return self.clip if self.kind == "zscore" and self.clip is not None else np.inf

    def _block(self, values: np.ndarray, dtype: type) -> np.ndarray:
        with np.errstate(over="ignore"):
            block = self._scaled(values).astype(dtype, copy=False)
        if dtype == np.float16 and not np.isfinite(block).all():
            raise DataError(
                "data.precision", "features beyond ±65504, the range of float16", "features in its range",
                "Normalise them, or use float32.",
            )  # fmt: skip
        return block

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        if not self.log:
            return values if self.kind == "none" else scale(values, self.shift, self.scale, self._most)
        block = np.asarray(values, np.float64)
        scaled = (self._logarithm(block) - self.shift) * self.scale
        np.clip(scaled, -self._most, self._most, out=scaled)
        scaled[~block.any(1)] = 0
        return scaled


def _present(values: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks of the frames that are not all zero, as float64."""
    for start in range(0, len(values), BLOCK):
        block = np.asarray(values[start : start + BLOCK], np.float64)
        block = block[block.any(1)]
        if len(block):
            yield block


@dataclass
class Normalizer:
    """Normalisers of both modalities. They are saved with a run, so that later data is treated as its training data
    was.
    """

    audio: ColumnNormalizer
    vision: ColumnNormalizer

    @classmethod
    def fit(cls, split: SplitData, data: DataConfig) -> Normalizer:
        """Fit on the training split as `data` says."""
        return cls(
            ColumnNormalizer.fit(split.audio.values, data.normalize_audio, data.log_audio, data.clip),
            ColumnNormalizer.fit(split.vision.values, data.normalize_vision, data.log_vision, data.clip),
        )

    def notes(self, split: SplitData) -> list[str]:
        """What the user should know of the training split that this was fitted on."""
        notes = []
        for modality in ("audio", "vision"):
            columns = getattr(self, modality).squeezed(getattr(split, modality).values)
            if columns:
                notes.append(
                    f"{modality}: nine tenths of the training values of columns {listed(map(str, columns))} lie within "
                    f"{SQUEEZED} of each other once normalised, because a few are far larger: correct these, or set "
                    f"data.log_{modality}=true"
                )
        return notes

    def state(self) -> dict[str, np.ndarray]:
        """The statistics, float64 [d] each, by `<modality>.<name>`."""
        return {
            f"{m}.{k}": getattr(getattr(self, m), k) for m in ("audio", "vision") for k in ("low", "shift", "scale")
        }

    def save(self, path: str | Path) -> None:
        """Write statistics and settings as safetensors.

        Raises:
            OutputError: the file cannot be written.
        """
        settings = {
            m: {k: v for k, v in asdict(getattr(self, m)).items() if k in ("kind", "log", "clip")}
            for m in ("audio", "vision")
        }
        with atomic_path(path) as temporary:
            temporary.write_bytes(save(self.state(), metadata={"normalizer": json.dumps(settings)}))

    @classmethod
    def load(cls, path: str | Path) -> Normalizer:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, or is something else.
        """
        try:
            if not Path(path).is_file():
                raise OSError("no file" if Path(path).exists() else "no such file")
            with safe_open(str(path), framework="numpy") as file:
                settings = parse_json(file.metadata()["normalizer"])
                parts = {
                    m: ColumnNormalizer(
                        **settings[m], **{k: file.get_tensor(f"{m}.{k}") for k in ("low", "shift", "scale")}
                    )
                    for m in ("audio", "vision")
                }
            for part in parts.values():
                part.check()
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as cause:
            raise DataError(
                str(path), f"no normaliser ({cause or type(cause).__name__})", "normalizer.safetensors of a run",
                "Name a finished run folder.",
            ) from None  # fmt: skip
        return cls(**parts)
