"""The headline on real CMU-MOSI: a two-stage epoch in mode fast over samples of its training split."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from bench import epochs, shapes
from bench.runner import Setting, Work
from engine.config import load_config
from engine.errors import DataError
from engine.loaders import open_dataset

TITLE = "two-stage epoch, mode fast, 256 training samples of real CMU-MOSI, MiniLM, against the eager baseline"
GOALS = {"ratio": (10.0, 20.0)}
SIDES = ("engine", "baseline", "gemm")
MEMORY = ("engine",)
MEMORY_REPEATS = 1
ROUNDS = 3
SAMPLES = 256  # as epoch_fast has
FILES = "ENGINE_MOSI_FILES"


def samples(setting: Setting) -> shapes.Utterances:
    """Training samples of all videos in the files that the environment names, normalised as preset mosi does."""
    path = os.environ.get(FILES)
    if not path:
        raise DataError(FILES, "nothing", "a folder with MOSI in any format that engine reads", f"Set {FILES}.")
    split = open_dataset(path, load_config("mosi").resolve().data).splits["train"]
    count = min(len(split), epochs.QUICK_SAMPLES if setting.quick else SAMPLES)
    rows = [i * len(split) // count for i in range(count)]
    audio, vision = ([ragged[i] for i in rows] for ragged in (split.audio, split.vision))
    text = [split.text[i] for i in rows]
    words = np.array([len(t.split()) for t in text])
    return shapes.Utterances(text, words, audio, vision, split.label[rows].numpy())


def build(side: str, setting: Setting) -> Work:
    if side == "gemm":
        return epochs.build_gemm(setting)
    if side == "baseline":
        return epochs.build_baseline(samples(setting), setting)
    return epochs.build_engine("fast", samples(setting), setting)


def gate(setting: Setting) -> None:
    epochs.gate_fast(setting)


def details(setting: Setting, works: dict[str, Work], numbers: dict[str, list[float]]) -> dict[str, Any]:
    return epochs.gemm_details("fast", samples(setting), setting, numbers)
