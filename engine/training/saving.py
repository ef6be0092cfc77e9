"""What a run writes into its folder: settings, checkpoints, history, predictions, features and metrics."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import checkpoint, metrics
from engine.config import Config
from engine.errors import CheckpointError, EngineError, EstimatorError
from engine.files import append_text, write_json
from engine.loaders.dataset import Split
from engine.report import environment
from engine.run_folder import (
    BEST,
    CONFIG,
    DIVERGED,
    FEATURES,
    HISTORY,
    LAST,
    METRICS,
    METRICS_CSV,
    NORMALIZER,
    PREVIOUS,
    TOKENIZER,
    Checksums,
)
from engine.sharded import gathered
from engine.step.averages import EpochResult
from engine.step.bank import FeatureBank
from engine.step.position import Position
from engine.training.parts import Parts
from engine.training.random_state import random_state, unchanged_random_state
from engine.training.records import Record, line_of
from engine.training.same_run import ADVISED, divergences

LARGE = 32 << 20
"""Bytes of a model's weights from which a checkpoint may take longer than a short epoch."""


class RunFiles:
    """The files of one run in `out`.

    Attributes:
        lines: bytes and CRC-32 of history.jsonl.
        records: epochs that history.jsonl holds.
        newest_is_damaged: whether the run goes on from the checkpoint before the newest.
    """

    def __init__(self, out: Path, parts: Parts, arithmetic: dict[str, Any]):
        self.out, self.parts, self.arithmetic = out, parts, arithmetic
        self.sums = Checksums(out)
        self.lines, self.records, self.newest_is_damaged = (0, 0), 0, False
        self._kept: tuple[int, Callable[[], None]] | None = None  # the best epoch if it is not written, and its writing
        # the epoch of best.safetensors, and the file's time and size when it was written
        self._written: tuple[int, tuple[int, int] | None] | None = None
        self.predictions = [f"predictions_{split}.csv" for split in parts.loaders if split != "train"]

    def write_settings(self) -> None:
        dataset = self.parts.dataset
        with self.sums.writing(CONFIG, NORMALIZER, *TOKENIZER):
            self.parts.config.save(self.out / CONFIG)
            dataset.normalizer.save(self.out / NORMALIZER)
            if dataset.tokenizer is not None:
                dataset.tokenizer.save(self.out)

    # -- every epoch --

    def save(
        self,
        history: list[Record],
        bank: FeatureBank,
        results: dict[str, EpochResult],
        improved: bool,
        wall_s: float,
    ) -> Callable[[], None]:
        """Copy what an epoch leaves. The returned function writes it.

        Args:
            results: the epoch's evaluation by split.
            improved: whether the epoch is the best so far, so that its model and predictions are kept.
        """
        meta = self._meta(history)
        last = checkpoint.Snapshot(self._state(bank))
        if improved:
            self._kept = meta["epoch"], self._save_best(meta, results)
        return self._write_epochs(list(history), last, meta, wall_s)

    @property
    def may_postpone(self) -> bool:
        """Whether a checkpoint is so large that the next epoch may end before it is written."""
        modules = (self.parts.model, self.parts.objective)
        return sum(t.nbytes for m in modules for t in m.state_dict().values()) >= LARGE

    def postpone(self, history: list[Record], results: dict[str, EpochResult], improved: bool) -> None:
        """Leave an epoch to the next checkpoint. Its model is copied here if it is the best so far."""
        if improved:
            meta = self._meta(history)
            self._kept = meta["epoch"], self._save_best(meta, results)

    def _write_epochs(
        self, history: list[Record], last: checkpoint.Snapshot, meta: dict[str, Any], wall_s: float | None = None
    ) -> Callable[[], None]:
        """What writes a checkpoint, the epochs that history.jsonl lacks, and the best model if it is not written.

        Args:
            wall_s: for a summary of the epochs; None: there is none within an epoch.
        """
        text = "".join(map(line_of, history[self.records :]))
        best, self._kept, self.records = self._kept, None, len(history)
        names = [HISTORY] * bool(text) + self.predictions * (best is not None)
        names += [METRICS, METRICS_CSV] * (wall_s is not None)

        def write() -> None:
            with self.sums.writing(*names):
                if text:
                    append_text(self.out / HISTORY, text, at=self.lines[0])
                    self.lines = self.lines[0] + len(text.encode()), zlib.crc32(text.encode(), self.lines[1])
                    self.sums.sums[HISTORY] = self.lines
                # The checkpoint has the weights of its last epoch alone: those of an earlier one go first.
                earlier = best is not None and ("within" in meta or best[0] != meta["epoch"])
                if best is not None and earlier:
                    best[1]()
                # With this file the epochs count. `complete` can make the others from it, and not it from them.
                self._save_last(last, meta | {"history": self.lines})
                if best is not None and not earlier:
                    best[1]()
                if wall_s is not None:
                    self._write_summary(history, wall_s)

        return write

    def save_within(self, history: list[Record], position: Position) -> Callable[[], None]:
        """Copy what is needed to go on within an epoch. The returned function writes it."""
        place = {"epoch": len(history), "stage": position.stage, "batches": position.total}
        times = {"seconds": position.seconds, "waiting_seconds": position.waited}
        meta = self._meta(history) | {"within": place | times}
        last = checkpoint.Snapshot(self._state(position.bank) | {"position": position.state_dict()})
        return self._write_epochs(list(history), last, meta)

    def _save_last(self, last: checkpoint.Snapshot, meta: dict[str, Any]) -> None:
        """Write the newest checkpoint, and keep the one before. One that is damaged does not take its place."""
        last.save(self.out / LAST, meta, previous=None if self.newest_is_damaged else self.out / PREVIOUS)
        self.newest_is_damaged = False

    def _meta(self, history: list[Record]) -> dict[str, Any]:
        """What a checkpoint says of itself. `epoch` is the last one that is finished, -1 before the first."""
        parts = self.parts
        return {
            "epoch": history[-1]["epoch"] if history else -1,
            "audio_dim": parts.dataset.audio_dim,
            "columns": parts.dataset.columns,
            "vision_dim": parts.dataset.vision_dim,
            "text_encoder": parts.text_config,
            "settings": parts.config.model_dump(mode="json"),
            "data": parts.dataset.fingerprints,
            "arithmetic": self.arithmetic,
        }

    def _state(self, bank: FeatureBank | None) -> dict[str, Any]:
        parts, scaler = self.parts, self.parts.step.scaler
        return self._trained() | {
            "schedulers": {k: s.state_dict() for k, s in parts.schedulers.items()},
            "scaler": scaler.state_dict() if scaler is not None else None,
            "bank": bank.state_dict() if bank is not None else None,
            "generator": parts.step.generator.get_state(),
            "rng": random_state(),
            **({"term_weights": changed} if (changed := parts.objective.changed_weights()) else {}),
        }

    def _trained(self) -> dict[str, Any]:
        """What training moves. Where the ranks hold some of it in parts, only the writer gets it whole."""
        parts, average = self.parts, self.parts.step.average
        trained = self.parts.weights() | {
            "optimizers": {k: o.state_dict() for k, o in parts.optimizers.items()},
            "average": average.state_dict() if average is not None else None,
        }
        return gathered(trained, parts.ranks.writes, "cpu")

    def _weights(self) -> dict[str, Any]:
        """The present weights, as `_trained`."""
        return gathered(self.parts.weights(), self.parts.ranks.writes, "cpu")

    def take_part(self, improved: bool = False) -> None:
        """Give the writer, which saves, this rank's parts of what is sharded. All other ranks must call it then.

        Args:
            improved: whether the writer keeps the best model, too.
        """
        if self.parts.sharded:
            self._trained()
            if improved:
                with self.parts.step.averaged():
                    self._weights()

    def _save_best(self, meta: dict[str, Any], results: dict[str, EpochResult]) -> Callable[[], None]:
        """Like `save`, for the best model and its predictions."""
        with self.parts.step.averaged():
            best = checkpoint.Snapshot(self._weights())
        kept = {s: replace(r, prediction=r.prediction.to("cpu", copy=True)) for s, r in results.items()}

        def write() -> None:
            best.save(self.out / BEST, meta)
            self._written = meta["epoch"], _stamp(self.out / BEST)
            for split, result in kept.items():
                path = self.out / f"predictions_{split}.csv"
                write_predictions(path, self.parts.config, self.parts.dataset.splits[split], result)

        return write

    # -- what went wrong --

    def explain_failure(self, problem: EngineError) -> EngineError:
        """The error of an epoch that failed. Where the run has diverged, it says how the run can go on."""
        diverged = isinstance(problem, EstimatorError) or problem.where == metrics.PREDICTIONS
        if not diverged or not (self.out / LAST).exists():
            return problem
        meta = checkpoint.load_meta(self.out / LAST)
        known = [*divergences(self.out), {"epoch": meta["epoch"], "problem": str(problem)}]
        with self.sums.writing(DIVERGED):
            write_json(self.out / DIVERGED, known)
        return type(problem)(
            problem.where, problem.found, problem.expected,
            f"{problem.do} The run in {self.out} can go on {place_of(meta)} that way: with --resume and another "
            f"{' or '.join(sorted(ADVISED))}.",
        )  # fmt: skip

    def complete(self, history: list[Record], ended: bool = False, within: bool = False) -> None:
        """Write the best model and its predictions if the run was stopped after its last epoch but before these files.

        Those of an earlier epoch cannot be made again. A warning says so if the best model is damaged, or if the run
        has ended and the file still holds another epoch's model.

        Args:
            within: whether the present weights are those of an epoch that is not finished.
        """
        kept = self._epoch_of_best()
        parts = self.parts
        best, last = parts.selection.best(history, "valid")["epoch"], history[-1]["epoch"]
        wrong = [name for name in self.predictions if not self.sums.hold(name)]
        if kept != best:
            wrong.insert(0, BEST)
        gone = best != last or within
        if wrong and gone and (ended or kept is None):
            warnings.warn(
                f"{self.out}: {', '.join(wrong)} not of epoch {best}, the best by validation, whose weights are gone",
                stacklevel=2,
            )
        elif wrong and not gone:
            with unchanged_random_state(parts.step.generator):
                with parts.step.averaged():
                    results = {s: parts.evaluate(s, p) for s, p in parts.loaders.items() if s != "train"}
                with self.sums.writing(*self.predictions):
                    self._save_best(self._meta(history), results)()

    def _epoch_of_best(self) -> int | None:
        """The epoch of best.safetensors; None if there is none that is whole."""
        if self._written is not None and _stamp(self.out / BEST) == self._written[1]:
            return self._written[0]
        try:
            return checkpoint.load(self.out / BEST)[1]["epoch"]
        except CheckpointError:
            return None

    # -- the end --

    def write_summary(self, history: list[Record], wall_s: float, timings: dict[str, float]) -> dict[str, Any]:
        """Write metrics.json and metrics.csv, and return the content of the first.

        Args:
            timings: where the time went, in seconds by phase.
        """
        with self.sums.writing(METRICS, METRICS_CSV):
            return self._write_summary(history, wall_s, timings)

    def _write_summary(
        self, history: list[Record], wall_s: float, timings: dict[str, float] | None = None
    ) -> dict[str, Any]:
        parts = self.parts
        best = parts.selection.best(history, "valid")
        oracle = parts.selection.best(history, "test") if "test" in parts.scored else None
        steady = [r["seconds"] for r in history[1:]] or [history[0]["seconds"]]
        summary = {
            "best_epoch": best["epoch"],
            "valid": _numbers(best, "valid"),
            "test": _numbers(best, "test"),
            "oracle_test": _numbers(oracle, "test") | {"epoch": oracle["epoch"]} if oracle else {},
            "data_wait_share": sum(r.get("waiting_seconds", 0.0) for r in history) / sum(r["seconds"] for r in history),
            "samples_per_second": parts.samples * len(steady) / sum(steady),
            "peak_memory_mb": _peak_memory_mb(parts.device),
            "wall_s": wall_s,
            "environment": environment(str(parts.device)),
        }
        if parts.config.train.non_finite == "skip":
            summary["skipped_steps"] = sum(r.get("skipped_steps", 0) for r in history)
        metrics.write_metrics_csv(self.out / METRICS_CSV, {k: v for k, v in summary.items() if v != {}})
        if timings is not None:
            summary["timings"] = timings
        write_json(self.out / METRICS, summary)
        return summary

    def write_features(self) -> None:
        """Write the best model's features of every split."""
        parts, best = self.parts, self.out / BEST
        checkpoint.load_into(parts.model, checkpoint.load(best)[0]["model"], str(best))
        with self.sums.writing(*FEATURES):
            for split, passes in (parts.loaders | {"train": parts.unshuffled_train}).items():
                path = self.out / f"features_{split}.safetensors"
                _write_features(path, parts.dataset.splits[split], parts.evaluate(split, passes))


def place_of(meta: dict[str, Any]) -> str:
    """Where a checkpoint was taken, in words.

    >>> place_of({"epoch": 2}), place_of({"epoch": 2, "within": {"epoch": 3, "stage": "stage2", "batches": 40}})
    ('after epoch 2', 'in epoch 3, after 40 batches')
    """
    within = meta.get("within")
    if within is None:
        return f"after epoch {meta['epoch']}"
    return f"in epoch {within['epoch']}, after {within['batches']} batch{'es' * (within['batches'] != 1)}"


def _numbers(record: Record, split: str) -> dict[str, Any]:
    """A split's metrics, without the groups of numbers in the record."""
    return {k: v for k, v in record[split].items() if not isinstance(v, dict)}


def write_predictions(path: Path, config: Config, split: Split, result: EpochResult) -> None:
    """Predictions as CSV, in file order with ids."""
    prediction, label = result.prediction.float().cpu().numpy(), split.label[:, 0].numpy()
    if config.model.task == "classification":
        metrics.write_predictions(path, split.ids, label, prediction.argmax(1), scores=prediction)
    else:
        metrics.write_predictions(path, split.ids, label, prediction[:, 0])


def _write_features(path: Path, split: Split, result: EpochResult) -> None:
    tensors: dict[str, Tensor] = {k: v.float().cpu().contiguous() for k, v in result.features.items() if k != "C"}
    tensors["label"] = split.label
    checkpoint.write_tensors(path, tensors, {"ids": json.dumps(split.ids)})


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written again; None if there is none."""
    with contextlib.suppress(OSError):
        state = path.stat()
        return state.st_mtime_ns, state.st_size
    return None


def _peak_memory_mb(device: torch.device) -> float:
    """Peak memory of the process (CPU) or of the device's allocator (GPU), in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # not on Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if os.uname().sysname == "Darwin" else 2**10)
