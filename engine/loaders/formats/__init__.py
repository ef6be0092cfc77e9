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
from typing import Any, Literal, Protocol

import numpy as np

from engine.config import MODALITIES
from engine.errors import DataError
from engine.files import user_path
from engine.loaders import safe_pickle
from engine.loaders.formats.tables import csv_header
from engine.loaders.ragged import STEPS, LengthRule, Sequences

SPLITS = ("train", "valid", "test")
SPLIT_ALIASES = {"train": "train", "valid": "valid", "val": "valid", "dev": "valid", "test": "test"}
MANIFEST = "manifest.csv"
SPLITS_FILE = "splits.json"
CSD = (".csd", ".hdf5", ".h5")
COMPANIONS = ("thumbs.db", "desktop.ini")  # what file managers leave in folders, beside names that begin with a dot
NAMED = 8  # names that a note lists


@dataclass(frozen=True)
class Choice:
    """What to take where the data has several of a kind; the settings `data.*` of the same names.

    Attributes:
        audio_features, vision_features, text_features: name of a feature set; "auto" is the reader's first.
        label_column: of labels with several columns; None is sentiment, the first of the SDK's seven.
        align: .csd files: one row a word, or the frames of a segment as they are.
        label_key: set of labels of an MMSA file; auto: regression_labels; classes: classification_labels, where it has
            them.
        modalities: of text, audio and vision those that the data has to hold.
    """

    audio_features: str = "auto"
    vision_features: str = "auto"
    text_features: str = "auto"
    label_column: int | None = None
    align: Literal["words", "segments"] = "words"
    label_key: str = "auto"
    modalities: tuple[str, ...] = MODALITIES

    def of(self, modality: Literal["audio", "vision", "text"], names: Iterable[str], where: str) -> str:
        """The name chosen for `modality` among `names`.

        Raises:
            DataError: it is not among them.
        """
        names, asked = list(names), getattr(self, f"{modality}_features")
        if asked == "auto":
            return names[0]
        same = [n for n in names if n.lower() == asked.lower()]
        if not same:
            near = difflib.get_close_matches(asked, names, 1)
            raise DataError(
                where,
                f"no {modality} features {asked!r}",
                f"one of {', '.join(names)}",
                f"Set data.{modality}_features to {near[0] if near else 'one of them'}.",
            )
        return same[0]


@dataclass
class RawSplit:
    """One split as read from a foreign file, in file order.

    Attributes:
        ids: N unique names, `<video>_<clip>` where the format has both.
        text: N transcripts, or None where the format holds none.
        label: float32 [N, n]; NaN where the data has none.
        audio, vision: cleaned sequences; `absent` where the data need not hold them and does not.
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
    """What a reader returns: `splits` by name, those that there are, and remarks for the user in `notes`.

    `draws_words` says that each line of a text is a sentence of which one word, drawn at random, goes to the text
    encoder, as AVEC2019's interviews are used. `cut` says that frames beyond `data.time_len` are left out before the
    encoders, as the reference does with data that has a row a step or word.
    """

    format: str
    splits: dict[str, RawSplit]
    dtypes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    draws_words: bool = False
    cut: bool = False


@dataclass
class Source:
    """What the user named: one file, a folder with one file a split, or one with a file a feature set (.csd).

    Attributes:
        path: as named.
        files: the file under "", the files by split name, or .csd files by their stems.
        choice: what to take where there is more than one of a kind.
        parts: further files the data lies in, which are looked at only for whether they have changed.
        notes: remarks for the user on what is skipped.
    """

    path: Path
    files: dict[str, Path]
    choice: Choice = Choice()
    parts: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def head(self) -> bytes:
        """The first 16 bytes of the (first) file, for formats that are not pickles."""
        with next(iter(self.files.values())).open("rb") as file:
            return file.read(16)

    @cached_property
    def kind(self) -> Literal["pickle", "hdf5", "csv"]:
        """What the (first) file is by its first bytes; a CSV by its name, since it has no mark."""
        if self.head.startswith(b"\x89HDF\r\n\x1a\n"):
            return "hdf5"
        return "csv" if next(iter(self.files.values())).suffix.lower() == ".csv" else "pickle"

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
        """The content by canonical split name, or None where it is not a dict of splits.

        The dicts are copies (not what they hold), with text for keys that are byte strings.

        Raises:
            DataError: a split is there under two names.
        """
        if self.kind != "pickle":
            return None
        if isinstance(self.content, dict):
            found: dict[str, Any] = {}
            for key, split in _text_keys(self.content).items():
                name = SPLIT_ALIASES.get(key, key)
                if name in found:
                    raise DataError(
                        str(self.path), f"the split {name} under two names, one of them {key!r}", f"one {name} split",
                        "Remove one of them.",
                    )  # fmt: skip
                found[name] = _text_keys(split) if isinstance(split, dict) else split
            if set(found) & set(SPLITS):
                return found
        alone = _split_named(self.files[""]) if "" in self.files else None
        if alone is None:
            return None
        return {alone: _text_keys(self.content) if isinstance(self.content, dict) else self.content}


def _text_keys(content: dict) -> dict[str, Any]:
    """A copy of a dict with its keys as text."""
    return {safe_pickle.decoded(k) if isinstance(k, bytes) else str(k): v for k, v in content.items()}


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


def find_source(path: str | Path, choice: Choice | None = None) -> Source:
    """The file or files that `path` names.

    A folder may hold one pickle, one file a split (train, dev or valid, test, with a common prefix), .csd files, or a
    manifest.csv. A path to one such split file or .csd file stands for all of them. Hidden files and what file managers
    leave in folders are skipped, which `notes` of the source says.

    Raises:
        DataError: nothing there, or more than one candidate.
    """
    path = user_path(path)
    source = _find(path, choice or Choice())
    if path.is_dir() or "" not in source.files:
        folder = path if path.is_dir() else path.parent
        hidden = sorted(p.name for p in folder.iterdir() if is_hidden(p) and p.is_file() and p.suffix != ".part")
        source.notes += [f"skipped files: {listed(hidden)}"] if hidden else []
    return source


def is_hidden(path: Path) -> bool:
    """Whether a file is a companion that no user means: `.DS_Store`, `._x.pkl`, `Thumbs.db`."""
    return path.name.startswith(".") or path.name.lower() in COMPANIONS


def listed(names: Iterable[str]) -> str:
    """Names for a note, the first few of many."""
    names = [name if len(name) <= 80 else f"{name[:80]}..." for name in names]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _find(path: Path, choice: Choice) -> Source:
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
    if not path.is_file() and not path.is_dir():
        raise DataError(str(path), "neither a file nor a folder", "a file or folder of features", "Check the path.")
    folder = path if path.is_dir() else path.parent
    groups = _split_groups(folder)
    if path.is_file():
        if path.suffix.lower() in CSD:
            return Source(path, _csd(folder), choice, _splits_file(folder))
        if path.suffix.lower() == ".csv":
            return Source(path, {"": path}, choice, _below(folder))
        for files in groups.values():
            if path in files.values():
                return _one_per_split(path, files, choice)
        return Source(path, {"": path}, choice)
    single = [p for p in _pickles(folder) if not any(p in files.values() for files in groups.values())]
    manifest, csd = folder / MANIFEST, _csd(folder)
    if len(single) + len(groups) + bool(csd) + manifest.is_file() != 1:
        names = [p.name for p in single] + [f"{prefix}{{{','.join(files)}}}.pkl" for prefix, files in groups.items()]
        names += [MANIFEST] * manifest.is_file() + ["*.csd"] * bool(csd)
        raise DataError(
            str(path),
            f"{len(names)} candidates ({', '.join(sorted(names)[:6])})" if names else "no pickle, .csd or manifest.csv",
            "one data set",
            "Name the file that is meant." if names else "Name the file or the folder that holds the features.",
        )
    if single:
        return Source(path, {"": single[0]}, choice)
    if csd:
        return Source(path, csd, choice, _splits_file(folder))
    if groups:
        return _one_per_split(path, next(iter(groups.values())), choice)
    return Source(path, {"": manifest}, choice, _below(folder))


def _pickles(folder: Path) -> list[Path]:
    kinds = (".pkl", ".pickle", ".p")
    return sorted(p for p in folder.iterdir() if p.suffix in kinds and p.is_file() and not is_hidden(p))


def _csd(folder: Path) -> dict[str, Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in CSD and p.is_file() and not is_hidden(p))
    return {p.stem: p for p in found}


def csv_files(folder: Path) -> list[Path]:
    """The CSV files of a folder, hidden ones left out."""
    return sorted(p for p in folder.glob("*.csv") if not is_hidden(p) and p.is_file())


def _splits_file(folder: Path) -> list[Path]:
    return [p for p in [folder / SPLITS_FILE] if p.is_file()]


def _below(folder: Path) -> list[Path]:
    kinds = (".npy", ".csv")
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in kinds and p.is_file() and not is_hidden(p))


_NAMED = re.compile(r"(|.*[^a-zA-Z])(train|valid|val|dev|test)")


def _split_named(file: Path) -> str | None:
    """The split that a file is named after."""
    named = _NAMED.fullmatch(file.stem)
    return SPLIT_ALIASES[named[2]] if named else None


def _split_groups(folder: Path) -> dict[str, dict[str, Path]]:
    """Files that are named after splits, by their common prefix; a group of one is no group."""
    groups: dict[str, dict[str, Path]] = {}
    for file in _pickles(folder):
        named = _NAMED.fullmatch(file.stem)
        if named:
            groups.setdefault(named[1], {})[named[2]] = file
    return {prefix: files for prefix, files in groups.items() if len(files) > 1}


def _one_per_split(path: Path, files: Mapping[str, Path], choice: Choice) -> Source:
    by_split: dict[str, Path] = {}
    for name, file in files.items():
        split = SPLIT_ALIASES[name]
        if split in by_split:
            raise DataError(
                str(path), f"both {by_split[split].name} and {file.name}", f"one {split} file", "Move one of them away."
            )
        by_split[split] = file
    check_splits(str(path), by_split)
    return Source(path, {s: by_split[s] for s in present(by_split)}, choice)


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
        raise DataError(str(source.path), describe(source), f"one of: {known}", "See docs/formats.md for the layouts.")
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
    """Name of the format that a row of a pickled list belongs to, by its nesting alone."""
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


def first_rows(source: Source) -> str | None:
    """`row_family` of the first row of the first split that has rows; None where splits are not lists of rows."""
    splits = source.split_dict() or {}
    filled = [v for k, v in splits.items() if k in SPLITS and isinstance(v, (list, tuple)) and len(v)]
    return row_family(filled[0][0]) if filled else None


def read(
    path: str | Path,
    rule: LengthRule,
    features: bool = False,
    expected: str | None = None,
    choice: Choice | None = None,
) -> tuple[Source, RawDataset]:
    """Read foreign data of any registered format.

    Raises:
        DataError: see `find_source`, `choose_format` and the readers.
    """
    source = find_source(path, choice)
    reader = choose_format(source, expected)
    return source, reader.read(source, rule, features)


# What readers share.


def present(splits: Iterable[str]) -> list[str]:
    """Those of train, valid and test that are among `splits`, in this order."""
    splits = set(splits)
    return [s for s in SPLITS if s in splits]


def check_splits(where: str, found: Iterable[str]) -> list[str]:
    """Raise unless some of train, valid and test are there and none is misnamed; a note on splits that are not read.

    Training asks for all three later.
    """
    found = sorted(found, key=lambda s: SPLITS.index(s) if s in SPLITS else len(SPLITS))
    missing = [s for s in SPLITS if s not in found]
    extra = [s for s in found if s not in SPLITS]
    if len(missing) == len(SPLITS) or any(nearest(s, extra, 0.5) for s in missing):
        raise missing_split(where, found)
    return [f"splits that are not read: {listed(extra)}"] if extra else []


def missing_split(where: str, found: list[str]) -> DataError:
    """One of train, valid and test is not among `found`."""
    missing, extra = [s for s in SPLITS if s not in found], [s for s in found if s not in SPLITS]
    near = {s: names[0] for s in missing if (names := nearest(s, extra, 0.5))}
    one = next(iter(near), missing[0])
    do = f"Rename {near[one]!r}." if near else "Write all three splits."
    return DataError(where, f"splits {', '.join(found)}, no {one}", "train, valid (or dev) and test", do)


def unlabelled(count: int) -> np.ndarray:
    """Labels of samples that have none: NaN, float32 [count, 1]."""
    return np.full((count, 1), np.nan, np.float32)


def splits_with_words(source: Source, title: str, features: bool) -> dict[str, Any]:
    """The rows of every split of a format that holds words but no text features; raises where `features` are asked."""
    splits = source.split_dict() or {}
    source.notes += check_splits(str(source.path), splits)
    if features:
        raise DataError(
            str(source.path), f"a {title}", "a file with precomputed text features",
            "Name a text encoder in text_encoder.",
        )  # fmt: skip
    return splits


def nearest(word: str, options: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The option most like `word`, or none. Bounded: both may come from a damaged file."""
    return difflib.get_close_matches(str(word)[:80], [str(o)[:80] for o in list(options)[:200]], 1, cutoff)


_MODALITY_KEYS = ("audio", "vision", "text", "raw_text")


def check_keys(
    where: str, split: Any, required: Iterable[str], optional: Iterable[str], title: str, unread: Iterable[str] = ()
) -> list[str]:
    """Raise for missing and misnamed keys of a split, suggesting the nearest names.

    Args:
        required, optional: keys that are read. unread: keys of the format that nothing here reads.

    Returns:
        the unknown keys, which are not read.
    """
    if not isinstance(split, dict):
        raise DataError(where, f"a {type(split).__name__}", f"a dict, as {title} files have", "Write one dict a split.")
    required, optional = list(required), list(optional)
    extra = [k for k in split if k not in required and k not in optional and k not in unread]
    for key in required:
        if key not in split:
            near = nearest(key, extra, 0.5)
            do = f"Add {key!r}, or leave it out of data.modalities." if key in _MODALITY_KEYS else f"Add {key!r}."
            do = f"Rename {near[0]!r} to {key!r}." if near else do
            raise DataError(
                where,
                f"keys {', '.join(map(str, split))}; no {key!r}",
                f"the keys of a {title} file: {', '.join(required)}",
                do,
            )
    free = [k for k in required + optional if k not in split]
    for key in extra:
        near = nearest(key, free, 0.8)
        if near:
            raise DataError(
                where, f"an unknown key {key!r}", f"the keys of a {title} file", f"Did you mean {near[0]!r}? Rename it."
            )
    return extra


def note_keys(extra: Mapping[str, list[str]]) -> list[str]:
    """A note on keys that are not read. `extra`: split -> its unknown keys."""
    found: dict[str, list[str]] = {}
    for split, keys in extra.items():
        for key in keys:
            found.setdefault(key, []).append(split)
    names = [key if len(splits) == len(extra) else f"{key} ({', '.join(splits)})" for key, splits in found.items()]
    return [f"keys that are not read: {listed(names)}"] if names else []


def remarks(source: Source, raw: RawDataset) -> list[str]:
    """All that the user should know of how a data set was read: what was skipped, where padding was, what was lost."""
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
                    f"have {place}; read so"
                )
        dropped = {s: p.dropped for s, p in parts.items() if p.dropped}
        if dropped:
            notes.append(
                f"{what}: {sum(dropped.values())} frames that are not zero left out, since they lie outside the "
                f"lengths of their sequences ({', '.join(f'{s} {n}' for s, n in dropped.items())})"
            )
        coarse = sorted({column for p in parts.values() for column in p.coarse})
        if coarse:
            notes.append(
                f"{what}: columns {listed(map(str, coarse))} lie so far from 0 that float32 tells fewer than {STEPS} "
                "values of them apart; subtract a constant from them before they are saved"
            )
    return notes


def may_be_labelled(split: Any, key: str, known: Iterable[str]) -> bool:
    """Whether a split has labels under `key`, or under an unknown name so like it that it is a mistake."""
    known = set(known) - {key}
    return isinstance(split, dict) and bool(nearest(key, [k for k in split if k not in known], 0.5))


def read_labels(
    values: Any, count: int, where: str, ids: list[str] | None = None, column: int | None = None
) -> np.ndarray:
    """Labels as float32 [N, 1]; NaN stays: a sample without a label.

    Args:
        column: of labels with several; None takes the only one, or of 7 (the SDK's "All Labels") the first, sentiment.

    Raises:
        DataError: wrong shape or dtype, or an infinite label.
    """
    label = as_numbers(values, where, "one number a row")
    with np.errstate(over="ignore"):  # told below, with the row
        label = label.astype(np.float32)
    columns = label.size // count if label.ndim and len(label) == count and label.size % count == 0 else 0
    flat = columns > 0 and max(label.shape[1:], default=1) == columns
    if not flat or (column is None and columns not in (1, 7)) or (column is not None and not 0 <= column < columns):
        asked = "" if column is None else f" with a column {column}, as data.label_column says"
        more = flat and columns not in (1, 7)
        raise DataError(
            where,
            f"labels of shape {label.shape}",
            f"({count},), ({count}, 1), ({count}, 1, 1) or 7 columns{asked}",
            "Name the column with data.label_column." if more else "Write one label a row.",
        )
    label = label.reshape(count, -1)[:, [column or 0]]
    wrong = np.flatnonzero(np.isinf(label[:, 0]))
    if len(wrong):
        row = int(wrong[0])
        name = f" (id {ids[row]})" if ids else ""
        raise DataError(
            f"{where}, row {row}{name}", f"label {label[row, 0]}", "a finite number", "Mend or remove the row."
        )
    return np.ascontiguousarray(label)


def as_numbers(values: Any, where: str, expected: str) -> np.ndarray:
    """`values` as an array of real numbers; lists are converted.

    Raises:
        DataError: something else, or lists of different lengths.
    """
    if not isinstance(values, np.ndarray):
        try:
            values = np.asarray(values)
        except (TypeError, ValueError, OverflowError):
            raise DataError(where, "lists of different lengths", expected, "Write a numpy array.") from None
    if values.dtype == object or values.dtype.kind in "US":
        try:
            values = values.astype(np.float64)
        except (TypeError, ValueError, OverflowError):
            raise DataError(where, "values that are not numbers", expected, "Write a numpy array of floats.") from None
    if values.dtype.kind not in "fiub":
        raise DataError(where, f"values of dtype {values.dtype}", expected, "Write a numpy array of floats.")
    return values


def to_text(value: Any, where: str = "text") -> str:
    """A str of what may be bytes (as written by Python 2 or in numpy S arrays), without lone surrogates.

    An empty cell (None, or NaN as pandas leaves it) is an empty text. A number is its digits, without `.0`.

    Raises:
        DataError: something that is neither text nor a finite number.
    """
    if value is None or (isinstance(value, (float, np.floating)) and np.isnan(value)):
        return ""
    if isinstance(value, bytes):
        return safe_pickle.decoded(value)
    if isinstance(value, (float, np.floating)) and np.isfinite(value):
        return str(int(value)) if value == int(value) and abs(value) < 2**53 else str(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, np.integer)):
        raise DataError(where, f"a {type(value).__name__}", "text", "Write texts and ids as str.")
    text = str(value)
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def to_id(value: Any, where: str) -> str:
    """`to_text` of the name of a sample.

    Raises:
        DataError: it is empty, or the word that an empty cell becomes in a numpy array of text.
    """
    text = to_text(value, where)
    if not text.strip() or text in ("nan", "None"):
        found = f"id {text!r}" if text.strip() else "an empty id"
        raise DataError(where, found, "a name for the sample", "Give every sample an id.")
    return text


def to_texts(values: Any, where: str) -> list[str]:
    """`to_text` of every item of a list or array.

    Raises:
        DataError: not a list or 1-D array of text, or numbers in every row.
    """
    values = _listed(values, where)
    texts = [to_text(value, f"{where}, row {row}") for row, value in enumerate(values)]
    numbers = [v for v in values if not isinstance(v, (str, bytes))] if any(texts) else []
    if numbers and len(numbers) == len(texts):
        raise DataError(where, "a number in every row", "text", "Name the key that holds the transcripts.")
    return texts


def to_ids(values: Any, where: str) -> list[str]:
    """`to_id` of every item of a list or array; numbers are names too.

    Raises:
        DataError: not a list or 1-D array, or an empty id.
    """
    return [to_id(value, f"{where}, row {row}") for row, value in enumerate(_listed(values, where))]


def _listed(values: Any, where: str) -> Any:
    if isinstance(values, np.ndarray) and values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if not isinstance(values, (list, tuple)) and not (isinstance(values, np.ndarray) and values.ndim == 1):
        shape = f" of shape {values.shape}" if isinstance(values, np.ndarray) else ""
        raise DataError(where, f"a {type(values).__name__}{shape}", "a list of text", "Write one str a row.")
    return values


def check_rows(where: str, rows: Any, title: str) -> int:
    """The number of rows; raise where there are none."""
    count = len(rows) if hasattr(rows, "__len__") and getattr(rows, "ndim", 1) else 0
    if count == 0:
        raise DataError(
            where, "no rows", f"at least one sample, as in other {title} files", "Check how the split was made."
        )
    return count


def _register_own() -> None:
    from engine.loaders.formats import csd, declarelab, manifest, mmsa, rows, tuples

    for reader in (
        declarelab.DeclareLab(),
        mmsa.MMSA(),
        tuples.Tuples(),
        tuples.MAGBert(),
        rows.SDKRows(),
        rows.AVEC2019(),
        csd.CSD(),
        manifest.Manifest(),
    ):
        register_format(reader)


_register_own()
