"""Runs: from a config and a data path to a run folder, and back from a run folder to metrics and predictions."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine import checkpoint, checks, losses, metrics
from engine.allocator import keep_memory
from engine.callbacks import Callback, ProgressCallback, TensorBoardCallback
from engine.config import Config, ScheduleConfig, load_config, text_of
from engine.errors import CheckpointError, ConfigError, DataError, EngineError, EstimatorError, OutputError
from engine.files import append_text, finite, parse_json, user_path, write_json, write_text
from engine.kernels import registry
from engine.kernels.knn_product import Bank
from engine.kernels.registry import has_triton, interpreting
from engine.kernels.warm import warm_up
from engine.loaders import open_dataset
from engine.loaders.batch import Batch
from engine.loaders.dataset import Dataset, Split
from engine.loaders.feed import CopyFeed, Feed, ResidentFeed, buckets_of
from engine.loaders.loader import Loader
from engine.loaders.normalize import Normalizer
from engine.loaders.text import PRECOMPUTED, Tokenizer, load_tokenizer
from engine.mimrl.model import MIMRL, build_model
from engine.mimrl.terms import MIMRL_ESTIMATORS, mimrl_objective
from engine.model.text_encoder import load_text_encoder, text_encoder_from_config
from engine.objective import Objective
from engine.precision import autocast_dtype
from engine.profile import Profiler, part
from engine.report import environment, write_report
from engine.run_folder import (
    BEST,
    CHECKSUMS,
    CONFIG,
    DIVERGED,
    FEATURES,
    HISTORY,
    LAST,
    MARKS,
    METRICS,
    METRICS_CSV,
    NORMALIZER,
    PREVIOUS,
    REPORT,
    TENSORBOARD,
    TOKENIZER,
    Checksums,
    file_sum,
    owned,
    verify,
)
from engine.step import EpochResult, FeatureBank, TwoStageStep

WIDEST_INPUT = 1_000_000
"""Columns that audio or vision features may have."""


@dataclass
class RunResult:
    """A finished run: its folder and the content of its metrics.json."""

    out: Path
    metrics: dict[str, Any]


@dataclass
class Run:
    """A run folder's best model, ready to predict. `meta`: epoch, input widths, the text encoder's configuration.

    `tokenizer` is the folder's own; None where it has none.
    """

    folder: Path
    config: Config
    model: MIMRL
    objective: Objective
    normalizer: Normalizer
    meta: dict[str, Any]
    tokenizer: Tokenizer | None = None


# -- public functions ------------------------------------------------------------------------------


def train(
    config: Config,
    out: str | Path,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    dataset: Dataset | None = None,
    profile: bool = False,
) -> RunResult:
    """Train one model and write its run folder.

    Args:
        config: the run's settings; `config.data.path` names the data.
        out: folder to write; it may not hold another run unless `resume`.
        resume: go on after the last finished epoch of the run in `out`, by the same settings and on the same data. A
            resumed CPU run ends bit-equal to one that was not interrupted. Where last.safetensors is damaged, the run
            goes on from the epoch before, with a warning.
        callbacks: called beside the built-in progress and TensorBoard ones (`config.output`).
        dataset: an open dataset, to share one among several runs; default: `config.data.path` is opened.
        profile: measure where the time of a few batches of each stage goes, in the second epoch:
            `out`/profile/shares.txt, shares.json and trace.json (Perfetto).

    Raises:
        EngineError: a problem with settings, data or the output folder, in one line.
    """
    _refuse_other_ranks()
    return _Trainer(config, user_path(out), callbacks, dataset, profile).fit(resume)


def train_seeds(
    config: Config, out: str | Path, seeds: Sequence[int], resume: bool = False, callbacks: Sequence[Callback] = ()
) -> list[RunResult]:
    """One run a seed in `out`/seedN, and summary.csv and summary.json with mean and standard deviation over them.

    They are of the test split, or of valid where the test split has no labels.

    Args:
        resume: runs that have done all epochs of `config` stay as they are, the others go on or begin.
    """
    _refuse_other_ranks()
    out = user_path(out)
    with owned(out):
        return _train_seeds(config, out, seeds, resume, callbacks)


def _train_seeds(
    config: Config, out: Path, seeds: Sequence[int], resume: bool, callbacks: Sequence[Callback]
) -> list[RunResult]:
    own = (_own_tokenizer(out / f"seed{seed}", config) for seed in seeds) if resume else iter(())
    tokenizer = next((t for t in own if t is not None), None)
    dataset = open_dataset(config.data.path, config.resolve().data, config.text_encoder, tokenizer=tokenizer)
    results = []
    for seed in seeds:
        folder = out / f"seed{seed}"
        one = config.model_copy(deep=True, update={"seed": seed})
        result = _finished(one.resolve(), folder, dataset) if resume else None
        if result is None:
            result = train(one, folder, resume, callbacks, dataset)
        results.append(result)
    split = "test" if all(r.metrics["test"] for r in results) else "valid"
    found = [r.metrics[split] for r in results]
    metrics.write_summary_csv(out / "summary.csv", {config.preset or config.mode: found})
    runs = {f"seed{seed}": r.metrics for seed, r in zip(seeds, results, strict=True)}
    write_json(out / "summary.json", {split: metrics.summary(found), "runs": runs})
    return results


def evaluate(
    run: str | Path, data: str | Path, split: str | None = None, batch_size: int | None = None, device: str = "auto"
) -> dict[str, float]:
    """Metrics of a run's best model on one split of `data`, normalised by the run's own statistics, in float32.

    Nothing is needed but the run folder and that split, with a label for every sample.

    Args:
        split: None is test, or the only one that the data has.
        device: as in a run's settings: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1" or "mps".

    Raises:
        CheckpointError, ConfigError, DataError: there is no such run or split, a label is missing, or features of other
            widths than the run was trained with.
    """
    loaded = load_run(run, choose_device(device))
    split, dataset = _open_split(loaded, data, split)
    _require_labels(dataset.splits[split], f"{data}, {split}")
    checks.class_numbers(loaded.config, dataset, [split])
    loaded.config.data.label_scale = checks.evaluated_scale(loaded.config, dataset.splits[split])
    return _metrics(loaded.config, _apply(loaded, dataset, split, batch_size, loaded.config.model.task))


def predict(
    run: str | Path,
    data: str | Path,
    out: str | Path,
    split: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
) -> Path:
    """Write the best model's predictions on one split of `data` as CSV, in file order with ids. As `evaluate`.

    Samples need no labels: the column label is empty where there is none, and else whatever number the data has.
    """
    loaded = load_run(run, choose_device(device))
    split, dataset = _open_split(loaded, data, split)
    result = _apply(loaded, dataset, split, batch_size, "regression")  # which asks nothing of the labels
    out = user_path(out)
    _write_predictions(out, loaded.config, dataset.splits[split], result)
    return out


def load_run(run: str | Path, device: str | torch.device = "cpu") -> Run:
    """The best model of a run folder.

    Raises:
        CheckpointError: the folder holds no run, or one of its files is damaged or was changed.
    """
    folder = user_path(run)
    if not (folder / CONFIG).exists() or not (folder / BEST).exists():
        raise CheckpointError(
            str(folder),
            "no config.yaml and best.safetensors",
            "a run folder",
            "Name the --out folder of `engine train`.",
        )
    config = load_config(folder / CONFIG).resolve()
    state, meta = checkpoint.load(folder / BEST)
    _check_unchanged(folder, config, meta)
    _check_described(folder / BEST, config, state, meta)
    model, objective = _build(config, meta["audio_dim"], meta["vision_dim"], _saved_encoder(meta))
    checkpoint.load_into(model, state["model"], f"{folder / BEST}: model")
    checkpoint.load_into(objective, state["objective"], f"{folder / BEST}: objective")
    normalizer = Normalizer.load(folder / NORMALIZER)
    tokenizer = _own_tokenizer(folder, config)
    return Run(folder, config, model.to(device).eval(), objective.to(device).eval(), normalizer, meta, tokenizer)


def _check_described(
    path: Path, config: Config, state: dict[str, Any], meta: dict[str, Any], trained: bool = False
) -> None:
    """Compare what a checkpoint says of its model with its tensors, before any memory is taken for the model.

    Args:
        trained: whether it has to know its epoch, which an imported run may not.

    Raises:
        CheckpointError, ConfigError: it has another form, or its tensors are not those of such a model.
    """
    dims = [meta.get("audio_dim"), meta.get("vision_dim")]
    encoder, settings = meta.get("text_encoder"), meta.get("settings", {})
    if (
        not all(type(dim) is int and 0 <= dim <= WIDEST_INPUT for dim in dims)
        or type(meta.get("epoch", "")) not in ((int,) if trained else (int, type(None)))
        or not isinstance(settings, dict)
        or not isinstance(encoder, (dict, type(None)))
        or (encoder is None) == ("text" in config.data.modalities)
        or not {"model", "objective"} <= set(state)
    ):
        raise CheckpointError(
            str(path), "a description of another form", "what engine train writes", "Use the file as it was written."
        )
    with torch.device("meta"), checkpoint.taken_apart(str(path)):
        model, objective = _build(config, *dims, _saved_encoder(meta))
    checkpoint.compare(model, state["model"], f"{path}: model")
    checkpoint.compare(objective, state["objective"], f"{path}: objective")


def _saved_encoder(meta: dict[str, Any], freeze: str = "no") -> nn.Module | None:
    """The text encoder that a checkpoint describes, its weights not loaded; None without text."""
    described = meta.get("text_encoder")
    return text_encoder_from_config(described, freeze) if described is not None else None


def _own_tokenizer(folder: Path, config: Config) -> Tokenizer | None:
    """The tokeniser that lies in a run folder, so that the text encoder's own folder need not be there."""
    beside = folder / "text_encoder"  # where an imported run asks for the files of its tokeniser
    place = next((p for p in (folder, beside) if (p / "tokenizer.json").is_file()), None)
    if place is None or "text" not in config.data.modalities or config.text_encoder == PRECOMPUTED:
        return None
    if place == folder:
        verify(folder, *TOKENIZER)
    return replace(load_tokenizer(str(place)), name=config.text_encoder)


def _check_unchanged(folder: Path, config: Config, meta: dict[str, Any]) -> None:
    """Compare config.yaml with the settings of the best model, and the normaliser with its checksum."""
    if "settings" not in meta:  # a run of an older version
        return verify(folder, CONFIG, NORMALIZER)
    # A text encoder may lie elsewhere now.
    free = {*FREE, "text_encoder", *(ADVISED if _diverged(folder) else ())}
    differing = _differences(_settings_of(folder, meta), config, free)
    if differing:
        raise CheckpointError(
            str(folder / CONFIG),
            f"settings that its model was not trained with ({', '.join(differing)})",
            "those of the training",
            "The file is damaged or was edited: put the original back.",
        )
    return verify(folder, NORMALIZER)


# -- building --------------------------------------------------------------------------------------


def _build(config: Config, audio_dim: int, vision_dim: int, text_encoder: nn.Module | None) -> tuple[MIMRL, Objective]:
    model = build_model(config, audio_dim, vision_dim, text_encoder)
    objective = mimrl_objective(config.objective, model.fused_dim, config.model.d_common, config.data.modalities)
    return model, objective


def _predictor(model: nn.Module) -> TwoStageStep:
    """A step that evaluates a model without a loss: samples need no labels."""
    return TwoStageStep(
        model, None, lambda prediction, target: prediction.new_zeros(()), torch.optim.SGD(model.parameters(), lr=0.0)
    )


def _say_what_is_left_out(config: Config, objective: Objective) -> None:
    """Name the information terms that a run without all modalities does not have, once, in one line."""
    out = [str(term) for term in MIMRL_ESTIMATORS if term not in objective.terms]
    if config.objective.enabled and out:
        warnings.warn(
            f"data.modalities=[{', '.join(config.data.modalities)}]: the objective keeps "
            f"{', '.join(map(str, objective.terms))} and leaves out {', '.join(out)}, which name another modality",
            stacklevel=2,
        )


def _optimizer(config: Config, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    groups = [g for g in groups if g["params"]]
    t = config.train
    if t.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=t.momentum, weight_decay=t.weight_decay, fused=True)
    return torch.optim.Adam(groups, lr=lr, weight_decay=t.weight_decay, fused=True)


def _scheduler(optimizer: torch.optim.Optimizer, s: ScheduleConfig, higher_is_better: bool) -> Any:
    from torch.optim import lr_scheduler

    match s.kind:
        case "none":
            return lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
        case "step":
            return lr_scheduler.StepLR(optimizer, s.step_size, s.rate)
        case "multi_step":
            return lr_scheduler.MultiStepLR(optimizer, s.milestones, s.rate)
        case "exp":
            return lr_scheduler.ExponentialLR(optimizer, s.rate)
        case "plateau":
            mode = "max" if higher_is_better else "min"
            return lr_scheduler.ReduceLROnPlateau(optimizer, mode, factor=s.rate, patience=s.patience)


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # meta has nothing to copy
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        raise ConfigError(
            "device", f"{name!r}, which this machine cannot use", "auto, cpu, cuda or mps", "Use auto."
        ) from cause
    return device


class _Passes:
    """A loader that reshuffles at every pass and whose order depends on nothing but seed, epoch and pass.

    Attributes:
        waited: seconds that were spent waiting for batches since `set_epoch`.
        prepare: what is done to a batch before it moves to the device.
        exact: a static step's batches also tell their widths without buckets.
    """

    PASSES_PER_EPOCH = 1000

    def __init__(self, loader: Loader, device: torch.device, prepare: Callable[[Batch], Batch], exact: bool = False):
        self.loader, self.device, self.prepare, self.exact = loader, device, prepare, exact
        self.epoch, self.passes, self.waited = 0, 0, 0.0

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.passes, self.waited = epoch, 0, 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = self._plain()
        while True:
            start = time.perf_counter()
            with part("load"):
                batch = next(batches, None)
                if batch is not None:
                    batch = self.prepare(batch).to(self.device, non_blocking=True)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    @property
    def in_order(self) -> bool:
        """Whether every pass gives all samples in file order."""
        return not self.loader.sampler.shuffle and self.loader.sampler.shard[1] == 1

    def batch_sizes(self) -> list[int]:
        """Rows of every batch of the next pass."""
        return [len(rows) for rows in self.loader.sampler.batches(self._number())]

    def feed(self) -> Feed:
        """The same passes for a static step: gathered in it where the split is resident, else copied into buffers."""
        if self.loader.kind == "resident" and not self.loader.draws_words:
            return ResidentFeed(self.loader, self._begin, self.exact)
        return CopyFeed(self._plain, self.device, buckets_of(self.loader), self.exact)

    def _number(self) -> int:
        return self.epoch * self.PASSES_PER_EPOCH + self.passes

    def _begin(self) -> tuple[list[Tensor], int]:
        number = self._number()
        self.passes += 1
        return self.loader.sampler.batches(number), number

    def _plain(self) -> Iterator[Batch]:
        self.loader.set_epoch(self._number())
        self.passes += 1
        return iter(self.loader)


def _compiles_kernels(device: torch.device) -> bool:
    """Whether training on `device` has Triton kernels to compile."""
    return device.type == "cuda" and has_triton() and not interpreting()


def _try_out(step: TwoStageStep, batch: Batch, size: int) -> None:
    """Both stages' passes on one batch, with a bank of `size` samples, and no updates."""
    step.model.train()
    with torch.no_grad():
        step.forward(batch, batch.label)
    prediction, features = step.forward(batch, batch.label)
    loss = step.task_loss(prediction, batch.label)
    if step.objective is not None and len(batch) >= step.objective.min_batch:
        detached = {name: value.detach() for name, value in features.items()}
        bank = Bank({name: value.new_zeros(size, *value.shape[1:]) for name, value in detached.items()})
        products = step.draw_products(bank, len(batch))
        step.objective.train()
        loss = loss + step.objective.estimator_loss(detached, products).loss
        with step._frozen_estimators():
            loss = loss + step.objective.model_loss(features, products).loss
    loss.backward()


def _pad_tokens(config: Config) -> int | None:
    return config.data.time_len if config.mode == "faithful" else None


# -- the training run ------------------------------------------------------------------------------


class _Trainer:
    def __init__(
        self,
        config: Config,
        out: Path,
        callbacks: Sequence[Callback],
        dataset: Dataset | None,
        profile: bool = False,
    ):
        self.profile, self.profiler = profile, None
        self.config, self.out, self.extra_callbacks = config.resolve(), out, callbacks
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        self.device = choose_device(self.config.device)
        if self.device.type == "cpu":
            keep_memory()
        self.dataset = dataset
        self.arithmetic = _arithmetic(self.device, self.config.train.amp)
        self.lines = (0, 0)  # bytes and CRC-32 of history.jsonl
        self.saving: Future | None = None

    def fit(self, resume: bool) -> RunResult:
        if self.profile and self.config.objective.enabled and self.config.epochs < 2:
            raise ConfigError(
                "profile", "one epoch", "two or more: the first has no information terms", "Set epochs=2."
            )
        with owned(self.out):
            if not resume and any((self.out / mark).exists() for mark in MARKS):
                raise OutputError(
                    str(self.out), "another run", "an empty or new folder",
                    "Choose another --out, or go on with --resume.",
                )  # fmt: skip
            try:
                return self._fit(resume)
            except Exception:
                if not resume and not (self.out / LAST).exists():  # there is no epoch to go on from: leave it free
                    for name in (CONFIG, NORMALIZER, *TOKENIZER, HISTORY, CHECKSUMS):
                        (self.out / name).unlink(missing_ok=True)
                raise

    def _fit(self, resume: bool) -> RunResult:
        c = self.config
        self.sums = Checksums(self.out)
        saved = self._saved() if resume else None
        self._open(saved is not None)
        if saved is not None and (differing := _other_data(self.dataset, saved[1])):
            raise DataError(
                c.data.path, f"other data than the run in {self.out} was trained on ({', '.join(differing)})",
                "the same samples, texts, labels and features", "Name the run's own data, or begin a new run.",
            )  # fmt: skip
        if resume and saved is None:
            warnings.warn(f"{self.out}: no epoch to go on from: the run begins at epoch 0", stacklevel=2)
        self._prepare(None if saved is None else saved[1])
        history: list[dict[str, Any]] = []
        bank: FeatureBank | None = None
        if saved is not None:
            with checkpoint.taken_apart(str(self.out / LAST)):
                history, bank = self._restore(*saved)
            del saved
        self._write_settings()
        if history:
            self._complete(history)
        for callback in (callbacks := self._callbacks(history)):
            callback.on_start(len(history), c.epochs, self._batches())

        def on_batch(stage: str, number: int) -> None:
            if self.profiler is not None:
                self.profiler.batch_done()
            for callback in callbacks:
                callback.on_batch(stage, number)

        if _compiles_kernels(self.device):
            self._warm_up()
        started = time.perf_counter() - sum(r["wall_seconds"] for r in history)
        try:
            # Saving goes on beside the next epoch; leaving this block waits for it.
            with ThreadPoolExecutor(1) as beside:
                for epoch in range(len(history), c.epochs):
                    try:
                        record, bank = self._epoch(epoch, bank, on_batch)
                    except EngineError as problem:
                        raise self._lost(epoch, problem) from problem
                    self._wait()
                    improved = self._improved(history, record)
                    history.append(record)
                    self.saving = beside.submit(self._save(history, bank, improved, time.perf_counter() - started))
                    if self.extra_callbacks:  # which may read the folder
                        self._wait()
                    for callback in callbacks:
                        callback.on_epoch(record, improved)
            self._wait()
        finally:
            for callback in callbacks:
                callback.on_end()
        with self.sums.writing(METRICS, METRICS_CSV):
            summary = self._summary(history, time.perf_counter() - started)
        self._complete(history, ended=True)
        if c.output.features:
            with self.sums.writing(*FEATURES):
                self._write_features()
        if c.output.report:
            write_report(self.out)
        return RunResult(self.out, summary)

    # -- setting up --

    def _open(self, resumed: bool) -> None:
        c = self.config
        if self.dataset is None:
            tokenizer = _own_tokenizer(self.out, c) if resumed else None
            self.dataset = open_dataset(c.data.path, c.data, c.text_encoder, tokenizer=tokenizer)

    def _prepare(self, resumed: dict[str, Any] | None = None) -> None:
        """`resumed`: what the checkpoint to go on from says of itself."""
        c = self.config
        checks.class_numbers(c, self.dataset)
        checks.last_batch(c, self.dataset)
        self._check_bank()
        _seed(c.seed)
        if resumed is not None:  # the run has all of its encoder, whose folder may be gone
            encoder = _saved_encoder(resumed, c.text.freeze)
        elif "text" in c.data.modalities:
            encoder = load_text_encoder(c.text_encoder, c.text.freeze, dim=self.dataset.text_dim)
        else:
            encoder = None
        checks.text_fits(c, self.dataset, encoder)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            described = _build(c, self.dataset.audio_dim, self.dataset.vision_dim, encoder)
        checks.memory(c, described, len(self.dataset.splits["train"]), self.device)
        checks.disk_space(self.out, *described, c.train, [self.out / n for n in (BEST, LAST, PREVIOUS)])
        model, objective = _build(c, self.dataset.audio_dim, self.dataset.vision_dim, encoder)
        c.data.label_scale = checks.label_scale(c, self.dataset)
        self.metric, self.higher_is_better = metrics.selection(c.data.dataset, c.model.task, c.data.label_scale)
        _say_what_is_left_out(c, objective)
        if c.mode == "fast" and c.model.task == "regression":
            model.start_at(float(self.dataset.splits["train"].label[:, 0].mean()))
        model, objective = model.to(self.device), objective.to(self.device)
        groups, lr = model.parameter_groups(), c.train.lr
        text_lr = lr * c.text.lr_rate if c.text.lr_rate > 0 else lr
        main = _optimizer(c, [{"params": groups["main"]}, {"params": groups["text"], "lr": text_lr}], lr)
        estimators = _optimizer(c, [{"params": list(objective.parameters())}], lr * c.train.mi_lr_rate)
        self.model, self.objective = model, objective
        self.text_config = None if encoder is None else encoder.describe()
        self.step = TwoStageStep(
            model,
            objective if c.objective.enabled else None,
            losses.task_loss(c.train.loss, c.model.num_class, c.model.task),
            main,
            estimators,
            clip_value=c.train.clip_value,
            clip_norm=c.train.clip_norm,
            average=c.train.average,
            autocast=autocast_dtype(c.train.amp, self.device),
            compile=c.train.compile,
            generator=torch.Generator().manual_seed(c.seed),
            graphs=c.train.graphs,
        )
        self.optimizers = {"main": main, "estimators": estimators}
        self.schedulers = {
            k: _scheduler(o, c.train.schedule, self.higher_is_better) for k, o in self.optimizers.items()
        }
        self.loaders = {split: self._loader(split, split == "train") for split in ("train", "valid", "test")}
        self.unshuffled_train = self._loader("train", False)
        self.scored = [s for s in ("train", "valid", "test") if not self.dataset.splits[s].label.isnan().any()]
        self.predictor = _predictor(model)

    def _evaluate(self, split: str, loader: _Passes, bank: FeatureBank | None = None) -> EpochResult:
        """One pass over a split; without a loss where it has no labels."""
        return self.step.evaluate(loader, bank) if split in self.scored else self.predictor.evaluate(loader)

    def _check_bank(self) -> None:
        c, size = self.config, len(self.dataset.splits["train"])
        k, m = c.objective.k_neighbor, c.batch_size // c.objective.k_neighbor
        if c.objective.enabled and size - min(m, size) < k:
            raise ConfigError(
                "objective.k_neighbor", f"{k} neighbours for {m} queries from a bank of {size} training samples",
                f"at least {m + k} training samples", "Lower objective.k_neighbor or batch_size.",
            )  # fmt: skip

    def _loader(self, split: str, training: bool) -> _Passes:
        c = self.config
        return _Passes(
            self.dataset.loader(
                split, c.batch_size, shuffle=training and c.data.shuffle, seed=c.seed, pad_tokens_to=_pad_tokens(c),
                drop_last=training and c.data.drop_last,
                drop_singleton=training,
                task=c.model.task, draw_words=training, device=self.device, kind=c.data.loader,
                workers=c.data.workers, max_padding=c.data.max_padding if training else None,
                augment=c.data.augment if training else None,
            ),
            self.device,
            self.model.prepare,
            exact=c.mode == "faithful",
        )  # fmt: skip

    def _warm_up(self) -> None:
        """Have the Triton kernels of a step compiled side by side. It changes nothing else."""
        random_state, generator_state = _rng_state(), self.step.generator.get_state()
        buffers = [(b, b.clone()) for module in (self.model, self.objective) for b in module.buffers()]
        try:
            loader, static = self.loaders["train"], self.step.static
            batch = next(iter(loader)) if static is None else static.first_batch(loader)
            with contextlib.nullcontext() if static is None else registry.static():
                warm_up(lambda: _try_out(self.step, batch, len(self.dataset.splits["train"])))
        except Exception as cause:  # whatever it was: a real step meets it again, if it matters
            warnings.warn(f"kernels are compiled when first used: {' '.join(str(cause).split())}", stacklevel=2)
        finally:
            for optimizer in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            self.step.generator.set_state(generator_state)
            _set_rng_state(random_state)

    def _callbacks(self, history: list[dict[str, Any]]) -> list[Callback]:
        callbacks: list[Callback] = list(self.extra_callbacks)
        if self.config.output.tensorboard:
            callbacks.append(TensorBoardCallback(self.out / TENSORBOARD, history))
        if self.config.output.progress:
            callbacks.append(ProgressCallback(self.metric))
        return callbacks

    def _batches(self) -> dict[str, int]:
        """Batches of each stage in an epoch that has a bank, for the estimate of the time left."""
        c, n = self.config, len(self.loaders["train"])
        if not c.objective.enabled:
            return {"stage2": n}
        return {
            "collect": n if c.train.stage1_features == "cached" and c.train.stage1_n else 0,
            "stage1": n * c.train.stage1_n,
            "stage2": n,
        }

    # -- one epoch --

    def _epoch(
        self, epoch: int, bank: FeatureBank | None, on_batch: Callable[[str, int], None]
    ) -> tuple[dict[str, Any], FeatureBank]:
        c = self.config
        start = time.perf_counter()
        record: dict[str, Any] = {"epoch": epoch}
        for name, optimizer in self.optimizers.items():
            record[f"lr_{name}"] = optimizer.param_groups[0]["lr"]
        had_bank = bank is not None
        self.loaders["train"].set_epoch(epoch)
        # The first epoch has no bank, and so no first stage: the second is the first that tells where time goes.
        profiled = self.profile and (had_bank or not c.objective.enabled)
        self.profiler = Profiler(self.device, self._batches()) if profiled else None
        with self.profiler.taken() if profiled else contextlib.nullcontext():
            trained, bank = self.step.train_epoch(
                self.loaders["train"], len(self.dataset.splits["train"]), bank, batch_size=c.batch_size,
                stage1_n=c.train.stage1_n, stage1_features=c.train.stage1_features, on_batch=on_batch,
            )  # fmt: skip
        record["seconds"] = time.perf_counter() - start
        record["waiting_seconds"] = self.loaders["train"].waited
        if profiled:
            self.profiler.save(self.out / "profile")
            self.profile, self.profiler = False, None
        record["train"] = _record(c, trained)
        # Epoch 0 trains without information terms, so its evaluation has none either: the losses stay comparable.
        with self.step.averaged():
            self.results = {
                split: self._evaluate(split, self.loaders[split], bank if had_bank and c.objective.enabled else None)
                for split in ("valid", "test")
            }
        for split, result in self.results.items():
            record[split] = _record(c, result) if split in self.scored else {}
        if had_bank and c.objective.enabled:
            self._read_terms(record, trained.features)
        for scheduler in self.schedulers.values():
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(record["valid"][self.metric])
                continue
            with warnings.catch_warnings():
                # Epoch 0 has no stage 1: the estimators' schedule rightly runs before their first step.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                scheduler.step()
        record["wall_seconds"] = time.perf_counter() - start
        return record, bank

    def _read_terms(self, record: dict[str, Any], training: dict[str, Tensor]) -> None:
        """Add what the terms read on all rows of a split at once, at the epoch's end: outside of the steps."""
        known = {"train": training} | {s: r.features for s, r in self.results.items() if s in self.scored}
        for split, features in known.items():
            try:
                found = self.objective.read(features, self.config.batch_size)
            except EstimatorError as problem:  # no step needs it: the run goes on
                warnings.warn(f"epoch {record['epoch']}, {split}: not read on all rows: {problem}", stacklevel=2)
                continue
            if found:
                record[split]["bank"] = {name: r.value for name, r in found.items()}
                limits = {name: r.ceiling for name, r in found.items() if r.ceiling is not None}
                record[split] |= {"bank_ceiling": limits} if limits else {}

    def _better(self, a: dict[str, Any], b: dict[str, Any], split: str) -> bool:
        """Whether epoch `a` beats epoch `b` on `split`. A metric that is NaN never wins."""
        x, y = a[split][self.metric], b[split][self.metric]
        if y != y:
            return x == x
        return x > y if self.higher_is_better else x < y

    def _improved(self, history: list[dict[str, Any]], record: dict[str, Any]) -> bool:
        return not history or self._better(record, self._best(history, "valid"), "valid")

    def _best(self, history: list[dict[str, Any]], split: str) -> dict[str, Any]:
        best = history[0]
        for record in history[1:]:
            if self._better(record, best, split):
                best = record
        return best

    # -- on disk --

    def _write_settings(self) -> None:
        with self.sums.writing(CONFIG, NORMALIZER, *TOKENIZER):
            self.config.save(self.out / CONFIG)
            self.dataset.normalizer.save(self.out / NORMALIZER)
            if self.dataset.tokenizer is not None:
                self.dataset.tokenizer.save(self.out)

    def _meta(self, epoch: int) -> dict[str, Any]:
        return {
            "epoch": epoch,
            "audio_dim": self.dataset.audio_dim,
            "vision_dim": self.dataset.vision_dim,
            "text_encoder": self.text_config,
            "settings": self.config.model_dump(mode="json"),
            "data": self.dataset.fingerprints,
            "arithmetic": self.arithmetic,
        }

    def _weights(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "objective": self.objective.state_dict()}

    def _wait(self) -> None:
        """Let the epoch before be saved, and raise what was in the way."""
        if self.saving is not None:
            self.saving.result()

    def _save(self, history: list[dict[str, Any]], bank: FeatureBank, improved: bool, wall_s: float) -> Callable:
        """Copy what an epoch leaves; calling what is returned writes it."""
        meta, history = self._meta(history[-1]["epoch"]), list(history)
        last = checkpoint.Snapshot(
            self._weights()
            | {
                "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()},
                "schedulers": {k: s.state_dict() for k, s in self.schedulers.items()},
                "average": self.step.average.state_dict() if self.step.average is not None else None,
                "bank": bank.state_dict(),
                "generator": self.step.generator.get_state(),
                "rng": _rng_state(),
            }
        )
        save_best = self._save_best(meta) if improved else None

        def write() -> None:
            with self.sums.writing(HISTORY, METRICS, METRICS_CSV, *(self._prediction_files() if improved else [])):
                line = _history_line(history[-1])
                append_text(self.out / HISTORY, line, at=self.lines[0])
                self.lines = self.lines[0] + len(line.encode()), zlib.crc32(line.encode(), self.lines[1])
                self.sums.sums[HISTORY] = self.lines
                # With this file the epoch counts. `_complete` can make the others from it, and not it from them.
                last.save(self.out / LAST, meta | {"history": self.lines}, previous=self.out / PREVIOUS)
                if save_best is not None:
                    save_best()
                self._summary(history, wall_s)

        return write

    def _prediction_files(self) -> list[str]:
        return [f"predictions_{split}.csv" for split in self.loaders if split != "train"]

    def _save_best(self, meta: dict[str, Any]) -> Callable:
        """As `_save`, for the best model and its predictions."""
        with self.step.averaged():
            best = checkpoint.Snapshot(self._weights())
        results = {s: replace(r, prediction=r.prediction.to("cpu", copy=True)) for s, r in self.results.items()}

        def write() -> None:
            best.save(self.out / BEST, meta)
            for split, result in results.items():
                path = self.out / f"predictions_{split}.csv"
                _write_predictions(path, self.config, self.dataset.splits[split], result)

        return write

    def _lost(self, epoch: int, problem: EngineError) -> EngineError:
        """What to say of an epoch that failed: how a run that has diverged can go on."""
        if not epoch or not (isinstance(problem, EstimatorError) or problem.where == metrics.PREDICTIONS):
            return problem
        self._wait()
        found = [*_diverged(self.out), {"epoch": epoch - 1, "problem": str(problem)}]
        with self.sums.writing(DIVERGED):
            write_json(self.out / DIVERGED, found)
        return type(problem)(
            problem.where, problem.found, problem.expected,
            f"{problem.do} The run in {self.out} can go on after epoch {epoch - 1} that way: with --resume and another "
            f"{' or '.join(sorted(ADVISED))}.",
        )  # fmt: skip

    def _complete(self, history: list[dict[str, Any]], ended: bool = False) -> None:
        """Write the best model and its predictions where a run was stopped between its last epoch and these files.

        Those of an earlier epoch cannot be made anew. A warning says so where the best model is damaged, and where it
        is still another one when the run has ended.
        """
        try:
            found = checkpoint.load(self.out / BEST)[1]["epoch"]
        except CheckpointError:
            found = None
        best, last = self._best(history, "valid")["epoch"], history[-1]["epoch"]
        wrong = [name for name in self._prediction_files() if not self.sums.hold(name)]
        if found != best:
            wrong.insert(0, BEST)
        if wrong and best != last and (ended or found is None):
            warnings.warn(
                f"{self.out}: {', '.join(wrong)} not of epoch {best}, the best by validation, whose weights are gone",
                stacklevel=2,
            )
        elif wrong and best == last:
            random_state, generator_state = _rng_state(), self.step.generator.get_state()
            with self.step.averaged():
                self.results = {s: self._evaluate(s, p) for s, p in self.loaders.items() if s != "train"}
            with self.sums.writing(*self._prediction_files()):
                self._save_best(self._meta(best))()
            self.step.generator.set_state(generator_state)
            _set_rng_state(random_state)

    def _saved(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """State and meta of the newest undamaged checkpoint to go on from; None where no epoch was saved."""
        newest, before = self.out / LAST, self.out / PREVIOUS
        if not newest.exists() and not before.exists():
            if not (self.out / BEST).exists():
                return None
            raise CheckpointError(
                str(self.out), f"{BEST} without {LAST}", "both, to go on with a run",
                "Choose another --out; the best model can still be evaluated.",
            )  # fmt: skip
        try:
            state, meta = checkpoint.load(newest)
        except CheckpointError as problem:
            if not before.exists():
                raise
            state, meta = checkpoint.load(before)
            warnings.warn(f"{problem} The run goes on from {PREVIOUS}, after epoch {meta['epoch']}.", stacklevel=2)
        advised = ADVISED if any(d["epoch"] == meta["epoch"] for d in _diverged(self.out)) else set()
        if differing := _differences(_settings_of(self.out, meta), self.config, FREE | advised):
            raise ConfigError(
                str(self.out), f"other settings than the run's ({', '.join(differing)})", "the settings of the run",
                "Resume with the same settings (only epochs, threads, device, output and the loader may differ).",
            )  # fmt: skip
        _check_described(self.out / LAST, self.config, state, meta, trained=True)
        if self.config.epochs <= meta["epoch"]:
            raise ConfigError(
                f"epochs={self.config.epochs}", f"{meta['epoch'] + 1} finished epochs in {self.out}",
                f"epochs={meta['epoch'] + 1} or more", "Ask for at least as many epochs as the run has.",
            )  # fmt: skip
        _say_what_computes_otherwise(self.out, meta, self.arithmetic)
        return state, meta

    def _restore(self, state: dict[str, Any], meta: dict[str, Any]) -> tuple[list[dict[str, Any]], FeatureBank]:
        history = self._restore_history(state, meta)
        where = str(self.out / LAST)
        checkpoint.load_into(self.model, state["model"], f"{where}: model")
        checkpoint.load_into(self.objective, state["objective"], f"{where}: objective")
        for name, optimizer in self.optimizers.items():
            _load_optimizer(optimizer, state["optimizers"][name], f"{where}: optimizer {name}")
            self.schedulers[name].load_state_dict(state["schedulers"][name])
            _scale_rates(optimizer, self.schedulers[name], self.config.train.lr / _settings_of(self.out, meta).train.lr)
        if self.step.average is not None:
            self.step.average.load_state_dict(state["average"])
        bank = FeatureBank(len(self.dataset.splits["train"]))
        bank.load_state_dict(state["bank"])
        bank.rows = {k: v.to(self.device) for k, v in bank.rows.items()}
        self.step.generator.set_state(state["generator"])
        _set_rng_state(state["rng"])
        return history, bank

    def _restore_history(self, state: dict[str, Any], meta: dict[str, Any]) -> list[dict[str, Any]]:
        """The records up to the checkpoint's epoch; what a stopped run wrote beyond is cut off."""
        path = self.out / HISTORY
        if "history" in state:  # older versions kept the records in the checkpoint
            history = json.loads(state["history"])
            with self.sums.writing(HISTORY):
                write_text(path, "".join(map(_history_line, history)))
            self.lines = file_sum(path)
            return history
        size, crc = meta["history"]
        content = path.read_bytes()[:size] if path.is_file() else b""
        if len(content) < size or zlib.crc32(content) != crc:
            raise CheckpointError(
                str(path), "contents that do not match their checksum", f"the epochs up to {meta['epoch']}",
                "The file is damaged or was edited: put the original back. The best model can still be evaluated.",
            )  # fmt: skip
        with self.sums.writing(HISTORY):
            append_text(path, "", at=size)
        self.lines = size, crc
        return [json.loads(line, object_hook=_with_nan) for line in content.splitlines()]

    def _summary(self, history: list[dict[str, Any]], wall_s: float) -> dict[str, Any]:
        best = self._best(history, "valid")
        oracle = self._best(history, "test") if "test" in self.scored else None
        steady = [r["seconds"] for r in history[1:]] or [history[0]["seconds"]]

        def numbers(record: dict[str, Any], split: str) -> dict[str, Any]:
            return {k: v for k, v in record[split].items() if not isinstance(v, dict)}

        summary = {
            "best_epoch": best["epoch"],
            "valid": numbers(best, "valid"),
            "test": numbers(best, "test"),
            "oracle_test": numbers(oracle, "test") | {"epoch": oracle["epoch"]} if oracle else {},
            "data_wait_share": sum(r.get("waiting_seconds", 0.0) for r in history) / sum(r["seconds"] for r in history),
            "samples_per_second": len(self.dataset.splits["train"]) * len(steady) / sum(steady),
            "peak_memory_mb": _peak_memory_mb(self.device),
            "wall_s": wall_s,
            "environment": environment(str(self.device)),
        }
        write_json(self.out / METRICS, summary)
        metrics.write_metrics_csv(self.out / METRICS_CSV, {k: v for k, v in summary.items() if v != {}})
        return summary

    def _write_features(self) -> None:
        state, _ = checkpoint.load(self.out / BEST)
        checkpoint.load_into(self.model, state["model"], str(self.out / BEST))
        for split, loader in (self.loaders | {"train": self.unshuffled_train}).items():
            result = self._evaluate(split, loader)
            _write_features(self.out / f"features_{split}.safetensors", self.dataset.splits[split], result)


# -- helpers ---------------------------------------------------------------------------------------


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _rng_state() -> dict[str, Any]:
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


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


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _refuse_other_ranks() -> None:
    """A run has one process: started once a device, as torchrun does, all but the first would repeat its work."""
    rank, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if rank.isdigit() and world.isdigit() and 0 < int(rank) < int(world) and not together:
        raise ConfigError(
            "environment",
            f"RANK={rank} of WORLD_SIZE={world}, and no process group",
            "one process a run",
            "Start engine without torchrun: a run trains in one process.",
        )


def _finished(config: Config, folder: Path, dataset: Dataset) -> RunResult | None:
    """The result of a run in `folder` that has done all epochs of `config` on this data and lacks no file.

    None: it has to go on, which also tells what is wrong with it.
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
        differing = _differences(_settings_of(folder, meta), config, FREE)
        result = parse_json((folder / METRICS).read_text(encoding="utf-8"))
        unfinished = meta["epoch"] + 1 != config.epochs
    except (EngineError, ValueError, TypeError, KeyError):
        return None
    if unfinished or differing or _other_data(dataset, meta):
        return None
    return RunResult(folder, result)


FREE = {
    "preset", "epochs", "threads", "device", "output",
    "data.path", "data.loader", "data.workers",  # which loader makes the batches does not change them
    "data.label_scale",  # what is reported does not change the training
    "train.graphs",  # how the steps are launched changes no more than rounding
}  # fmt: skip
"""Settings, or sections of them, that may change when a run goes on."""
ADVISED = {"train.lr", "train.clip_norm", "objective.on_degenerate"}
"""Settings that may change, too, when a run goes on after an epoch after which it diverged."""


def _diverged(folder: Path) -> list[dict[str, Any]]:
    """The last finished epoch before each time that a run diverged, and what was said."""
    if not (folder / DIVERGED).is_file():
        return []
    verify(folder, DIVERGED)
    return json.loads((folder / DIVERGED).read_text(encoding="utf-8"))


def _scale_rates(optimizer: torch.optim.Optimizer, scheduler: Any, factor: float) -> None:
    """Multiply an optimiser's learning rates, those that its schedule begins with included."""
    if factor == 1:
        return
    for group in optimizer.param_groups:
        for key in {"lr", "initial_lr"} & group.keys():
            group[key] *= factor
    for name in ("base_lrs", "_last_lr"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])


def _arithmetic(device: torch.device, amp: str) -> dict[str, Any]:
    """What the last digits of a run depend on beside its settings and data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the step says it again
        products = str(autocast_dtype(amp, device) or torch.float32).removeprefix("torch.")
    found: dict[str, Any] = {"torch": torch.__version__, "device": device.type, "products": products}
    if device.type == "cuda":
        return found | {"gpu": torch.cuda.get_device_name(device)}
    return found | {"threads": torch.get_num_threads(), "processor": torch.backends.cpu.get_cpu_capability()}


def _say_what_computes_otherwise(folder: Path, meta: dict[str, Any], now: dict[str, Any]) -> None:
    """Name what a resumed run has other than before, which keeps it from ending bit-equal."""
    before = meta.get("arithmetic", now)
    changed = [f"{k} {now.get(k)}, not {before.get(k)}" for k in {**before, **now} if before.get(k) != now.get(k)]
    if changed:
        warnings.warn(
            f"{folder}: the run goes on with {', '.join(changed)}: it will not end bit-equal to one that was not "
            "interrupted",
            stacklevel=2,
        )


def _settings_of(folder: Path, meta: dict[str, Any]) -> Config:
    """The settings that a checkpoint was trained with; older versions kept them in config.yaml only."""
    if "settings" not in meta:
        return load_config(folder / CONFIG).resolve()
    settings = meta["settings"]
    return Config(**{str(k): v for k, v in settings.items()} if isinstance(settings, dict) else {"settings": settings})


def _history_line(record: dict[str, Any]) -> str:
    return json.dumps(finite(record), allow_nan=False) + "\n"


def _with_nan(values: dict[str, Any]) -> dict[str, Any]:
    """A part of a history's record, where null stands for a value that was not finite."""
    return {k: math.nan if v is None else v for k, v in values.items()}


def _differences(saved: Config, given: Config, free: set[str]) -> list[str]:
    """`key=value, not value` of every setting that differs and is not free."""
    x, y = _flat(saved.model_dump(mode="json"), free), _flat(given.model_dump(mode="json"), free)
    return [f"{key}={text_of(y.get(key))}, not {text_of(x.get(key))}" for key in {**x, **y} if x.get(key) != y.get(key)]


def _flat(values: dict[str, Any], free: set[str], prefix: str = "") -> dict[str, Any]:
    """`{section.key: value}`, the free ones left out."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if (name := prefix + key) in free:
            continue
        found |= _flat(value, free, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def _other_data(dataset: Dataset, meta: dict[str, Any]) -> list[str]:
    """The splits whose content is not that of the run's data; older checkpoints do not tell."""
    known = meta.get("data", dataset.fingerprints)
    return sorted(name for name in {*known, *dataset.fingerprints} if known.get(name) != dataset.fingerprints.get(name))


def _metrics(config: Config, result: EpochResult) -> dict[str, float]:
    compute = metrics.metrics_for(config.data.dataset, config.model.task, config.data.label_scale)
    return compute(result.prediction.float().cpu().numpy(), result.target.cpu().numpy())


def _record(config: Config, result: EpochResult) -> dict[str, Any]:
    record: dict[str, Any] = {"loss": result.loss, "task": result.task}
    if result.information:
        record["information"] = result.information
    if result.estimators:
        record["estimators"] = result.estimators
    if result.prediction is not None:
        record |= _metrics(config, result)
    return record


def _open_split(run: Run, data: str | Path, split: str | None) -> tuple[str, Dataset]:
    """Data to apply a run to, and the split that is meant."""
    # `format` and `loader` are what the training data and machine allowed: this may be another format and machine
    settings = run.config.data.model_copy(update={"format": "auto", "loader": "auto", "workers": None})
    dataset = open_dataset(
        str(data), settings, run.config.text_encoder, run.normalizer, tokenizer=run.tokenizer, training=False
    )
    there = list(dataset.splits)
    if split is None:
        split = there[0] if len(there) == 1 else "test"
    if split not in there:
        raise ConfigError(
            "split", f"{split!r}, which {data} does not have", f"one of {', '.join(there)}", "Name a split of the data."
        )
    for kind in [m for m in run.config.data.modalities if m != "text"]:
        found, expected = getattr(dataset, f"{kind}_dim"), run.meta[f"{kind}_dim"]
        if found != expected:
            raise ConfigError(
                f"{data}: {kind}",
                f"{found} features a frame",
                f"{expected}, as the run was trained with",
                "Use its features.",
            )
    return split, dataset


def _require_labels(split: Split, where: str) -> None:
    """Raise DataError unless every sample has a label."""
    gone = torch.nonzero(split.label[:, 0].isnan())
    if len(gone):
        row = int(gone[0])
        raise DataError(
            where,
            f"no label for {len(gone)} of {len(split)} samples, row {row} (id {split.ids[row]}) the first",
            "a label for every sample",
            "Add the labels, or use engine predict, which needs none.",
        )


def _apply(run: Run, dataset: Dataset, split: str, batch_size: int | None, task: str) -> EpochResult:
    """Predictions, with the labels as `task` has them."""
    c, device = run.config, next(run.model.parameters()).device
    loader = dataset.loader(
        split,
        batch_size or c.batch_size,
        shuffle=False,
        seed=c.seed,
        pad_tokens_to=_pad_tokens(c),
        task=task,
        device=device,
    )
    checks.text_fits(c, dataset, run.model.text_encoder, [split])
    return _predictor(run.model).evaluate(_Passes(loader, device, run.model.prepare))


def _write_predictions(path: Path, config: Config, split: Split, result: EpochResult) -> None:
    prediction, label = result.prediction.float().cpu().numpy(), split.label[:, 0].numpy()
    if config.model.task == "classification":
        metrics.write_predictions(path, split.ids, label, prediction.argmax(1), scores=prediction)
    else:
        metrics.write_predictions(path, split.ids, label, prediction[:, 0])


def _write_features(path: Path, split: Split, result: EpochResult) -> None:
    tensors: dict[str, Tensor] = {k: v.float().cpu().contiguous() for k, v in result.features.items() if k != "C"}
    tensors["label"] = split.label
    checkpoint.write_tensors(path, tensors, {"ids": json.dumps(split.ids)})


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
