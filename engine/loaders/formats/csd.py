"""CMU-SDK computational sequences: a folder of .csd files (HDF5), which are aligned here.

A file's layout: `/<root>/data/<video>/{features [n, d], intervals [n, 2] in seconds}`. The folder holds

- the words: features that are text;
- the labels: a name with "label" or "segment" in it, one interval per segment, sentiment in the first column;
- audio and vision features;
- the split of the videos: `splits.json` (`{"train": [video, ...], "valid": [...], "test": [...]}`), or a CSV with
  columns video_id and mode.

A sample is a labelled segment. Its id is `video[number]`, as in the SDK's `align`. Its words are those whose middle
lies in the segment, without pauses ("sp"). With `data.align=words` (the default) there is one row per word: the mean of
the frames that overlap the word in time, or zeros if none does. With `segments`, a sample has the frames whose middle
lies in the segment, as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.errors import DataError
from engine.loaders.formats.checks import SPLIT_ALIASES, check_splits, listed, present, read_labels
from engine.loaders.formats.registry import RawDataset, RawSplit
from engine.loaders.formats.source import SPLITS_FILE, Choice, DataFiles, csv_files
from engine.loaders.formats.tables import csv_header, read_table
from engine.loaders.hdf5 import CsdReader
from engine.loaders.progress import with_progress
from engine.loaders.ragged import LengthRule, absent, from_sequences
from engine.loaders.spool import Staged

TITLE = "CMU-SDK .csd"
PAUSE = "sp"
ROUNDING = 1e-6  # seconds: intervals that only touch do not overlap
KINDS = {
    "audio": ("covarep", "opensmile", "is09", "eb10", "acoustic", "audio", "mfcc", "gemaps", "wav2vec"),
    "vision": ("facet", "openface", "visual", "vision", "vgg", "face"),
    "text": ("glove", "vector", "embedding", "bert"),
    "label": ("label", "segment", "sentiment", "opinion"),
    "other": ("phone",),
}


@dataclass
class _Segment:
    video: str
    number: int
    start: float
    end: float
    label: np.ndarray
    split: str

    @property
    def id(self) -> str:
        return f"{self.video}[{self.number}]"


class CSD:
    name = "csd"
    title = TITLE
    choices = ("audio_features", "vision_features", "text_features", "label_column")

    def recognises(self, source: DataFiles) -> bool:
        return source.kind == "hdf5"

    def read(self, source: DataFiles, rule: LengthRule, features: bool) -> RawDataset:
        data = RawDataset(self.name, {})
        with CsdReader() as reader:
            files = _sort(source, reader)
            if files["other"]:
                data.notes.append(f"files that are not read: {listed(p.name for p in files['other'].values())}")
            modalities = source.choice.modalities
            names, segments = _segments(source, reader, files["label"]["labels"], data.notes)
            words, spans, spoken = {}, {}, segments
            if needs_words(source.choice):
                words, spans = _words(reader.open(files["words"]["words"]), segments)
                spoken = [s for s in segments if words[s.id]]
            if len(spoken) < len(segments):
                data.notes.append(f"{len(segments) - len(spoken)} segments without a word are left out")
            kinds = [k for k in ("audio", "vision", "text") if k in modalities and (k != "text" or features)]
            frames = {}
            for kind in kinds:
                file = files[kind][source.choice.of(kind, files[kind], str(source.path))]
                frames[kind] = _frames(reader.open(file), spoken, spans, source.choice.align, data.notes, file)
        for s in names:
            own = [x for x in spoken if x.split == s]
            where = f"{source.path}, {s}"
            if not own:
                silent = sum(x.split == s for x in segments)
                found = f"no word in any of {silent} segments" if silent else "no segment"
                do = "Compare the times of words and labels: seconds." if silent else "Check the list of videos."
                raise DataError(where, found, "labelled segments of its videos", do)
            ids = [x.id for x in own]
            label = read_labels(
                np.stack([x.label for x in own]), len(own), f"{where}, labels", ids, source.choice.label_column
            )
            parts = {k: from_sequences([frames[k][i] for i in ids], ids, f"{where}/{k}") for k in kinds}
            text = [" ".join(words[i]) for i in ids] if "text" in modalities else None
            audio, vision = (parts.get(m) or absent(len(own)) for m in ("audio", "vision"))
            data.splits[s] = RawSplit(ids, text, label, audio, vision, parts.get("text"))
        data.dtypes = {"audio": "float32", "vision": "float32"}
        return data


def needs_words(choice: Choice) -> bool:
    """Whether samples need words: as their text, or because frames are aligned to words."""
    return "text" in choice.modalities or choice.align == "words"


def _sort(source: DataFiles, reader: CsdReader) -> dict[str, dict[str, Path]]:
    """What each file is: kind -> name of the feature set -> file."""
    by_kind: dict[str, dict[str, Path]] = {"words": {}, "label": {}, "audio": {}, "vision": {}, "text": {}, "other": {}}
    for stem, file in source.files.items():
        reader.open(file)
        kind = "words" if reader.kind == "words" and "phone" not in f"{reader.root} {stem}".lower() else None
        for name in (reader.root.lower(), stem.lower()):  # the root's name may differ from the file's
            kind = kind or next((k for k, marks in KINDS.items() if any(m in name for m in marks)), None)
        asked = {getattr(source.choice, f"{k}_features").lower(): k for k in ("audio", "vision", "text")}
        kind = asked.get(stem.lower(), kind)
        name = "words" if kind == "words" else "labels" if kind == "label" else stem
        if name in by_kind[kind or "other"]:
            raise DataError(
                str(source.path), f"several files of {name} ({by_kind[kind][name].name}, {file.name})", "one",
                "Move one of them away.",
            )  # fmt: skip
        by_kind[kind or "other"][name] = file
    for kind, do in (
        (
            "words",
            "Add the file of words, or set data.align=segments and leave text out of data.modalities.",
        ),
        ("label", "Add the labels."),
        ("audio", "Add a file such as COVAREP.csd, or name one with data.audio_features."),
        ("vision", "Add a file such as FACET_4.2.csd, or name one with data.vision_features."),
    ):
        if kind in ("audio", "vision") and kind not in source.choice.modalities:
            continue
        if kind == "words" and not needs_words(source.choice):
            continue
        if not by_kind[kind]:
            raise DataError(str(source.path), f"{', '.join(source.files)}: no {kind}", f"a .csd file of {kind}", do)
        auto = kind in ("audio", "vision") and getattr(source.choice, f"{kind}_features") == "auto"
        if auto and len(by_kind[kind]) > 1:
            raise DataError(
                str(source.path), f"several sets of {kind} features ({', '.join(by_kind[kind])})", "one, or a choice",
                f"For example, set data.{kind}_features={next(iter(by_kind[kind]))}.",
            )  # fmt: skip
    return by_kind


def _segments(source: DataFiles, reader: CsdReader, file: Path, notes: list[str]) -> tuple[list[str], list[_Segment]]:
    """The splits that are listed, and all their segments."""
    split_of = _splits(source, notes)
    reader.open(file)
    if reader.kind != "numbers":
        raise DataError(str(file), "labels that are text", "numbers", "Use the SDK's labels.")
    out: list[_Segment] = []
    unknown = 0
    for video in with_progress(reader.videos, "reading labels", "videos"):
        intervals, labels = reader.video(video)
        split = split_of.get(video)
        if split is None:
            unknown += 1
            continue
        for i, ((start, end), label) in enumerate(zip(intervals.tolist(), labels, strict=True)):
            if not start <= end:  # NaN too
                raise DataError(
                    f"{file}, {video}[{i}]", f"an interval from {start} to {end}", "start before end",
                    "Correct the file.",
                )  # fmt: skip
            out.append(_Segment(video, i, start, end, np.array(label), split))
    if len({len(x.label) for x in out}) > 1:
        raise DataError(str(file), "labels of different widths", "the same columns in every video", "Correct the file.")
    if unknown:
        notes.append(f"{unknown} labelled videos are in no split and are left out")
    notes += _unlabelled(split_of, set(reader.videos))
    if not out:
        aligned = any(re.fullmatch(r".*\[\d+\]", video) for video in reader.videos)
        do = "Their ids end in [number], as after the SDK's align: give the files from before." if aligned else ""
        raise DataError(
            str(source.path),
            "no labelled segment of a video of any split",
            "at least one",
            do or "Check the list of videos.",
        )
    return present(split_of.values()), out


def _splits(source: DataFiles, notes: list[str]) -> dict[str, str]:
    """video -> train, valid or test."""
    folder = next(iter(source.files.values())).parent
    file = folder / SPLITS_FILE
    if file.is_file():
        try:
            folds = json.loads(file.read_text(encoding="utf-8"))
            folds = {SPLIT_ALIASES.get(k, k): [str(v) for v in videos] for k, videos in folds.items()}
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as cause:
            raise DataError(
                str(file), f"{cause}", '{"train": [video, ...], "valid": [...], "test": [...]}', "Correct the file."
            ) from None
        notes += check_splits(str(file), folds)
        return _one_split_each(str(file), ((video, split) for split in present(folds) for video in folds[split]))
    for table in csv_files(folder):
        columns = csv_header(table)
        if {"video_id", "mode"} <= set(columns):
            source.parts.append(table)
            read = read_table(table, "columns video_id and mode", ("video_id", "mode"), "replace")
            rows = [(row["video_id"].strip(), row["mode"].strip()) for _, row in read.rows]
            return _one_split_each(str(table), ((v, SPLIT_ALIASES[mode]) for v, mode in rows if mode in SPLIT_ALIASES))
    raise DataError(
        str(source.path), "no list of each split's videos",
        'splits.json ({"train": [video, ...], "valid": [...], "test": [...]}) or a CSV with columns video_id and mode',
        "Put the data set's standard folds beside the .csd files.",
    )  # fmt: skip


def _one_split_each(where: str, listed: Iterable[tuple[str, str]]) -> dict[str, str]:
    """video -> split, of pairs.

    Raises:
        DataError: a video is in two splits.
    """
    split_of: dict[str, str] = {}
    for video, split in listed:
        if split_of.setdefault(video, split) != split:
            raise DataError(
                where, f"video {video} in {split_of[video]} and in {split}", "every video in one split",
                "Remove it from one of them.",
            )  # fmt: skip
    return split_of


def _unlabelled(split_of: dict[str, str], videos: set[str]) -> list[str]:
    """A note on the videos of the splits that the labels do not have."""
    gone = [split for video, split in split_of.items() if video not in videos]
    counts = ", ".join(f"{s} {gone.count(s)}" for s in present(gone))
    return [f"{len(gone)} videos of the splits have no labels and are left out ({counts})"] if gone else []


def _inside(intervals: np.ndarray, start: float, end: float) -> np.ndarray:
    """Rows whose middle lies in [start, end)."""
    middle = intervals.mean(1)
    return np.flatnonzero((middle >= start) & (middle < end))


def _words(reader: CsdReader, segments: list[_Segment]) -> tuple[dict[str, list[str]], dict[str, np.ndarray]]:
    """Words of every segment, and their intervals float64 [n, 2]."""
    words: dict[str, list[str]] = {}
    spans: dict[str, np.ndarray] = {}
    known = set(reader.videos)
    by_video = _by_video(segments)
    for video, own in with_progress(by_video.items(), "reading words", "videos"):
        intervals, spoken = reader.video(video) if video in known else (np.zeros((0, 2)), [])
        kept = [i for i, w in enumerate(spoken) if w.strip() and w != PAUSE]
        times = intervals[kept]
        for segment in own:
            rows = _inside(times, segment.start, segment.end)
            words[segment.id] = [spoken[kept[r]].strip() for r in rows]
            spans[segment.id] = times[rows]
    return words, spans


def _frames(
    reader: CsdReader,
    segments: list[_Segment],
    spans: dict[str, np.ndarray],
    align: str,
    notes: list[str],
    file: Path,
) -> dict[str, np.ndarray]:
    """Rows of every segment, float32 or float64 [n, d]."""
    if reader.kind != "numbers":
        raise DataError(str(file), "text", "numbers", "Choose another feature set.")
    staged, by_video = Staged(), _by_video(segments)
    known, absent, bad, outside = set(reader.videos), 0, 0, 0
    for video, own in with_progress(by_video.items(), f"reading {file.name}", "videos"):
        if video not in known:
            absent += 1
            for _ in own:
                staged.add(np.zeros((0, 0), np.float32))
            continue
        intervals, features = reader.video(video)
        used = np.zeros(len(features), bool)
        if align == "segments":
            for x in own:
                rows = _inside(intervals, x.start, x.end)
                staged.add(features[rows])
                used[rows] = True
            outside += int(np.count_nonzero((features != 0).any(1) & ~used))
            continue
        finite = np.isfinite(features)
        bad += features.size - int(np.count_nonzero(finite))
        features = np.where(finite, features, 0)
        for segment in own:
            staged.add(_mean_by_word(intervals, features, spans[segment.id], used))
        outside += int(np.count_nonzero(features.any(1) & ~used))
    if absent:
        notes.append(f"{file.name} lacks {absent} videos: that modality is missing for their segments")
    if bad:
        notes.append(f"{bad} NaN or infinite values of {file.name} replaced by 0 before averaging")
    if outside:
        where = "segment" if align == "segments" else "word"
        notes.append(f"{outside} frames of {file.name} that are not zero lie in no {where} and are left out")
    ids = [x.id for own in by_video.values() for x in own]
    return dict(zip(ids, staged.arrays(), strict=True))


def _mean_by_word(intervals: np.ndarray, features: np.ndarray, words: np.ndarray, used: np.ndarray) -> np.ndarray:
    """The mean of the frames that overlap each word, which are marked in `used`."""
    rows = np.zeros((len(words), features.shape[1]), features.dtype)
    starts, ends = np.ascontiguousarray(intervals[:, 0]), np.ascontiguousarray(intervals[:, 1])
    over: slice | np.ndarray
    in_order = bool((np.diff(starts) >= 0).all() and (np.diff(ends) >= 0).all())
    first = np.searchsorted(ends, words[:, 0] + ROUNDING, "right") if in_order else None
    behind = np.searchsorted(starts, words[:, 1] - ROUNDING, "left") if in_order else None
    for i, (start, end) in enumerate(words):
        if first is not None and behind is not None:
            over = slice(first[i], behind[i])
        else:
            over = np.flatnonzero((starts < end - ROUNDING) & (ends > start + ROUNDING))
        if len(starts[over]):
            rows[i], used[over] = features[over].mean(0, dtype=np.float64), True
    return rows


def _by_video(segments: list[_Segment]) -> dict[str, list[_Segment]]:
    out: dict[str, list[_Segment]] = {}
    for segment in segments:
        out.setdefault(segment.video, []).append(segment)
    return out
