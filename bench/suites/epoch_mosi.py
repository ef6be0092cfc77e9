"""The headline on real CMU-MOSI: a two-stage epoch in mode fast over its training split."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from bench import epochs, shapes
from bench.runner import Setting, Work
from engine.config import load_config
from engine.errors import DataError
from engine.loaders import open_dataset

TITLE = "two-stage epoch, mode fast, training split of real CMU-MOSI, MiniLM, against the eager baseline"
GOALS = {"ratio": (10.0, 20.0)}
SIDES = ("engine", "baseline", "gemm")
MEMORY = ("engine",)
MEMORY_REPEATS = 1
ROUNDS = 1
FILES = "ENGINE_MOSI_FILES"


def samples(setting: Setting) -> shapes.Utterances:
    """The training split of the files that the environment names, normalised as preset mosi does."""
    path = os.environ.get(FILES)
    if not path:
        raise DataError(FILES, "nothing", "a folder with MOSI in any format that engine reads", f"Set {FILES}.")
    split = open_dataset(path, load_config("mosi").resolve().data).splits["train"]
    count = epochs.QUICK_SAMPLES if setting.quick else len(split)
    audio, vision = ([ragged[i] for i in range(count)] for ragged in (split.audio, split.vision))
    text, words = split.text[:count], np.array([len(t.split()) for t in split.text[:count]])
    return shapes.Utterances(text, words, audio, vision, split.label[:count].numpy())


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
