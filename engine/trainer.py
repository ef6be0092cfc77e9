"""Runs: from a config and a data path to a run folder, and back from a run folder to metrics and predictions."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine import checkpoint, checks, losses, metrics
from engine.allocator import keep_memory
from engine.callbacks import Callback, ProgressCallback, TensorBoardCallback
from engine.config import Config, ScheduleConfig, load_config
from engine.errors import CheckpointError, ConfigError, OutputError
from engine.files import output_error, write_json, write_text
from engine.kernels import registry
from engine.kernels.knn_product import Bank
from engine.kernels.registry import has_triton, interpreting
from engine.kernels.warm import warm_up
from engine.loaders import open_dataset
from engine.loaders.batch import Batch
from engine.loaders.dataset import Dataset
from engine.loaders.feed import CopyFeed, Feed, ResidentFeed, buckets_of
from engine.loaders.loader import Loader
from engine.loaders.normalize import Normalizer
from engine.model.mimrl import MIMRL, build_model
from engine.model.text_encoder import load_text_encoder, text_encoder_from_config
from engine.objective import Objective, mimrl_objective
from engine.precision import autocast_dtype
from engine.profile import Profiler, part
from engine.report import environment, write_report
from engine.step import EpochResult, FeatureBank, TwoStageStep

HISTORY, BEST, LAST, NORMALIZER = "history.jsonl", "best.safetensors", "last.safetensors", "normalizer.safetensors"


@dataclass
class RunResult:
    """A finished run: its folder and the content of its metrics.json."""

    out: Path
    metrics: dict[str, Any]


@dataclass
class Run:
    """A run folder's best model, ready to predict. `meta`: epoch, input widths, the text encoder's configuration."""

    folder: Path
    config: Config
    model: MIMRL
    objective: Objective
    normalizer: Normalizer
    meta: dict[str, Any]


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
        resume: go on after the last finished epoch of the run in `out`. A resumed CPU run ends bit-equal to one that
            was not interrupted.
        callbacks: called beside the built-in progress and TensorBoard ones (`config.output`).
        dataset: an open dataset, to share one among several runs; default: `config.data.path` is opened.
        profile: measure where the time of a few batches of each stage goes, in the second epoch:
            `out`/profile/shares.txt, shares.json and trace.json (Perfetto).

    Raises:
        EngineError: a problem with settings, data or the output folder, in one line.
    """
    return _Trainer(config, Path(out), callbacks, dataset, profile).fit(resume)


def train_seeds(
    config: Config, out: str | Path, seeds: Sequence[int], resume: bool = False, callbacks: Sequence[Callback] = ()
) -> list[RunResult]:
    """One run a seed in `out`/seedN, and summary.csv and summary.json with mean and standard deviation over them."""
    out = Path(out)
    dataset = open_dataset(config.data.path, config.resolve().data, config.text_encoder)
    results = []
    for seed in seeds:
        folder = out / f"seed{seed}"
        result = _finished(folder) if resume else None
        if result is None:
            one = config.model_copy(deep=True, update={"seed": seed})
            result = train(one, folder, resume and (folder / LAST).exists(), callbacks, dataset)
        results.append(result)
    tests = [r.metrics["test"] for r in results]
    metrics.write_summary_csv(out / "summary.csv", {config.preset or config.mode: tests})
    runs = {f"seed{seed}": r.metrics for seed, r in zip(seeds, results, strict=True)}
    write_json(out / "summary.json", {"test": metrics.summary(tests), "runs": runs})
    return results


def evaluate(
    run: str | Path, data: str | Path, split: str = "test", batch_size: int | None = None, device: str = "auto"
) -> dict[str, float]:
    """Metrics of a run's best model on one split of `data`, normalised by the run's own statistics, in float32.

    Args:
        device: as in a run's settings: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1" or "mps".
    """
    loaded = load_run(run, _device(device))
    dataset, result = _apply(loaded, data, split, batch_size)
    loaded.config.data.label_scale = checks.evaluated_scale(loaded.config, dataset.splits[split])
    return _metrics(loaded.config, result)


def predict(
    run: str | Path,
    data: str | Path,
    out: str | Path,
    split: str = "test",
    batch_size: int | None = None,
    device: str = "auto",
) -> Path:
    """Write the best model's predictions on one split of `data` as CSV, in file order with ids. As `evaluate`."""
    loaded = load_run(run, _device(device))
    dataset, result = _apply(loaded, data, split, batch_size)
    _write_predictions(Path(out), loaded.config, dataset.splits[split].ids, result)
    return Path(out)


def load_run(run: str | Path, device: str | torch.device = "cpu") -> Run:
    """The best model of a run folder.

    Raises:
        CheckpointError: the folder holds no run, or its checkpoint is damaged.
    """
    folder = Path(run)
    if not (folder / "config.yaml").exists() or not (folder / BEST).exists():
        raise CheckpointError(
            str(folder),
            "no config.yaml and best.safetensors",
            "a run folder",
            "Name the --out folder of `engine train`.",
        )
    config = load_config(folder / "config.yaml").resolve()
    state, meta = checkpoint.load(folder / BEST)
    model, objective = _build(
        config, meta["audio_dim"], meta["vision_dim"], text_encoder_from_config(meta["text_encoder"])
    )
    checkpoint.load_into(model, state["model"], f"{folder / BEST}: model")
    checkpoint.load_into(objective, state["objective"], f"{folder / BEST}: objective")
    normalizer = Normalizer.load(folder / NORMALIZER)
    return Run(folder, config, model.to(device).eval(), objective.to(device).eval(), normalizer, meta)


# -- building --------------------------------------------------------------------------------------


def _build(config: Config, audio_dim: int, vision_dim: int, text_encoder: nn.Module) -> tuple[MIMRL, Objective]:
    model = build_model(config, audio_dim, vision_dim, text_encoder)
    return model, mimrl_objective(config.objective, model.fused_dim, config.model.d_common)


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


def _device(name: str) -> torch.device:
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
        self.device = _device(self.config.device)
        if self.device.type == "cpu":
            keep_memory()
        self.dataset = dataset

    def fit(self, resume: bool) -> RunResult:
        if self.profile and self.config.objective.enabled and self.config.epochs < 2:
            raise ConfigError(
                "profile", "one epoch", "two or more: the first has no information terms", "Set epochs=2."
            )
        self._claim_folder(resume)
        self._prepare()
        history: list[dict[str, Any]] = []
        bank: FeatureBank | None = None
        if resume and (self.out / LAST).exists():
            history, bank = self._restore()
            self._write_settings()
        c = self.config
        for callback in (callbacks := self._callbacks()):
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
            for epoch in range(len(history), c.epochs):
                record, bank = self._epoch(epoch, bank, on_batch)
                improved = self._improved(history, record)
                history.append(record)
                self._save(history, bank, improved, time.perf_counter() - started)
                for callback in callbacks:
                    callback.on_epoch(record, improved)
        finally:
            for callback in callbacks:
                callback.on_end()
        summary = self._summary(history, time.perf_counter() - started)
        if c.output.features:
            self._write_features()
        if c.output.report:
            write_report(self.out)
        return RunResult(self.out, summary)

    # -- setting up --

    def _claim_folder(self, resume: bool) -> None:
        if (self.out / "config.yaml").exists() and not resume:
            raise OutputError(
                str(self.out), "another run", "an empty or new folder", "Choose another --out, or go on with --resume."
            )
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            probe = self.out / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as cause:
            raise output_error(self.out, cause) from cause

    def _prepare(self) -> None:
        c = self.config
        if self.dataset is None:
            self.dataset = open_dataset(c.data.path, c.data, c.text_encoder)
        checks.class_numbers(c, self.dataset)
        self._check_bank()
        _seed(c.seed)
        encoder = load_text_encoder(c.text_encoder, c.text.freeze, dim=self.dataset.text_dim)
        checks.text_fits(c, self.dataset, encoder)
        model, objective = _build(c, self.dataset.audio_dim, self.dataset.vision_dim, encoder)
        checks.disk_space(self.out, model, objective, c.train, [self.out / BEST, self.out / LAST])
        c.data.label_scale = checks.label_scale(c, self.dataset)
        self.metric, self.higher_is_better = metrics.selection(c.data.dataset, c.model.task, c.data.label_scale)
        if c.mode == "fast" and c.model.task == "regression":
            model.start_at(float(self.dataset.splits["train"].label[:, 0].mean()))
        model, objective = model.to(self.device), objective.to(self.device)
        groups, lr = model.parameter_groups(), c.train.lr
        text_lr = lr * c.text.lr_rate if c.text.lr_rate > 0 else lr
        main = _optimizer(c, [{"params": groups["main"]}, {"params": groups["text"], "lr": text_lr}], lr)
        estimators = _optimizer(c, [{"params": list(objective.parameters())}], lr * c.train.mi_lr_rate)
        self.model, self.objective, self.text_config = model, objective, encoder.describe()
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

    def _callbacks(self) -> list[Callback]:
        callbacks: list[Callback] = list(self.extra_callbacks)
        if self.config.output.tensorboard:
            callbacks.append(TensorBoardCallback(self.out / "tensorboard"))
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
                split: self.step.evaluate(self.loaders[split], bank if had_bank and c.objective.enabled else None)
                for split in ("valid", "test")
            }
        for split, result in self.results.items():
            record[split] = _record(c, result)
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
        self.config.save(self.out / "config.yaml")
        self.dataset.normalizer.save(self.out / NORMALIZER)

    def _meta(self, epoch: int) -> dict[str, Any]:
        return {
            "epoch": epoch,
            "audio_dim": self.dataset.audio_dim,
            "vision_dim": self.dataset.vision_dim,
            "text_encoder": self.text_config,
        }

    def _weights(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "objective": self.objective.state_dict()}

    def _save(self, history: list[dict[str, Any]], bank: FeatureBank, improved: bool, wall_s: float) -> None:
        epoch = history[-1]["epoch"]
        if improved:
            with self.step.averaged():
                checkpoint.save(self.out / BEST, self._weights(), self._meta(epoch))
            for split, result in self.results.items():
                ids = self.dataset.splits[split].ids
                _write_predictions(self.out / f"predictions_{split}.csv", self.config, ids, result)
        if len(history) == 1:  # not before: a run that fails in its first epoch leaves the folder free
            self._write_settings()
        write_text(self.out / HISTORY, "".join(json.dumps(r) + "\n" for r in history))
        self._summary(history, wall_s)
        state = self._weights() | {
            "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()},
            "schedulers": {k: s.state_dict() for k, s in self.schedulers.items()},
            "average": self.step.average.state_dict() if self.step.average is not None else None,
            "bank": bank.state_dict(),
            "generator": self.step.generator.get_state(),
            "rng": _rng_state(),
            # What history.jsonl held at this moment: the two files cannot be replaced in one stroke.
            "history": json.dumps(history),
        }
        checkpoint.save(self.out / LAST, state, self._meta(epoch))

    def _restore(self) -> tuple[list[dict[str, Any]], FeatureBank]:
        saved = load_config(self.out / "config.yaml").resolve()
        if differing := _differences(saved, self.config):
            raise ConfigError(
                f"{self.out / 'config.yaml'}", f"other settings for {', '.join(differing)}", "the settings of the run",
                "Resume with the same settings (only epochs, threads, device and output may differ).",
            )  # fmt: skip
        state, _ = checkpoint.load(self.out / LAST)
        where = str(self.out / LAST)
        checkpoint.load_into(self.model, state["model"], f"{where}: model")
        checkpoint.load_into(self.objective, state["objective"], f"{where}: objective")
        for name, optimizer in self.optimizers.items():
            _load_optimizer(optimizer, state["optimizers"][name], f"{where}: optimizer {name}")
            self.schedulers[name].load_state_dict(state["schedulers"][name])
        if self.step.average is not None:
            self.step.average.load_state_dict(state["average"])
        bank = FeatureBank(len(self.dataset.splits["train"]))
        bank.load_state_dict(state["bank"])
        bank.rows = {k: v.to(self.device) for k, v in bank.rows.items()}
        self.step.generator.set_state(state["generator"])
        _set_rng_state(state["rng"])
        return json.loads(state["history"]), bank

    def _summary(self, history: list[dict[str, Any]], wall_s: float) -> dict[str, Any]:
        best, oracle = self._best(history, "valid"), self._best(history, "test")
        steady = [r["seconds"] for r in history[1:]] or [history[0]["seconds"]]

        def numbers(record: dict[str, Any], split: str) -> dict[str, Any]:
            return {k: v for k, v in record[split].items() if not isinstance(v, dict)}

        summary = {
            "best_epoch": best["epoch"],
            "valid": numbers(best, "valid"),
            "test": numbers(best, "test"),
            "oracle_test": numbers(oracle, "test") | {"epoch": oracle["epoch"]},
            "data_wait_share": sum(r.get("waiting_seconds", 0.0) for r in history) / sum(r["seconds"] for r in history),
            "samples_per_second": len(self.dataset.splits["train"]) * len(steady) / sum(steady),
            "peak_memory_mb": _peak_memory_mb(self.device),
            "wall_s": wall_s,
            "environment": environment(str(self.device)),
        }
        write_json(self.out / "metrics.json", summary)
        metrics.write_metrics_csv(self.out / "metrics.csv", summary)
        return summary

    def _write_features(self) -> None:
        state, _ = checkpoint.load(self.out / BEST)
        checkpoint.load_into(self.model, state["model"], str(self.out / BEST))
        for split, loader in (self.loaders | {"train": self.unshuffled_train}).items():
            result = self.step.evaluate(loader)
            _write_features(self.out / f"features_{split}.safetensors", self.dataset.splits[split].ids, result)


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


def _finished(folder: Path) -> RunResult | None:
    """The result of a run in `folder` if it has done all its epochs."""
    if not (folder / "metrics.json").exists() or not (folder / HISTORY).exists():
        return None
    done = (folder / HISTORY).read_text(encoding="utf-8").count("\n")
    if done < load_config(folder / "config.yaml").epochs:
        return None
    return RunResult(folder, json.loads((folder / "metrics.json").read_text(encoding="utf-8")))


def _differences(a: Config, b: Config) -> list[str]:
    free = {"epochs", "threads", "device", "output", "preset"}
    x, y = a.model_dump(), b.model_dump()
    for data in (x["data"], y["data"]):
        del data["path"], data["loader"], data["workers"]  # which loader makes the batches does not change them
        del data["label_scale"]  # what is reported does not change the training
    for train in (x["train"], y["train"]):
        del train["graphs"]  # how the steps are launched changes no more than rounding
    return [key for key in x if key not in free and x[key] != y[key]]


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


def _apply(run: Run, data: str | Path, split: str, batch_size: int | None) -> tuple[Dataset, EpochResult]:
    c, device = run.config, next(run.model.parameters()).device
    dataset = open_dataset(str(data), c.data, c.text_encoder, normalizer=run.normalizer)
    if split not in dataset.splits:
        raise ConfigError("split", repr(split), f"one of {sorted(dataset.splits)}", "Name a split of the data.")
    for kind in ("audio", "vision"):
        found, expected = getattr(dataset, f"{kind}_dim"), run.meta[f"{kind}_dim"]
        if found != expected:
            raise ConfigError(
                f"{data}: {kind}",
                f"{found} features a frame",
                f"{expected}, as the run was trained with",
                "Use its features.",
            )
    loader = dataset.loader(
        split,
        batch_size or c.batch_size,
        shuffle=False,
        seed=c.seed,
        pad_tokens_to=_pad_tokens(c),
        task=c.model.task,
        device=device,
        kind=c.data.loader,
        workers=c.data.workers,
    )
    checks.class_numbers(c, dataset, [split])
    checks.text_fits(c, dataset, run.model.text_encoder, [split])
    task = losses.task_loss(c.train.loss, c.model.num_class, c.model.task)
    step = TwoStageStep(run.model, None, task, torch.optim.SGD(run.model.parameters(), lr=0.0))
    return dataset, step.evaluate(_Passes(loader, device, run.model.prepare))


def _write_predictions(path: Path, config: Config, ids: list[str], result: EpochResult) -> None:
    prediction, label = result.prediction.float().cpu().numpy(), result.target.cpu().numpy()
    if config.model.task == "classification":
        metrics.write_predictions(path, ids, label, prediction.argmax(1), scores=prediction)
    else:
        metrics.write_predictions(path, ids, label.reshape(len(ids), -1)[:, 0], prediction[:, 0])


def _write_features(path: Path, ids: list[str], result: EpochResult) -> None:
    from safetensors.torch import save_file

    from engine.files import atomic_path

    tensors: dict[str, Tensor] = {k: v.float().cpu().contiguous() for k, v in result.features.items() if k != "C"}
    tensors["label"] = result.target.reshape(len(ids), -1).float().cpu().contiguous()
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"ids": json.dumps(ids)})


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
