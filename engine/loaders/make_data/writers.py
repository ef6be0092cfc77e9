"""Writes samples in the exact layout of every format that the readers know, for `engine make-data`.

Each function in `WRITERS` takes a folder, samples by split and the data set's name. It returns the path to give to
`--data`.
"""

from __future__ import annotations

import csv
import json
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine.vocabulary import SPLITS as SPLITS

LARGE = 1 << 26  # padded arrays of more bytes are built in a file
TEXT_LENGTH = 50  # tokens of aligned files and of text features
WHOLE = 1 << 30  # aligned lists are not cut


@dataclass
class Sample:
    """One utterance.

    Attributes:
        id: `<video>_<clip>`.
        text: transcript; for AVEC2019 one sentence per line.
        audio, vision: float32 [frames, features].
        more: further feature sets by name, for formats that hold several.
    """

    id: str
    text: str
    label: float
    audio: np.ndarray
    vision: np.ndarray
    more: dict[str, np.ndarray] = field(default_factory=dict)


Data = dict[str, list[Sample]]


@dataclass
class Caps:
    """Padded lengths. A longer sequence is cut, as in the field's files."""

    audio: int = 375
    vision: int = 500
    text: int = TEXT_LENGTH


def dump(content: object, path: Path, protocol: int = 4) -> Path:
    """Pickle `content` to `path`, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        pickle.dump(content, file, protocol=protocol)
    return path


def pad(
    sequences: Sequence[np.ndarray], length: int, side: str, dtype: type = np.float32, scratch: Path | None = None
) -> np.ndarray:
    """Zero-padded [N, length, d]. On the left the last frames of a longer sequence are kept, on the right the first.

    Args:
        scratch: folder for large arrays, which then take no memory.
    """
    shape = (len(sequences), length, sequences[0].shape[1])
    if scratch is not None and np.prod(shape) * np.dtype(dtype).itemsize > LARGE:
        with tempfile.NamedTemporaryFile(dir=scratch) as file:
            out = np.asarray(np.memmap(file, dtype, "w+", shape=shape))
    else:
        out = np.zeros(shape, dtype)
    for row, frames in zip(out, sequences, strict=True):
        if side == "left" and len(frames):
            frames = frames[-length:]
            row[length - len(frames) :] = frames
        else:
            row[: min(len(frames), length)] = frames[:length]
    return out


def embedded(text: str, width: int, extra: int = 0) -> np.ndarray:
    """A fixed random vector per word, and `extra` ones for the tokens around them: float32 [words + extra, width]."""
    words = text.split() + ["[SEP]"] * extra
    return np.stack([_vector(w, width) for w in words]) if words else np.zeros((0, width), np.float32)


@lru_cache(4096)
def _vector(word: str, width: int) -> np.ndarray:
    return np.random.default_rng([ord(c) for c in word]).standard_normal(width, np.float32)


def aligned(data: Data, most: int = TEXT_LENGTH) -> Data:
    """The same samples with one row per word: frame i of n words is the frame at the same fraction of the sequence."""

    def fit(frames: np.ndarray, words: int) -> np.ndarray:
        return frames[np.arange(words) * len(frames) // max(words, 1)]

    return {
        split: [
            Sample(
                s.id, s.text, s.label, *(fit(x, min(len(s.text.split()), most)) for x in (s.audio, s.vision)), s.more
            )
            for s in rows
        ]
        for split, rows in data.items()
    }


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".scratch-"))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)


# The content of each format.


def declarelab(
    data: Data,
    ids: str = "mosi",
    dtype: type = np.float32,
    caps: Caps | None = None,
    glove: int = 300,
    scratch: Path | None = None,
) -> dict:
    """DeclareLab/MulT. `ids`: mosi (bytes `video_clip`) or mosei (str rows video, start, end); `glove`: text width."""
    out, caps = {}, caps or Caps()
    for split, rows in data.items():
        if ids == "mosi":
            names = np.array([[s.id.encode()] for s in rows])
        else:
            names = np.array(
                [[s.id.rsplit("_", 1)[0], f"{i * 1.5:.3f}", f"{i * 1.5 + 1:.3f}"] for i, s in enumerate(rows)]
            )
        out[split] = {
            "vision": pad([s.vision for s in rows], caps.vision, "left", dtype, scratch),
            "audio": pad([s.audio for s in rows], caps.audio, "left", dtype, scratch),
            "text": pad([embedded(s.text, glove) for s in rows], caps.text, "left", dtype, scratch),
            "labels": np.array([[[s.label]] for s in rows], dtype),
            "id": names,
        }
    return out


def label_rows(data: Data) -> list[dict]:
    """Rows of the label CSV."""
    rows = []
    for split, items in data.items():
        for s in items:
            video, clip = s.id.rsplit("_", 1)
            rows.append({"video_id": video, "clip_id": clip, "text": s.text, "label": s.label, "mode": split})
    return rows


def write_csv(path: Path, rows: list[dict]) -> None:
    """A CSV with the keys of the first row as its header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def mmsa(
    data: Data,
    lengths: bool = True,
    text_bert: bool = False,
    features: int = 0,
    dtype: type = np.float32,
    caps: Caps | None = None,
    scratch: Path | None = None,
) -> dict:
    """MMSA: unaligned with recorded lengths, or without. `features`: width of precomputed text."""
    out, caps = {}, caps or Caps()
    for split, rows in data.items():
        out[split] = {
            "raw_text": np.array([s.text for s in rows]),
            "id": np.array(["$_$".join(s.id.rsplit("_", 1)) for s in rows]),
            "audio": pad([s.audio for s in rows], caps.audio, "right", dtype, scratch),
            "vision": pad([s.vision for s in rows], caps.vision, "right", dtype, scratch),
            "regression_labels": np.array([s.label for s in rows], np.float32),
            "classification_labels": np.array([np.sign(s.label) + 1 for s in rows], np.float32),
            "annotations": np.array(
                ["Negative" if s.label < 0 else "Neutral" if s.label == 0 else "Positive" for s in rows]
            ),
        }
        if lengths:
            out[split]["audio_lengths"] = [min(len(s.audio), caps.audio) for s in rows]
            out[split]["vision_lengths"] = [min(len(s.vision), caps.vision) for s in rows]
        words = np.array([len(s.text.split()) for s in rows])
        if text_bert:
            mask = (np.arange(caps.text) < words[:, None] + 2).astype(np.float32)
            out[split]["text_bert"] = np.stack([mask * 7, mask, mask * 0], 1)
        if features:
            pieces = [embedded(s.text, features, 2) for s in rows]
            out[split]["text"] = pad(pieces, caps.text, "right", dtype, scratch)
    return out


def mmsa_fet(data: Data) -> dict:
    """MMSA-FET's output: float64, padded to mean + 3 deviations of the lengths, samples in no order, lists of ids."""
    out = {}
    order = np.random.default_rng(0)
    for split, rows in data.items():
        rows = [rows[i] for i in order.permutation(len(rows))]
        caps = Caps(*(_fet_length([len(getattr(s, m)) for s in rows]) for m in ("audio", "vision")))
        content = mmsa({split: rows}, dtype=np.float64, caps=caps)[split]
        out[split] = {**content, "id": list(map(str, content["id"])), "raw_text": [s.text for s in rows]}
    return out


def _fet_length(lengths: list[int]) -> int:
    return int(np.mean(lengths) + 3 * np.std(lengths))


def tuples(data: Data, fields: int = 6) -> dict[str, list]:
    """One list per split: MMIM's rows (6 inner fields) or MISA's (4)."""
    out: dict[str, list] = {}
    for split, rows in data.items():
        out[split] = []
        for s in rows:
            words: object = [] if fields == 6 else np.arange(len(s.text.split()))
            inner = (words, s.vision, s.audio, s.text.split(), len(s.vision), len(s.audio))[:fields]
            out[split].append((inner, np.array([[s.label]], np.float32), s.id))
    return out


def magbert(data: Data) -> dict[str, list]:
    """MAG-BERT's rows."""
    return {
        {"valid": "dev"}.get(split, split): [
            ((s.text.split(), s.vision, s.audio), np.array([[s.label]], np.float32), s.id) for s in rows
        ]
        for split, rows in data.items()
    }


def sdk(data: Data, sets: str = "mosi") -> dict[str, list]:
    """The published code's CMU-SDK lists. `sets`: mosi or mosei."""
    more_audio = {"mosi": (1585, 384)}.get(sets, ())
    more_vision = {"mosi": (35, 430)}.get(sets, ())
    out: dict[str, list] = {}
    for split, rows in data.items():
        out[split] = []
        for s in rows:
            words = np.array(s.text.split())

            def fill(width: int, count: int = words.size) -> np.ndarray:
                return np.ones((count, width), np.float32)

            text = [words, *(embedded(s.text, d) for d in (300, 768, 768)), np.ones(768, np.float32)]
            parts = [
                [*text, embedded(s.text, 768)], [s.audio, *map(fill, more_audio)], [s.vision, *map(fill, more_vision)],
            ]  # fmt: skip
            seven = int(np.round(np.clip(s.label, -3, 3))) + 3
            out[split].append([parts, float(s.label), int(s.label >= 0), seven, s.id])
    return out


def avec2019(data: Data) -> dict[str, list]:
    """The published code's AVEC2019 lists; `Sample.more` holds ege, ds and resnet."""
    return {
        split: [
            [
                np.array(s.text.split("\n")), s.audio, *(s.more[k] for k in ("ege", "ds")), s.vision, s.more["resnet"],
                s.label,
            ]
            for s in rows
        ]
        for split, rows in data.items()
    }  # fmt: skip


# Files.


def write_split_files(folder: Path, content: dict[str, list], prefix: str = "", valid: str = "valid") -> Path:
    """One pickled list per split."""
    for split, rows in content.items():
        dump(rows, folder / f"{prefix}{valid if split == 'valid' else split}.pkl")
    return folder


def write_declarelab(
    folder: Path, data: Data, name: str = "mosi_data_noalign.pkl", table: str = "MOSI-label.csv", **options
) -> Path:
    """The pickle and its label CSV."""
    with _scratch(folder) as scratch:
        path = dump(declarelab(data, scratch=scratch, **options), folder / name)
    write_csv(folder / table, label_rows(data))
    return path


def write_mmsa(folder: Path, data: Data, name: str = "unaligned_50.pkl", **options) -> Path:
    """One pickle."""
    with _scratch(folder) as scratch:
        return dump(mmsa(data, scratch=scratch, **options), folder / name)


def write_csd(folder: Path, data: Data, word_s: float = 0.4, labels: int = 1) -> Path:
    """A folder of computational sequences: words, COVAREP, FACET and labels, with splits.json.

    Every word lasts `word_s` seconds, and a pause follows each segment. The frames of a segment divide its time evenly.
    `labels`: number of columns, 1 as in MOSI or 7 as in MOSEI.
    """
    import h5py

    folder.mkdir(parents=True, exist_ok=True)
    videos: dict[str, list[Sample]] = {}
    splits: dict[str, list[str]] = {s: [] for s in data}
    for split, rows in data.items():
        for s in rows:
            video = f"{split}_{s.id.rsplit('_', 1)[0]}"  # a video belongs to one split
            if video not in videos:
                splits[split].append(video)
            videos.setdefault(video, []).append(s)
    files = {}
    for stem, root in (
        ("words", "words"),
        ("COVAREP", "COVAREP"),
        ("FACET_4.2", "FACET_4.2"),
        ("labels", "All Labels"),
    ):
        files[stem] = h5py.File(folder / f"{stem}.csd", "w")
        metadata = files[stem].create_group(root).create_group("metadata")
        text = h5py.string_dtype("utf-8")
        metadata.create_dataset("root name", (1,), text, data=[json.dumps(root)])
        files[stem][root].create_group("data")

    def add(stem: str, video: str, features: np.ndarray, intervals: np.ndarray) -> None:
        group = next(iter(files[stem].values()))["data"].create_group(video)
        group.create_dataset("features", data=features, compression="gzip")
        group.create_dataset("intervals", data=np.asarray(intervals, np.float64).reshape(len(features), 2))

    for video, rows in videos.items():
        at, spoken, times, labels_at = 1.0, [], [], []
        frames: dict[str, list] = {"COVAREP": [], "FACET_4.2": []}
        spans: dict[str, list] = {"COVAREP": [], "FACET_4.2": []}
        for s in rows:
            words = s.text.split()
            end = at + word_s * len(words)
            spoken += [*words, "sp"]
            times += [(at + word_s * i, at + word_s * (i + 1)) for i in range(len(words))] + [(end, end + word_s)]
            labels_at.append((at, end))
            for stem, sequence in (("COVAREP", s.audio), ("FACET_4.2", s.vision)):
                edges = np.linspace(at, end, len(sequence) + 1)
                frames[stem].append(sequence)
                spans[stem].append(np.stack([edges[:-1], edges[1:]], 1))
            at = end + word_s
        add("words", video, np.array([[w.encode()] for w in spoken]), np.array(times))
        add("labels", video, np.array([[s.label] + [9] * (labels - 1) for s in rows], np.float32), np.array(labels_at))
        for stem in frames:
            add(stem, video, np.concatenate(frames[stem]), np.concatenate(spans[stem]))
    for file in files.values():
        file.close()
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder


def write_manifest(folder: Path, data: Data, kind: str = "npy", features: int = 0) -> Path:
    """A folder of .npy or .csv files and manifest.csv."""
    rows = []
    for split, samples in data.items():
        for s in samples:
            row = {"id": s.id, "split": split, "label": s.label, "text": s.text}
            parts = {"audio": s.audio, "vision": s.vision}
            if features:
                parts["text_features"] = embedded(s.text, features)
            for name, frames in parts.items():
                path = folder / name / f"{s.id}.{kind}"
                path.parent.mkdir(parents=True, exist_ok=True)
                row[name] = str(path.relative_to(folder)) if len(frames) else ""
                if kind == "npy" and len(frames):
                    np.save(path, frames)
                elif len(frames):
                    header = ",".join(f"f{i}" for i in range(frames.shape[1]))
                    np.savetxt(path, frames, "%.9g", ",", header=header, comments="")
            rows.append(row)
    write_csv(folder / "manifest.csv", rows)
    return folder


def _caps(data: Data, shape: str) -> Caps:
    """Padded lengths of a data set's files."""
    known = {"mosi": Caps(375, 500), "mosei": Caps(500, 500)}
    every = [s for rows in data.values() for s in rows]
    return known.get(shape) or Caps(*(max(len(getattr(s, m)) for s in every) for m in ("audio", "vision")))


def _declarelab(folder: Path, data: Data, shape: str, name: str, caps: Caps) -> Path:
    stem, ids = {"mosei": ("mosei_senti", "mosei")}.get(shape, (shape, "mosi"))
    return write_declarelab(folder, data, f"{stem}_{name}.pkl", f"{shape.upper()}-label.csv", ids=ids, caps=caps)


ALIGNED = Caps(TEXT_LENGTH, TEXT_LENGTH)
BERT = {"text_bert": True, "features": 768}

WRITERS: dict[str, Callable[[Path, Data, str], Path]] = {
    "declarelab": lambda f, d, shape: _declarelab(f, d, shape, "data_noalign", _caps(d, shape)),
    "declarelab-aligned": lambda f, d, shape: _declarelab(f, aligned(d), shape, "data", ALIGNED),
    "mmsa": lambda f, d, shape: write_mmsa(f, d, caps=_caps(d, shape), **BERT),
    "mmsa-aligned": lambda f, d, shape: write_mmsa(
        f, aligned(d), "aligned_50.pkl", lengths=False, caps=ALIGNED, **BERT
    ),
    "mmsa-fet": lambda f, d, shape: dump(mmsa_fet(d), f / "feature.pkl"),
    "tuples": lambda f, d, shape: write_split_files(f, tuples(d), f"{shape}_", "valid" if shape == "mosei" else "dev"),
    "misa": lambda f, d, shape: write_split_files(f, tuples(aligned(d, WHOLE), 4), valid="dev"),
    "magbert": lambda f, d, shape: dump(magbert(aligned(d, WHOLE)), f / f"{shape}.pkl"),
    "sdk": lambda f, d, shape: write_split_files(f, sdk(aligned(d, WHOLE), shape), f"{shape}_"),
    "avec2019": lambda f, d, shape: write_split_files(f, avec2019(d), valid="dev"),
    "csd": lambda f, d, shape: write_csd(f, d, labels=7 if shape == "mosei" else 1),
    "manifest": lambda f, d, shape: write_manifest(f, d),
}
"""Name of a layout -> function of folder, samples and shape that writes it; names are the readers', with variants."""
