"""The headline: one two-stage epoch in mode fast."""

from __future__ import annotations

from typing import Any

from bench import epochs, shapes
from bench.runner import Setting, Work

TITLE = "two-stage epoch, mode fast, 256 MOSI-shaped samples, MiniLM, against the eager baseline"
GOALS = {"ratio": (10.0, 20.0), "gemm_fraction": (0.35, 0.6)}
SIDES = ("engine", "baseline", "gemm")
MEMORY = ("engine", "baseline")
MEMORY_REPEATS = 1  # an epoch each
ROUNDS = 3
MODE = "fast"


def samples(setting: Setting) -> shapes.Utterances:
    return shapes.mosi(epochs.QUICK_SAMPLES if setting.quick else epochs.SAMPLES)


def build(side: str, setting: Setting) -> Work:
    if side == "gemm":
        return epochs.build_gemm(setting)
    if side == "baseline":
        return epochs.build_baseline(samples(setting), setting)
    return epochs.build_engine(MODE, samples(setting), setting)


def gate(setting: Setting) -> None:
    epochs.gate_fast(setting)


def details(setting: Setting, works: dict[str, Work], numbers: dict[str, list[float]]) -> dict[str, Any]:
    return epochs.gemm_details(MODE, samples(setting), setting, numbers)
