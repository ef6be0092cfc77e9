"""The registry of readers: what a reader returns, and how the reader of given files is chosen."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.errors import DataError
from engine.loaders.formats.checks import SPLITS, check_splits, listed
from engine.loaders.formats.source import Choice, DataFiles, find_source
from engine.loaders.formats.tables import csv_header
from engine.loaders.ragged import STEPS, LengthRule, Sequences


@dataclass
class RawSplit:
    """One split as read from a foreign file, in file order.

    Attributes:
        ids: N unique names, `<video>_<clip>` if the format has both.
        text: N transcripts, or None if the format holds none.
        label: float32 [N, n]; NaN where the data has none.
        audio, vision: cleaned sequences; `absent` if the data does not hold them and need not.
        features: precomputed text features, if they were asked for and the file has them.
    """

    ids: list[str]
    text: list[str] | None
    label: np.ndarray
    audio: Sequences
    vision: Sequences
    features: Sequences | None = None


@dataclass
class RawDataset:
    """What a reader returns.

    Attributes:
        splits: those that there are, by name.
        notes: remarks for the user.
        draws_words: each line of a text is a sentence, and the text encoder gets one random word of it (AVEC2019).
        cut: frames beyond `data.time_len` are left out before the encoders. The reference does so with data that has
            one row per step or word.
        columns: modality -> names of its feature columns, if the files name them.
    """

    format: str
    splits: dict[str, RawSplit]
    dtypes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    draws_words: bool = False
    cut: bool = False
    columns: dict[str, list[str]] = field(default_factory=dict)


class Format(Protocol):
    """A reader. `name` is short and unique; messages call it by its `title`.

    It may have `choices`, the fields of `Choice` that it heeds. A note then tells the user which settings do nothing.
    """

    name: str
    title: str

    def recognises(self, source: DataFiles) -> bool:
        """Whether the content is of this family, even if some keys are missing or misnamed."""
        ...

    def read(self, source: DataFiles, rule: LengthRule, features: bool) -> RawDataset:
        """Read everything. `features` asks for precomputed text features too.

        Raises:
            DataError: the content is not as the format says.
        """
        ...


_FORMATS: dict[str, Format] = {}


def register_format(reader: Format) -> None:
    """Add a reader, or replace the one of the same name. The reader that was added last is asked first."""
    _FORMATS.pop(reader.name, None)
    _FORMATS[reader.name] = reader


def formats() -> tuple[Format, ...]:
    """The known readers, in the order in which they are asked.

    >>> [reader.name for reader in formats()][-1]
    'declarelab'
    """
    return tuple(reversed(_FORMATS.values()))


def choose_format(source: DataFiles, expected: str | None = None) -> Format:
    """The reader of `source`.

    Args:
        expected: name of the format that the user says it is, or None.

    Raises:
        DataError: no reader recognises the content, or the one that does is not `expected`.
    """
    if expected is not None and expected not in _FORMATS:
        near = difflib.get_close_matches(expected, _FORMATS, 1)
        raise DataError(
            "format", f"{expected!r}", f"one of {', '.join(_FORMATS)}",
            f"Did you mean {near[0]}?" if near else "Pick one.",
        )  # fmt: skip
    reader = next((f for f in formats() if f.recognises(source)), None)
    if reader is None:
        known = "; ".join(f.title for f in _FORMATS.values())
        if source.kind == "csv":
            expected = "a manifest with the columns id, split, label, text, audio and vision"
            raise DataError(str(source.path), describe(source), expected, "Rename the columns: docs/formats.md.")
        raise DataError(str(source.path), describe(source), f"one of: {known}", "See docs/formats.md for the layouts.")
    if expected is not None and reader.name != expected:
        wanted = _FORMATS[expected]
        raise DataError(
            str(source.path), f"a {reader.title} file", f"a {wanted.title} file",
            f"Use format {reader.name}, or another file.",
        )  # fmt: skip
    return reader


def describe(source: DataFiles) -> str:
    """A few words on content that no reader recognises. They name its family if that is known."""
    if source.kind == "hdf5":
        return "an HDF5 file that is not laid out as a .csd"
    if source.kind == "csv":
        return f"a CSV with columns {', '.join(csv_header(next(iter(source.files.values())))[:8])}"
    content = source.content
    splits = source.split_dict()
    if splits is not None:
        first = next(v for k, v in splits.items() if k in SPLITS)
        if isinstance(first, dict):
            return f"a dict of splits with keys {', '.join(map(str, list(first)[:8]))}"
        return f"splits that are a {_rows(first)}"
    if isinstance(content, dict):
        return f"a dict with keys {', '.join(map(repr, list(content)[:6]))}"
    if isinstance(content, (list, tuple)):
        return f"a {_rows(content)} that is not named train, dev/valid or test beside its sister files"
    return f"a pickled {type(content).__name__}"


def _rows(rows: Any) -> str:
    if isinstance(rows, np.ndarray):
        return f"numpy array of shape {rows.shape}"
    if not isinstance(rows, (list, tuple)) or not len(rows):
        return f"{type(rows).__name__} without rows"
    family = row_family(rows[0])
    if family:
        return f"list of rows as in a {_FORMATS[family].title} file"
    fields = len(rows[0]) if isinstance(rows[0], (list, tuple)) else 0
    return f"list of {fields}-item rows" if fields else f"list of {type(rows[0]).__name__}"


def row_family(row: Any) -> str | None:
    """Name of the format of a pickled list's row, judged by its nesting alone.

    >>> row_family([(["so", "good"], [[0.1]], [[0.2]]), 1.0, "a_1"])
    'magbert'
    """
    if not isinstance(row, (list, tuple)) or not len(row):
        return None
    first = row[0]
    inner = len(first) if isinstance(first, (list, tuple)) else 0
    if len(row) == 3 and inner in (4, 6):
        return "tuples"
    if len(row) == 3 and inner == 3:
        return "magbert"
    if len(row) == 7:
        return "avec2019"
    if len(row) in (4, 5) and inner == 3 and all(isinstance(part, (list, tuple)) for part in first):
        return "sdk"
    return None


def first_rows(source: DataFiles) -> str | None:
    """`row_family` of the first row of the first split that has rows; None if splits are not lists of rows."""
    splits = source.split_dict() or {}
    filled = [v for k, v in splits.items() if k in SPLITS and isinstance(v, (list, tuple)) and len(v)]
    return row_family(filled[0][0]) if filled else None


def splits_with_words(source: DataFiles, title: str, features: bool) -> dict[str, Any]:
    """The rows of every split of a format that holds words but no text features. Raises if `features` are asked for."""
    splits = source.split_dict() or {}
    source.notes += check_splits(str(source.path), splits)
    if features:
        raise DataError(
            str(source.path), f"a {title}", "a file with precomputed text features",
            "Name a text encoder in text_encoder.",
        )  # fmt: skip
    return splits


def read(
    path: str | Path,
    rule: LengthRule,
    features: bool = False,
    expected: str | None = None,
    choice: Choice | None = None,
) -> tuple[DataFiles, RawDataset]:
    """Read foreign data of any registered format.

    Raises:
        DataError: see `find_source`, `choose_format` and the readers.
    """
    source = find_source(path, choice)
    reader = choose_format(source, expected)
    return source, reader.read(source, rule, features)


EVERYWHERE = ("modalities", "label_key", "align", "pool_audio", "pool_vision")
"""Choices that need no note here: every reader heeds them, or other notes say what they did."""


def without_effect(reader: Format, choice: Choice) -> list[str]:
    """Notes on choices of the user's that a reader does not heed. None for a reader that does not say what it heeds."""
    heeded = getattr(reader, "choices", None)
    if heeded is None:
        return []
    given = {key: value for key, value in vars(choice).items() if value != getattr(Choice(), key)}
    ignored = [key for key in given if key not in (*heeded, *EVERYWHERE)]
    if given.get("label_column") == 0:  # the only column
        ignored = [key for key in ignored if key != "label_column"]
    return [f"data.{key}={given[key]} has no effect: a {reader.title} has no choice of that kind" for key in ignored]


def remarks(source: DataFiles, raw: RawDataset) -> list[str]:
    """What the user should know of how a data set was read: what was skipped, where padding was, and what was lost."""
    notes = [*source.notes, *raw.notes]
    for name in ("audio", "vision", "features"):
        parts = {s: p for s, split in raw.splits.items() if (p := getattr(split, name)) is not None}
        what = "text features" if name == "features" else name
        for side, end, other in (("left", "start", "end"), ("right", "end", "start")):
            turned = [s for s, p in parts.items() if p.side == side]
            if turned:
                place = "none" if parts[turned[0]].usual is None else f"it at the {other}"
                notes.append(
                    f"{what}: padding found at the {end} of sequences ({', '.join(turned)}), where {raw.format} files "
                    f"have {place}; removed at the {end}"
                )
        dropped = {s: p.dropped for s, p in parts.items() if p.dropped}
        if dropped:
            notes.append(
                f"{what}: {sum(dropped.values())} frames that are not zero left out, since they lie outside the "
                f"lengths of their sequences ({', '.join(f'{s} {n}' for s, n in dropped.items())})"
            )
        notes += _zeros_at_ends(parts, what)
        coarse = sorted({column for p in parts.values() for column in p.coarse})
        if coarse:
            notes.append(
                f"{what}: columns {listed(map(str, coarse))} lie so far from 0 that float32 tells fewer than {STEPS} "
                "values of them apart; subtract a constant from them before they are saved"
            )
    return notes


def _zeros_at_ends(parts: dict[str, Sequences], what: str) -> list[str]:
    """Notes on frames of zeros at one end of most sequences, on average more than one or two of them.

    They are rather padding that was taken for frames. One may be real: the first difference of a sequence, for example.
    """
    notes, present = [], sum(len(p.ragged) - len(p.missing) for p in parts.values())
    for side, verb in (("left", "begin"), ("right", "end")):
        found = {s: p.edges[side] for s, p in parts.items() if side in p.edges}
        sequences, zeros = sum(n for n, _ in found.values()), sum(n for _, n in found.values())
        if 2 * sequences > present and zeros > 2 * sequences:
            counts = ", ".join(f"{s} {n}" for s, (n, _) in found.items() if n)
            # text features have lengths of their own, whatever data.length_rule is
            recorded = what != "text features" and any(
                parts[s].rule == "recorded" and side == (parts[s].side or parts[s].usual) for s in found
            )
            do = "cut them off before the sequences are saved"
            if recorded:
                do = "correct the recorded lengths or ignore them with data.length_rule=all_zero"
            nan = "; padding is zeros, not NaN" if any(p.nonfinite for p in parts.values()) else ""
            notes.append(
                f"{what}: {sequences} of {present} sequences {verb} in frames of zeros ({counts}), {zeros} frames that "
                f"are read as any other. If they are padding, {do}{nan}"
            )
    return notes
