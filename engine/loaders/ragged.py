"""Sequences of different lengths in one array, and how padded arrays become such."""

from __future__ import annotations

import contextlib
import mmap
import tempfile
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from engine.errors import DataError
from engine.files import output_error

LengthRule = Literal["recorded", "all_zero", "sum_zero"]
BLOCK = 128  # samples looked at together: bounds the temporary copies of a padded array


@dataclass
class Ragged:
    """N sequences end to end.

    Attributes:
        values: [total, d] (or [total]) array, possibly memory-mapped.
        offsets: int64 [N + 1]; sequence i is `values[offsets[i]:offsets[i + 1]]`.
    """

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]."""
        return np.diff(self.offsets)

    @property
    def dim(self) -> int:
        return self.values.shape[1]

    def cut(self, most: int) -> Ragged:
        """The first `most` rows of every sequence; itself where none is longer."""
        lengths = self.lengths
        if not (lengths > most).any():
            return self
        place = np.arange(len(self.values)) - np.repeat(self.offsets[:-1], lengths)
        offsets = np.zeros_like(self.offsets)
        np.cumsum(np.minimum(lengths, most), out=offsets[1:])
        return Ragged(self.values[place < most], offsets)

    def take(self, rows: np.ndarray) -> Ragged:
        """A copy of sequences `rows`, in their order."""
        pieces = [self.values[a:b] for a, b in zip(self.offsets[rows], self.offsets[rows + 1], strict=True)]
        return Ragged.join(pieces, self.values.dtype, self.values.shape[1] if self.values.ndim == 2 else None)

    @classmethod
    def join(cls, pieces: Sequence[np.ndarray], dtype: np.dtype | type, dim: int | None = None) -> Ragged:
        """Copy `pieces` end to end. `dim` is needed only when there are none."""
        offsets = np.zeros(len(pieces) + 1, np.int64)
        np.cumsum([len(p) for p in pieces], out=offsets[1:])
        if not isinstance(dtype, type) and pieces and all(p.dtype == dtype for p in pieces):
            return cls(np.concatenate(pieces), offsets)
        empty = np.zeros((0,) if dim is None else (0, dim), dtype)
        return cls(np.concatenate([empty, *pieces]).astype(dtype, copy=False), offsets)


_SPOOL: ContextVar[Path | None] = ContextVar("spool", default=None)


@contextlib.contextmanager
def spooled(folder: Path | None) -> Iterator[None]:
    """Within the context, joined sequences are kept in unnamed files in `folder` and mapped, not held in memory.

    The files vanish with the arrays, and with the process however it ends. None: they are held in memory.
    """
    token = _SPOOL.set(folder)
    try:
        yield
    finally:
        _SPOOL.reset(token)


def _unnamed(folder: Path) -> IO[bytes]:
    return tempfile.TemporaryFile(dir=folder)


class _Join:
    """Sequences end to end, taken one by one.

    Raises:
        OutputError: there is no space for the spool.
    """

    def __init__(self, dim: int):
        self._dim, self._lengths, self._pieces, self._folder = dim, [0], [], _SPOOL.get()
        self._open, self._file = contextlib.ExitStack(), None
        if self._folder is not None:
            with self._writing():
                self._file = self._open.enter_context(_unnamed(self._folder))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as cause:
            raise output_error(self._folder, cause) from cause

    def add(self, frames: np.ndarray) -> None:
        self._lengths.append(len(frames))
        if self._file is None:
            self._pieces.append(frames)
            return
        with self._writing():
            self._file.write(np.ascontiguousarray(frames).data)

    def ragged(self) -> Ragged:
        offsets = np.cumsum(self._lengths, dtype=np.int64)
        if self._file is None:
            return Ragged(np.concatenate([np.zeros((0, self._dim), np.float32), *self._pieces]), offsets)
        with self._writing(), self._open:
            self._file.flush()
            return Ragged(np.memmap(self._file, np.float32, "r", shape=(int(offsets[-1]), self._dim)), offsets)


def release(array: np.ndarray) -> None:
    """Give back the memory of a view of a mapped file. Its pages are read from the file again if they are asked for."""
    base: Any = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    if not isinstance(base, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED") or not array.flags.c_contiguous:
        return
    begin = array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    first, end = begin // mmap.PAGESIZE * mmap.PAGESIZE, begin + array.nbytes
    if end > first:
        base.madvise(mmap.MADV_DONTNEED, first, end - first)


@dataclass
class Sequences:
    """One modality of a split, cleaned.

    Attributes:
        ragged: float32 frames; a missing sequence is one zero frame.
        nonfinite: NaN and infinite values that were replaced by 0.
        missing: rows whose sequence is empty or all zero.
    """

    ragged: Ragged
    nonfinite: int = 0
    missing: list[int] = field(default_factory=list)


def absent(count: int, dim: int = 1) -> Sequences:
    """A modality that no sample has: one zero frame of `dim` columns for each of `count` samples."""
    return Sequences(zero_frames(count, dim), 0, list(range(count)))


def zero_frames(count: int, dim: int) -> Ragged:
    """One zero frame of `dim` columns for each of `count` samples."""
    return Ragged(np.zeros((count, dim), np.float32), np.arange(count + 1, dtype=np.int64))


def _clean(frames: np.ndarray, where: str, row: int, sample: str) -> tuple[np.ndarray, int]:
    """float32 frames with non-finite values replaced by 0, and how many there were."""
    with np.errstate(over="ignore", invalid="ignore"):
        frames = frames.astype(np.float32)
    finite = np.isfinite(frames)
    bad = frames.size - int(np.count_nonzero(finite))
    if bad:
        used = (frames != 0).any(1)
        if not finite[used].any():
            raise DataError(
                f"{where}, row {row} (id {sample})",
                "a sequence without one finite value",
                "numbers, or zeros where the modality is missing",
                "Extract the sample again, or write zeros for it.",
            )
        frames[~finite] = 0
    return frames, bad


def from_sequences(sequences: Sequence[np.ndarray], ids: Sequence[str], where: str) -> Sequences:
    """Clean and join sequences that are not padded.

    Args:
        sequences: N arrays [length, d], any real dtype; length may be 0. Where all are empty, d is taken to be 1.
        ids, where: for messages.

    Raises:
        DataError: an array of the wrong shape or dtype, another width, or with no finite value.
    """
    pieces, nonfinite, missing, dim = [], 0, [], None
    for row, (frames, sample) in enumerate(zip(sequences, ids, strict=True)):
        at = f"{where}, row {row} (id {sample})"
        try:
            frames = np.asarray(frames)
        except (TypeError, ValueError, OverflowError):
            raise DataError(
                at, "frames of different widths", "numbers of shape (frames, features)", "Write one 2-D float array."
            ) from None
        if frames.size == 0 and frames.ndim < 3:
            missing.append(row)
            pieces.append(None)
            continue
        if frames.ndim != 2 or frames.dtype.kind not in "fiu":
            raise DataError(
                at,
                f"an array of shape {frames.shape} and dtype {frames.dtype}",
                "numbers of shape (frames, features)",
                "Write every sequence as a 2-D float array.",
            )
        dim = dim or frames.shape[1]
        if frames.shape[1] != dim:
            raise DataError(
                at,
                f"{frames.shape[1]} features a frame",
                f"{dim} as in the rows before",
                "Use one feature set for all rows.",
            )
        frames, bad = _clean(frames, where, row, sample)
        nonfinite += bad
        if not frames.any():
            missing.append(row)
            frames = frames[:0]
        pieces.append(frames)
    if dim is None:
        return absent(len(pieces))
    if len(missing) * dim > 16 * sum(p.size for p in pieces if p is not None) + (1 << 24):
        raise DataError(
            where,
            f"{len(missing)} of {len(pieces)} sequences empty, and {dim} features a frame",
            "frames in most sequences",
            "Check the feature extraction.",
        )
    zero = np.zeros((1, dim), np.float32)
    joined = _Join(dim)
    for i, piece in enumerate(pieces):
        joined.add(zero if piece is None or len(piece) == 0 else piece)
        pieces[i] = None
    return Sequences(joined.ragged(), nonfinite, missing)


def from_padded(
    padded: np.ndarray,
    side: Literal["left", "right"],
    rule: LengthRule,
    lengths: np.ndarray | None,
    ids: Sequence[str],
    where: str,
) -> Sequences:
    """Take the sequences out of a zero-padded array.

    Args:
        padded: [N, L, d], any real dtype.
        side: where the padding is.
        rule: `recorded` uses `lengths` where given, else `all_zero`; `all_zero` takes frames of zeros at the padded
            side for padding (zero frames inside are kept); `sum_zero` is the reference's rule: the length is L minus
            the number of frames whose features sum to 0, wherever they are, so that a zero frame inside drops a real
            one at the padded side.
        lengths: int [N] or None.

    Raises:
        DataError: wrong shape or dtype, or a sequence with no finite value.
    """
    if (
        not isinstance(padded, np.ndarray)
        or padded.ndim != 3
        or padded.dtype.kind not in "fiu"
        or len(padded) != len(ids)
    ):
        found = f"{padded.dtype} of shape {padded.shape}" if isinstance(padded, np.ndarray) else type(padded).__name__
        raise DataError(
            where,
            found,
            f"numbers of shape ({len(ids)}, length, features)",
            "Write the features as one padded 3-D array.",
        )
    total, dim = padded.shape[1], padded.shape[2]
    if dim == 0 or total == 0:
        raise DataError(
            where, f"no {'frames' if dim else 'feature columns'}", "at least one", "Check the feature extraction."
        )
    joined, nonfinite, missing = _Join(dim), 0, []
    for first in range(0, len(padded), BLOCK):
        block = padded[first : first + BLOCK]
        if rule == "sum_zero":
            sums = np.where(np.isfinite(block), block, 0).sum(-1)
            length = total - (sums == 0).sum(1)
        elif rule == "recorded" and lengths is not None:
            length = np.clip(lengths[first : first + BLOCK], 0, total)
        else:
            used = (block != 0).any(-1)  # true for NaN and infinities: they are frames, not padding
            edge = used if side == "left" else used[:, ::-1]
            length = np.where(used.any(1), total - edge.argmax(1), 0)
        for i, n in enumerate(length):
            row = first + i
            frames = block[i, total - n :] if side == "left" else block[i, :n]
            frames, bad = _clean(frames, where, row, ids[row])
            nonfinite += bad
            if not frames.any():
                missing.append(row)
                frames = np.zeros((1, dim), np.float32)
            joined.add(frames)
        release(block)
    return Sequences(joined.ragged(), nonfinite, missing)
