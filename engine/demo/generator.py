"""Tri-modal utterances driven by latents of known information, written in the MMSA layout users have."""

from __future__ import annotations

import csv
import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.demo.latents import LatentModel, true_information
from engine.demo.sentences import make_sentence
from engine.files import atomic_path, user_path, write_json, write_text
from engine.vocabulary import SPLITS

LABEL_SCALE = 1.5  # label = C x LABEL_SCALE, cut to [-3, 3] and rounded to 0.2; a sentence's level likewise of T0
LABEL_STEP = 0.2
MISSING_SHARE = 0.02
TOPIC_COUNT = 8


@dataclass(frozen=True)
class SequenceModel:
    """Frames of one modality: x_t = W latent + fluctuation_t + noise_t.

    W is drawn once for all demo data. The fluctuation is a stationary AR(1) process per channel, so that neighbouring
    frames resemble each other; the noise is white.

    Attributes:
        width: features per frame.
        frames_per_word: mean length = words x this.
        memory: AR(1) coefficient.
        fluctuation: standard deviation of the AR(1) process.
        noise: standard deviation of the white noise.
    """

    width: int
    frames_per_word: float
    memory: float
    fluctuation: float
    noise: float
    mixing_seed: int

    def mixing(self) -> np.ndarray:
        """W, float64 [3, width]: orthogonal rows of norm sqrt(width), so that all latents are equally strong."""
        drawn = np.random.default_rng(self.mixing_seed).standard_normal((self.width, 3))
        return np.linalg.qr(drawn)[0].T * np.sqrt(self.width)

    def sequence(self, latent: np.ndarray, words: int, rng: np.random.Generator) -> np.ndarray:
        """Frames float32 [length, width] of one utterance with latent [3]."""
        length = max(2, round(words * self.frames_per_word) + int(rng.integers(-2, 3)))
        shocks = rng.standard_normal((length, self.width)) * self.fluctuation
        shocks[1:] *= np.sqrt(1 - self.memory**2)
        for t in range(1, length):
            shocks[t] += self.memory * shocks[t - 1]
        white = self.noise * rng.standard_normal((length, self.width))
        return (latent @ self.mixing() + shocks + white).astype(np.float32)


AUDIO = SequenceModel(width=8, frames_per_word=3.0, memory=0.8, fluctuation=1.0, noise=0.5, mixing_seed=1)
VISION = SequenceModel(width=12, frames_per_word=2.0, memory=0.9, fluctuation=1.0, noise=0.8, mixing_seed=2)


@dataclass
class Utterance:
    """One sample: what a data set holds of it, and the truth behind it.

    audio [La, 8] and vision [Lv, 12] are float32, or None where the modality is missing. `value` is the sentence's own
    sentiment, `label` the utterance's.
    """

    id: str
    text: str
    label: float
    value: float
    audio: np.ndarray | None
    vision: np.ndarray | None


def make_utterances(
    n: int, seed: int = 0, model: LatentModel | None = None
) -> tuple[list[Utterance], dict[str, np.ndarray]]:
    """`n` utterances and their latents {"T", "A", "V": float64 [n, 3], "C": float64 [n, 1]}; equal seeds equal bits."""
    rng = np.random.default_rng(seed)
    latents = (model or LatentModel()).sample(n, rng)
    labels = label_of(latents["C"][:, 0])
    utterances = []
    for i in range(n):
        valence, verbosity, topic = latents["T"][i]
        target = int(np.clip(round(12 + 6 * verbosity), 4, 30))
        sentence = make_sentence(LABEL_SCALE * valence, target, topic_of(topic), rng)
        words = len(sentence.text.split())
        audio = AUDIO.sequence(latents["A"][i], words, rng)
        vision = VISION.sequence(latents["V"][i], words, rng)
        missing = rng.random(2) < MISSING_SHARE
        utterances.append(
            Utterance(
                id=f"demo{i // 20:03d}_{i % 20}",
                text=sentence.text,
                label=float(labels[i]),
                value=sentence.value,
                audio=None if missing[0] else audio,
                vision=None if missing[1] else vision,
            )
        )
    return utterances, latents


def label_of(c: np.ndarray) -> np.ndarray:
    """The label that a label latent shows as: scaled, cut to [-3, 3], rounded to 0.2.

    Monotone, so the median of the one is the other's, and E[C | latents] put through it has the least absolute
    error.
    """
    return np.round(np.clip(LABEL_SCALE * c, -3, 3) / LABEL_STEP) * LABEL_STEP


def topic_of(latent: float) -> int:
    """Number of the topic latent's octile."""
    octiles = (-1.1503, -0.6745, -0.3186, 0.0, 0.3186, 0.6745, 1.1503)
    return int(np.searchsorted(octiles, latent))


def write_demo_files(
    out_dir: str | Path, n_train: int = 600, n_valid: int = 150, n_test: int = 150, seed: int = 0
) -> dict[str, Path]:
    """Write demo data and its truth into `out_dir`; equal seeds write equal bytes.

    - `unaligned_50.pkl`: MMSA layout, float32, padded on the right, without precomputed text features;
    - `label.csv`: video_id, clip_id, text, label, annotation, mode, in train, valid, test order;
    - `latents.safetensors`: float32 T, A, V [N, 3], C [N, 1] and the sentences' own sentiment `text_value` [N], in
      the CSV's order, ids in the metadata;
    - `truth.json`: true information of the raw latents (nats) and the MAE that simple predictors reach on test.

    Returns: the four paths by the names data, labels, latents, truth.

    Raises:
        OutputError: `out_dir` cannot be written.
    """
    from safetensors.numpy import save

    out = user_path(out_dir)
    counts = dict(zip(SPLITS, (n_train, n_valid, n_test), strict=True))
    utterances, latents = make_utterances(sum(counts.values()), seed)
    mode = np.repeat(SPLITS, list(counts.values()))
    paths = {
        "data": out / "unaligned_50.pkl",
        "labels": out / "label.csv",
        "latents": out / "latents.safetensors",
        "truth": out / "truth.json",
    }
    by_split = {s: [u for u, m in zip(utterances, mode, strict=True) if m == s] for s in SPLITS}
    with atomic_path(paths["data"]) as temporary:
        temporary.write_bytes(pickle.dumps({s: _mmsa_split(rows) for s, rows in by_split.items()}, protocol=4))
    write_text(paths["labels"], _label_csv(utterances, mode))
    arrays = {name: value.astype(np.float32) for name, value in latents.items()}
    arrays["text_value"] = np.array([u.value for u in utterances], np.float32)
    with atomic_path(paths["latents"]) as temporary:
        temporary.write_bytes(save(arrays, metadata={"ids": json.dumps([u.id for u in utterances])}))
    write_json(paths["truth"], _truth(latents, mode, seed))
    return paths


def _mmsa_split(rows: list[Utterance]) -> dict[str, object]:
    labels = np.array([u.label for u in rows], np.float32)
    split: dict[str, object] = {
        "raw_text": np.array([u.text for u in rows]),
        "id": np.array([u.id.replace("_", "$_$") for u in rows]),
        "regression_labels": labels,
        "classification_labels": np.sign(labels) + 1,
        "annotations": np.array([_annotation(u.label) for u in rows]),
    }
    for name, width in (("audio", AUDIO.width), ("vision", VISION.width)):
        # a missing modality is one frame of zeros
        sequences = [np.zeros((1, width), np.float32) if (s := getattr(u, name)) is None else s for u in rows]
        lengths = [len(s) for s in sequences]
        padded = np.zeros((len(rows), max(lengths), width), np.float32)
        for row, sequence in zip(padded, sequences, strict=True):
            row[: len(sequence)] = sequence
        split[name], split[f"{name}_lengths"] = padded, lengths
    return split


def _annotation(label: float) -> str:
    return "Negative" if label < 0 else "Positive" if label > 0 else "Neutral"


def _label_csv(utterances: list[Utterance], mode: np.ndarray) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["video_id", "clip_id", "text", "label", "annotation", "mode"])
    for u, split in zip(utterances, mode, strict=True):
        video, clip = u.id.split("_")
        writer.writerow([video, clip, u.text, f"{u.label:.1f}", _annotation(u.label), split])
    return text.getvalue()


def _truth(latents: dict[str, np.ndarray], mode: np.ndarray, seed: int) -> dict[str, object]:
    true = true_information()
    labels = label_of(latents["C"][:, 0])
    train, test = labels[mode == "train"], labels[mode == "test"]

    def mae(prediction: np.ndarray | float) -> float:
        return float(np.abs(test - prediction).mean())

    def informed(given: str) -> float:
        return mae(label_of(LatentModel().expected_label(latents, given))[mode == "test"])

    return {
        "seed": seed,
        "unit": "nats",
        "latents": [{"name": n, "true": true[n], "estimates": {}, "ceiling": None} for n in true if n.startswith("I(")],
        "derived": {n: v for n, v in true.items() if not n.startswith("I(")},
        "test_mae": {
            "mean_baseline_mae": mae(float(train.mean())),
            "median_baseline_mae": mae(float(np.median(train))),
            "best_from_text_latent": informed("T"),
            "best_from_all_latents": informed("TAV"),
        },
    }
