"""Demo data whose information is known: latents with closed forms, English sentences, audio and vision sequences."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.config import Config


def run_demo(out: str | Path, overrides: Iterable[str] = ()) -> None:
    """Generate data, check the estimators against their truth, train and report: see `engine.demo.run.run_demo`."""
    from engine.demo.run import run_demo as run

    run(out, overrides)


def demo_config(overrides: Iterable[str] = ()) -> Config:
    """The demo's settings, checked: see `engine.demo.run.demo_config`."""
    from engine.demo.run import demo_config as make

    return make(overrides)
