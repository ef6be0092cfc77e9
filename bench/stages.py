"""The stages of a training step, ready to be run one by one, so that their launches can be counted and timed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import shapes
from engine.config import Config, load_config
from engine.step.bank import FeatureBank
from engine.step.passes import passes_of_epoch
from engine.training.parts import Parts
from engine.training.run import TrainingRun

MODES = ("fast", "faithful")
STAGES = ("stage1", "stage2", "draw", "collect")
BATCH, BANK = 32, 1284  # MOSI's training split
HELD_OUT = 4  # samples of valid and test


def settings(mode: str, data: Path, device: str, *more: str) -> Config:
    """The flagship as `engine train` runs it, preset mosi at B=32, without its optional output."""
    words = [
        f"mode={mode}", f"data.path={data}", f"batch_size={BATCH}", f"device={device}", "seed=0", "train.amp=auto",
        "data.loader=resident", "data.length_rule=recorded", "output.report=false", "output.tensorboard=false",
        "output.progress=false", "output.features=false", *more,
    ]  # fmt: skip
    return load_config("mosi", words)


def write_data(folder: Path, samples: shapes.Utterances, text_encoder: str = "minilm") -> Path:
    """A store of these training samples; valid and test hold a few of them."""
    held_out = {name: samples.part(0, HELD_OUT) for name in ("valid", "test")}
    return shapes.write_store(folder, {"train": samples, **held_out}, text_encoder)


def ready(config: Config) -> Parts:
    """The parts of a training run before its first epoch. No file is kept."""
    with tempfile.TemporaryDirectory(prefix="bench-stages-") as folder:
        run = TrainingRun(config, Path(folder) / "run")
        run.prepare()
    return run.parts


def epoch(parts: Parts, number: int, bank: FeatureBank | None) -> FeatureBank:
    """Run one epoch of both stages and return the bank for the next. The first has no bank, and so no stage 1."""
    loader, c = parts.loaders["train"], parts.config
    loader.set_epoch(number)
    return parts.step.train_epoch(
        loader, len(parts.dataset.splits["train"]), bank, batch_size=c.batch_size, stage1_n=c.train.stage1_n,
        stage1_features=c.train.stage1_features,
    )[1]  # fmt: skip


def passes(parts: Parts) -> dict[str, tuple[Callable[[], Any], int]]:
    """{stage: (function that runs one pass, number of batches)} of a static step; "draw" draws an epoch's product rows.

    Two epochs are run first, so that every shape is known and, on a GPU, captured.
    """
    static, loader, size = parts.step.static, parts.loaders["train"], len(parts.dataset.splits["train"])
    bank = epoch(parts, 1, epoch(parts, 0, None))
    batch, known, step, t = parts.config.batch_size, bank.tensors(), parts.step, parts.config.train
    fresh = t.stage1_features == "fresh"
    sizes = [n for part in passes_of_epoch(loader, size, bank, batch, t.stage1_n, fresh) for n in part]

    def nothing(stage: str, number: int) -> None:
        pass

    return {
        "stage2": (lambda: static.stage2(loader, size, bank, 0, nothing), len(loader)),
        "stage1": (lambda: static.stage1(loader, bank, batch, fresh, 0, nothing), -(-size // batch)),
        "draw": (lambda: step.objective.sample_epoch(known, sizes, step.generator), len(sizes)),
        "collect": (lambda: static.collect(loader, size, nothing), len(loader)),
    }


def prepare(config: Config, bank_size: int = BANK) -> dict[str, Callable[[], Any]]:
    """{stage: function that runs one batch eagerly}. The bank's features are random."""
    parts = ready(config)
    loader = parts.loaders["train"]
    loader.set_epoch(0)
    step, device = parts.step, parts.device
    inputs, target, _, size = step.read(next(iter(loader)))
    features = step.features(inputs, target)
    bank = FeatureBank(bank_size)
    rows = {k: torch.randn(bank_size, *v.shape[1:], device=device) for k, v in features.items()}
    bank.store(torch.arange(bank_size, device=device), rows)
    known = bank.tensors()
    products = step.draw_products(known, size)
    return {
        "stage1": lambda: step.stage1(features, products),
        "stage2": lambda: step.stage2(inputs, target, products),
        "draw": lambda: step.draw_products(known, size),
        "collect": lambda: step.features(inputs, target),
    }
