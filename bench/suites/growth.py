"""Whether a sample costs as much in a large data set and in a large batch as in small ones."""

from __future__ import annotations

import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import epochs, shapes
from bench.memory import extra_peak
from bench.runner import Setting, Work
from engine import losses
from engine.allocator import keep_memory
from engine.kernels.knn_product import Bank
from engine.loaders import open_dataset
from engine.mimrl.model import build_model
from engine.mimrl.terms import mimrl_objective
from engine.model.text_encoder import load_text_encoder
from engine.step import TwoStageStep
from engine.training.parts import parameter_groups

TITLE = "time a sample: N=1,284 to 16,326 at B=32, and B=32 to 512 at N=1,284 (larger factor), mode fast"
GOALS = {"value": (1.3, 1.0)}
VALUE = "factor"
SIDES = ("engine",)
ROUNDS = 3
BANKS, BATCHES = (1284, 4096, 16326), (32, 64, 128, 256, 512)
QUICK_BANKS, QUICK_BATCHES = (1284, 16326), (16, 64)
BATCH = 32


def grid(setting: Setting) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (QUICK_BANKS, QUICK_BATCHES) if setting.quick else (BANKS, BATCHES)


class Point:
    """Everything that an epoch does to `count` samples in batches of `batch`, beside a bank of `bank` samples.

    Loading, the forward pass for stage 1, two updates of the estimators and one of the model, each
    with its own product rows. The samples are the same at every point.
    """

    def __init__(self, bank: int, batch: int, count: int, setting: Setting):
        self.batch, self.count, self.device = batch, count, setting.device
        self.folder = Path(tempfile.mkdtemp(prefix="bench-growth-"))
        samples = shapes.mosi(max(bank, count), seed=0)
        store = shapes.write_store(
            self.folder, {"train": samples, **{name: samples.part(0, 4) for name in ("valid", "test")}}
        )
        config = epochs.config("fast", store, setting).resolve()
        dataset = open_dataset(store, config.data)
        self.loader = dataset.loader("train", batch)
        torch.manual_seed(0)
        model = build_model(config, dataset.audio_dim, dataset.vision_dim, load_text_encoder("minilm"))
        width = config.model.d_common
        objective = mimrl_objective(config.objective, model.fused_dim, width)
        for module in (model, objective):
            module.to(setting.device)
        groups = parameter_groups(model, model.text_encoder)
        self.step = TwoStageStep(
            model, objective, losses.task_loss("MAE", 1),
            torch.optim.Adam([*groups["main"], *groups["text"]], 1e-4, fused=True),
            torch.optim.Adam(objective.parameters(), 1e-4, fused=True), clip_value=1.5,
        )  # fmt: skip
        features = {name: torch.randn(bank, width, device=setting.device) for name in "FTAV"}
        features["C"] = torch.from_numpy(samples.label[:bank]).mul(5).round().div(5).to(setting.device)
        self.bank = Bank(features)  # as the trainer makes it, once an epoch

    def run(self) -> None:
        self.step.model.train()
        for batch in itertools.islice(self.loader, self.count // self.batch):
            batch = batch.to(self.device)
            with torch.no_grad():
                _, features = self.step.forward(batch, batch.label)
            for _ in range(2):
                self.step.stage1(features, self.step.draw_products(self.bank, self.batch))
            self.step.stage2(batch, batch.label, self.step.draw_products(self.bank, self.batch))

    def seconds(self) -> float:
        start = time.perf_counter()
        self.run()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / self.count

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def build(side: str, setting: Setting) -> Work:
    """The whole grid (side "engine"), or one point of it: n1284, b512 and so on."""
    keep_memory()  # as the trainer does
    banks, batches = grid(setting)
    most = max(batches)
    if side != "engine":
        kind, size = side[0], int(side[1:])
        point = Point(size, BATCH, 2 * BATCH, setting) if kind == "n" else Point(BANKS[0], size, most, setting)
        return Work(point.run, close=point.close)
    points: dict[str, Callable] = {f"n{n}": Point(n, BATCH, 2 * BATCH, setting) for n in banks}
    points |= {f"b{b}": Point(BANKS[0], b, most, setting) for b in batches}

    def run() -> float:
        seconds = {name: point.seconds() for name, point in points.items()}
        run.points.append(seconds)
        return max(_factors(seconds, setting).values())

    run.points = []
    for point in points.values():
        point.run()
    return Work(run, returns_number=True, warmups=0, close=lambda: [point.close() for point in points.values()])


def _factors(seconds: dict[str, float], setting: Setting) -> dict[str, float]:
    banks, batches = grid(setting)
    return {
        "samples_factor": seconds[f"n{banks[-1]}"] / seconds[f"n{banks[0]}"],
        "batch_factor": seconds[f"b{batches[-1]}"] / seconds[f"b{batches[0]}"],
    }


def gate(setting: Setting) -> None:
    epochs.gate_fast(setting)


def details(setting: Setting, works: dict[str, Work], numbers: dict[str, list[float]]) -> dict[str, Any]:
    """Both factors and both curves: seconds per sample and extra peak memory at every point."""
    rounds = works["engine"].run.points
    median = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    curve = {
        name: {
            "seconds_per_sample": value,
            "extra_peak_bytes": extra_peak("growth", name, setting, torch.get_num_threads(), repeats=1),
        }
        for name, value in median.items()
    }
    return {**_factors(median, setting), "curve": curve}
