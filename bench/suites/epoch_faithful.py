"""One two-stage epoch in mode faithful: the reference's mathematics, without work that changes no result."""

from __future__ import annotations

from bench import epochs
from bench.runner import Setting, Work
from bench.suites.epoch_fast import samples

TITLE = "two-stage epoch, mode faithful, 256 MOSI-shaped samples, MiniLM, against the eager baseline"
GOALS = {"ratio": (2.5, 3.2)}
SIDES = ("engine", "baseline")
MEMORY = ("engine", "baseline")
MEMORY_REPEATS = 1  # an epoch each
ROUNDS = 3


def build(side: str, setting: Setting) -> Work:
    if side == "baseline":
        return epochs.build_baseline(samples(setting), setting)
    return epochs.build_engine("faithful", samples(setting), setting)


def gate(setting: Setting) -> None:
    epochs.gate_faithful(setting)
