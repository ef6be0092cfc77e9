"""Feature normalisation with statistics of the training split only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from engine.allocator import large_pages
from engine.config import DataConfig
from engine.errors import DataError
from engine.files import atomic_path, parse_json
from engine.kernels.ragged.cpu import scale

if TYPE_CHECKING:
    from engine.loaders.content import SplitData

BLOCK = 1 << 16  # frames looked at together: bounds temporary copies of a memory-mapped array


@dataclass
class ColumnNormalizer:
    """Normalises the columns of one modality: `(g - shift) * scale`, g the feature or its logarithm.

    A column that is constant on train has scale 0. Frames that are all zero (a missing modality) stay so.

    Attributes:
        kind: none; zscore (mean 0, standard deviation 1, then clipped to +-clip); minmax (to [-1, 1] on train).
        log: g = log(f - low + 1), f cut at low from below.
        low, shift, scale: float64 [d].
    """

    kind: Literal["none", "zscore", "minmax"]
    log: bool
    clip: float | None
    low: np.ndarray
    shift: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(
        cls, values: np.ndarray, kind: Literal["none", "zscore", "minmax"], log: bool = False, clip: float | None = None
    ) -> ColumnNormalizer:
        """Statistics of `values` [frames, d] in float64; all-zero frames are left out."""
        dim = values.shape[1]
        result = cls(kind, log, clip, np.zeros(dim), np.zeros(dim), np.ones(dim))
        if kind == "none" and not log:
            return result
        low, high = np.full(dim, np.inf), np.full(dim, -np.inf)
        for block in _present(values):
            low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
        if not np.isfinite(low).all():
            low, high = np.zeros(dim), np.zeros(dim)  # not one frame present
        if log:
            result.low = low
            low, high = np.zeros(dim), np.log(high - low + 1)
        varies = high > low
        if kind == "minmax":
            result.shift = (low + high) / 2
            result.scale = np.divide(2, high - low, out=np.zeros(dim), where=varies)
        elif kind == "zscore":
            count, first, second = 0, np.zeros(dim), np.zeros(dim)
            middle = (low + high) / 2  # summing around it keeps the squares small
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

    def check(self) -> None:
        """Raise ValueError unless the statistics, which a file may hold, are such as `fit` makes."""
        arrays = (self.low, self.shift, self.scale)
        if any(a.dtype != np.float64 or a.ndim != 1 or len(a) != self.dim for a in arrays):
            raise ValueError("statistics that are not float64 [d]")
        if not all(np.isfinite(a).all() for a in arrays):
            raise ValueError("statistics that are not finite")
        clipped = self.clip is None or (isinstance(self.clip, (int, float)) and 0 < self.clip < np.inf)
        if self.kind not in ("none", "zscore", "minmax") or type(self.log) is not bool or not clipped:
            raise ValueError("settings of another form")

    @property
    def dim(self) -> int:
        """Feature columns."""
        return len(self.shift)

    def _logarithm(self, values: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(values - self.low, 0) + 1) if self.log else values

    def apply(
        self, values: np.ndarray, dtype: type = np.float32, check: Callable[[], None] | None = None
    ) -> np.ndarray:
        """Normalised copy of `values` [frames, d], as `dtype` (float32 or float16).

        Args:
            check: called before a block of `values` is read and after it.

        Raises:
            DataError: another number of columns than on train, or values that float16 cannot hold.
        """
        self._check_columns(values)
        out = large_pages(values.shape, dtype)
        for start in range(0, len(values), BLOCK):
            if check is not None:
                check()
            with np.errstate(over="ignore"):
                out[start : start + BLOCK] = self._block(values[start : start + BLOCK])
            if check is not None:
                check()
            if dtype == np.float16 and not np.isfinite(out[start : start + BLOCK]).all():
                raise DataError(
                    "data.precision",
                    "features beyond ±65504, the range of float16",
                    "features in its range",
                    "Normalise them, or use float32.",
                )
        return out

    def linear(self, values: np.ndarray) -> tuple[Tensor, Tensor, float] | None:
        """What `engine.kernels.ragged.Source` needs to normalise `values` where it pads them; None: nothing.

        Only without `log`. Raises as `apply`.
        """
        self._check_columns(values)
        if self.kind == "none":
            return None
        return torch.from_numpy(self.shift), torch.from_numpy(self.scale), self._most

    def _check_columns(self, values: np.ndarray) -> None:
        if values.shape[1] != len(self.shift):
            raise DataError(
                "normaliser",
                f"{values.shape[1]} feature columns",
                f"{len(self.shift)} as fitted",
                "Use data with the features of the training data.",
            )

    @property
    def _most(self) -> float:
        return self.clip if self.kind == "zscore" and self.clip is not None else np.inf

    def _block(self, values: np.ndarray) -> np.ndarray:
        if self.kind == "none" and not self.log:
            return values
        if not self.log:
            found = scale(values, self.shift, self.scale, self._most)
            if found is not None:
                return found
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
    """Normalisers of both modalities, saved with a run so that later data is treated as its training data was."""

    audio: ColumnNormalizer
    vision: ColumnNormalizer

    @classmethod
    def fit(cls, split: SplitData, data: DataConfig) -> Normalizer:
        """Fit on the training split as `data` says."""
        return cls(
            ColumnNormalizer.fit(split.audio.values, data.normalize_audio, data.log_audio, data.clip),
            ColumnNormalizer.fit(split.vision.values, data.normalize_vision, data.log_vision, data.clip),
        )

    def apply(
        self,
        modality: Literal["audio", "vision"],
        values: np.ndarray,
        dtype: type = np.float32,
        check: Callable[[], None] | None = None,
    ) -> np.ndarray:
        """Normalised [frames, d]; see `ColumnNormalizer.apply`."""
        return getattr(self, modality).apply(values, dtype, check)

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
            DataError: the file is missing or is something else.
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
                str(path),
                f"no normaliser ({cause or type(cause).__name__})",
                "normalizer.safetensors of a run",
                "Name a finished run folder.",
            ) from None
        return cls(**parts)
