"""How much of a training epoch is spent waiting for the next batch, by each of the three loaders (engine: resident)."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import epochs, shapes
from bench.runner import Setting, Work
from bench.suites import loader_throughput
from engine.loaders.batch import Batch
from engine.loaders.dataset import Dataset

TITLE = "share of a fast epoch spent waiting for data, 16,326 MOSEI-shaped utterances, MiniLM, B=32"
GOALS = {"value": (0.02, 0.005)}
VALUE = "share"
SIDES = ("engine", "torch", "dali")
ROUNDS = 3
# A whole epoch of 16,326 utterances takes too long to repeat. An epoch over this many batches of the whole set's order
# draws its samples from everywhere in the set all the same, and its own work a batch is at most that of a whole one.
BATCHES, QUICK_BATCHES = 24, 3


class TimedDataset:
    """A data set whose training loader ends after some batches, and which adds up the time of waiting for them."""

    def __init__(self, dataset: Dataset, batches: int):
        self.dataset, self.batches, self.waited = dataset, batches, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)

    def loader(self, split: str, *args: Any, **options: Any) -> Any:
        loader = self.dataset.loader(split, *args, **options)
        return _TimedLoader(self, loader) if split == "train" else loader


class _TimedLoader:
    def __init__(self, owner: TimedDataset, loader: Any):
        self.owner, self.loader = owner, loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return min(self.owner.batches, len(self.loader))

    def __iter__(self) -> Iterator[Batch]:
        start = time.perf_counter()
        for batch in itertools.islice(self.loader, self.owner.batches):
            self.owner.waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()
        self.owner.waited += time.perf_counter() - start


def build(side: str, setting: Setting) -> Work:
    folder = Path(tempfile.mkdtemp(prefix="bench-loader-"))
    samples = shapes.mosei(loader_throughput.count(setting))
    dataset = TimedDataset(loader_throughput.open_engine(samples, folder), QUICK_BATCHES if setting.quick else BATCHES)
    del samples
    kind = (f"data.loader={loader_throughput.KINDS[side]}",)
    run_epoch = epochs.EngineEpochs(epochs.config("fast", folder, setting, kind), dataset)

    def run() -> float:
        dataset.waited = 0.0
        seconds = run_epoch()
        return dataset.waited / seconds

    def close() -> None:
        run_epoch.close()
        shutil.rmtree(folder, ignore_errors=True)

    return Work(run, returns_number=True, close=close)


def gate(setting: Setting) -> None:
    loader_throughput.gate(setting)
