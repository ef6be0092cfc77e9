"""Readers of the formats users have: one module a format, chosen by the file's content, never by its name.

A new format is an object with the attributes of `Format`, given to `register_format`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.errors import DataError
from engine.loaders import safe_pickle
from engine.loaders.ragged import LengthRule, Sequences

SPLITS = ("train", "valid", "test")
SPLIT_ALIASES = {"train": "train", "valid": "valid", "val": "valid", "dev": "valid", "test": "test"}


@dataclass
class RawSplit:
    """One split as read from a foreign file, in file order.

    Attributes:
        ids: N unique names, `<video>_<clip>` where the format has both.
        text: N transcripts, or None where the format holds none.
        label: float32 [N, n].
        audio, vision: cleaned sequences.
        features: precomputed text features, where they were asked for and the file has them.
    """

    ids: list[str]
    text: list[str] | None
    label: np.ndarray
    audio: Sequences
    vision: Sequences
    features: Sequences | None = None


@dataclass
class RawDataset:
    """What a reader returns: `splits` by name, and remarks for the user in `notes`."""

    format: str
    splits: dict[str, RawSplit]
    dtypes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Source:
    """What the user named: one file, or a folder with one file a split.

    Attributes:
        path: as named.
        files: the file under "" or the files by split name.
    """

    path: Path
    files: dict[str, Path]

    @cached_property
    def head(self) -> bytes:
        """The first 16 bytes of the (first) file, for formats that are not pickles."""
        with next(iter(self.files.values())).open("rb") as file:
            return file.read(16)

    @cached_property
    def content(self) -> Any:
        """The unpickled object; for one file a split, a dict of them by split name.

        Raises:
            DataError: a file is not a pickle, is damaged, or is refused.
        """
        if "" in self.files:
            return safe_pickle.load(self.files[""])
        return {name: safe_pickle.load(file) for name, file in self.files.items()}

    def split_dict(self) -> dict[str, Any] | None:
        """The content by canonical split name, or None where it is not a dict of splits."""
        content = self.content
        if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
            return None
        found = {SPLIT_ALIASES.get(k, k): v for k, v in content.items()}
        return found if set(found) & set(SPLITS) else None


class Format(Protocol):
    """A reader. `name` is short and unique, `title` is what messages call it."""

    name: str
    title: str

    def recognises(self, source: Source) -> bool:
        """Whether the content is of this family, even if some keys are missing or misnamed."""
        ...

    def read(self, source: Source, rule: LengthRule, features: bool) -> RawDataset:
        """Read everything. `features` asks for precomputed text features as well.

        Raises:
            DataError: where the content is not as the format says.
        """
        ...


_FORMATS: dict[str, Format] = {}


def register_format(reader: Format) -> None:
    """Add a reader (or replace the one of the same name). Readers added later are asked first."""
    _FORMATS.pop(reader.name, None)
    _FORMATS[reader.name] = reader


def formats() -> tuple[Format, ...]:
    """The known readers, in the order in which they are asked."""
    return tuple(reversed(_FORMATS.values()))


def find_source(path: str | Path) -> Source:
    """The file or files that `path` names.

    A folder may hold one pickle, or one file a split (train, dev or valid, test, with a common prefix). A path to one
    such split file stands for all three.

    Raises:
        DataError: nothing there, or more than one candidate.
    """
    path = Path(path)
    if not path.exists():
        near = (
            []
            if not path.parent.is_dir()
            else difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 1)
        )
        raise DataError(
            str(path),
            "nothing",
            "a file or folder of features",
            f"Did you mean {near[0]}?" if near else "Check the path.",
        )
    folder = path if path.is_dir() else path.parent
    groups = _split_groups(folder)
    if path.is_file():
        for files in groups.values():
            if path in files.values():
                return _one_per_split(path, files)
        return Source(path, {"": path})
    single = [p for p in _pickles(folder) if not any(p in files.values() for files in groups.values())]
    if len(single) + len(groups) != 1:
        names = [p.name for p in single] + [f"{prefix}{{{','.join(files)}}}.pkl" for prefix, files in groups.items()]
        raise DataError(
            str(path),
            f"{len(names)} candidates ({', '.join(sorted(names)[:6])})" if names else "no pickle",
            "one data set",
            "Name the file that is meant." if names else "Name the file or the folder that holds the features.",
        )
    if single:
        return Source(path, {"": single[0]})
    return _one_per_split(path, next(iter(groups.values())))


def _pickles(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in (".pkl", ".pickle", ".p") and p.is_file())


def _split_groups(folder: Path) -> dict[str, dict[str, Path]]:
    """Files that are named after splits, by their common prefix; a group of one is no group."""
    groups: dict[str, dict[str, Path]] = {}
    for file in _pickles(folder):
        named = re.fullmatch(r"(|.*[^a-zA-Z])(train|valid|val|dev|test)", file.stem)
        if named:
            groups.setdefault(named[1], {})[named[2]] = file
    return {prefix: files for prefix, files in groups.items() if len(files) > 1}


def _one_per_split(path: Path, files: Mapping[str, Path]) -> Source:
    by_split: dict[str, Path] = {}
    for name, file in files.items():
        split = SPLIT_ALIASES[name]
        if split in by_split:
            raise DataError(
                str(path), f"both {by_split[split].name} and {file.name}", f"one {split} file", "Move one of them away."
            )
        by_split[split] = file
    check_splits(str(path), by_split)
    return Source(path, {s: by_split[s] for s in SPLITS})


def choose_format(source: Source, expected: str | None = None) -> Format:
    """The reader for `source`.

    Args:
        expected: name of the format the user says it is, or None.

    Raises:
        DataError: no reader recognises the content, or another one than `expected` does.
    """
    if expected is not None and expected not in _FORMATS:
        near = difflib.get_close_matches(expected, _FORMATS, 1)
        raise DataError(
            "format",
            f"{expected!r}",
            f"one of {', '.join(_FORMATS)}",
            f"Did you mean {near[0]}?" if near else "Pick one.",
        )
    reader = next((f for f in formats() if f.recognises(source)), None)
    if reader is None:
        known = "; ".join(f.title for f in _FORMATS.values())
        raise DataError(str(source.path), describe(source), f"one of: {known}", "See docs/data.md for the layouts.")
    if expected is not None and reader.name != expected:
        wanted = _FORMATS[expected]
        raise DataError(
            str(source.path),
            f"a {reader.title} file",
            f"a {wanted.title} file",
            f"Use format {reader.name}, or another file.",
        )
    return reader


def describe(source: Source) -> str:
    """A few words on content that no reader recognises, naming the family where it is a known one."""
    content = source.content
    splits = source.split_dict()
    if splits is not None:
        first = next(v for k, v in splits.items() if k in SPLITS)
        if isinstance(first, dict):
            return f"a dict of splits with keys {', '.join(map(str, list(first)[:8]))}"
        return f"splits that are a {_row_family(first)}"
    if isinstance(content, dict):
        return f"a dict with keys {', '.join(map(repr, list(content)[:6]))}"
    if isinstance(content, (list, tuple)):
        return f"a {_row_family(content)} that is not named train, dev/valid or test beside its sister files"
    return f"a pickled {type(content).__name__}"


def _row_family(rows: Any) -> str:
    if not isinstance(rows, (list, tuple)) or not len(rows):
        return (
            f"{type(rows).__name__} without rows"
            if not isinstance(rows, np.ndarray)
            else f"numpy array of shape {rows.shape}"
        )
    row = rows[0]
    fields = len(row) if isinstance(row, (list, tuple)) else 0
    if fields == 7:
        return "list of 7-item rows (AVEC2019 as in the reference)"
    if fields == 5 or (fields == 4 and isinstance(row[0], list)):
        return f"list of {fields}-item rows (CMU-SDK features as in the reference)"
    if fields == 3 and isinstance(row[0], tuple) and len(row[0]) == 3:
        return "list of (words, visual, acoustic) rows (MAG-BERT)"
    return f"list of {fields}-item rows" if fields else f"list of {type(row).__name__}"


def read(
    path: str | Path, rule: LengthRule, features: bool = False, expected: str | None = None
) -> tuple[Source, RawDataset]:
    """Read foreign data of any registered format.

    Raises:
        DataError: see `find_source`, `choose_format` and the readers.
    """
    source = find_source(path)
    reader = choose_format(source, expected)
    return source, reader.read(source, rule, features)


# What readers share.


def check_splits(where: str, found: Iterable[str]) -> None:
    """Raise unless train, valid and test are all there and nothing else is."""
    found = sorted(found, key=lambda s: SPLITS.index(s) if s in SPLITS else len(SPLITS))
    missing = [s for s in SPLITS if s not in found]
    extra = [s for s in found if s not in SPLITS]
    if missing:
        near = difflib.get_close_matches(missing[0], extra, 1, 0.5)
        do = f"Rename {near[0]!r}." if near else "Write all three splits."
        raise DataError(where, f"splits {', '.join(found)}, no {missing[0]}", "train, valid (or dev) and test", do)
    if extra:
        raise DataError(where, f"an extra split {extra[0]!r}", "train, valid (or dev) and test", "Remove it.")


def check_keys(where: str, split: Any, required: Iterable[str], optional: Iterable[str], title: str) -> None:
    """Raise for missing, misnamed and unknown keys of a split, suggesting the nearest names."""
    if not isinstance(split, dict):
        raise DataError(where, f"a {type(split).__name__}", f"a dict, as {title} files have", "Write one dict a split.")
    required, optional = list(required), list(optional)
    extra = [str(k) for k in split if k not in required and k not in optional]
    for key in required:
        if key not in split:
            near = difflib.get_close_matches(key, extra, 1, 0.5)
            do = f"Rename {near[0]!r} to {key!r}." if near else f"Add {key!r}."
            raise DataError(
                where,
                f"keys {', '.join(map(str, split))}; no {key!r}",
                f"the keys of a {title} file: {', '.join(required)}",
                do,
            )
    if extra:
        free = [k for k in required + optional if k not in split]
        near = difflib.get_close_matches(extra[0], free, 1, 0.6)
        do = f"Did you mean {near[0]!r}? Rename it." if near else "Remove it."
        raise DataError(where, f"an unknown key {extra[0]!r}", f"only keys of a {title} file", do)


def read_labels(values: Any, count: int, where: str, ids: list[str] | None = None) -> np.ndarray:
    """Labels as float32 [N, 1]. Of 7 columns (the SDK's "All Labels") the first is sentiment.

    Raises:
        DataError: wrong shape or dtype, or a label that is not finite.
    """
    try:
        label = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        raise DataError(where, "labels that are not numbers", "one number a row", "Write labels as floats.") from None
    if label.size == 0 or len(label) != count or label.size % count or label.size // count not in (1, 7):
        raise DataError(
            where,
            f"labels of shape {label.shape}",
            f"({count},), ({count}, 1), ({count}, 1, 1) or 7 columns",
            "Write one label a row.",
        )
    label = label.reshape(count, -1)[:, :1]
    wrong = np.flatnonzero(~np.isfinite(label[:, 0]))
    if len(wrong):
        row = int(wrong[0])
        name = f" (id {ids[row]})" if ids else ""
        raise DataError(
            f"{where}, row {row}{name}", f"label {label[row, 0]}", "a finite number", "Mend or remove the row."
        )
    return np.ascontiguousarray(label)


def to_text(value: Any) -> str:
    """A str of what may be bytes (as written by Python 2 or in numpy S arrays)."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def check_rows(where: str, rows: Any, title: str) -> int:
    """The number of rows; raise where there are none."""
    count = len(rows) if hasattr(rows, "__len__") else 0
    if count == 0:
        raise DataError(
            where, "no rows", f"at least one sample, as in other {title} files", "Check how the split was made."
        )
    return count


def _register_own() -> None:
    from engine.loaders.formats import declarelab, mmsa, tuples

    for reader in (declarelab.DeclareLab(), mmsa.MMSA(), tuples.Tuples()):
        register_format(reader)


_register_own()
