"""Lists of nested tuples: one file per split, or one dict of splits.

- Cached lists of MMIM and the reference (6 inner fields) and of MISA (4): rows
  `((words, visual [Lv, dv], acoustic [La, da], actual_words[, vlen, alen]), label, id)`.
- MAG-BERT: rows `((words, visual, acoustic), label, segment)`, word-aligned; `words` are the words themselves.

Labels are (1, 1) or (1, 7). Sequences are not padded, so of the length rules only `recorded` (vlen, alen) can matter.
Rows may share one array: zeros for a missing modality, or the features of a whole video.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.errors import DataError
from engine.loaders.formats.checks import as_numbers, check_rows, present, read_labels, to_id, to_text, to_texts
from engine.loaders.formats.registry import RawDataset, RawSplit, first_rows, row_family, splits_with_words
from engine.loaders.formats.source import Choice, DataFiles
from engine.loaders.ragged import LengthRule, absent, from_sequences

WIDEST_LABEL = 1000  # values of a row's label, of which one is chosen


class Tuples:
    name = "tuples"
    title = "cached tuple list (MMIM, MIMRL, MISA)"
    choices = ("label_column",)  # fields of `Choice` that it heeds
    inner = "(words, visual, acoustic, actual_words[, vlen, alen])"
    words = 3

    def recognises(self, source: DataFiles) -> bool:
        return first_rows(source) == self.name

    def read(self, source: DataFiles, rule: LengthRule, features: bool) -> RawDataset:
        splits = splits_with_words(source, self.title, features)
        data = RawDataset(self.name, {})
        firsts: dict[str, list[str]] = {}
        for s in present(splits):
            where = f"{source.files.get(s, source.path)}, {s}"
            data.splits[s], firsts[s] = self._split(splits.pop(s), rule, where, source.choice)
        every = [name for names in firsts.values() for name in names]
        if len(set(every)) == len(every):  # else they name the video only, as in MOSEI's (video, start, end)
            for s, names in firsts.items():
                data.splits[s].ids = names
        first = next(iter(data.splits.values())).audio.ragged.values
        data.dtypes = {"audio": str(first.dtype), "vision": str(first.dtype)}
        return data

    def _split(self, rows: Any, rule: LengthRule, where: str, choice: Choice) -> tuple[RawSplit, list[str]]:
        """A split, and the first part of each of its ids."""
        check_rows(where, rows, self.title)
        firsts: list[str] = []
        ids, text, label, visual, acoustic = [], [], [], [], []
        vlen, alen = [], []
        for i, row in enumerate(rows):
            if row_family(row) != self.name:
                raise DataError(
                    f"{where}, row {i}", "another kind of row", f"({self.inner}, label, id)", "Write every row alike."
                )
            inner, value, name = row
            cells = name.ravel().tolist() if isinstance(name, np.ndarray) else name
            cells = cells if isinstance(cells, (list, tuple)) and len(cells) else [name]
            firsts.append(to_id(cells[0], f"{where}, row {i}, id"))
            ids.append("_".join([firsts[-1], *(to_text(cell, f"{where}, row {i}, id") for cell in cells[1:])]))
            at = f"{where}, row {i} (id {ids[-1]})"
            if "text" in choice.modalities:
                text.append(" ".join(_words(inner[self.words], self.inner, at)))
            label.append(as_numbers(value, f"{at}, label", "a number").reshape(-1))
            lengths = inner[4:6] if rule == "recorded" and len(inner) == 6 else (0, 0)
            for frames, length, arrays, recorded in (
                (inner[1], lengths[0], visual, vlen),
                (inner[2], lengths[1], acoustic, alen),
            ):
                arrays.append(_frames(frames, at))
                recorded.append(_length(length, at))
        modalities = choice.modalities
        split = RawSplit(
            ids, text if "text" in modalities else None, stacked_labels(label, where, ids, choice.label_column),
            from_sequences(acoustic, ids, f"{where}, acoustic", alen) if "audio" in modalities else absent(len(ids)),
            from_sequences(visual, ids, f"{where}, visual", vlen) if "vision" in modalities else absent(len(ids)),
        )  # fmt: skip
        return split, firsts


class MAGBert(Tuples):
    name = "magbert"
    title = "MAG-BERT"
    choices = ("label_column",)  # fields of `Choice` that it heeds
    inner = "(words, visual, acoustic)"
    words = 0


def stacked_labels(label: list[np.ndarray], where: str, ids: list[str], column: int | None) -> np.ndarray:
    """Labels of rows, each 1-D, as float32 [N, 1]. See `read_labels`."""
    widest = max(map(len, label))
    if widest > WIDEST_LABEL:
        raise DataError(
            f"{where}, labels", f"{widest} values per row", f"at most {WIDEST_LABEL}", "Write one label per row."
        )
    if len({len(v) for v in label}) != 1:
        raise DataError(
            f"{where}, labels", "labels of different lengths", "one label per row", "Write every label alike."
        )
    return read_labels(np.stack(label), len(label), f"{where}, labels", ids, column)


def _words(words: Any, inner: str, where: str) -> list[str]:
    if (
        not isinstance(words, (list, tuple, np.ndarray))
        or (isinstance(words, np.ndarray) and words.ndim != 1)
        or not all(isinstance(w, (str, bytes)) for w in words)
    ):
        other = next((w for w in words if not isinstance(w, (str, bytes))), None) if isinstance(words, list) else None
        found = f"actual_words of type {type(words).__name__}{'' if other is None else f' of {type(other).__name__}'}"
        raise DataError(where, found, "a list of words", f"Write {inner}.")
    return to_texts(words, where)


def _length(length: Any, where: str) -> int:
    """A recorded length. 0 stands for an empty or all-zero sequence."""
    if not isinstance(length, (int, float, np.number)) or not 0 <= length < 1 << 62:
        raise DataError(where, f"a recorded length {str(length)[:40]}", "a number of frames", "Write vlen and alen.")
    return int(length)


def _frames(frames: Any, where: str) -> np.ndarray:
    if isinstance(frames, np.ndarray):
        return frames
    return as_numbers(frames, where, "numbers of shape (frames, features)")
