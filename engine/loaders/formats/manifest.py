"""Your own data: a folder of .npy or .csv files, and a manifest that names them.

Layout: `manifest.csv` with columns `id, split, label, audio, vision`, and `text` or, for precomputed text features,
`text_features`. `audio`, `vision` and `text_features` are paths relative to the folder. Each is a 2-D array (frames,
features): .npy, or .csv with one row per frame and, optionally, a header. An empty cell is a missing modality, or no
label.

Columns of modalities that are not in `data.modalities` may be left out. Data that is only predicted needs no `label`
and no `split`: without `split`, every row belongs to the test split.
"""

from __future__ import annotations

import io
import math
import mmap
from pathlib import Path, PurePosixPath

import numpy as np

from engine.errors import DataError, EngineError
from engine.loaders.formats.checks import SPLIT_ALIASES, SPLITS, check_splits, listed, nearest, present, to_id
from engine.loaders.formats.frames import SHAPE, ColumnNames, read_frames
from engine.loaders.formats.registry import RawDataset, RawSplit
from engine.loaders.formats.source import DataFiles
from engine.loaders.formats.tables import csv_header, label_of, read_table
from engine.loaders.progress import with_progress
from engine.loaders.ragged import LengthRule, absent, from_sequences
from engine.loaders.spool import MAPPED, Staged, stable_content

TITLE = "folder of arrays with a manifest.csv"
COLUMNS = ("id", "split", "label", "audio", "vision", "text", "text_features")


class Manifest:
    name = "manifest"
    title = TITLE
    choices = ("skip_columns",)  # fields of `Choice` that it heeds

    def recognises(self, source: DataFiles) -> bool:
        if source.kind != "csv":
            return False
        columns = csv_header(next(iter(source.files.values())))
        return sum(bool(nearest(c, columns)) for c in COLUMNS) >= 3

    def read(self, source: DataFiles, rule: LengthRule, features: bool) -> RawDataset:
        path = source.files[""]
        modalities = source.choice.modalities
        frames = [m for m in ("audio", "vision") if m in modalities]
        text = ["text_features" if features else "text"] if "text" in modalities else []
        rows = _rows(path, [*frames, *text])
        columns = csv_header(path)
        data = RawDataset(self.name, {}, notes=check_splits(str(path), dict.fromkeys(r["split"] for r in rows)))
        extra = dict.fromkeys(c or "one without a name" for c in columns if c not in COLUMNS)
        data.notes += [f"columns that are not read: {listed(extra)}"] if extra else []
        if "split" not in columns:
            data.notes.append("there is no column split: every row is taken for the test split")
        rows = [r for r in rows if r["split"] in SPLITS]
        gone = [m for m in frames if not any(r[m] for r in rows)]
        if gone == frames and not any(r[c] for r in rows for c in text):
            lacking = " and ".join(f"no {m}" for m in (*gone, *text))
            raise DataError(str(path), f"{lacking} in any row", "one of them at least", "Fill the cells.")
        data.notes += [f"no row has {m}: it is missing in every sample" for m in gone]
        skip = source.choice.skip_columns
        names = {kind: ColumnNames(skip) for kind in (*frames, "text_features")}
        for s in present(r["split"] for r in rows):
            own = [r for r in rows if r["split"] == s]
            ids = [r["id"] for r in own]
            parts = {m: absent(len(own)) for m in ("audio", "vision") if m not in frames}
            for kind in [*frames, "text_features"] if features else frames:
                arrays = _arrays(path, own, kind, names[kind], f"reading {kind} of {s}")
                data.dtypes.setdefault(kind, str(arrays[0].dtype))
                parts[kind] = from_sequences(arrays, ids, f"{path}, {s}, {kind}")
            data.splits[s] = RawSplit(
                ids, [r["text"] for r in own] if "text" in modalities and "text" in own[0] else None,
                np.array([[r["number"]] for r in own], np.float32), parts["audio"], parts["vision"],
                parts.get("text_features"),
            )  # fmt: skip
        data.notes += [note for kind, one in names.items() for note in one.notes(kind)]
        data.columns = {kind: one.kept for kind, one in names.items() if one.kept and not one.others}
        found = {name.lower() for one in names.values() for name in one.skipped}
        unknown = [name for name in skip if name.lower() not in found]
        data.notes += [f"no file has the columns {listed(unknown)} of data.skip_columns"] if unknown else []
        named = {(path.parent / r[kind].replace("\\", "/")).resolve() for r in rows for kind in parts if r.get(kind)}
        source.parts = [p for p in source.parts if p.resolve() in named]  # other files of the folder are not the data
        return data


def _rows(path: Path, modalities: list[str]) -> list[dict]:
    """The rows. Each one has a split and a number: its label, or NaN if there is none."""
    columns = csv_header(path)
    free = [c for c in columns if c not in COLUMNS]
    for need in ("id", "split", "label", *modalities):
        near = nearest(need, free)
        if need not in columns and (near or need not in ("split", "label")):
            do = f"Rename {near[0]!r} to {need!r}." if near else "Add it."
            if not near and need in modalities:
                do = "Add it, or leave it out of data.modalities."
            raise DataError(str(path), f"columns {', '.join(columns)}", f"a column {need}", do)
    rows = []
    for line, cells in read_table(path, "a manifest", [c for c in COLUMNS if c in columns]).rows:
        row: dict = {k: v.strip() for k, v in cells.items()}
        row["at"] = at = f"{path}, line {line}"
        row["id"] = to_id(row["id"], at)
        row.setdefault("split", "test")
        if row["split"] not in SPLIT_ALIASES and (not row["split"] or nearest(row["split"], SPLIT_ALIASES)):
            raise DataError(at, f"split {row['split']!r}", "train, valid or test", "Correct the row.")
        row["split"] = SPLIT_ALIASES.get(row["split"], row["split"])
        if row["split"] in SPLITS:  # the labels of other splits are not read
            row["number"] = np.float32(label_of(row.get("label", ""), at))
        rows.append(row)
    if not rows:
        raise DataError(str(path), "no rows", "one row per sample", "Fill the manifest.")
    return rows


def _arrays(manifest: Path, rows: list[dict], kind: str, names: ColumnNames, doing: str) -> list[np.ndarray]:
    """The arrays of a modality, one per row. One file at a time is in memory."""
    staged = Staged()
    for row in with_progress(rows, doing, "files"):
        staged.add(_array(manifest, row, kind, names))
    return staged.arrays()


def _array(manifest: Path, row: dict, kind: str, names: ColumnNames) -> np.ndarray:
    """The array that a row names, [frames, features]; empty if the cell is empty."""
    cell, at = row[kind], f"{row['at']} (id {row['id']}), {kind}"
    if not cell:
        return np.zeros((0, 0), np.float32)
    folder, pure = manifest.parent.resolve(), PurePosixPath(cell.replace("\\", "/"))
    outside = pure.is_absolute() or ".." in pure.parts or ":" in pure.parts[0] or "\0" in cell
    path = folder / pure
    try:
        # a link inside the folder may lead out of it too
        if outside or not path.resolve().is_relative_to(folder):
            raise DataError(
                at, f"{cell!r}, which is outside the folder", f"a path below {folder}", "Copy the file there."
            )
        there = path.is_file()
    except (OSError, RuntimeError):  # a name that is too long, a link that leads to itself
        there = False
    if not there:
        raise DataError(at, f"no file {cell!r}", "a .npy or .csv file", "Check the path.")
    if path.suffix.lower() == ".npy":
        array = _npy(path, at)
    else:
        table = read_frames(path, at)
        names.add(table, f"{at}: {path.name}")
        array = names.features(table)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise DataError(f"{at}: {path.name}", f"shape {array.shape} and dtype {array.dtype}", SHAPE, "Save it again.")
    return array


def _npy(path: Path, at: str) -> np.ndarray:
    try:
        return _parsed(stable_content(path, small=MAPPED))
    except EngineError:
        raise
    except Exception as cause:  # numpy parses the header as Python: a damaged one can raise anything
        raise DataError(f"{at}: {path.name}", f"{cause}", "a .npy file of numbers", "Save it again.") from None


def _parsed(data: mmap.mmap | bytes) -> np.ndarray:
    """The array of a .npy file: a view of its bytes. So a header cannot ask for more than the file holds."""
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if min(shape, default=0) < 0:
        raise ValueError(f"shape {shape}")
    if 0 in shape:
        return np.zeros((0, 0) if len(shape) == 2 and dtype.kind in "fiu" else shape, dtype)
    array = np.frombuffer(data, dtype, math.prod(shape), file.tell())
    return array.reshape(shape, order="F" if fortran_order else "C")
