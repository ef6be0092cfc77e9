"""One run: its epochs from the first, or from where it was stopped, to the last."""

from __future__ import annotations

import contextlib
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import checks
from engine.allocator import keep_memory
from engine.callbacks import Callback, ProgressCallback, TensorBoardCallback
from engine.config import Config
from engine.errors import ConfigError, DataError, EngineError, EstimatorError, OutputError
from engine.limits import fit_threads
from engine.loaders.dataset import Dataset
from engine.objective import Objective
from engine.profile import Profiler
from engine.ranks import Ranks
from engine.report import write_report
from engine.run_folder import (
    BEST,
    CHECKSUMS,
    CONFIG,
    HISTORY,
    LAST,
    MARKS,
    NORMALIZER,
    PREVIOUS,
    TENSORBOARD,
    TOKENIZER,
    owned,
    require_kind,
    require_no_sweep,
)
from engine.step.averages import EpochResult
from engine.step.bank import FeatureBank
from engine.step.passes import AfterBatch
from engine.step.position import Position
from engine.stopping import Stopped, StopSignals
from engine.task import find_task
from engine.torchrun import JOB, restartable, restarted
from engine.training import resuming
from engine.training.ahead import begin_ahead
from engine.training.applying import own_tokenizer
from engine.training.parts import assemble, choose_device
from engine.training.phases import Phases
from engine.training.rank_warnings import RankWarnings
from engine.training.records import Record, record_of
from engine.training.same_run import arithmetic, differing_splits
from engine.training.saving import RunFiles
from engine.training.sharding import ShardedText
from engine.training.warming import compiles_kernels, warm_kernels
from engine.training.what_is_left import write_left
from engine.training.within_epochs import WithinEpochs
from engine.training.without_compiler import without_compiler


class TrainingRun:
    """A run in the folder `out`.

    Args:
        config, out, callbacks, dataset, profile: as `engine.train` takes them.
        ranks: the processes that train together; by default this one alone.

    Attributes:
        parts: what is trained, after `prepare`.
        files: what it writes, after `prepare`.
        results: the last epoch's evaluation by split.
        position: where the epoch is.
        phases: where the time goes.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        callbacks: Sequence[Callback] = (),
        dataset: Dataset | None = None,
        profile: bool = False,
        ranks: Ranks | None = None,
    ):
        self.config, self.out = config.resolve(), out
        self.ranks = ranks or Ranks(device=choose_device(config.device))
        self.warnings = RankWarnings(self.ranks)
        self.extra_callbacks = callbacks if self.ranks.writes else ()
        self.dataset, self.profile, self.profiler = dataset, profile and self.ranks.writes, None
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        else:
            fit_threads()
        self.device = self.ranks.device
        if self.device.type == "cpu":
            keep_memory()
        self.arithmetic = arithmetic(self.device, self.config.train.amp)
        if self.ranks.size > 1:
            self.arithmetic["ranks"] = self.ranks.size
            self.arithmetic |= {"shard": True} if self.config.train.shard else {}
        self.phases = Phases()
        begin_ahead(self.config.device)
        self.results: dict[str, EpochResult] = {}
        self.saving: Future | None = None
        self.position = Position()

    def fit(self, resume: bool) -> dict[str, Any]:
        """Train, and return the content of metrics.json. A signal that stopped it then does what it always does."""
        try:
            return self._fit_alone(resume)
        except Stopped as stop:
            signal.raise_signal(stop.number)
            raise

    def _fit_alone(self, resume: bool) -> dict[str, Any]:
        if self.profile and self.config.objective.enabled and self.config.epochs < 2:
            raise ConfigError(
                "profile", "one epoch", "two or more: the first has no information terms", "Set epochs=2."
            )
        compiler = without_compiler() if self.config.train.compile == "off" else contextlib.nullcontext()
        with self.ranks.failing_together(), self.warnings.taken(), compiler:
            return self._write(resume) if self.ranks.writes else self._fit(resume)

    def _write(self, resume: bool) -> dict[str, Any]:
        """The run on the rank that writes its folder."""
        with owned(self.out):
            require_no_sweep(self.out)
            require_kind(self.out, seeds=False)
            resume = resume or restarted(self.out)
            if not resume and any((self.out / mark).exists() for mark in MARKS):
                raise OutputError(
                    str(self.out), "another run", "an empty or new folder",
                    "Choose another --out, or go on with --resume.",
                )  # fmt: skip
            try:
                with restartable(self.out):
                    return self._fit(resume)
            except Exception:
                if not resume and not (self.out / LAST).exists():  # there is no epoch to go on from: leave it free
                    for name in (CONFIG, NORMALIZER, *TOKENIZER, HISTORY, CHECKSUMS, JOB):
                        (self.out / name).unlink(missing_ok=True)
                raise

    def _fit(self, resume: bool) -> dict[str, Any]:
        resume = self.ranks.tell(resume)
        with self.ranks.writer_first():  # data are converted once, and the folder is read before it is written
            history, bank = self._begin(resume)
        self.ranks.same_weights(self.parts.model, self.parts.objective)
        if self.ranks.writes:
            with self.ranks.alone(), self.phases.of("saving"):
                self.files.write_settings()
                if history:
                    self.files.complete(history, within=self.position.resumed)
        started = time.perf_counter() - sum(r["wall_seconds"] for r in history) - self.position.seconds
        self._train(history, bank, started)
        return self.ranks.from_writer(self._end(history, started) if self.ranks.writes else None)

    def _begin(self, resume: bool) -> tuple[list[Record], FeatureBank | None]:
        """Every part as it is before the first epoch that is left; the records of those before, and their bank."""
        saved = resuming.newest_checkpoint(self.out, self.config, self.arithmetic) if resume else None
        if resume and saved is None:
            warnings.warn(f"{self.out}: no epoch to go on from: the run begins at epoch 0", stacklevel=2)
        self.prepare(None if saved is None else saved[1])
        return ([], None) if saved is None else resuming.restore(self.files, saved, self.position)

    def _end(self, history: list[Record], started: float) -> dict[str, Any]:
        """Write what a finished run has beside its epochs, and return the content of metrics.json."""
        with self.ranks.alone():
            with self.phases.of("saving"):
                summary = self.files.write_summary(history, time.perf_counter() - started, self.phases.seconds())
                self.files.complete(history, ended=True)
            with self.phases.of("what is left"):
                write_left(self.files, history, summary, self.phases.seconds)
            if self.config.output.features:
                self.files.write_features()
        if self.config.output.report:
            write_report(self.out)
        return summary

    def prepare(self, resumed: dict[str, Any] | None = None) -> None:
        """Open the data and make all parts.

        Args:
            resumed: what the checkpoint to go on from says of itself; None for a new run.
        """
        c, task = self.config, find_task(self.config.task)
        if self.dataset is None:
            with self.phases.of("data"):
                tokenizer = own_tokenizer(self.out, c) if resumed is not None else None
                self.dataset = task.open_data(c, c.data.path, tokenizer=tokenizer)
        if resumed is not None and (differing := differing_splits(self.dataset, resumed)):
            raise DataError(
                c.data.path, f"other data than the run in {self.out} was trained on ({', '.join(differing)})",
                "the same samples, texts, labels and features", "Name the run's own data, or begin a new run.",
            )  # fmt: skip

        def check_space(model: nn.Module, objective: Objective) -> None:
            present = [self.out / name for name in (BEST, LAST, PREVIOUS)]
            checks.disk_space(self.out, model, objective, c.train, present)

        with self.phases.of("model"):
            self.parts = assemble(task, c, self.dataset, self.device, resumed, check_space, self.ranks)
        self.parts.step.finite.ids = self.dataset.splits["train"].ids
        self.files = RunFiles(self.out, self.parts, self.arithmetic)

    def _train(self, history: list[Record], bank: FeatureBank | None, started: float) -> None:
        """The epochs that are left; `history` grows by their records."""
        callbacks = self._callbacks(history)
        for callback in callbacks:
            callback.on_start(len(history), self.config.epochs, self.parts.batches())

        def tell(stage: str, number: int) -> None:
            if self.profiler is not None:
                self.profiler.batch_done()
            for callback in callbacks:
                callback.on_batch(stage, number)
            within.batch_done()

        on_batch = AfterBatch(tell, only_looks=not self.extra_callbacks)
        if compiles_kernels(self.device):
            with self.ranks.alone(), self.phases.of("kernels"):
                warm_kernels(self.parts)
        sharded = ShardedText(self.parts) if self.config.train.shard and self.ranks.size > 1 else None
        try:
            # Saving goes on beside the next epoch; leaving this block waits for it.
            with ThreadPoolExecutor(1) as beside, StopSignals() as signals:

                def save_within() -> None:
                    self._wait()
                    if self.ranks.writes:
                        self.saving = beside.submit(self.files.save_within(history, self._present()))
                    else:
                        self.files.take_part()

                within = WithinEpochs(self.config.train, signals, save_within, self._wait, self.ranks)
                for epoch in range(len(history), self.config.epochs):
                    try:
                        record, bank = self._epoch(epoch, bank, on_batch)
                    except EngineError as problem:
                        self._wait()
                        raise (self.files.explain_failure(problem) if self.ranks.writes else problem) from problem
                    self.position = Position()
                    improved = self.parts.selection.improved(history, record)
                    if self.parts.sharded:  # all save the same, whatever the last digits of their metrics
                        improved = self.ranks.from_writer(improved)
                    history.append(record)
                    seconds, ends = time.perf_counter() - started, bool(signals.number)
                    saved = self._save(history, bank, improved, seconds, beside, at_once=ends)
                    if self.extra_callbacks:  # which may read the folder
                        self._wait()
                    for callback in callbacks:
                        callback.on_epoch(record, improved)
                    if saved:
                        within.saved()
                self._wait()
            if sharded is not None:  # from here on the writer computes alone
                sharded.undo()
        finally:
            for callback in callbacks:
                callback.on_end()

    def _save(
        self,
        history: list[Record],
        bank: FeatureBank,
        improved: bool,
        wall_s: float,
        beside: ThreadPoolExecutor,
        at_once: bool,
    ) -> bool:
        """Have the epoch written beside the next one. False where it is left to the next one.

        That is so where the checkpoint before is still being written, a large one of a short epoch: a slow disk then
        does not hold up the training. The last epoch is always written, and one with `at_once`: after a signal.
        """
        with self.phases.of("saving"):
            behind = self.saving is not None and not self.saving.done()
            more = len(history) < self.config.epochs and not at_once
            if behind and more and self.ranks.size == 1 and self.files.may_postpone:
                self.files.postpone(history, self.results, improved)
                return False
            self._wait()
            if self.ranks.writes:
                self.saving = beside.submit(self.files.save(history, bank, self.results, improved, wall_s))
            else:
                self.files.take_part(improved)
        return True

    def _callbacks(self, history: list[Record]) -> list[Callback]:
        callbacks: list[Callback] = list(self.extra_callbacks)
        if not self.ranks.writes:
            return callbacks
        if self.config.output.tensorboard:
            callbacks.append(TensorBoardCallback(self.out / TENSORBOARD, history))
        if self.config.output.progress:
            callbacks.append(ProgressCallback(self.parts.selection.metric, self.position.total))
        return callbacks

    def _present(self) -> Position:
        """The position, with the time that the epoch has taken."""
        self.position.seconds = time.perf_counter() - self.epoch_began
        self.position.waited = self.parts.loaders["train"].waited
        return self.position

    def _wait(self) -> None:
        """Let the epoch before be saved, and raise what was in the way."""
        if self.saving is not None:
            with self.phases.of("saving"):
                self.saving.result()

    # -- one epoch --

    def _epoch(
        self, epoch: int, bank: FeatureBank | None, on_batch: Callable[[str, int], None]
    ) -> tuple[Record, FeatureBank]:
        parts = self.parts
        start = self.epoch_began = time.perf_counter() - self.position.seconds
        record: Record = {"epoch": epoch}
        for name, optimizer in parts.optimizers.items():
            record[f"lr_{name}"] = optimizer.param_groups[0]["lr"]
        with self.phases.of("training"):
            trained, next_bank = self._train_epoch(epoch, bank, on_batch)
        record["seconds"] = time.perf_counter() - start
        record["waiting_seconds"] = parts.loaders["train"].waited
        record["train"] = record_of(self.config, trained)
        if self.config.train.non_finite == "skip":
            record["skipped_steps"] = trained.skipped
            if trained.skipped:
                warnings.warn(
                    f"epoch {epoch}: {trained.skipped} steps left out, whose loss or gradient was not finite",
                    stacklevel=2,
                )
        # Epoch 0 trains without information terms, so its evaluation has none either: the losses stay comparable.
        informed = bank is not None and parts.informed
        with self.phases.of("evaluation"), parts.step.averaged():
            self.results = {
                split: parts.evaluate(split, parts.loaders[split], next_bank if informed else None)
                for split in ("valid", "test")
            }
        for split, result in self.results.items():
            record[split] = record_of(self.config, result) if split in parts.scored else {}
        self.ranks.check_weights(f"epoch {epoch}", parts.model, parts.objective)
        self.warnings.show()
        if informed and self.ranks.writes:
            with self.phases.of("readings"):
                self._read_terms(record, trained.features)
        self._step_schedules(record)
        record["wall_seconds"] = time.perf_counter() - start
        return record, next_bank

    def _train_epoch(
        self, epoch: int, bank: FeatureBank | None, on_batch: Callable[[str, int], None]
    ) -> tuple[EpochResult, FeatureBank]:
        """Both stages, with a profile of their time where one was asked for."""
        parts, c = self.parts, self.config
        passes = parts.loaders["train"]
        passes.set_epoch(epoch)
        passes.waited = self.position.waited
        # The first epoch has no bank, and so no first stage: the second is the first that tells where time goes.
        profiled = self.profile and (bank is not None or not parts.informed) and not self.position.resumed
        self.profiler = Profiler(self.device, parts.batches()) if profiled else None
        with self.profiler.taken() if profiled else contextlib.nullcontext():
            trained = parts.step.train_epoch(
                passes, parts.samples, bank, batch_size=c.batch_size,
                stage1_n=c.train.stage1_n, stage1_features=c.train.stage1_features, on_batch=on_batch,
                position=self.position,
            )  # fmt: skip
        if profiled:
            self.profiler.save(self.out / "profile")
            self.profile, self.profiler = False, None
        return trained

    def _read_terms(self, record: Record, training: dict[str, Tensor]) -> None:
        """Add what the terms read on all rows of a split at once. No step of the training depends on it."""
        scored = self.parts.scored
        known = {"train": training} | {s: r.features for s, r in self.results.items() if s in scored}
        for split, features in known.items():
            try:
                readings = self.parts.objective.read(features, self.config.batch_size)
            except EstimatorError as problem:  # no step needs it: the run goes on
                warnings.warn(f"epoch {record['epoch']}, {split}: not read on all rows: {problem}", stacklevel=2)
                continue
            if readings:
                record[split]["bank"] = {name: r.value for name, r in readings.items()}
                limits = {name: r.ceiling for name, r in readings.items() if r.ceiling is not None}
                record[split] |= {"bank_ceiling": limits} if limits else {}

    def _step_schedules(self, record: Record) -> None:
        for scheduler in self.parts.schedulers.values():
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(record["valid"][self.parts.selection.metric])
                continue
            with warnings.catch_warnings():
                # Epoch 0 has no stage 1: the estimators' schedule rightly runs before their first step.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                scheduler.step()
