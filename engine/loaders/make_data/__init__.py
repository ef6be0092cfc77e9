"""`engine make-data`: synthetic files of a data set's shape in any format, for benchmarks and for trials.

Nothing that reads data imports this package.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.errors import ConfigError, OutputError
from engine.files import user_path
from engine.loaders.make_data import synthetic
from engine.loaders.make_data.writers import WRITERS, Data, Sample
from engine.vocabulary import SPLITS

COUNTS = {"mosi": (1284, 229, 686), "mosei": (16326, 1871, 4659), "avec2019": (163, 56, 56)}
"""Samples of train, valid and test in the real data sets."""

CLIPS = 20  # segments per video


def make_data(out: str | Path, shape: str, n: int | None = None, format: str | None = None, seed: int = 0) -> Path:
    """Write `n` synthetic samples with the lengths and widths of a data set.

    Args:
        out: a new or empty folder.
        shape: mosi, mosei or avec2019.
        n: samples of the three splits together, in the real proportions; None is the real number.
        format: a name of `engine.loaders.make_data.writers.WRITERS`; None is declarelab, or avec2019 for that shape.
        seed: equal seeds give equal files.

    Returns:
        The path to give to `--data`.

    Raises:
        ConfigError: the shape or format is unknown, there are too few samples, or the format cannot hold the shape.
        OutputError: `out` is not an empty folder.
    """
    format = format or ("avec2019" if shape == "avec2019" else "declarelab")
    for name, value, allowed in (("--shape", shape, COUNTS), ("--format", format, WRITERS)):
        if value not in allowed:
            raise ConfigError(name, repr(value), f"one of {', '.join(allowed)}", "Pick one.")
    if format == "avec2019" and shape != "avec2019":
        raise ConfigError("--format", f"avec2019 with --shape {shape}", "shape avec2019", "Choose another format.")
    whole = sum(COUNTS[shape])
    n = whole if n is None else n
    sizes = [max(round(n * count / whole), 1) for count in COUNTS[shape]]
    sizes[0] = n - sizes[1] - sizes[2]
    if sizes[0] < 1:
        raise ConfigError("--n", str(n), "at least 3, one a split", "Ask for more samples.")
    if type(seed) is not int or seed < 0:
        raise ConfigError("--seed", repr(seed), "an integer from 0", "Change the seed.")
    folder = user_path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(str(folder), "files", "a new or empty folder", "Choose another one.")
    return WRITERS[format](folder, samples(shape, sizes, seed), shape)


def samples(shape: str, sizes: list[int], seed: int = 0) -> Data:
    """Samples of train, valid and test."""
    n = sum(sizes)
    rng = np.random.default_rng((seed, 1))
    made = {"mosi": synthetic.mosi, "mosei": synthetic.mosei, "avec2019": synthetic.avec}[shape](n, seed)
    out: Data = {}
    row = 0
    for split, size in zip(SPLITS, sizes, strict=True):
        out[split] = []
        for i in range(size):
            text, more = made.text[row], {}
            steps = len(made.audio[row])
            if shape == "avec2019":
                text = _interview(steps, rng)
                widths = {"ege": 23, "ds": 1920, "resnet": 2048}
                more = {k: rng.standard_normal((steps, d), np.float32) for k, d in widths.items()}
            label = round(float(made.label[row, 0]), 2 if shape == "avec2019" else 1)
            name = f"{split}{i // CLIPS:04d}_{i % CLIPS}"
            out[split].append(Sample(name, text, label, made.audio[row], made.vision[row], more))
            row += 1
    return out


def _interview(steps: int, rng: np.random.Generator) -> str:
    """One sentence of 1 to 12 words per line."""
    words = synthetic.WORDS
    return "\n".join(
        " ".join(words[i] for i in rng.integers(len(words), size=rng.integers(1, 13))) for _ in range(steps)
    )
