"""Checks and conversions that all readers share: splits, keys, labels, texts and ids.

Each one returns its result in one form, or raises a DataError that names the place.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from engine.errors import DataError
from engine.loaders.safe_pickle import decoded
from engine.vocabulary import SPLITS as SPLITS

SPLIT_ALIASES = {"train": "train", "valid": "valid", "val": "valid", "dev": "valid", "test": "test"}
NAMED = 8  # names that a note lists


def listed(names: Iterable[str]) -> str:
    """Names for a note; of many, the first few.

    >>> listed(["a", "b"])
    'a, b'
    """
    names = [name if len(name) <= 80 else f"{name[:80]}..." for name in names]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def nearest(word: str, options: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The option most like `word`, or none. Capital letters do not count.

    Lengths and counts are bounded: both may come from a damaged file.

    >>> nearest("lables", ["labels", "id"])
    ['labels']
    """
    plain = {str(o)[:80].lower(): str(o)[:80] for o in reversed(list(options)[:200])}
    return [plain[o] for o in difflib.get_close_matches(str(word)[:80].lower(), plain, 1, cutoff)]


def present(splits: Iterable[str]) -> list[str]:
    """Those of train, valid and test that are among `splits`, in this order."""
    splits = set(splits)
    return [s for s in SPLITS if s in splits]


def check_splits(where: str, names: Iterable[str]) -> list[str]:
    """A note on splits that are not read. Raises if none of train, valid and test is there, or if one is misnamed.

    Training asks for all three later.
    """
    names = sorted(names, key=lambda s: SPLITS.index(s) if s in SPLITS else len(SPLITS))
    missing = [s for s in SPLITS if s not in names]
    extra = [s for s in names if s not in SPLITS]
    if len(missing) == len(SPLITS) or any(nearest(s, extra, 0.5) for s in missing):
        raise missing_split(where, names)
    return [f"splits that are not read: {listed(extra)}"] if extra else []


def missing_split(where: str, names: list[str]) -> DataError:
    """The error if one of train, valid and test is not among `names`."""
    missing, extra = [s for s in SPLITS if s not in names], [s for s in names if s not in SPLITS]
    near = {s: like[0] for s in missing if (like := nearest(s, extra, 0.5))}
    one = next(iter(near), missing[0])
    do = f"Rename {near[one]!r}." if near else "Write all three splits."
    return DataError(where, f"splits {', '.join(names)}, no {one}", "train, valid (or dev) and test", do)


_MODALITY_KEYS = ("audio", "vision", "text", "raw_text")


def check_keys(
    where: str, split: Any, required: Iterable[str], optional: Iterable[str], title: str, unread: Iterable[str] = ()
) -> list[str]:
    """Raise for missing and misnamed keys of a split, and suggest the nearest names.

    Args:
        required, optional: keys that are read. unread: keys of the format that the engine does not read.

    Returns:
        The unknown keys, which are not read.
    """
    if not isinstance(split, dict):
        raise DataError(
            where, f"a {type(split).__name__}", f"a dict, as {title} files have", "Write one dict per split."
        )
    required, optional = list(required), list(optional)
    extra = [k for k in split if k not in required and k not in optional and k not in unread]
    for key in required:
        if key not in split:
            near = nearest(key, extra, 0.5)
            do = f"Add {key!r}, or leave it out of data.modalities." if key in _MODALITY_KEYS else f"Add {key!r}."
            do = f"Rename {near[0]!r} to {key!r}." if near else do
            raise DataError(
                where, f"keys {', '.join(map(str, split))}; no {key!r}",
                f"the keys of a {title} file: {', '.join(required)}", do,
            )  # fmt: skip
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
    splits_of: dict[str, list[str]] = {}
    for split, keys in extra.items():
        for key in keys:
            splits_of.setdefault(key, []).append(split)
    names = [key if len(splits) == len(extra) else f"{key} ({', '.join(splits)})" for key, splits in splits_of.items()]
    return [f"keys that are not read: {listed(names)}"] if names else []


def may_be_labelled(split: Any, key: str, known: Iterable[str]) -> bool:
    """Whether a split has labels under `key`, or under an unknown name so similar that it must be a mistake."""
    known = set(known) - {key}
    return isinstance(split, dict) and bool(nearest(key, [k for k in split if k not in known], 0.5))


def unlabelled(count: int) -> np.ndarray:
    """Labels of samples without labels: NaN, float32 [count, 1]."""
    return np.full((count, 1), np.nan, np.float32)


def read_labels(
    values: Any, count: int, where: str, ids: list[str] | None = None, column: int | None = None
) -> np.ndarray:
    """Labels as float32 [N, 1]. A sample without a label keeps NaN.

    Args:
        column: which of several columns. None takes the only one, or the first of 7: sentiment in the SDK's "All
            Labels".

    Raises:
        DataError: wrong shape or dtype, or an infinite label.
    """
    label = as_numbers(values, where, "one number per row")
    with np.errstate(over="ignore"):  # reported below, with the row
        label = label.astype(np.float32)
    columns = label.size // count if label.ndim and len(label) == count and label.size % count == 0 else 0
    flat = columns > 0 and max(label.shape[1:], default=1) == columns
    if not flat or (column is None and columns not in (1, 7)) or (column is not None and not 0 <= column < columns):
        asked = "" if column is None else f" with a column {column}, as data.label_column says"
        more = flat and columns not in (1, 7)
        raise DataError(
            where, f"labels of shape {label.shape}", f"({count},), ({count}, 1), ({count}, 1, 1) or 7 columns{asked}",
            "Name the column with data.label_column." if more else "Write one label per row.",
        )  # fmt: skip
    label = label.reshape(count, -1)[:, [column or 0]]
    wrong = np.flatnonzero(np.isinf(label[:, 0]))
    if len(wrong):
        row = int(wrong[0])
        name = f" (id {ids[row]})" if ids else ""
        raise DataError(
            f"{where}, row {row}{name}", f"label {label[row, 0]}", "a finite number", "Correct or remove the row."
        )
    return np.ascontiguousarray(label)


def as_numbers(values: Any, where: str, expected: str) -> np.ndarray:
    """`values` as an array of real numbers. Lists are converted.

    Raises:
        DataError: they are something else, or lists of different lengths.
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


def check_rows(where: str, rows: Any, title: str) -> int:
    """The number of rows. Raises if there are none."""
    count = len(rows) if hasattr(rows, "__len__") and getattr(rows, "ndim", 1) else 0
    if count == 0:
        raise DataError(
            where, "no rows", f"at least one sample, as in other {title} files", "Check how the split was made."
        )
    return count


def to_text(value: Any, where: str = "text") -> str:
    """Text without lone surrogates. Bytes are decoded: Python 2 and numpy's S arrays have them.

    An empty cell (None, or NaN as pandas leaves it) is an empty text. A number is its digits, without `.0`.

    Raises:
        DataError: the value is neither text nor a finite number.
    """
    if value is None or (isinstance(value, (float, np.floating)) and np.isnan(value)):
        return ""
    if isinstance(value, bytes):
        return decoded(value)
    if isinstance(value, (float, np.floating)) and np.isfinite(value):
        return str(int(value)) if value == int(value) and abs(value) < 2**53 else str(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, np.integer)):
        raise DataError(where, f"a {type(value).__name__}", "text", "Write texts and ids as str.")
    text = str(value)
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def to_id(value: Any, where: str) -> str:
    """`to_text` of a sample's name.

    Raises:
        DataError: it is empty, or a word that numpy arrays of text have for an empty cell.
    """
    text = to_text(value, where)
    if not text.strip() or text in ("nan", "None"):
        found = f"id {text!r}" if text.strip() else "an empty id"
        raise DataError(where, found, "a name for the sample", "Give every sample an id.")
    return text


def to_texts(values: Any, where: str) -> list[str]:
    """`to_text` of every item of a list or array.

    Raises:
        DataError: it is not a list or 1-D array of text, or every row is a number.
    """
    values = _listed(values, where)
    texts = [to_text(value, f"{where}, row {row}") for row, value in enumerate(values)]
    numbers = [v for v in values if not isinstance(v, (str, bytes))] if any(texts) else []
    if numbers and len(numbers) == len(texts):
        raise DataError(where, "a number in every row", "text", "Name the key that holds the transcripts.")
    return texts


def to_ids(values: Any, where: str) -> list[str]:
    """`to_id` of every item of a list or array. Numbers may be names.

    Raises:
        DataError: it is not a list or 1-D array, or an id is empty.
    """
    return [to_id(value, f"{where}, row {row}") for row, value in enumerate(_listed(values, where))]


def _listed(values: Any, where: str) -> Any:
    if isinstance(values, np.ndarray) and values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if not isinstance(values, (list, tuple)) and not (isinstance(values, np.ndarray) and values.ndim == 1):
        shape = f" of shape {values.shape}" if isinstance(values, np.ndarray) else ""
        raise DataError(where, f"a {type(values).__name__}{shape}", "a list of text", "Write one str per row.")
    return values
