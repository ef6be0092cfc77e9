"""Resuming a run: its newest checkpoint, and every part as it was then."""

from __future__ import annotations

import json
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch

from engine import checkpoint
from engine.config import Config
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.files import append_text, parse_json, write_text
from engine.loaders.dataset import Dataset
from engine.run_folder import (
    BEST,
    CONFIG,
    FEATURES,
    HISTORY,
    LAST,
    METRICS,
    METRICS_CSV,
    NORMALIZER,
    PREVIOUS,
    REPORT,
    file_sum,
    verify,
)
from engine.step.bank import FeatureBank
from engine.step.position import Position
from engine.training import same_run
from engine.training.random_state import set_random_state
from engine.training.records import Record, line_of, parse_line
from engine.training.saving import RunFiles, place_of

Saved = tuple[dict[str, Any], dict[str, Any]]
"""State and meta of a checkpoint."""


def newest_checkpoint(out: Path, config: Config, arithmetic: dict[str, Any]) -> Saved | None:
    """The newest undamaged checkpoint; None if no epoch was saved.

    Raises:
        CheckpointError, ConfigError: it is damaged, has another form, or is of other settings.
    """
    newest, before = out / LAST, out / PREVIOUS
    if not newest.exists() and not before.exists():
        if not (out / BEST).exists():
            return None
        raise CheckpointError(
            str(out), f"{BEST} without {LAST}", "both, to go on with a run",
            "Choose another --out; the best model can still be evaluated.",
        )  # fmt: skip
    state, meta = _newest_whole(newest, before)
    advised = same_run.ADVISED if any(d["epoch"] == meta["epoch"] for d in same_run.divergences(out)) else set()
    if differing := same_run.differences(same_run.settings_of(out, meta), config, same_run.FREE | advised):
        raise ConfigError(
            str(out), f"other settings than the run's ({', '.join(differing)})", "the settings of the run",
            f"Resume with the same settings; only these may differ: {', '.join(sorted(same_run.FREE))}.",
        )  # fmt: skip
    same_run.require_described(out / LAST, config, state, meta, trained=True)
    finished, begun = meta["epoch"] + 1, int("position" in state)
    if config.epochs < finished + begun:
        raise ConfigError(
            f"epochs={config.epochs}", f"{finished} finished epochs{' and a part of the next' * begun} in {out}",
            f"epochs={finished + begun} or more", "Ask for at least as many epochs as the run has.",
        )  # fmt: skip
    same_run.warn_of_other_arithmetic(out, meta, arithmetic)
    return state, meta


def _newest_whole(newest: Path, before: Path) -> Saved:
    """The newer of two checkpoints that is not damaged."""
    try:
        return checkpoint.load(newest)
    except CheckpointError as problem:
        if not before.exists():
            raise
        try:
            state, meta = checkpoint.load(before)
        except CheckpointError as other:
            raise CheckpointError(
                str(newest.parent), f"no checkpoint that is whole ({LAST}: {problem.found}; {PREVIOUS}: {other.found})",
                "one of the two as it was written",
                "Put a copy of one of them back. The best model can still be evaluated; else begin a new run.",
            ) from other  # fmt: skip
        warnings.warn(f"{problem} The run goes on from {PREVIOUS}, {place_of(meta)}.", stacklevel=2)
        return state | {"newest_is_damaged": True}, meta


def restore(files: RunFiles, saved: Saved, position: Position) -> tuple[list[Record], FeatureBank | None]:
    """Put every part back as it was when the checkpoint was taken. Returns the history and the bank.

    Args:
        position: takes over that of a checkpoint within an epoch.

    Raises:
        CheckpointError: the checkpoint or the history has another form, or does not fit.
    """
    (state, meta), parts = saved, files.parts
    where = str(files.out / LAST)
    files.newest_is_damaged = "newest_is_damaged" in state
    with checkpoint.taken_apart(where):
        history = _restore_history(files, state, meta)
        files.records = len(history)
        checkpoint.load_into(parts.model, state["model"], f"{where}: model")
        checkpoint.load_into(parts.objective, state["objective"], f"{where}: objective")
        parts.objective.restore_weights(state.get("term_weights", {}))
        factor = parts.config.train.lr / same_run.settings_of(files.out, meta).train.lr
        for name, optimizer in parts.optimizers.items():
            _load_optimizer(optimizer, state["optimizers"][name], f"{where}: optimizer {name}")
            parts.schedulers[name].load_state_dict(state["schedulers"][name])
            _scale_rates(optimizer, parts.schedulers[name], factor)
        if parts.step.average is not None:
            parts.step.average.load_state_dict(state["average"])
        if parts.step.scaler is not None and state.get("scaler"):
            parts.step.scaler.load_state_dict(state["scaler"])
        if "position" in state:
            position.load_state_dict(state["position"], parts.device)
            position.seconds, position.waited = meta["within"]["seconds"], meta["within"]["waiting_seconds"]
        bank = FeatureBank.of(state["bank"], parts.device)
        parts.step.generator.set_state(state["generator"])
        set_random_state(state["rng"])
    return history, bank


def _restore_history(files: RunFiles, state: dict[str, Any], meta: dict[str, Any]) -> list[Record]:
    """The records up to the checkpoint's epoch. Later ones, which a stopped run may have written, are cut off."""
    path = files.out / HISTORY
    if "history" in state:  # older versions kept the records in the checkpoint
        history = json.loads(state["history"])
        if files.parts.ranks.writes:
            with files.sums.writing(HISTORY):
                write_text(path, "".join(map(line_of, history)))
        files.lines = file_sum(path)
        return history
    size, crc = meta["history"]
    content = path.read_bytes()[:size] if path.is_file() else b""
    if len(content) < size or zlib.crc32(content) != crc:
        raise CheckpointError(
            str(path), "contents that do not match their checksum", f"the epochs up to {meta['epoch']}",
            "The file is damaged or was edited: put the original back. The best model can still be evaluated.",
        )  # fmt: skip
    if files.parts.ranks.writes:
        with files.sums.writing(HISTORY):
            append_text(path, "", at=size)
    files.lines = size, crc
    return [parse_line(line) for line in content.splitlines()]


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], where: str) -> None:
    own, saved = ([len(g["params"]) for g in s["param_groups"]] for s in (optimizer.state_dict(), state))
    if own != saved:
        raise CheckpointError(
            where,
            f"the state of {sum(saved)} parameters",
            f"that of {sum(own)}",
            "An older version of engine began this run: finish it with that version, or begin a new one. Its best model"
            " can still be evaluated.",
        )
    optimizer.load_state_dict(state)


def _scale_rates(optimizer: torch.optim.Optimizer, scheduler: Any, factor: float) -> None:
    """Multiply an optimiser's learning rates and the initial rates of its schedule."""
    if factor == 1:
        return
    for group in optimizer.param_groups:
        for key in {"lr", "initial_lr"} & group.keys():
            group[key] *= factor
    for name in ("base_lrs", "_last_lr"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])


def finished_metrics(config: Config, folder: Path, dataset: Dataset) -> dict[str, Any] | None:
    """The content of metrics.json, if the run in `folder` has done all epochs of `config` on this data.

    None if it has not, or if a file is missing or damaged. Resuming it then reports what is wrong.
    """
    needed = [CONFIG, METRICS, METRICS_CSV, HISTORY, NORMALIZER]
    needed += [f"predictions_{split}.csv" for split in dataset.splits if split != "train"]
    needed += [REPORT] * config.output.report + list(FEATURES) * config.output.features
    if not all((folder / name).is_file() for name in (*needed, BEST, LAST)):
        return None
    try:
        _, meta = checkpoint.load(folder / LAST)
        checkpoint.load(folder / BEST)
        verify(folder, *needed)
        differing = same_run.differences(same_run.settings_of(folder, meta), config, same_run.FREE)
        metrics = parse_json((folder / METRICS).read_text(encoding="utf-8"))
        unfinished = meta["epoch"] + 1 != config.epochs or "within" in meta
    except (EngineError, ValueError, TypeError, KeyError):
        return None
    return None if unfinished or differing or same_run.differing_splits(dataset, meta) else metrics
