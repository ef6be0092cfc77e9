"""Small synthetic data, written in the layouts that users have by the package's own writers."""

from functools import partial

import numpy as np

from engine.loaders.make_data import writers
from engine.loaders.make_data.writers import (
    SPLITS,
    Caps,
    Sample,
    aligned,
    avec2019,
    dump,
    label_rows,
    magbert,
    mmsa_fet,
    pad,
    tuples,
    write_csd,
    write_csv,
    write_manifest,
    write_split_files,
)

__all__ = [
    "SPLITS", "Caps", "Sample", "aligned", "avec2019", "declarelab", "dump", "interviews", "label_rows", "magbert",
    "mmsa", "mmsa_fet", "pad", "samples", "sdk", "tuples", "write_csd", "write_csv", "write_declarelab",
    "write_manifest", "write_split_files", "write_tuples",
]  # fmt: skip

SIZES = {"train": 7, "valid": 3, "test": 4}
AUDIO, VISION = 5, 4  # feature columns
AUDIO_CAP, VISION_CAP = 9, 11  # padded lengths
WORDS = ["the", "film", "was", "not", "very", "good", "but", "i", "really", "liked", "it"]

CAPS = Caps(AUDIO_CAP, VISION_CAP, 12)
declarelab = partial(writers.declarelab, caps=CAPS, glove=3)
write_declarelab = partial(writers.write_declarelab, caps=CAPS, glove=3)
mmsa = partial(writers.mmsa, caps=CAPS)


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


def interviews(seed: int = 0, sizes: dict[str, int] = SIZES) -> dict[str, list[Sample]]:
    """Splits of AVEC2019-like samples: a sentence a line, a row of every feature set a sentence, labels in [0, 1]."""
    rng = np.random.default_rng(seed)
    out: dict[str, list[Sample]] = {}
    for split in SPLITS:
        out[split] = []
        for i in range(sizes[split]):
            steps = int(rng.integers(2, 8))
            text = "\n".join(" ".join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(steps))
            widths = {"mfcc": AUDIO, "ege": 3, "ds": 6, "au": VISION, "resnet": 7}
            parts = {k: rng.normal(size=(steps, d)).astype(np.float32) for k, d in widths.items()}
            audio, vision = parts.pop("mfcc"), parts.pop("au")
            out[split].append(Sample(f"{split}_{i}", text, float(rng.integers(25) / 25), audio, vision, parts))
    return out


def sdk(data: dict[str, list[Sample]], sets: str = "mosi") -> dict[str, list]:
    """CMU-SDK lists of `sets` (mosi, mosei or pom), with one column in the feature sets that are not the first."""
    content = writers.sdk(data, "mosei" if sets == "pom" else sets)
    for rows in content.values():
        for row in rows:
            row[0] = [[parts[0], *(part[..., :1] for part in parts[1:])] for parts in row[0]]
            if sets == "pom":  # 18 traits, and no label of two classes
                traits = np.full(18, 4, np.float32)
                traits[2] = row[1]
                row[1:3] = [traits]
    return content


def write_tuples(folder, data, fields: int = 6, dev: str = "dev", prefix: str = ""):
    """MMIM's or MISA's files."""
    return write_split_files(folder, tuples(data, fields), prefix, dev)
