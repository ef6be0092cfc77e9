"""MulT's pickles as DeclareLab's projects and the reference use them, with their label CSV.

Layout: `d[split] = {vision [N, Lv, dv], audio [N, La, da], text [N, 50, 300], labels [N, 1, 1 or 7], id [N, 1 to 3]}`,
padded with zeros on the LEFT; in aligned files all three have a row a word and L = 50. Transcripts are in a CSV beside
it (video_id, clip_id, text, label, in any order).
MOSI ids are `<video>_<clip>`; MOSEI ids are rows (video, start, end), which the CSV need not have.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import DataError
from engine.loaders.formats import (
    SPLITS,
    RawDataset,
    RawSplit,
    Source,
    check_keys,
    check_rows,
    check_splits,
    csv_header,
    may_be_labelled,
    nearest,
    present,
    read_labels,
    to_text,
    unlabelled,
)
from engine.loaders.ragged import LengthRule, absent, from_padded

TITLE = "DeclareLab/MulT"
KEYS = ("vision", "audio", "text", "labels", "id")
MMSA_HINTS = (
    "regression_labels",
    "raw_text",
    "text_bert",
    "classification_labels",
    "annotations",
    "audio_lengths",
    "vision_lengths",
)
LABEL_TOLERANCE = 0.05  # CSVs round labels to one decimal; two different MOSI or MOSEI labels are further apart


@dataclass
class _Row:
    """A row of the label CSV."""

    line: int
    video: str
    clip: str
    text: str
    label: float
    mode: str


@dataclass
class _Sample:
    """A row of the pickle. `cells` are the non-empty columns of its id."""

    where: str
    cells: list[str]
    label: float

    @property
    def name(self) -> str:
        return "_".join(self.cells)

    @property
    def clip(self) -> tuple[str, str]:
        """(video, clip) as MOSI's first column has them; video ids may hold underscores too."""
        video, _, clip = self.cells[0].rpartition("_")
        return video, clip

    @property
    def start(self) -> tuple[str, str]:
        """(video, start) as in MOSEI's rows."""
        return self.cells[0], _number(self.cells[1]) if len(self.cells) > 1 else ""


class DeclareLab:
    name = "declarelab"
    title = TITLE

    def recognises(self, source: Source) -> bool:
        splits = source.split_dict()
        first = next((v for k, v in splits.items() if k in SPLITS), None) if splits else None
        if not isinstance(first, dict) or looks_like_mmsa(first):
            return False
        return sum(bool(nearest(k, first)) for k in KEYS) >= 3

    def read(self, source: Source, rule: LengthRule, features: bool) -> RawDataset:
        splits = source.split_dict() or {}
        where = str(source.path)
        check_splits(where, splits)
        names = present(splits)
        modalities = source.choice.modalities
        frames = [m for m in ("audio", "vision") if m in modalities]
        samples: dict[str, list[_Sample]] = {}
        for s in names:
            labels = ["labels"] if may_be_labelled(splits[s], "labels", KEYS) else []
            required = [*frames, *(["text"] if features else []), *labels, "id"]
            check_keys(f"{where}, {s}", splits[s], required, KEYS, TITLE)
            samples[s] = _samples(splits[s], f"{where}, {s}")
        column = source.choice.label_column
        every = [x for s in names for x in samples[s]]
        # MOSI's first column is a whole id, MOSEI's names only the video
        whole = len({x.cells[0] for x in every}) == len(every) or all(len(x.cells) == 1 for x in every)
        data = RawDataset(self.name, {})
        text = None if features or "text" not in modalities else _join(source, samples, data.notes)
        for s in names:
            split = splits.pop(s)
            data.dtypes.update({m: str(getattr(split[m], "dtype", "")) for m in frames})
            ids = [x.cells[0] if whole else x.name for x in samples[s]]
            embedded = split.pop("text", None)
            data.splits[s] = RawSplit(
                ids,
                text[s] if text else None,
                read_labels(split["labels"], len(ids), f"{where}, {s}/labels", ids, column)
                if split.get("labels") is not None
                else unlabelled(len(ids)),
                *(
                    from_padded(split.pop(m), "left", rule, None, ids, f"{where}, {s}/{m}")
                    if m in frames
                    else absent(len(ids))
                    for m in ("audio", "vision")
                ),
                from_padded(embedded, "left", "all_zero", None, ids, f"{where}, {s}/text") if features else None,
            )
        return data


def looks_like_mmsa(split: dict) -> bool:
    """Whether a split's keys are those of an MMSA file, misspelt or not."""
    keys = [str(k) for k in split if k not in KEYS]
    return any(nearest(k, keys, 0.85) for k in MMSA_HINTS)


def _samples(split: dict[str, Any], where: str) -> list[_Sample]:
    values = split["id"]
    count = check_rows(f"{where}/id", values, TITLE)
    if not isinstance(values, (list, tuple, np.ndarray)):
        raise DataError(f"{where}/id", f"a {type(values).__name__}", "an array of ids", "Write one id a row.")
    cells = []
    for row in range(count):
        value, at = values[row], f"{where}/id, row {row}"
        parts = (
            value.ravel().tolist()
            if isinstance(value, np.ndarray)
            else value
            if isinstance(value, (list, tuple))
            else [value]
        )
        cells.append([c for c in (to_text(part, at) for part in parts) if c])
        if not cells[-1]:
            raise DataError(
                f"{where}/id, row {row}", "an empty id", "video_clip or (video, start, end)", "Give every sample an id."
            )
    # sentiment, which the CSV has too, whatever column is trained on
    names = [c[0] for c in cells]
    known = split.get("labels") is not None
    label = read_labels(split["labels"], count, f"{where}/labels", names) if known else unlabelled(count)
    return [_Sample(f"{where}, row {i}", c, float(label[i, 0])) for i, c in enumerate(cells)]


def find_csv(source: Source) -> Path:
    """The label CSV beside the pickle: one with columns video_id and text; of several, the one named most like it.

    Raises:
        DataError: there is none.
    """
    file = next(iter(source.files.values()))
    tables = [p for p in sorted(file.parent.glob("*.csv")) if {"video_id", "text"} <= set(csv_header(p))]
    if not tables:
        raise DataError(
            str(source.path),
            f"no label CSV in {file.parent}",
            "a CSV with columns video_id, clip_id, text, label beside the pickle, which has no transcripts",
            "Put it there, use text_encoder=features, or leave text out of data.modalities.",
        )
    return max(tables, key=lambda p: difflib.SequenceMatcher(None, p.stem.lower(), file.stem.lower()).ratio())


def _read_csv(path: Path) -> list[_Row]:
    columns = csv_header(path)
    for need in ("video_id", "clip_id", "text", "label"):
        near = difflib.get_close_matches(need, columns, 1)
        if need not in columns and (near or need != "label"):
            do = f"Rename {near[0]!r} to {need!r}." if near else "Use the data set's label CSV."
            raise DataError(str(path), f"columns {', '.join(columns)}", f"a column {need}", do)
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            next(file)
            reader = csv.DictReader(file, columns, restval="")
            for row in reader:
                where = f"{path}, line {reader.line_num + 1}"
                try:
                    label = float(row.get("label") or "nan")
                except ValueError:
                    raise DataError(where, f"label {row['label']!r}", "a number", "Mend the row.") from None
                video, clip = row["video_id"].strip(), row["clip_id"].strip()
                rows.append(_Row(reader.line_num + 1, video, clip, row["text"], label, row.get("mode", "")))
    except UnicodeDecodeError as cause:
        raise DataError(str(path), f"no UTF-8 at byte {cause.start}", "UTF-8 text", "Save the CSV as UTF-8.") from None
    except csv.Error as cause:
        raise DataError(str(path), f"no CSV ({cause})", "the data set's label CSV", "Download it again.") from None
    return rows


def _join(source: Source, samples: dict[str, list[_Sample]], notes: list[str]) -> dict[str, list[str]]:
    """The transcript of every sample, by id where the CSV allows it, else by position; labels must agree."""
    path = find_csv(source)
    rows = _read_csv(path)
    every = [(s, x) for s in samples for x in samples[s]]
    clips = {(r.video, r.clip) for r in rows}
    starts = {(r.video, _number(r.clip)) for r in rows}
    # MOSI's ids hold a clip; MOSEI's a start, which some CSVs have as clip_id
    if all(len(x.cells) == 1 for _, x in every) or all(x.clip in clips for _, x in every):
        joined = _by_id(every, rows, path, lambda x: x.clip, lambda r: (r.video, r.clip))
    elif all(x.start in starts for _, x in every):
        joined = _by_id(every, rows, path, lambda x: x.start, lambda r: (r.video, _number(r.clip)))
    else:
        joined = _by_position(every, rows, path)
    moved = 0
    text: dict[str, list[str]] = {s: [] for s in samples}
    for (s, sample), row in zip(every, joined, strict=True):
        if sample.label == sample.label and not abs(row.label - sample.label) <= LABEL_TOLERANCE:
            raise DataError(
                f"{path}, line {row.line} ({row.video}, {row.clip})",
                f"label {row.label:g}",
                f"{sample.label:g}, the label of id {sample.name} ({s}) in the pickle",
                "Use the CSV that belongs to this pickle, in its order: texts would go to the wrong samples.",
            )
        moved += bool(row.mode) and row.mode != s
        text[s].append(row.text)
    if moved:
        notes.append(f"{moved} samples are in another split than the column mode of {path.name} says")
    if len(rows) > len(every):
        notes.append(f"{len(rows) - len(every)} rows of {path.name} belong to no sample")
    return text


def _by_id(
    every: list[tuple[str, _Sample]],
    rows: list[_Row],
    path: Path,
    sample_key: Callable[[_Sample], tuple[str, str]],
    row_key: Callable[[_Row], tuple[str, str]],
) -> list[_Row]:
    index: dict[tuple[str, str], _Row] = {}
    for row in rows:
        if row_key(row) in index:
            raise DataError(
                f"{path}, line {row.line}",
                f"({row.video}, {row.clip}) a second time",
                "every (video_id, clip_id) once",
                "Remove one of them.",
            )
        index[row_key(row)] = row
    for _, sample in every:
        if sample_key(sample) not in index:
            video, clip = sample_key(sample)
            raise DataError(
                sample.where,
                f"id {sample.name}, which {path.name} does not have",
                f"a row with video_id {video}, clip_id {clip} in it",
                "Use the CSV of the same data set.",
            )
    return [index[sample_key(sample)] for _, sample in every]


def _by_position(every: list[tuple[str, _Sample]], rows: list[_Row], path: Path) -> list[_Row]:
    if len(rows) != len(every):
        raise DataError(
            str(path),
            f"{len(rows)} rows",
            f"{len(every)}, one a sample of train, valid and test, in this order",
            "Use the CSV that belongs to this pickle.",
        )
    for row, (s, sample) in zip(rows, every, strict=True):
        if row.video != sample.cells[0]:
            raise DataError(
                f"{path}, line {row.line}",
                f"video {row.video}",
                f"{sample.cells[0]}, the video of id {sample.name} ({s}) at this position of the pickle",
                "Use the CSV that belongs to this pickle, in train, valid, test order.",
            )
    return rows


def _number(text: str) -> str:
    """One spelling for 1.0, 1.00 and 1."""
    try:
        return f"{float(text):.3f}"
    except ValueError:
        return text
