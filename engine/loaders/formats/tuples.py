"""Cached lists of tuples: MMIM's and the reference's (6 inner fields) and MISA's (4 inner fields), one file a split.

Layout of a row: `((words, visual [Lv, dv], acoustic [La, da], actual_words[, vlen, alen]), label, id)`, label (1, 1) or
(1, 7); sequences are not padded, so of the length rules only `recorded` (vlen, alen) can matter.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.errors import DataError
from engine.loaders.formats import SPLITS, RawDataset, RawSplit, Source, check_rows, check_splits, read_labels, to_text
from engine.loaders.ragged import LengthRule, from_sequences

TITLE = "cached tuple list (MMIM, MIMRL, MISA)"
INNER = "(words, visual, acoustic, actual_words[, vlen, alen])"


class Tuples:
    name = "tuples"
    title = TITLE

    def recognises(self, source: Source) -> bool:
        splits = source.split_dict()
        if not splits:
            return False
        filled = [v for k, v in splits.items() if k in SPLITS and isinstance(v, (list, tuple)) and len(v)]
        return bool(filled) and _is_row(filled[0][0])

    def read(self, source: Source, rule: LengthRule, features: bool) -> RawDataset:
        splits = source.split_dict() or {}
        check_splits(str(source.path), splits)
        if features:
            raise DataError(
                str(source.path),
                f"a {TITLE}",
                "a file with precomputed text features",
                "Name a text encoder in text_encoder.",
            )
        data = RawDataset(self.name, {})
        for s in SPLITS:
            where = f"{source.files.get(s, source.path)}, {s}"
            data.splits[s] = _read_split(splits.pop(s), rule, where)
        first = data.splits["train"].audio.ragged.values
        data.dtypes = {"audio": str(first.dtype), "vision": str(first.dtype)}
        return data


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, (tuple, list)) and len(row) == 3 and isinstance(row[0], (tuple, list)) and len(row[0]) in (4, 6)
    )


def _read_split(rows: Any, rule: LengthRule, where: str) -> RawSplit:
    count = check_rows(where, rows, TITLE)
    ids, text, label, visual, acoustic = [], [], [], [], []
    for i, row in enumerate(rows):
        if not _is_row(row):
            raise DataError(
                f"{where}, row {i}", "another kind of row", f"({INNER}, label, id)", "Write every row alike."
            )
        inner, value, name = row
        name = name[0] if isinstance(name, (np.ndarray, list, tuple)) and len(name) else name
        ids.append(to_text(name))
        words = inner[3]
        if (
            isinstance(words, (str, bytes))
            or not hasattr(words, "__len__")
            or not all(isinstance(w, (str, bytes)) for w in words)
        ):
            raise DataError(
                f"{where}, row {i} (id {ids[-1]})",
                f"actual_words of type {type(words).__name__}",
                "a list of words",
                f"Write {INNER}.",
            )
        text.append(" ".join(to_text(w) for w in words))
        label.append(np.asarray(value).reshape(-1))
        lengths = inner[4:6] if rule == "recorded" and len(inner) == 6 else (0, 0)
        visual.append(_cut(inner[1], lengths[0]))
        acoustic.append(_cut(inner[2], lengths[1]))
    if len({len(v) for v in label}) != 1:
        raise DataError(
            f"{where}, labels", "labels of different lengths", "one label a row", "Write every label alike."
        )
    return RawSplit(
        ids,
        text,
        read_labels(label, count, f"{where}, labels", ids),
        from_sequences(acoustic, ids, f"{where}, acoustic"),
        from_sequences(visual, ids, f"{where}, visual"),
    )


def _cut(frames: Any, length: Any) -> np.ndarray:
    """The first `length` frames where a length is recorded; 0 stands for an empty or all-zero sequence."""
    frames = np.asarray(frames)
    return frames[: int(length)] if np.ndim(length) == 0 and 0 < int(length) < len(frames) else frames
