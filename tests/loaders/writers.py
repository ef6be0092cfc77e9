"""Small synthetic data in the exact layouts that users have."""

import csv
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPLITS = ("train", "valid", "test")
SIZES = {"train": 7, "valid": 3, "test": 4}
AUDIO, VISION = 5, 4  # feature columns
AUDIO_CAP, VISION_CAP = 9, 11  # padded lengths
WORDS = ["the", "film", "was", "not", "very", "good", "but", "i", "really", "liked", "it"]


@dataclass
class Sample:
    id: str
    text: str
    label: float
    audio: np.ndarray
    vision: np.ndarray


def samples(seed: int = 0, sizes: dict[str, int] = SIZES) -> dict[str, list[Sample]]:
    """Splits of random samples; no frame is all zero or sums to zero."""
    rng = np.random.default_rng(seed)
    out, number = {}, 0
    for split in SPLITS:
        out[split] = []
        for _ in range(sizes[split]):
            audio = rng.normal(size=(rng.integers(1, AUDIO_CAP + 1), AUDIO)).astype(np.float32)
            vision = rng.normal(size=(rng.integers(1, VISION_CAP + 1), VISION)).astype(np.float32)
            text = " ".join(rng.choice(WORDS, rng.integers(1, 9)))
            label = float(np.round(rng.uniform(-3, 3), 1))
            out[split].append(Sample(f"v_ideo{number // 3}_{number % 3}", text, label, audio, vision))
            number += 1
    return out


def pad(sequences: list[np.ndarray], length: int, side: str, dtype: type = np.float32) -> np.ndarray:
    out = np.zeros((len(sequences), length, sequences[0].shape[1]), dtype)
    for row, frames in zip(out, sequences, strict=True):
        if len(frames):
            row[length - len(frames) :] = frames if side == "left" else row[length - len(frames) :]
            if side == "right":
                row[: len(frames)] = frames
    return out


def declarelab(data: dict[str, list[Sample]], ids: str = "mosi", dtype: type = np.float32) -> dict:
    """The pickle's content. `ids`: mosi (bytes `video_clip`) or mosei (str rows video, start, end)."""
    out = {}
    for split, rows in data.items():
        if ids == "mosi":
            names = np.array([[s.id.encode()] for s in rows])
        else:
            names = np.array(
                [[s.id.rsplit("_", 1)[0], f"{i * 1.5:.3f}", f"{i * 1.5 + 1:.3f}"] for i, s in enumerate(rows)]
            )
        out[split] = {
            "vision": pad([s.vision for s in rows], VISION_CAP, "left", dtype),
            "audio": pad([s.audio for s in rows], AUDIO_CAP, "left", dtype),
            "text": np.zeros((len(rows), 6, 3), dtype),
            "labels": np.array([[[s.label]] for s in rows], dtype),
            "id": names,
        }
    return out


def label_rows(data: dict[str, list[Sample]]) -> list[dict]:
    rows = []
    for split, items in data.items():
        for s in items:
            video, clip = s.id.rsplit("_", 1)
            rows.append({"video_id": video, "clip_id": clip, "text": s.text, "label": s.label, "mode": split})
    return rows


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def mmsa(data: dict[str, list[Sample]], lengths: bool = True, text_bert: bool = False, features: int = 0) -> dict:
    """The pickle's content: unaligned with recorded lengths, or without; `features`: width of precomputed text."""
    out = {}
    for split, rows in data.items():
        out[split] = {
            "raw_text": np.array([s.text for s in rows]),
            "id": np.array(["$_$".join(s.id.rsplit("_", 1)) for s in rows]),
            "audio": pad([s.audio for s in rows], AUDIO_CAP, "right"),
            "vision": pad([s.vision for s in rows], VISION_CAP, "right"),
            "regression_labels": np.array([s.label for s in rows], np.float32),
            "classification_labels": np.array([np.sign(s.label) + 1 for s in rows], np.float32),
            "annotations": np.array(["Negative" if s.label < 0 else "Positive" for s in rows]),
        }
        if lengths:
            out[split]["audio_lengths"] = [len(s.audio) for s in rows]
            out[split]["vision_lengths"] = [len(s.vision) for s in rows]
        words = np.array([len(s.text.split()) for s in rows])
        if text_bert:
            mask = (np.arange(12) < words[:, None] + 2).astype(np.float32)
            out[split]["text_bert"] = np.stack([mask * 7, mask, mask * 0], 1)
        if features:
            rng = np.random.default_rng(len(rows))
            embedded = [rng.normal(size=(n + 2, features)).astype(np.float32) for n in words]
            out[split]["text"] = pad(embedded, 12, "right")
    return out


def tuples(data: dict[str, list[Sample]], fields: int = 6) -> dict[str, list]:
    """One list a split: MMIM's rows (6 inner fields) or MISA's (4)."""
    out = {}
    for split, rows in data.items():
        out[split] = []
        for s in rows:
            inner = ([], s.vision, s.audio, s.text.split(), len(s.vision), len(s.audio))[:fields]
            out[split].append((inner, np.array([[s.label]], np.float32), s.id))
    return out


def dump(content: object, path: Path, protocol: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        pickle.dump(content, file, protocol=protocol)
    return path


def write_declarelab(folder: Path, data: dict[str, list[Sample]], **options) -> Path:
    path = dump(declarelab(data, **options), folder / "mosi_data_noalign.pkl")
    write_csv(folder / "MOSI-label.csv", label_rows(data))
    return path


def write_tuples(
    folder: Path, data: dict[str, list[Sample]], fields: int = 6, dev: str = "dev", prefix: str = ""
) -> Path:
    names = {"train": "train", "valid": dev, "test": "test"}
    for split, rows in tuples(data, fields).items():
        dump(rows, folder / f"{prefix}{names[split]}.pkl")
    return folder
