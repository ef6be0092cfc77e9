"""The stages of a training step, ready to be run one by one: for counting their launches and for timing them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import shapes
from engine.config import Config, load_config
from engine.step import FeatureBank, unpack
from engine.trainer import _Trainer

MODES = ("fast", "faithful")
STAGES = ("stage1", "stage2", "draw", "collect")
BATCH, BANK = 32, 1284  # MOSI's training split
HELD_OUT = 4  # samples of valid and test


def settings(mode: str, data: Path, device: str, *more: str) -> Config:
    """The flagship as `engine train` runs it, preset mosi at B=32, without what it writes."""
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


def prepare(config: Config, bank_size: int = BANK) -> dict[str, Callable[[], Any]]:
    """{stage: what runs one batch of it} of a training run in a steady-state epoch; the bank's features are random."""
    with tempfile.TemporaryDirectory(prefix="bench-stages-") as folder:
        trainer = _Trainer(config, Path(folder) / "run", (), None)
        trainer._prepare()
        loader = trainer.loaders["train"]
        loader.set_epoch(0)
        inputs, target, _ = unpack(next(iter(loader)))
    step, device, size = trainer.step, trainer.device, len(target)
    if device.type == "cuda":
        for optimizer in trainer.optimizers.values():
            for group in optimizer.param_groups:
                group["capturable"] = True
    with torch.no_grad():
        features = step.forward(inputs, target)[1]
    bank = FeatureBank(bank_size)
    rows = {k: torch.randn(bank_size, *v.shape[1:], device=device) for k, v in features.items()}
    bank.store(torch.arange(bank_size, device=device), rows)
    known = bank.tensors()
    products = step.draw_products(known, size)

    def collect() -> None:
        with torch.no_grad():
            step._run_forward(step._prepared(inputs), target)

    return {
        "stage1": lambda: step.stage1(features, products),
        "stage2": lambda: step.stage2(inputs, target, products),
        "draw": lambda: step.draw_products(known, size),
        "collect": collect,
    }
