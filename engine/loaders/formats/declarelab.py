"""MulT's pickles with their label CSV, as DeclareLab's projects and the reference use them.

Layout: `d[split] = {vision [N, Lv, dv], audio [N, La, da], text [N, 50, 300], labels [N, 1, 1 or 7], id [N, 1 to 3]}`.
As a rule, zeros on the LEFT are padding; if the zeros lie at the other side, that side is taken. In aligned files all
three have one row per word, and L = 50.

Transcripts are in a CSV beside the pickle (video_id, clip_id, text, label, in any order). MOSI ids are
`<video>_<clip>`. MOSEI ids are rows (video, start, end), which the CSV need not have.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import DataError
from engine.loaders.formats.checks import (
    SPLIT_ALIASES,
    SPLITS,
    check_keys,
    check_rows,
    check_splits,
    listed,
    may_be_labelled,
    nearest,
    note_keys,
    present,
    read_labels,
    to_text,
    unlabelled,
)
from engine.loaders.formats.registry import RawDataset, RawSplit
from engine.loaders.formats.source import DataFiles, csv_files
from engine.loaders.formats.tables import csv_header, label_of, plain_number, read_table
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
COLUMNS = ("video_id", "clip_id", "text", "label")  # of the label CSV
LABEL_TOLERANCE = 0.05  # CSVs round labels to one decimal; different labels are further apart


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
    """A row of the pickle.

    Attributes:
        cells: the columns of its id that are not empty.
        label: its sentiment; None if the labels have neither one column nor the SDK's seven.
    """

    where: str
    cells: list[str]
    label: float | None

    @property
    def name(self) -> str:
        return "_".join(self.cells)

    @property
    def clip(self) -> tuple[str, str]:
        """(video, clip) from MOSI's first column. Video ids may hold underscores too."""
        video, _, clip = self.cells[0].rpartition("_")
        return video, clip

    @property
    def start(self) -> tuple[str, str]:
        """(video, start) from MOSEI's rows."""
        return self.cells[0], _number(self.cells[1]) if len(self.cells) > 1 else ""


class DeclareLab:
    name = "declarelab"
    title = TITLE
    choices = ("label_column",)  # fields of `Choice` that it heeds

    def recognises(self, source: DataFiles) -> bool:
        splits = source.split_dict()
        first = next((v for k, v in splits.items() if k in SPLITS), None) if splits else None
        if not isinstance(first, dict) or looks_like_mmsa(first):
            return False
        return sum(bool(nearest(k, first)) for k in KEYS) >= 3

    def read(self, source: DataFiles, rule: LengthRule, features: bool) -> RawDataset:
        splits = source.split_dict() or {}
        where = str(source.path)
        notes = check_splits(where, splits)
        names = present(splits)
        modalities = source.choice.modalities
        frames = [m for m in ("audio", "vision") if m in modalities]
        samples: dict[str, list[_Sample]] = {}
        unknown = {}
        for s in names:
            labels = ["labels"] if may_be_labelled(splits[s], "labels", KEYS) else []
            required = [*frames, *(["text"] if features else []), *labels, "id"]
            unknown[s] = check_keys(f"{where}, {s}", splits[s], required, KEYS, TITLE)
            samples[s] = _samples(splits[s], f"{where}, {s}")
        column = source.choice.label_column
        every = [x for s in names for x in samples[s]]
        # MOSI's first column is a whole id; MOSEI's names only the video
        whole = len({x.cells[0] for x in every}) == len(every) or all(len(x.cells) == 1 for x in every)
        data = RawDataset(self.name, {}, notes=notes + note_keys(unknown))
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
        raise DataError(f"{where}/id", f"a {type(values).__name__}", "an array of ids", "Write one id per row.")
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
        texts = [to_text(part, at) for part in parts]
        if not texts or not texts[0].strip() or texts[0] in ("nan", "None"):
            raise DataError(
                f"{where}/id, row {row}", "an empty id", "video_clip or (video, start, end)", "Give every sample an id."
            )
        cells.append([text for text in texts if text])
    names = [c[0] for c in cells]
    known = split.get("labels") is not None
    label = _sentiment(split["labels"], count, f"{where}/labels", names) if known else [math.nan] * count
    return [_Sample(f"{where}, row {i}", c, label[i]) for i, c in enumerate(cells)]


def _sentiment(values: Any, count: int, where: str, ids: list[str]) -> list[float] | list[None]:
    """The label that the CSV has too, whatever column is trained on: the only one, or the first of the SDK's seven."""
    shape = getattr(values, "shape", ())
    columns = max(shape[1:], default=1)
    if shape[:1] == (count,) and columns not in (1, 7) and np.prod(shape) == count * columns:
        return [None] * count  # `read_labels` checks them for the column that is asked for
    return read_labels(values, count, where, ids)[:, 0].tolist()


def find_csv(source: DataFiles) -> Path:
    """The label CSV beside the pickle: one with columns video_id and text. Of several, the one whose name is most
    similar.

    Raises:
        DataError: there is none.
    """
    file = next(iter(source.files.values()))
    headers = {p: csv_header(p) for p in csv_files(file.parent)}
    tables = [p for p, columns in headers.items() if {"video_id", "text"} <= set(columns)]
    for path, columns in headers.items():
        near = {need: nearest(need, columns, 0.8) for need in ("video_id", "text")}
        if not tables and all(near.values()):
            wrong = {need: like[0] for need, like in near.items() if like[0] != need}
            raise DataError(
                str(path), f"columns {listed(columns)}", f"columns {' and '.join(wrong)}, as a label CSV has",
                " ".join(f"Rename {like!r} to {need!r}." for need, like in wrong.items()),
            )  # fmt: skip
    if not tables:
        raise DataError(
            str(source.path), f"no label CSV in {file.parent}",
            "a CSV with columns video_id, clip_id, text, label beside the pickle, which has no transcripts",
            "Put it there, use text_encoder=features, or leave text out of data.modalities.",
        )  # fmt: skip
    best = max(tables, key=lambda p: difflib.SequenceMatcher(None, p.stem.lower(), file.stem.lower()).ratio())
    if len(tables) > 1:
        source.notes.append(
            f"texts are from {best.name}, of {listed(p.name for p in tables)}: its name is most similar"
        )
    return best


def _read_csv(path: Path) -> list[_Row]:
    columns = csv_header(path)
    labelled = "label" in columns or nearest("label", columns)  # a label CSV of samples without labels may lack it
    rows = []
    for line, row in read_table(path, "the data set's label CSV", COLUMNS if labelled else COLUMNS[:-1]).rows:
        label = label_of(row.get("label", ""), f"{path}, line {line}")
        video, clip = row["video_id"].strip(), row["clip_id"].strip()
        rows.append(_Row(line, video, clip, row["text"], label, row.get("mode", "").strip()))
    return rows


def _join(source: DataFiles, samples: dict[str, list[_Sample]], notes: list[str]) -> dict[str, list[str]]:
    """The transcript of every sample: by id if the CSV allows it, else by position. Labels must agree."""
    path = find_csv(source)
    source.parts.append(path)
    rows = _read_csv(path)
    every = [(s, x) for s in samples for x in samples[s]]
    joined = _matched(every, rows, path, notes)
    compared = [x.label is not None for _, x in every]
    if not all(compared):
        notes.append(f"the labels of {path.name} are not compared: the pickle's have no sentiment")
    moved = 0
    text: dict[str, list[str]] = {s: [] for s in samples}
    for (s, sample), row in zip(every, joined, strict=True):
        known = sample.label is not None and not math.isnan(sample.label)
        if known and not abs(row.label - sample.label) <= LABEL_TOLERANCE:
            raise DataError(
                f"{path}, line {row.line} ({row.video}, {row.clip})", f"label {row.label:g}",
                f"{sample.label:g}, the label of id {sample.name} ({s}) in the pickle",
                "Use the CSV that belongs to this pickle, in its order: texts would go to the wrong samples.",
            )  # fmt: skip
        moved += bool(row.mode) and SPLIT_ALIASES.get(row.mode, row.mode) != s
        text[s].append(row.text)
    if moved:
        notes.append(f"{moved} samples are in another split than the column mode of {path.name} says")
    if len(rows) > len(every):
        notes.append(f"{len(rows) - len(every)} rows of {path.name} belong to no sample")
    return text


def _matched(every: list[tuple[str, _Sample]], rows: list[_Row], path: Path, notes: list[str]) -> list[_Row]:
    """The CSV's row of every sample."""
    clips = {(r.video, r.clip) for r in rows}
    starts = {(r.video, _number(r.clip)) for r in rows}
    rewritten = {_plain((r.video, r.clip)) for r in rows}
    # MOSI's ids hold a clip. MOSEI's hold a start, which some CSVs have as clip_id.
    if all(x.clip in clips for _, x in every):
        return _by_id(every, rows, path, lambda x: x.clip, lambda r: (r.video, r.clip))
    told_apart = len({_plain(x.clip) for _, x in every}) == len(every)
    if told_apart and all(_plain(x.clip) in rewritten for _, x in every):
        notes.append(f"{path.name} writes clip numbers otherwise than the ids do (1.0 or 01 for 1): matched as numbers")
        return _by_id(every, rows, path, lambda x: _plain(x.clip), lambda r: _plain((r.video, r.clip)))
    if all(len(x.cells) == 1 for _, x in every):
        return _by_id(every, rows, path, lambda x: x.clip, lambda r: (r.video, r.clip))
    if all(x.start in starts for _, x in every):
        return _by_id(every, rows, path, lambda x: x.start, lambda r: (r.video, _number(r.clip)))
    unchecked = next((x for _, x in every if x.label is None or math.isnan(x.label)), None)
    if unchecked is not None:
        raise DataError(
            unchecked.where,
            f"id {unchecked.name}, whose clip or start {path.name} does not have, and no sentiment label",
            "a way to check that row and sample belong together",
            "Use a CSV whose clip_id holds the clip or the start of the ids.",
        )
    return _by_position(every, rows, path)


def _plain(clip: tuple[str, str]) -> tuple[str, str]:
    """(video, clip) with one spelling of whole numbers: spreadsheets rewrite 01 as 1, and pandas writes 1 as 1.0."""
    return plain_number(clip[0]), plain_number(clip[1])


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
                f"{path}, line {row.line}", f"({row.video}, {row.clip}) a second time",
                "every (video_id, clip_id) once", "Remove one of them.",
            )  # fmt: skip
        index[row_key(row)] = row
    for _, sample in every:
        if sample_key(sample) not in index:
            video, clip = sample_key(sample)
            own = sorted(row_key(r)[1] for r in rows if row_key(r)[0] == video)
            there = f" (of {video} it has {', '.join(own[:5])}{', ...' if len(own) > 5 else ''})" if own else ""
            raise DataError(
                sample.where, f"id {sample.name}, which {path.name} does not have{there}",
                f"a row with video_id {video}, clip_id {clip} in it",
                "Use the CSV of the same data set, as it was before a spreadsheet saved it.",
            )  # fmt: skip
    return [index[sample_key(sample)] for _, sample in every]


def _by_position(every: list[tuple[str, _Sample]], rows: list[_Row], path: Path) -> list[_Row]:
    if len(rows) != len(every):
        raise DataError(
            str(path), f"{len(rows)} rows", f"{len(every)}, one per sample of train, valid and test, in this order",
            "Use the CSV that belongs to this pickle.",
        )  # fmt: skip
    for row, (s, sample) in zip(rows, every, strict=True):
        if row.video != sample.cells[0]:
            raise DataError(
                f"{path}, line {row.line}", f"video {row.video}",
                f"{sample.cells[0]}, the video of id {sample.name} ({s}) at this position of the pickle",
                "Use the CSV that belongs to this pickle, in train, valid, test order.",
            )  # fmt: skip
    return rows


def _number(text: str) -> str:
    """One spelling for 1.0, 1.00 and 1."""
    try:
        return f"{float(text):.3f}"
    except ValueError:
        return text
