"""Run folders on the command line: which one may be written to, and what an interrupted run has left in it."""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from engine.errors import CheckpointError, OutputError
from engine.run_folder import CONFIG, FILES, LAST, MARKS, PREVIOUS, TENSORBOARD, owned, require_kind, require_no_sweep


def existing_run(run: Path) -> Path:
    """`run`, if it is a folder."""
    if not run.is_dir():
        problem = "a file" if run.exists() else "no such folder"
        raise CheckpointError(f"--run {run}", problem, "a folder made by engine train", "Check the path.")
    return run


def check_out(out: Path, resume: bool) -> None:
    """Refuse an output folder that is a file or holds a run, before anything slow begins."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}", "a file", "a folder", "Choose another --out.")
    require_no_sweep(out)
    if not resume and any((out / mark).exists() for mark in MARKS):
        raise OutputError(
            f"--out {out}", "another run", "an empty or new folder", "Choose another --out, or go on with --resume."
        )


def seed_folders(out: Path, seeds: Sequence[int] | None) -> list[Path]:
    """The run folders of these seeds, `out` itself where there is only one run."""
    return [out] if seeds is None else [out / f"seed{seed}" for seed in seeds]


def check_folders(out: Path, seeds: Sequence[int] | None, resume: bool) -> None:
    """As `check_out`, for all run folders that `out` is to hold."""
    require_kind(out, seeds is not None)
    for folder in seed_folders(out, seeds):
        check_out(folder, resume)


def saved_config(out: Path, seeds: Sequence[int] | None) -> Path | None:
    """The configuration of the run to go on with, so that --resume needs no --preset."""
    files = [folder / CONFIG for folder in seed_folders(out, seeds)]
    return next((file for file in files if file.is_file()), None)


def clear_demo(out: Path) -> None:
    """Remove the files of an earlier demo run from `out`, so that `engine demo` can be repeated.

    Nothing else is removed: neither another run nor a file that a run does not write.
    """
    check_out(out, resume=True)
    saved = out / CONFIG
    if not saved.exists():
        return check_out(out, resume=False)
    from engine.callbacks import TensorBoardCallback
    from engine.config import load_config

    if load_config(saved).preset != "demo":
        check_out(out, resume=False)
    with owned(out):
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        for events in TensorBoardCallback.event_files(out / TENSORBOARD):
            events.unlink()
        for folder in (TENSORBOARD, "profile"):
            with contextlib.suppress(OSError):  # not there, or with files of the user's
                (out / folder).rmdir()
    return None


def what_is_kept(a: argparse.Namespace, rest: Sequence[str]) -> str:
    """What interrupted training has left, and the command that continues it. Empty for other commands."""
    if a.command in ("sweep", "tune"):
        return ": the runs that have finished are kept. Go on with the same command"
    if a.command not in ("train", "demo"):
        return ""
    runs = [a.out, *sorted(a.out.glob("seed*"))]
    if not any((folder / CONFIG).is_file() for folder in runs):
        return ": nothing was kept, because training had not begun"
    kept = {folder: what for folder in runs if (what := _saved(folder))}
    seeds = [word for word in rest if word.startswith("seeds=")]
    task = ["--task", a.task] if getattr(a, "task", None) else []
    resume = shlex.join(["engine", "train", "--resume", "--out", str(a.out), *task, *seeds])
    if not kept:
        return f": nothing was kept, because no epoch was finished. Begin again with: {resume}"
    listed = ", ".join(f"{what} in {folder}" for folder, what in kept.items())
    return f": kept {listed}. Go on with: {resume}"


def _saved(run: Path) -> str:
    """How many epochs a run has saved, and how many batches of the next one."""
    from engine import checkpoint

    for name in (LAST, PREVIOUS):
        with contextlib.suppress(CheckpointError, KeyError, TypeError):
            meta = checkpoint.load_meta(run / name)
            batches = meta["within"]["batches"] if "within" in meta else 0
            counts = [(meta["epoch"] + 1, "epoch", "s"), (batches, "batch", "es")]
            return " and ".join(f"{n} {word}{more * (n > 1)}" for n, word, more in counts if n)
    return ""
