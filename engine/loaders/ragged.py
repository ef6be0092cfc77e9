"""Sequences of different lengths in one array, and how padded arrays become such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from engine.errors import DataError
from engine.loaders.spool import Joiner, release
from engine.vocabulary import KnownLengthRule as LengthRule

Side = Literal["left", "right"]
USUAL_CUT: Side = "right"  # sequences that are longer than recorded are cut there
BLOCK = 128  # so many samples are read at a time, which bounds temporary copies of a padded array
PADDED = 8  # zeros at the ends of sequences can be padding if at least so many sequences have one length
STEPS = 256  # float32 must tell so many values of a column apart
# Rows may share arrays. Written out row by row, their frames may take SHARED times the arrays' size, plus ROOM bytes.
SHARED, ROOM = 64, 1 << 28


@dataclass
class Ragged:
    """N sequences end to end.

    Attributes:
        values: [total, d] (or [total]) array, possibly memory-mapped.
        offsets: int64 [N + 1]; sequence i is `values[offsets[i]:offsets[i + 1]]`.

    >>> ragged = Ragged.join([np.zeros((3, 2)), np.ones((1, 2))], np.float32, dim=2)
    >>> ragged.lengths.tolist(), ragged[1].tolist()
    ([3, 1], [[1.0, 1.0]])
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
        """The first `most` rows of every sequence. If none is longer, this is the same object."""
        lengths = self.lengths
        if not (lengths > most).any():
            return self
        place = np.arange(len(self.values)) - np.repeat(self.offsets[:-1], lengths)
        offsets = np.zeros_like(self.offsets)
        np.cumsum(np.minimum(lengths, most), out=offsets[1:])
        return Ragged(self.values[place < most], offsets)

    def pieces(self, rows: np.ndarray | None = None) -> list[np.ndarray]:
        """Views of sequences `rows` (None: all), in that order."""
        starts, ends = self.offsets[:-1], self.offsets[1:]
        if rows is not None:
            starts, ends = starts[rows], ends[rows]
        return [self.values[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]

    def take(self, rows: np.ndarray) -> Ragged:
        """A copy of sequences `rows`, in that order."""
        return Ragged.join(
            self.pieces(rows), self.values.dtype, self.values.shape[1] if self.values.ndim == 2 else None
        )

    @classmethod
    def join(cls, pieces: Sequence[np.ndarray], dtype: np.dtype | type, dim: int | None = None) -> Ragged:
        """A copy of `pieces` end to end. `dim`: columns of pieces with two axes."""
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
        side: the side of the padding if it is not that of the format; else None.
        usual: the format's side of the padding; None if the format has no padding.
        rule: the length rule that told frames from padding; None if the format has none.
        padded_to: length of the sequences with their padding, if that was found in a format without; else None.
        coarse: columns whose values lie so far from 0 that float32 tells fewer than `STEPS` of them apart.
        edges: side -> number of sequences with frames of zeros at that end, and number of these frames. They count as
            frames. Missing sequences do not count.
    """

    ragged: Ragged
    nonfinite: int = 0
    missing: list[int] = field(default_factory=list)
    dropped: int = 0
    side: Side | None = None
    usual: Side | None = None
    rule: LengthRule | None = None
    padded_to: int | None = None
    coarse: list[int] = field(default_factory=list)
    edges: dict[Side, tuple[int, int]] = field(default_factory=dict)


def absent(count: int, dim: int = 1) -> Sequences:
    """A modality that no sample has: one zero frame of `dim` columns for each of `count` samples."""
    return Sequences(zero_frames(count, dim), 0, list(range(count)))


def unpadded(part: Sequences, side: Side, length: int) -> Sequences:
    """The same sequences without the frames of zeros at one end, if all that are present have `length` frames.

    >>> part = from_sequences([np.array([[1.0], [0.0]])], ["a"], "audio")
    >>> unpadded(part, "right", 2).ragged[0].tolist()
    [[1.0]]
    """
    lengths = np.delete(part.ragged.lengths, part.missing)
    if (lengths != length).any() or not part.edges.get(side, (0, 0))[0]:
        return part
    pieces = []
    for frames in part.ragged.pieces():
        used = np.flatnonzero(frames.any(1))
        first, end = (used[0], used[-1] + 1) if len(used) else (0, len(frames))
        pieces.append(frames[first:] if side == "left" else frames[:end])
    joined = Ragged.join(pieces, part.ragged.values.dtype, part.ragged.dim)
    return replace(part, ragged=joined, side=side, padded_to=length, edges=part.edges | {side: (0, 0)})


def zero_frames(count: int, dim: int) -> Ragged:
    """One zero frame of `dim` columns for each of `count` samples."""
    return Ragged(np.zeros((count, dim), np.float32), np.arange(count + 1, dtype=np.int64))


class _Cleaner:
    """Makes frames float32 and finite, and counts what that changes.

    Attributes:
        nonfinite: values replaced by 0 so far.
        edges: see `Sequences.edges`.
    """

    def __init__(self, dim: int, ids: Sequence[str], where: str):
        self._ids, self._where, self.nonfinite = ids, where, 0
        self.edges: dict[Side, tuple[int, int]] = {"left": (0, 0), "right": (0, 0)}
        self._low, self._high = np.full(dim, np.inf), np.full(dim, -np.inf)

    def __call__(self, given: np.ndarray, row: int) -> np.ndarray:
        """float32 copy of a row's frames. Values that are not finite become 0."""
        with np.errstate(over="ignore", invalid="ignore"):
            frames = given.astype(np.float32)
        finite = np.isfinite(frames)
        bad = frames.size - int(np.count_nonzero(finite))
        if bad:
            used = (frames != 0).any(1)
            if not finite[used].any():
                raise DataError(
                    f"{self._where}, row {row} (id {self._ids[row]})", "a sequence without one finite value",
                    "numbers, or zeros where the modality is missing",
                    "Extract the sample again, or write zeros for it.",
                )  # fmt: skip
            frames[~finite] = 0
            self.nonfinite += bad
        elif not np.can_cast(given.dtype, np.float32) and frames.any():
            present = given[frames.any(1)]
            np.minimum(self._low, present.min(0), out=self._low)
            np.maximum(self._high, present.max(0), out=self._high)
        return frames

    def look_at_edges(self, frames: np.ndarray) -> None:
        """Count the frames of zeros at the ends of a sequence that has others."""
        sides: tuple[tuple[Side, np.ndarray], ...] = (("left", frames), ("right", frames[::-1]))
        for side, inwards in sides:
            if not inwards[0].any():
                sequences, zeros = self.edges[side]
                self.edges[side] = sequences + 1, zeros + int(inwards.any(1).argmax())

    def coarse(self) -> list[int]:
        """See `Sequences.coarse`."""
        varies = self._high > self._low
        low, high = np.where(varies, self._low, 0), np.where(varies, self._high, 0)
        most = np.maximum(abs(low), abs(high))
        noise = high - low < (1 << 20) * np.spacing(most)  # for example, of a constant column
        return np.flatnonzero(varies & ~noise & (high - low < STEPS * np.spacing(most.astype(np.float32)))).tolist()


def _kept_side(used: np.ndarray, lengths: np.ndarray, usual: Side) -> tuple[Side, int]:
    """The side of the padding of [N, L] frames with given lengths, and how many `used` frames lie outside these
    lengths.

    Padding is at the usual side, unless the other side loses less than half as many frames.
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
    """The side of the padding of [N, L] frames: the usual one, unless most samples have more zeros at the other.

    A zero frame at an end may be real (no face was detected), so a few such samples decide nothing.
    """
    used = used[used.any(1)]
    first, last = used.argmax(1), used[:, ::-1].argmax(1)
    votes = {"left": np.count_nonzero(first > last), "right": np.count_nonzero(last > first)}
    return _other(usual) if votes[_other(usual)] > 2 * votes[usual] else usual


def from_sequences(
    sequences: Sequence[np.ndarray], ids: Sequence[str], where: str, lengths: Sequence[int] | None = None
) -> Sequences:
    """Clean and join sequences. Rows may share one array.

    As a rule, sequences without recorded lengths are not padded. But if all have one length, `PADDED` of them or more
    are not all zero, and most of these have zeros at one end, those zeros are padding.

    Args:
        sequences: N arrays [length, d] of any real dtype; length may be 0. If all are empty, d is 1.
        ids, where: for messages.
        lengths: recorded number of frames of each row; 0: not recorded. Frames beyond it are left out, at the end, or
            at the start if that loses fewer frames that are not zero.

    Raises:
        DataError: an array has the wrong shape or dtype, another width, or no finite value; or rows share arrays so
            often that their frames would take far more room than the arrays.

    >>> from_sequences([np.ones((2, 3)), np.zeros((4, 3))], ["a", "b"], "audio").missing
    [1]
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
    zeros: dict[tuple, int] = {}  # part of an array that is all zero -> values that were replaced by 0 in it
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
                clean.look_at_edges(frames)
                joined.add(frames)
                if array is not None:
                    release(array)
                continue
            zeros[key] = clean.nonfinite - before
        missing.append(row)
        if len(missing) * dim > most:
            break
        joined.add(zero)
    if len(missing) * dim > min(most, 16 * kept + (1 << 24)):
        raise DataError(
            where, f"{len(missing)} of {len(arrays)} sequences empty, and {dim} features per frame",
            "frames in most sequences", "Check the feature extraction.",
        )  # fmt: skip
    turned = side if side != usual else None
    padded_to = next(len(a) for a in arrays if a is not None) if usual is None and side else None
    return Sequences(
        Ragged(*joined.arrays()), clean.nonfinite, missing, dropped, turned, usual, None, padded_to, clean.coarse(),
        clean.edges,
    )  # fmt: skip


def _padding(arrays: list[np.ndarray | None]) -> tuple[Side | None, list[int]]:
    """The side of the padding of sequences that are all of one length, and how long they are without it.

    None and no lengths if they are not padded.
    """
    present = [a for a in arrays if a is not None]
    if len(present) < PADDED or len({len(a) for a in present}) > 1:
        return None, []
    ends: dict[int, tuple[int, int, bool]] = {}  # array -> zeros at its start and end, and whether it has other frames
    for a in present:
        if id(a) not in ends:
            used = (a != 0).any(1)
            ends[id(a)] = (int(used.argmax()), int(used[::-1].argmax()), bool(used.any()))
    zeros = np.array([(0, 0, False) if a is None else ends[id(a)] for a in arrays])
    most, count = int(np.count_nonzero(zeros[:, :2], 0).argmax()), int(np.count_nonzero(zeros[:, 2]))
    if count < PADDED or 2 * np.count_nonzero(zeros[:, most]) <= count:
        return None, []
    return ("left", "right")[most], (len(present[0]) - zeros[:, most]).tolist()


def _checked(sequences: Sequence[Any], ids: Sequence[str], where: str) -> tuple[list[np.ndarray | None], int]:
    """Each sequence as an array [length, d], or None if it is empty; and d, which is 1 if all are empty."""
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
                at, f"an array of shape {frames.shape} and dtype {frames.dtype}",
                "numbers of shape (frames, features)", "Write every sequence as a 2-D float array.",
            )  # fmt: skip
        dim = dim or frames.shape[1]
        if frames.shape[1] != dim:
            raise DataError(
                at, f"{frames.shape[1]} features per frame", f"{dim} as in the rows before",
                "Use one feature set for all rows.",
            )  # fmt: skip
        arrays.append(frames)
    return arrays, dim or 1


def _part(array: np.ndarray, length: int, side: Side | None) -> slice:
    """The frames of an array inside its recorded length; all of them if no length is recorded."""
    if not 0 < length < len(array):
        return slice(0, len(array))
    return slice(0, length) if side == "right" else slice(len(array) - length, len(array))


def _cut_side(arrays: list[np.ndarray | None], lengths: Sequence[int]) -> tuple[Side, int]:
    """The side at which sequences that are longer than recorded are cut, and how many frames that are not zero that
    loses.
    """
    lost: dict[Side, int] = {"left": 0, "right": 0}
    before: dict[int, np.ndarray] = {}  # array -> frames that are not zero before each place
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
        where, f"{arrays} arrays of {size} bytes that {rows} rows share",
        f"frames of at most {SHARED} times the arrays' size (and {ROOM >> 20} MiB) once written out row by row",
        "Give every row its own frames only.",
    )  # fmt: skip


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
        side: where the format has its padding. If the zeros of the array lie at the other side, that side is taken.
        rule: `recorded` uses `lengths` if given, else it is `all_zero`. `all_zero` takes frames of zeros at the padded
            side for padding; zero frames inside are kept. `sum_zero` is the reference's rule: the length is L minus the
            number of frames whose features sum to 0, wherever they are. So a zero frame inside drops a real one at the
            padded side.
        lengths: int [N] or None.
        least: share of the frames that are not zero that must lie inside the sequences' lengths.

    Raises:
        DataError: wrong shape or dtype, a sequence with no finite value, or more frames lost than `least` allows.

    >>> padded = np.array([[[0.0], [1.0], [2.0]]])
    >>> from_padded(padded, "left", "all_zero", None, ["a"], "audio").ragged[0].tolist()
    [[1.0], [2.0]]
    """
    if (
        not isinstance(padded, np.ndarray)
        or padded.ndim != 3
        or padded.dtype.kind not in "fiu"
        or len(padded) != len(ids)
    ):
        found = f"{padded.dtype} of shape {padded.shape}" if isinstance(padded, np.ndarray) else type(padded).__name__
        raise DataError(
            where, found, f"numbers of shape ({len(ids)}, length, features)",
            "Write the features as one padded 3-D array.",
        )  # fmt: skip
    total, dim = padded.shape[1], padded.shape[2]
    if dim == 0 or total == 0:  # nothing was extracted
        return absent(len(padded), max(dim, 1))
    if rule == "recorded" and lengths is None:
        rule = "all_zero"
    usual = side
    side, length, dropped = _inside(padded, usual, rule, lengths, where, least)
    clean, joined, missing = _Cleaner(dim, ids, where), Joiner(dim), []
    for first in range(0, len(padded), BLOCK):
        block = padded[first : first + BLOCK]
        for row, n in enumerate(length[first : first + BLOCK].tolist(), first):
            frames = clean(block[row - first, total - n :] if side == "left" else block[row - first, :n], row)
            if frames.any():
                clean.look_at_edges(frames)
            else:
                missing.append(row)
                frames = np.zeros((1, dim), np.float32)
            joined.add(frames)
        release(block)
    turned = side if side != usual else None
    return Sequences(
        Ragged(*joined.arrays()), clean.nonfinite, missing, dropped, turned, usual, rule, None, clean.coarse(),
        clean.edges,
    )  # fmt: skip


def _inside(
    padded: np.ndarray, usual: Side, rule: LengthRule, lengths: np.ndarray | None, where: str, least: float
) -> tuple[Side, np.ndarray, int]:
    """The side of the padding, the sequences' lengths, and how many frames that are not zero lie outside them."""
    (used, summed), total = _look(padded, rule), padded.shape[1]
    if rule != "all_zero":
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
        return side, length, dropped
    side = _zero_side(used, usual)
    edge = used if side == "left" else used[:, ::-1]
    return side, np.where(used.any(1), total - edge.argmax(1), 0), 0


def _look(padded: np.ndarray, rule: LengthRule) -> tuple[np.ndarray, np.ndarray]:
    """Which frames are not zero, bool [N, L]; and for `sum_zero`, how many frames do not sum to 0, int [N]."""
    used, summed = np.empty(padded.shape[:2], bool), np.zeros(len(padded), np.int64)
    for first in range(0, len(padded), BLOCK):
        block = padded[first : first + BLOCK]
        used[first : first + BLOCK] = (block != 0).any(-1)  # NaN and infinities count: they are frames, not padding
        if rule == "sum_zero":
            sums = np.where(np.isfinite(block), block, 0).sum(-1)
            summed[first : first + BLOCK] = padded.shape[1] - (sums == 0).sum(1)
        release(block)
    return used, summed
