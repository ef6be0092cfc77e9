"""An epoch on AVEC-shaped data, in mode fast. It has no floor."""

from __future__ import annotations

from bench import epochs, shapes
from bench.runner import Setting, Work

TITLE = "two-stage epoch, mode fast, 64 AVEC2019-shaped samples, MiniLM, against the eager baseline"
GOALS: dict[str, tuple[float, float]] = {}
SIDES = ("engine", "baseline")
MEMORY = ("engine", "baseline")
MEMORY_REPEATS = 1  # an epoch each
ROUNDS = 3


def build(side: str, setting: Setting) -> Work:
    samples = shapes.avec(epochs.QUICK_SAMPLES if setting.quick else 64)
    if side == "baseline":
        return epochs.build_baseline(samples, setting)
    return epochs.build_engine("fast", samples, setting)


def gate(setting: Setting) -> None:
    epochs.gate_fast(setting)
