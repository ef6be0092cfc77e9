"""`engine inspect`: what a file holds and what is wrong with it, without training on it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import DataError, OutputError, printable
from engine.loaders import formats
from engine.loaders.cache import is_writable, room_for
from engine.loaders.convert import open_current
from engine.loaders.formats import SPLIT_ALIASES, DataFiles
from engine.loaders.formats.tables import csv_header
from engine.loaders.problems import level_padding, level_widths, nan_words, problems, training_problems
from engine.loaders.ragged import Ragged
from engine.loaders.spool import spooled
from engine.loaders.store import is_store, store_path, verify_store
from engine.vocabulary import KnownLengthRule

if TYPE_CHECKING:
    from rich.console import Group

# Chinese and Japanese put no blanks between words: each of their characters counts as one.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
BARS = "▁▂▃▄▅▆▇█"


@dataclass
class InspectReport:
    """What `inspect_path` has seen. Everything in it is plain JSON.

    Attributes:
        path: what was inspected. format: its family, "unknown" if none. files: file name -> bytes.
        layout: split -> key -> "dtype shape" as stored (foreign files).
        splits: split -> {samples, label, text, tokens, audio, vision}. A modality is {dim, dtype, length: {min, median,
            max}, nonfinite, missing, dropped, zero_frames}. dropped: frames that are not zero outside the lengths of
            their sequences. zero_frames: frames of zeros inside sequences.
        duplicates: ids that occur more than once.
        problems: what keeps the data from being used, one line each.
        notes: what is handled, but worth knowing.
    """

    path: str
    format: str
    files: dict[str, int]
    length_rule: str = ""
    layout: dict[str, dict[str, str]] = field(default_factory=dict)
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    duplicates: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON content."""
        return asdict(self)

    def render(self) -> Group:
        """The report for a rich console."""
        from rich.console import Group
        from rich.markup import escape as _escape
        from rich.table import Table
        from rich.text import Text

        def line(text: object, style: str = "") -> Text:
            """Text with names from a file: no markup, and nothing that acts on the terminal."""
            return Text(printable(text), style=style)

        sizes = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in self.files.items())
        parts: list[Any] = [line(f"{self.path}: {self.format}", "bold"), line(f"files: {sizes}")]
        if self.splits:
            rule = _escape(printable(f" (rule {self.length_rule})")) if self.length_rule else ""
            table = Table("split", "samples", "modality", "dim", "dtype", f"length min / median / max{rule}",
                          "NaN, inf", "missing", "dropped", "zero frames")  # fmt: skip
            for name, split in self.splits.items():
                for i, key in enumerate(k for k in ("audio", "vision", "features", "text", "tokens") if k in split):
                    part = split[key]
                    length = " / ".join(f"{part['length'][k]:g}" for k in ("min", "median", "max"))
                    cells = (str(part.get(k, "")) for k in ("nonfinite", "missing", "dropped", "zero_frames"))
                    head = (name, str(split["samples"])) if i == 0 else ("", "")
                    unit = " words" if key == "text" else ""
                    table.add_row(*head, key, str(part.get("dim", "")), part.get("dtype", ""), length + unit, *cells)
            labels = Table("split", "label min / mean / max", "histogram", "counts")
            for name, split in self.splits.items():
                label = split["label"]
                if label["min"] is None:
                    labels.add_row(name, "no labels", "", "")
                    continue
                bars = "".join(BARS[round(7 * n / max(label["counts"]))] for n in label["counts"])
                spread = " / ".join(f"{label[k]:.3g}" for k in ("min", "mean", "max"))
                labels.add_row(name, spread, bars, " ".join(map(str, label["counts"])))
            parts += [table, labels]
        elif self.layout:
            table = Table("split", "key", "content")
            for name, keys in self.layout.items():
                for i, (key, content) in enumerate(keys.items()):
                    table.add_row(line(name if i == 0 else ""), line(key), line(content))
            parts.append(table)
        parts += [line(f"note: {note}") for note in self.notes]
        if self.duplicates:
            parts.append(line(f"duplicate ids: {len(self.duplicates)} ({', '.join(self.duplicates[:5])})", "red"))
        parts += [line(f"problem: {problem}", "red") for problem in self.problems]
        if not self.problems:
            parts.append(Text("no problems", style="green"))
        return Group(*parts)


def inspect_path(path: str | Path, length_rule: KnownLengthRule = "recorded", verify: bool = False) -> InspectReport:
    """Look at a file, folder or store. Problems of the content are listed in the report, not raised.

    Args:
        verify: compare the checksum of every tensor of a store. This reads the whole file.

    Raises:
        DataError: there is no data set, or more than one.
    """
    if is_store(path):
        return _inspect_store(path, verify)
    source = formats.find_source(path)
    room = next((p for p in room_for(source) if is_writable(p)), None)
    try:
        with spooled(room):
            return _inspect_source(path, source, length_rule)
    except OutputError:  # the disk is full: memory holds the frames
        return _inspect_source(path, formats.find_source(path), length_rule)


def _inspect_source(path: str | Path, source: DataFiles, length_rule: KnownLengthRule) -> InspectReport:
    """The report on foreign files."""
    files = {file.name: file.stat().st_size for file in source.files.values()}
    report = InspectReport(str(path), "unknown", files, length_rule)
    try:
        reader = formats.choose_format(source)
        report.format = f"{reader.title} ({reader.name})"
        report.layout = _layout(source)
        raw = reader.read(source, length_rule, False)
    except DataError as problem:
        report.problems.append(str(problem))
        return report
    level_padding(raw)
    level_widths(raw)
    report.notes += formats.remarks(source, raw) + nan_words(raw)
    sets = list(dict.fromkeys(key for keys in report.layout.values() for key in keys if "_labels" in key))
    if len(sets) > 1:
        report.notes.append(f"sets of labels: {', '.join(sets)}; data.label_key chooses (default: regression_labels)")
    report.problems += [str(p) for p in problems(raw, str(path))]
    for name, split in raw.splits.items():
        described = report.splits[name] = _describe(split.label, split.text)
        for key in ("audio", "vision"):
            part = getattr(split, key)
            counts = {"nonfinite": part.nonfinite, "missing": len(part.missing), "dropped": part.dropped}
            described[key] = {**_frames(part.ragged, raw.dtypes.get(key, "")), **counts}
            described[key]["zero_frames"] -= len(part.missing)
    report.duplicates = _duplicates([i for s in raw.splits.values() for i in s.ids])
    return report


def _inspect_store(path: str | Path, verify: bool) -> InspectReport:
    file = store_path(path)
    report = InspectReport(str(file), "engine store", {file.name: file.stat().st_size})
    try:
        data = open_current(path)
        report.format = f"engine store (made from {data.meta['format']}: {data.meta['source']})"
        report.length_rule = data.meta["length_rule"]
        report.notes += data.meta["notes"]
        ids: list[str] = []
        for name, split in data.splits.items():
            counts = data.meta["counts"][name]
            described = report.splits[name] = _describe(split.label, split.text)
            ids += split.ids
            for key in ("audio", "vision", "features"):
                ragged = getattr(split, key)
                if ragged is not None:
                    described[key] = _frames(ragged, str(ragged.values.dtype))
                if key in counts["nonfinite"]:
                    described[key] |= {kind: counts[kind][key] for kind in ("nonfinite", "missing", "dropped")}
                    described[key]["zero_frames"] -= counts["missing"][key]
            if split.tokens is not None:
                described["tokens"] = {"length": _spread(split.tokens.lengths), "dtype": str(split.tokens.values.dtype)}
        report.duplicates = _duplicates(ids)
        report.problems += [str(p) for p in training_problems(data.splits, str(file))]
        if verify:
            report.problems += [
                f"{file}: the checksum of {key} differs; convert the data again" for key in verify_store(file)
            ]
    except DataError as problem:
        report.problems.append(str(problem))
    return report


def _layout(source: DataFiles) -> dict[str, dict[str, str]]:
    out: dict[str, dict[str, str]] = {}
    if source.kind == "hdf5":
        return {"files": {stem: f"{file.stat().st_size} bytes" for stem, file in source.files.items()}}
    if source.kind == "csv":
        return {"files": {"columns": ", ".join(csv_header(source.files[""])), "arrays": str(len(source.parts))}}
    for name, split in (source.split_dict() or {}).items():
        if isinstance(split, Mapping):
            out[SPLIT_ALIASES.get(name, name)] = {str(k): _content(v) for k, v in split.items()}
        elif hasattr(split, "__len__"):
            out[name] = {"rows": str(len(split))}
    return out


def _content(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else type(value).__name__


def _spread(numbers: np.ndarray) -> dict[str, float]:
    return {"min": int(numbers.min()), "median": float(np.median(numbers)), "max": int(numbers.max())}


def _frames(ragged: Ragged, dtype: str) -> dict[str, Any]:
    zero = sum(int((~ragged.values[i : i + 65536].any(1)).sum()) for i in range(0, len(ragged.values), 65536))
    return {"dim": ragged.dim, "dtype": dtype, "length": _spread(ragged.lengths), "zero_frames": zero}


def _describe(label: np.ndarray, text: list[str] | None) -> dict[str, Any]:
    flat = label[~np.isnan(label[:, 0]), 0].astype(np.float64)
    about: dict[str, Any] = {"min": None, "mean": None, "max": None, "edges": [], "counts": []}
    if len(flat):
        low, high = float(flat.min()), float(flat.max())
        edges = np.linspace(low, high, 11)
        if low >= -3 and high <= 3:  # sentiment, centred on 0: one bin for each of Acc-7's classes
            edges = np.arange(-3.5, 4)
        if low < 0 and low >= -1 and high <= 1:  # SIMS has eleven labels: -1, -0.8, ..., 1
            edges = np.linspace(-1.1, 1.1, 12)
        counts = [int(n) for n in np.histogram(flat, edges)[0]]
        about = {"min": low, "mean": float(flat.mean()), "max": high, "edges": edges.tolist(), "counts": counts}
    out: dict[str, Any] = {"samples": len(label), "label": about}
    if text is not None:
        words = np.array([len(WORD.findall(t)) for t in text])
        out["text"] = {"length": _spread(words), "missing": int((words == 0).sum())}
    return out


def _duplicates(ids: list[str]) -> list[str]:
    seen: set[str] = set()
    twice: dict[str, None] = {}
    for sample in ids:
        if sample in seen:
            twice[sample] = None
        seen.add(sample)
    return list(twice)
