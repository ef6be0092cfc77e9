"""python -m bench host: what Python does in a training epoch whose CUDA graphs are only replayed, without a GPU.

    python -m bench host              microseconds per batch of each stage, and per epoch of everything else
    python -m bench host --json       the same and the counters, as one line
    python -m bench host --where      also the functions that take longest

A stage's graph is replaced by one whose replay does nothing. So what is left of an epoch is what the host does: it has
to be quicker than the GPU works, or the GPU waits. A launch by `cudaGraphLaunch` comes on top of each batch.

Two kinds of numbers are given. Times depend on the machine, and contain the CPU's own work in drawing product rows.
Counters do not: calls of Python functions per replayed batch; and what a GPU would be asked for outside of graphs in an
epoch: launches, and reads and copies that make the host wait (counted by `bench.pretend`).
"""

from __future__ import annotations

import contextlib
import cProfile
import pstats
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import guard, shapes, stages
from bench.pretend import PretendedGpu, Seen
from engine.config import Config
from engine.step.bank import FeatureBank
from engine.step.graphs import GraphRunner
from engine.step.passes import OnBatch, nothing
from engine.training.parts import Parts

STAGES = ("collect", "stage1", "stage2", "evaluate")
WARM, EPOCHS = 3, 5  # epochs: each shape comes twice in the first, and then those that are measured


def only_looking(on_batch: Any) -> Any:
    """Promise that a function called after every batch changes nothing, as those of `engine train` do."""
    on_batch.only_looks = True
    return on_batch


class _Nothing:
    """A graph that holds nothing."""

    def replay(self) -> None:
        pass


class PretendedGraphs(GraphRunner):
    """Runs the first batch of every shape. From the second on there is a graph, whose replay does nothing."""

    def __init__(self, device: torch.device):
        super().__init__(device, capture=False, strict=True)
        self.capture = True
        self._watching = False

    def clear(self) -> None:
        self._graphs.clear()
        self._seen.clear()

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        yield

    def _captured(self, key: Any, function: Callable[[], None]) -> bool:
        self._graphs[key] = _Nothing()
        return True


def flagship(folder: Path, device: str = "cpu") -> Config:
    """MOSI's size and shape, the preset mosi at B=32, fast mode."""
    data = stages.write_data(folder / "data", shapes.mosi(stages.BANK))
    return stages.settings("fast", data, device, "train.graphs=emulate")


def tiny(folder: Path, device: str = "cpu") -> Config:
    """A few short samples and a text encoder of two layers."""
    encoder = guard.tiny_text_encoder(folder / "encoder")
    data = stages.write_data(folder / "data", shapes.utterances(guard.SHAPE, 6 * guard.BATCH - 3), str(encoder))
    config = guard.tiny_config("fast", data, encoder)
    return config.model_copy(update={"device": device, "train": config.train.model_copy(update={"graphs": "emulate"})})


class Epochs:
    """Epochs of a static step whose graphs hold nothing, as `engine train` runs them."""

    def __init__(self, config: Config):
        self.parts: Parts = stages.ready(config)
        self.static = self.parts.step.static
        self.static.graphs = PretendedGraphs(self.parts.device)
        self.bank: FeatureBank | None = None
        self.number = 0
        # the sums of steps that did not run are no numbers to be checked
        self.parts.step._check_finite = lambda result: None
        for _ in range(WARM):
            self.run()
            for bank in self.static._banks.values():  # rows of batches that did not run: no two are equal
                for value in bank.rows.values():
                    value.normal_()

    def run(self, on_batch: OnBatch = nothing) -> None:
        """One epoch of training and an evaluation of the validation set."""
        parts, c = self.parts, self.parts.config
        loader = parts.loaders["train"]
        loader.set_epoch(self.number)
        known, self.number = self.bank, self.number + 1
        # a replay stores nothing, and all rows have to be there
        with mock.patch.object(FeatureBank, "clear", lambda bank: bank.filled.fill_(True)):
            self.bank = parts.step.train_epoch(
                loader, parts.samples, known, batch_size=c.batch_size, stage1_n=c.train.stage1_n,
                stage1_features=c.train.stage1_features, on_batch=on_batch,
            )[1]  # fmt: skip
            with parts.step.averaged():
                parts.evaluate("valid", parts.loaders["valid"], None if known is None else self.bank)


def calls_of(fn: Callable[[], Any]) -> int:
    """Calls of functions, of Python and of C, within a call of `fn`."""
    seen = Counter[str]()

    def count(frame: Any, event: str, argument: Any) -> None:
        seen[event] += 1

    sys.setprofile(count)
    try:
        fn()
    finally:
        sys.setprofile(None)
    return seen["call"] + seen["c_call"]


def calls(epochs: Epochs) -> dict[str, float]:
    """{stage: calls of functions from the end of one replayed batch to the end of the next}, the fewest of a pass."""
    counted: dict[str, list[int]] = {}
    seen = Counter[str]()

    def count(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            seen["calls"] += 1

    @only_looking
    def on_batch(stage: str, number: int) -> None:
        sys.setprofile(None)
        if number:
            counted.setdefault(stage, []).append(seen["calls"])
        seen.clear()
        sys.setprofile(count)

    try:
        epochs.run(on_batch)
    finally:
        sys.setprofile(None)
    return {stage: min(values) for stage, values in counted.items()}


def times(epochs: Epochs, count: int = EPOCHS) -> dict[str, float]:
    """Microseconds of this thread's time: per batch of a stage, of each pass beside its batches, of the whole epoch."""
    found: dict[str, list[float]] = {}

    def timed(name: str, owner: Any) -> mock._patch:
        original = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                found.setdefault(name, []).append(time.thread_time() - start)

        return mock.patch.object(owner, name, run)

    static, last = epochs.static, [0.0]

    @only_looking
    def on_batch(stage: str, number: int) -> None:
        now = time.thread_time()
        if number:
            found.setdefault(f"{stage} a batch", []).append(now - last[0])
        last[0] = time.thread_time()

    with contextlib.ExitStack() as stack:
        for name in ("collect", "begin_epoch", "stage1", "stage2", "evaluate", "_check_settings", "_shuffle", "_draw"):
            stack.enter_context(timed(name, static))
        for _ in range(count):
            start = time.thread_time()
            epochs.run(on_batch)
            found.setdefault("epoch", []).append(time.thread_time() - start)
    per_pass = {name: len(epochs.parts.loaders["train"]) for name in ("collect", "stage1", "stage2")}
    result = {name: 1e6 * statistics.median(values) for name, values in found.items()}
    for stage, batches in per_pass.items():
        result[f"{stage} beside its batches"] = result[stage] - batches * result[f"{stage} a batch"]
    result["epoch beside its passes"] = result["epoch"] - sum(
        result[name] for name in (*per_pass, "begin_epoch", "evaluate")
    )
    return result


def outside(make: Callable[[Path, str], Config]) -> Seen:
    """What an epoch asks of a GPU outside of its graphs."""
    # results of the engine's operations are placeholders: whether they are finite says nothing
    finite = mock.patch.object(torch, "isfinite", lambda x: torch.ones_like(x, dtype=torch.bool))
    with PretendedGpu() as gpu, finite, tempfile.TemporaryDirectory(prefix="bench-host-") as folder:
        epochs = Epochs(make(Path(folder), "cuda"))
        with gpu.watch() as seen:
            epochs.run()
    return seen


def summary(seen: Seen) -> dict[str, int]:
    """Launches outside of graphs, and how often the host waits or copies."""
    return {"launches": seen.launches, "host": sum(seen.traffic.values())}


def where(epochs: Epochs, lines: int = 45) -> None:
    """Print the functions that take longest in an epoch."""
    profile = cProfile.Profile()
    profile.runcall(epochs.run)
    pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(lines)
