"""Demo data whose information is known: latents with closed forms, English sentences, audio and vision sequences."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def run_demo(out: str | Path, overrides: Iterable[str] = ()) -> None:
    """Generate data, check the estimators against their truth, train and report: see `engine.demo.run.run_demo`."""
    from engine.demo.run import run_demo as run

    run(out, overrides)
