"""python -m bench host: what Python does in a training epoch whose CUDA graphs are only replayed, without a GPU.

    python -m bench host              microseconds, per batch of a stage and beside the batches, and the counters
    python -m bench host --json       the same as one line
    python -m bench host --where      the functions that take longest

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

from bench import guard, pretend, shapes, stages
from bench.pretend import PretendedGpu, Seen
from engine.config import Config
from engine.step.bank import FeatureBank
from engine.step.graphs import GraphRunner
from engine.step.passes import OnBatch, nothing
from engine.training.parts import Parts

WARM, EPOCHS = 4, 5  # epochs before those that are measured, and these


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
        for number in range(WARM):
            self.run()
            if number == 1:
                self._fill_banks()

    def _fill_banks(self) -> None:
        """Give all banks the same rows, no two of which are equal: most of them are of batches that did not run."""
        label = self.parts.dataset.splits["train"].label
        rows: dict[Any, torch.Tensor] = {(self.parts.step.label, label.shape): label}
        for bank in self.static._banks.values():
            for name, value in bank.rows.items():
                value.copy_(rows.setdefault((name, value.shape), torch.randn_like(value)))

    def run(self, on_batch: OnBatch = nothing) -> None:
        """One epoch of training and an evaluation of the validation set."""
        self.train(on_batch)
        self.evaluate()

    def train(self, on_batch: OnBatch = nothing) -> None:
        parts, c = self.parts, self.parts.config
        loader = parts.loaders["train"]
        loader.set_epoch(self.number)
        self.number += 1
        # a replay stores nothing, and all rows have to be there
        with mock.patch.object(FeatureBank, "clear", lambda bank: bank.filled.fill_(True)):
            self.bank = parts.step.train_epoch(
                loader, parts.samples, self.bank, batch_size=c.batch_size, stage1_n=c.train.stage1_n,
                stage1_features=c.train.stage1_features, on_batch=on_batch,
            )[1]  # fmt: skip

    def evaluate(self) -> None:
        """A pass over the validation set with the averaged weights."""
        full = mock.patch.object(FeatureBank, "clear", lambda bank: bank.filled.fill_(True))
        with full, self.parts.step.averaged():
            self.parts.evaluate("valid", self.parts.loaders["valid"], self.bank if self.number > 1 else None)


def calls(epochs: Epochs) -> dict[str, int]:
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


WAITS = {"Tensor.tolist", "copy to the host", "copy to the GPU", "torch.tensor", "aten.copy_ with a tensor of the host"}
WAITS |= {f"aten.{name}" for name in pretend.WAITS}
"""What makes the host wait for the GPU, of what `Seen.traffic` names."""


def waits(seen: Seen) -> int:
    """How often the host waits for the GPU."""
    return sum(times for what, times in seen.traffic.items() if what in WAITS)


def outside(make: Callable[[Path, str], Config]) -> dict[str, Seen]:
    """What an epoch asks of a GPU outside of its graphs.

    Returns:
        {"collect to stage1": from the end of the last batch of one stage to the end of the first of the next, ...,
        "within stages": from batch to batch, "evaluate": a pass over the validation set}.
    """
    found: dict[str, Seen] = {}
    last = ["begin"]
    # results of the engine's operations are placeholders: whether they are finite says nothing
    finite = mock.patch.object(torch, "isfinite", lambda x: torch.ones_like(x, dtype=torch.bool))
    with PretendedGpu() as gpu, finite, tempfile.TemporaryDirectory(prefix="bench-host-") as folder:
        epochs = Epochs(make(Path(folder), "cuda"))
        gpu.seen = Seen()

        def take(name: str) -> None:
            seen = found.setdefault(name, Seen())
            for field in ("by_operation", "calls", "by_part", "traffic"):
                getattr(seen, field).update(getattr(gpu.seen, field))
            gpu.seen = Seen()

        @only_looking
        def on_batch(stage: str, number: int) -> None:
            take("within stages" if stage == last[0] else f"{last[0]} to {stage}")
            last[0] = stage

        epochs.train(on_batch)
        take(f"{last[0]} to end")
        epochs.evaluate()
        take("evaluate")
        gpu.seen = None
    return found


def outside_of_graphs(make: Callable[[Path, str], Config]) -> dict[str, dict[str, int]]:
    """{"launches": {where: number, as of `outside`}, "waits": ...}."""
    seen = outside(make)
    return {"launches": {n: s.launches for n, s in seen.items()}, "waits": {n: waits(s) for n, s in seen.items()}}


def calls_a_batch(make: Callable[[Path, str], Config]) -> dict[str, int]:
    """See `calls`."""
    with tempfile.TemporaryDirectory(prefix="bench-host-") as folder:
        return calls(Epochs(make(Path(folder), "cpu")))


def measure() -> dict[str, dict[str, float]]:
    """Times and counters of the flagship."""
    with tempfile.TemporaryDirectory(prefix="bench-host-") as folder:
        microseconds = times(Epochs(flagship(Path(folder))))
    return {"microseconds": microseconds, "calls a batch": calls_a_batch(flagship), **outside_of_graphs(flagship)}


def table(measured: dict[str, dict[str, float]]) -> str:
    lines = []
    for what, numbers in measured.items():
        lines.append(what)
        lines += [f"  {name:40}{number:12.1f}" for name, number in sorted(numbers.items())]
    return "\n".join(lines)


def where(lines: int = 45) -> None:
    """Print the functions that take longest in an epoch of the flagship."""
    with tempfile.TemporaryDirectory(prefix="bench-host-") as folder:
        epochs, profile = Epochs(flagship(Path(folder))), cProfile.Profile()
        profile.runcall(epochs.run)
    pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(lines)
