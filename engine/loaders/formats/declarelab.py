"""MulT's no-align pickles as DeclareLab's projects and the reference use them, with their label CSV.

Layout: `d[split] = {vision [N, Lv, dv], audio [N, La, da], text [N, 50, 300], labels [N, 1, 1] or [N, 1, 7], id [N, 1..3]}`, padded with
zeros on the LEFT. Transcripts are in a CSV beside it (video_id, clip_id, text, label, ...).
MOSI ids are `<video>_<clip>`; MOSEI ids are rows (video, start, end), which the CSV does not have.
"""

from __future__ import annotations

import csv
import difflib
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
    read_labels,
    to_text,
)
from engine.loaders.ragged import LengthRule, from_padded

TITLE = "DeclareLab/MulT no-align"
KEYS = ("vision", "audio", "text", "labels", "id")
MMSA_HINTS = ("regression_labels", "raw_text", "text_bert", "classification_labels", "audio_lengths", "vision_lengths")
LABEL_TOLERANCE = 0.05  # CSVs round labels to one decimal; two different MOSI or MOSEI labels are further apart


@dataclass
class _Row:
    line: int
    video: str
    clip: str
    text: str
    label: float
    mode: str


class DeclareLab:
    name = "declarelab"
    title = TITLE

    def recognises(self, source: Source) -> bool:
        splits = source.split_dict()
        first = next((v for k, v in splits.items() if k in SPLITS), None) if splits else None
        if not isinstance(first, dict) or looks_like_mmsa(first):
            return False
        return sum(bool(difflib.get_close_matches(k, map(str, first), 1)) for k in KEYS) >= 3

    def read(self, source: Source, rule: LengthRule, features: bool) -> RawDataset:
        splits = source.split_dict() or {}
        where = str(source.path)
        check_splits(where, splits)
        for name in SPLITS:
            check_keys(f"{where}, {name}", splits[name], [k for k in KEYS if k != "text" or features], KEYS, TITLE)
        names = {s: sample_ids(splits[s]["id"], f"{where}, {s}/id") for s in SPLITS}
        label = {
            s: read_labels(splits[s]["labels"], len(names[s]), f"{where}, {s}/labels", [n[0] for n in names[s]])
            for s in SPLITS
        }
        data = RawDataset(self.name, {})
        text = None if features else _join(source, names, label, data.notes)
        for s in SPLITS:
            split, ids = splits.pop(s), [n[0] for n in names[s]]
            data.dtypes.update({m: str(getattr(split[m], "dtype", "")) for m in ("audio", "vision")})
            glove = split.pop("text", None)
            data.splits[s] = RawSplit(
                ids,
                text[s] if text else None,
                label[s],
                from_padded(split.pop("audio"), "left", rule, None, ids, f"{where}, {s}/audio"),
                from_padded(split.pop("vision"), "left", rule, None, ids, f"{where}, {s}/vision"),
                from_padded(glove, "left", "all_zero", None, ids, f"{where}, {s}/text") if features else None,
            )
        return data


def looks_like_mmsa(split: dict) -> bool:
    """Whether a split's keys are those of an MMSA file, misspelt or not."""
    keys = [str(k) for k in split if k not in KEYS]
    return any(difflib.get_close_matches(k, keys, 1, 0.85) for k in MMSA_HINTS)


def sample_ids(values: Any, where: str) -> list[tuple[str, str, str]]:
    """(id, video, clip) of every row; clip is "" where ids are (video, start, end)."""
    count = check_rows(where, values, TITLE)
    out = []
    for row in range(count):
        value = values[row]
        cells = [
            to_text(c)
            for c in (
                value.reshape(-1)
                if isinstance(value, np.ndarray)
                else [value]
                if isinstance(value, (str, bytes))
                else value
            )
        ]
        cells = [c for c in cells if c]
        if not cells:
            raise DataError(
                f"{where}, row {row}", "an empty id", "video_clip or (video, start, end)", "Give every sample an id."
            )
        if len(cells) == 1:
            video, _, clip = cells[0].rpartition("_")
            out.append((cells[0], video, clip))
        else:
            out.append(("_".join(cells), cells[0], ""))
    return out


def find_csv(source: Source) -> Path:
    """The label CSV beside the pickle: the one with a video_id and a text column; of several, the one named most like it."""
    folder = source.path if source.path.is_dir() else source.path.parent
    tables = [p for p in sorted(folder.glob("*.csv")) if {"video_id", "text"} <= set(_header(p))]
    if not tables:
        raise DataError(
            str(source.path),
            f"no label CSV in {folder}",
            "a CSV with columns video_id, clip_id, text, label",
            "Put it beside the pickle: the texts are in it.",
        )
    stem = next(iter(source.files.values())).stem.lower()
    return max(tables, key=lambda p: difflib.SequenceMatcher(None, p.stem.lower(), stem).ratio())


def _header(path: Path) -> list[str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return [c.strip() for c in next(csv.reader(file), [])]
    except (OSError, UnicodeDecodeError):
        return []


def read_csv(path: Path) -> list[_Row]:
    """The rows of a label CSV, whatever the order of its columns."""
    columns = _header(path)
    for need in ("video_id", "clip_id", "text", "label"):
        if need not in columns:
            near = difflib.get_close_matches(need, columns, 1)
            do = f"Rename {near[0]!r} to {need!r}." if near else "Use the data set's label CSV."
            raise DataError(str(path), f"columns {', '.join(columns)}", f"a column {need}", do)
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = columns if next(reader.reader, None) is not None else columns
            for row in reader:
                try:
                    label = float(row["label"])
                except (TypeError, ValueError):
                    raise DataError(
                        f"{path}, line {reader.line_num}", f"label {row['label']!r}", "a number", "Mend the row."
                    ) from None
                rows.append(
                    _Row(
                        reader.line_num,
                        row["video_id"].strip(),
                        (row["clip_id"] or "").strip(),
                        row["text"] or "",
                        label,
                        row.get("mode") or "",
                    )
                )
    except UnicodeDecodeError as cause:
        raise DataError(
            str(path), f"bytes that are not UTF-8 at {cause.start}", "UTF-8 text", "Save the CSV as UTF-8."
        ) from None
    return rows


def _join(
    source: Source, names: dict[str, list[tuple[str, str, str]]], label: dict[str, np.ndarray], notes: list[str]
) -> dict[str, list[str]]:
    """The transcript of every sample, checked against the CSV's labels."""
    path = find_csv(source)
    rows = read_csv(path)
    by_id: dict[tuple[str, str], _Row] = {}
    for row in rows:
        if (row.video, row.clip) in by_id:
            raise DataError(
                f"{path}, line {row.line}",
                f"({row.video}, {row.clip}) a second time",
                "every (video_id, clip_id) once",
                "Remove one of them.",
            )
        by_id[row.video, row.clip] = row
    if all(clip for s in SPLITS for _, _, clip in names[s]):
        joined = {
            s: [_lookup(by_id, n, path, f"{source.path}, {s}/id, row {i}") for i, n in enumerate(names[s])]
            for s in SPLITS
        }
    else:
        joined = _by_row(rows, names, path, source)
    for s in SPLITS:
        for i, row in enumerate(joined[s]):
            ours = float(label[s][i, 0])
            if not abs(row.label - ours) <= LABEL_TOLERANCE:
                raise DataError(
                    f"{path}, line {row.line} ({row.video}, {row.clip})",
                    f"label {row.label:g}",
                    f"{ours:g}, the label of {s} row {i} (id {names[s][i][0]}) in the pickle",
                    "Use the CSV that belongs to this pickle, in its order: texts would go to the wrong samples.",
                )
    moved = sum(bool(r.mode) and r.mode != s for s in SPLITS for r in joined[s])
    if moved:
        notes.append(f"{moved} samples are in another split than the column mode of {path.name} says")
    unused = len(rows) - sum(map(len, joined.values()))
    if unused:
        notes.append(f"{unused} rows of {path.name} belong to no sample")
    return {s: [r.text for r in joined[s]] for s in SPLITS}


def _lookup(by_id: dict[tuple[str, str], _Row], name: tuple[str, str, str], path: Path, where: str) -> _Row:
    row = by_id.get(name[1:])
    if row is None:
        raise DataError(
            where,
            f"id {name[0]}, which {path.name} does not have",
            f"({name[1]}, {name[2]}) in its columns video_id, clip_id",
            "Use the CSV of the same data set.",
        )
    return row


def _by_row(
    rows: list[_Row], names: dict[str, list[tuple[str, str, str]]], path: Path, source: Source
) -> dict[str, list[_Row]]:
    """(video, start, end) ids: by (video, start) where the CSV's clip_id is the start, else by position, videos checked."""
    by_start = {(r.video, _number(r.clip)): r for r in rows}
    starts = {
        s: [(video, _number(name.removeprefix(video + "_").partition("_")[0])) for name, video, _ in names[s]]
        for s in SPLITS
    }
    if len(by_start) == len(rows) and all(key in by_start for s in SPLITS for key in starts[s]):
        return {s: [by_start[key] for key in starts[s]] for s in SPLITS}
    count = sum(map(len, names.values()))
    if len(rows) != count:
        raise DataError(
            str(path),
            f"{len(rows)} rows",
            f"{count}, one for each sample of {source.path.name} in train, valid, test order",
            "Use the CSV that belongs to this pickle.",
        )
    out: dict[str, list[_Row]] = {}
    at = 0
    for s in SPLITS:
        out[s] = rows[at : at + len(names[s])]
        at += len(names[s])
        for i, (row, name) in enumerate(zip(out[s], names[s], strict=True)):
            if row.video != name[1]:
                raise DataError(
                    f"{path}, line {row.line}",
                    f"video {row.video}",
                    f"{name[1]}, the video of {s} row {i} (id {name[0]})",
                    "Use a CSV in train, valid, test order of the pickle.",
                )
    return out


def _number(text: str) -> float | str:
    try:
        return round(float(text), 3)
    except ValueError:
        return text
