"""Sequences of different lengths in one array, and how padded arrays become such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from engine.errors import DataError
from engine.loaders.spool import Joiner, release

LengthRule = Literal["recorded", "all_zero", "sum_zero"]
Side = Literal["left", "right"]
USUAL_CUT: Side = "right"  # where sequences that are longer than recorded are cut
BLOCK = 128  # samples looked at together: bounds the temporary copies of a padded array
PADDED = 8  # sequences of one length, from which on zeros at their ends can be taken for padding
STEPS = 256  # values of a column that float32 must tell apart
SHARED, ROOM = 64, 1 << 28  # frames of rows that share arrays: times the arrays' size, plus bytes


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


@dataclass
class Sequences:
    """One modality of a split, cleaned.

    Attributes:
        ragged: float32 frames; a missing sequence is one zero frame.
        nonfinite: NaN and infinite values that were replaced by 0.
        missing: rows whose sequence is empty or all zero.
        dropped: frames that are not zero and were left out, because they lie outside the length of their sequence.
        side: where padding was found, if that is not where the format has it; else None. usual: where that is; None
            for a format that has no padding.
        coarse: columns whose values lie so far from 0 that float32 tells fewer than `STEPS` of them apart.
    """

    ragged: Ragged
    nonfinite: int = 0
    missing: list[int] = field(default_factory=list)
    dropped: int = 0
    side: Side | None = None
    usual: Side | None = None
    coarse: list[int] = field(default_factory=list)


def absent(count: int, dim: int = 1) -> Sequences:
    """A modality that no sample has: one zero frame of `dim` columns for each of `count` samples."""
    return Sequences(zero_frames(count, dim), 0, list(range(count)))


def zero_frames(count: int, dim: int) -> Ragged:
    """One zero frame of `dim` columns for each of `count` samples."""
    return Ragged(np.zeros((count, dim), np.float32), np.arange(count + 1, dtype=np.int64))


class _Cleaner:
    """Makes frames float32 and finite, and counts what that costs.

    Attributes:
        nonfinite: values replaced by 0 so far.
    """

    def __init__(self, dim: int, ids: Sequence[str], where: str):
        self._ids, self._where, self.nonfinite = ids, where, 0
        self._low, self._high = np.full(dim, np.inf), np.full(dim, -np.inf)

    def __call__(self, given: np.ndarray, row: int) -> np.ndarray:
        """float32 copy of frames of a row, with non-finite values replaced by 0."""
        with np.errstate(over="ignore", invalid="ignore"):
            frames = given.astype(np.float32)
        finite = np.isfinite(frames)
        bad = frames.size - int(np.count_nonzero(finite))
        if bad:
            used = (frames != 0).any(1)
            if not finite[used].any():
                raise DataError(
                    f"{self._where}, row {row} (id {self._ids[row]})",
                    "a sequence without one finite value",
                    "numbers, or zeros where the modality is missing",
                    "Extract the sample again, or write zeros for it.",
                )
            frames[~finite] = 0
            self.nonfinite += bad
        elif given.dtype.itemsize > 4 and frames.any():
            present = given[frames.any(1)]
            np.minimum(self._low, present.min(0), out=self._low)
            np.maximum(self._high, present.max(0), out=self._high)
        return frames

    def coarse(self) -> list[int]:
        """See `Sequences.coarse`."""
        varies = self._high > self._low
        low, high = np.where(varies, self._low, 0), np.where(varies, self._high, 0)
        most = np.maximum(abs(low), abs(high))
        noise = high - low < (1 << 20) * np.spacing(most)  # of a constant column, say
        return np.flatnonzero(varies & ~noise & (high - low < STEPS * np.spacing(most.astype(np.float32)))).tolist()


def _kept_side(used: np.ndarray, lengths: np.ndarray, usual: Side) -> tuple[Side, int]:
    """The side of [N, L] frames that the padding is at, given lengths, and how many `used` frames lie outside them.

    Padding is where fewer frames are lost: at the usual side, unless the other loses less than half as many.
    """
    place = np.arange(used.shape[1])
    right = int(np.count_nonzero(used & (place >= lengths[:, None])))
    left = int(np.count_nonzero(used & (place < used.shape[1] - lengths[:, None])))
    return _cheaper({"left": left, "right": right}, usual)


def _cheaper(lost: dict[Side, int], usual: Side) -> tuple[Side, int]:
    other = _other(usual)
    side = other if 2 * lost[other] < lost[usual] else usual
    return side, lost[side]


def _other(side: Side) -> Side:
    return "left" if side == "right" else "right"


def _zero_side(used: np.ndarray, usual: Side) -> Side:
    """The side of [N, L] frames where the padding is: the usual one, unless most samples have more zeros at the other.

    A frame of zeros at an end may be real (a face that was not found), so that a few such samples decide nothing.
    """
    used = used[used.any(1)]
    first, last = used.argmax(1), used[:, ::-1].argmax(1)
    votes = {"left": np.count_nonzero(first > last), "right": np.count_nonzero(last > first)}
    return _other(usual) if votes[_other(usual)] > 2 * votes[usual] else usual


def from_sequences(
    sequences: Sequence[np.ndarray], ids: Sequence[str], where: str, lengths: Sequence[int] | None = None
) -> Sequences:
    """Clean and join sequences. Rows may share one array.

    Sequences without recorded lengths are not padded, as a rule. Where all have one length and most of them have zeros
    at one end (of `PADDED` rows or more), those are padding.

    Args:
        sequences: N arrays [length, d], any real dtype; length may be 0. Where all are empty, d is taken to be 1.
        ids, where: for messages.
        lengths: recorded number of frames of each row, 0 where none is; the frames beyond it are left out, at the end,
            or at the start where that loses fewer frames that are not zero.

    Raises:
        DataError: an array of the wrong shape or dtype, another width, or with no finite value; rows that share arrays
            so often that their frames would take far more room than the arrays.
    """
    arrays, dim = _checked(sequences, ids, where)
    usual, dropped = USUAL_CUT, 0
    if lengths is not None and any(lengths):
        side, dropped = _cut_side(arrays, lengths)
    else:
        usual, (side, lengths) = None, _padding(arrays)
    distinct = {id(a): a for a in arrays if a is not None}
    size = sum(a.nbytes for a in distinct.values())
    room, most = ROOM + SHARED * size, 16 * sum(a.size for a in distinct.values()) + (1 << 24)
    clean, joined = _Cleaner(dim, ids, where), Joiner(dim)
    missing: list[int] = []
    zeros: dict[tuple, int] = {}  # parts of arrays that are all zero -> values replaced to make them so
    zero, kept = np.zeros((1, dim), np.float32), 0
    for row, array in enumerate(arrays):
        part = slice(0) if array is None else _part(array, lengths[row] if lengths else 0, side)
        key = (id(array), part.start, part.stop)
        if key in zeros:
            clean.nonfinite += zeros[key]
        else:
            before = clean.nonfinite
            frames = zero if array is None else clean(array[part], row)
            if frames.any():
                kept += frames.size
                if 4 * kept > room:
                    raise _shared_too_often(where, len(arrays), len(distinct), size)
                joined.add(frames)
                continue
            zeros[key] = clean.nonfinite - before
        missing.append(row)
        if len(missing) * dim > most:
            break
        joined.add(zero)
    if len(missing) * dim > min(most, 16 * kept + (1 << 24)):
        raise DataError(
            where,
            f"{len(missing)} of {len(arrays)} sequences empty, and {dim} features a frame",
            "frames in most sequences",
            "Check the feature extraction.",
        )
    found = side if side != usual else None
    return Sequences(Ragged(*joined.arrays()), clean.nonfinite, missing, dropped, found, usual, clean.coarse())


def _padding(arrays: list[np.ndarray | None]) -> tuple[Side | None, list[int]]:
    """The side of the padding of sequences that are all of one length, and how long they are without it.

    None and no lengths where they are not padded.
    """
    present = [a for a in arrays if a is not None]
    if len(present) < PADDED or len({len(a) for a in present}) > 1:
        return None, []
    ends: dict[int, tuple[int, int, bool]] = {}  # array -> zeros at its start and end, and whether there is more
    for a in present:
        if id(a) not in ends:
            used = (a != 0).any(1)
            ends[id(a)] = (int(used.argmax()), int(used[::-1].argmax()), bool(used.any()))
    zeros = np.array([(0, 0, False) if a is None else ends[id(a)] for a in arrays])
    most = int(np.count_nonzero(zeros[:, :2], 0).argmax())
    if 2 * np.count_nonzero(zeros[:, most]) <= np.count_nonzero(zeros[:, 2]):
        return None, []
    return ("left", "right")[most], (len(present[0]) - zeros[:, most]).tolist()


def _checked(sequences: Sequence[Any], ids: Sequence[str], where: str) -> tuple[list[np.ndarray | None], int]:
    """Each sequence as an array [length, d], None where it is empty; and d, 1 where all are."""
    arrays: list[np.ndarray | None] = []
    dim = None
    for row, (frames, sample) in enumerate(zip(sequences, ids, strict=True)):
        at = f"{where}, row {row} (id {sample})"
        try:
            frames = np.asarray(frames)
        except (TypeError, ValueError, OverflowError):
            raise DataError(
                at, "frames of different widths", "numbers of shape (frames, features)", "Write one 2-D float array."
            ) from None
        if frames.size == 0 and frames.ndim < 3:
            arrays.append(None)
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
        arrays.append(frames)
    return arrays, dim or 1


def _part(array: np.ndarray, length: int, side: Side | None) -> slice:
    """The frames of an array that lie inside its recorded length; all of them where none is recorded."""
    if not 0 < length < len(array):
        return slice(0, len(array))
    return slice(0, length) if side == "right" else slice(len(array) - length, len(array))


def _cut_side(arrays: list[np.ndarray | None], lengths: Sequence[int]) -> tuple[Side, int]:
    """Where sequences that are longer than recorded are cut, and how many frames that are not zero that loses."""
    lost: dict[Side, int] = {"left": 0, "right": 0}
    before: dict[int, np.ndarray] = {}  # array -> number of frames that are not zero before each place
    for array, length in zip(arrays, lengths, strict=True):
        if array is None or not 0 < length < len(array):
            continue
        if id(array) not in before:
            before[id(array)] = np.concatenate([[0], np.cumsum((array != 0).any(1))])
        count = before[id(array)]
        lost["right"] += int(count[-1] - count[length])
        lost["left"] += int(count[len(array) - length])
    return _cheaper(lost, USUAL_CUT)


def _shared_too_often(where: str, rows: int, arrays: int, size: int) -> DataError:
    return DataError(
        where,
        f"{arrays} arrays of {size} bytes that {rows} rows share",
        f"frames of at most {SHARED} times the arrays' size (and {ROOM >> 20} MiB) once written out row by row",
        "Give every row its own frames only.",
    )


def from_padded(
    padded: np.ndarray,
    side: Side,
    rule: LengthRule,
    lengths: np.ndarray | None,
    ids: Sequence[str],
    where: str,
    least: float = 0.5,
) -> Sequences:
    """Take the sequences out of a zero-padded array.

    Args:
        padded: [N, L, d], any real dtype.
        side: where the format has its padding; that the array has it at the other side is found in its zeros.
        rule: `recorded` uses `lengths` where given, else `all_zero`; `all_zero` takes frames of zeros at the padded
            side for padding (zero frames inside are kept); `sum_zero` is the reference's rule: the length is L minus
            the number of frames whose features sum to 0, wherever they are, so that a zero frame inside drops a real
            one at the padded side.
        lengths: int [N] or None.
        least: share of the frames that are not zero that must lie inside the sequences' lengths.

    Raises:
        DataError: wrong shape or dtype, a sequence with no finite value, or more frames lost than `least` allows.
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
    if dim == 0 or total == 0:  # nothing was extracted
        return absent(len(padded), max(dim, 1))
    used, summed = _look(padded, rule)
    usual, dropped = side, 0
    if rule == "sum_zero" or (rule == "recorded" and lengths is not None):
        length = summed if rule == "sum_zero" else np.clip(lengths, 0, total)
        side, dropped = _kept_side(used, length, usual)
        if dropped > (1 - least) * np.count_nonzero(used):
            raise DataError(
                where,
                f"{dropped} of {np.count_nonzero(used)} frames that are not zero outside the lengths of rule {rule}, "
                "on whichever side the padding is",
                "lengths that hold most of them",
                "Check the lengths, or use data.length_rule=all_zero.",
            )
    else:
        side = _zero_side(used, usual)
        edge = used if side == "left" else used[:, ::-1]
        length = np.where(used.any(1), total - edge.argmax(1), 0)
    clean, joined, missing = _Cleaner(dim, ids, where), Joiner(dim), []
    for first in range(0, len(padded), BLOCK):
        block = padded[first : first + BLOCK]
        for row, n in enumerate(length[first : first + BLOCK].tolist(), first):
            frames = clean(block[row - first, total - n :] if side == "left" else block[row - first, :n], row)
            if not frames.any():
                missing.append(row)
                frames = np.zeros((1, dim), np.float32)
            joined.add(frames)
        release(block)
    found = side if side != usual else None
    return Sequences(Ragged(*joined.arrays()), clean.nonfinite, missing, dropped, found, usual, clean.coarse())


def _look(padded: np.ndarray, rule: LengthRule) -> tuple[np.ndarray, np.ndarray]:
    """Which frames are not zero, bool [N, L], and for `sum_zero` how many do not sum to 0, int [N]."""
    used, summed = np.empty(padded.shape[:2], bool), np.zeros(len(padded), np.int64)
    for first in range(0, len(padded), BLOCK):
        block = padded[first : first + BLOCK]
        used[first : first + BLOCK] = (block != 0).any(-1)  # true for NaN and infinities: they are frames, not padding
        if rule == "sum_zero":
            sums = np.where(np.isfinite(block), block, 0).sum(-1)
            summed[first : first + BLOCK] = padded.shape[1] - (sums == 0).sum(1)
        release(block)
    return used, summed
