"""Counters of a two-stage step that do not depend on the machine's speed. They must not change.

    python -m bench.guard                                  compare with bench/guard.json; exit status 1 on a difference
    python -m bench.guard --update --reason "why"          accept the present counters
    python -m bench.guard --update-floors --reason "why"   measure the quick suites and accept their ratios x MARGIN,
                                                           for processors with this one's instructions

Counted, in `engine.train` on a fixed tiny data set and model, from the end of one batch to the end of the next in a
steady-state epoch (so drawing, loading and storing belong to it): calls of aten operations, as a dispatch mode sees
them; bytes of new storages that those calls return; FLOPs of matrix products, by torch's own formulas and those of
engine/kernels/flops.py. Memory that an operation uses within itself does not show.

Beside them, GPU launches of every stage of the flagship: see `bench.launches`. And what the host does where graphs are
replayed, on the tiny data set: see `bench.host`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from bench import machine, shapes
from engine.config import Config, load_config
from engine.files import write_json
from engine.kernels import flops
from engine.trainer import train

FILE = Path(__file__).with_name("guard.json")
MODES, STAGES = ("fast", "faithful"), ("stage1", "stage2")
COUNTERS = ("aten_calls", "bytes_allocated", "flops")
VERSIONS = ("torch", "transformers", "triton")
MARGIN = 0.7
FLOOR_SUITES = ("gru", "knn", "critics", "streaming_infonce", "concat_critic", "cubemlp", "loader_throughput")
BATCH = 8
# Short sequences: the plain recurrence makes some fifty calls a frame.
SHAPE = shapes.Shape("tiny", 2.0, 12, 5, 20, 20, 26)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


class Counters(TorchDispatchMode):
    """Within the context it counts operations by name, the bytes of the storages they make, and FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        flops.register()
        self.operations: Counter[str] = Counter()
        self.bytes = self.flops = 0

    def result(self) -> dict[str, Any]:
        return {
            "aten_calls": sum(self.operations.values()),
            "bytes_allocated": self.bytes,
            "flops": self.flops,
            "operations": dict(sorted(self.operations.items())),
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        known = {_storage(t) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **kwargs)
        self.operations[str(func)] += 1
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in known:
                known.add(_storage(tensor))
                self.bytes += tensor.untyped_storage().nbytes()
        packet = getattr(func, "_overloadpacket", None)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Stop(Exception):
    pass


class _SecondBatches:
    """A callback that counts the second batch of both stages in epoch 1, the first with a bank, and then stops."""

    def __init__(self) -> None:
        self.epoch = 0
        self.counting = ExitStack()
        self.counters_of: dict[str, dict[str, Any]] = {}

    def on_start(self, first_epoch: int, epochs: int, batches: dict[str, int]) -> None:
        pass

    def on_batch(self, stage: str, number: int) -> None:
        if self.epoch != 1 or stage not in STAGES or stage in self.counters_of:
            return
        if number == 0:
            self.counters = self.counting.enter_context(Counters())
        if number == 1:
            self.counting.close()
            self.counters_of[stage] = self.counters.result()

    def on_epoch(self, record: dict[str, Any], improved: bool) -> None:
        self.epoch += 1
        if self.epoch == 2:
            raise _Stop

    def on_end(self) -> None:
        pass


def tiny_text_encoder(folder: Path, dropout: float = 0.1) -> Path:
    """A two-layer BERT of width 32 with a word-level tokeniser of `bench.shapes.WORDS`, written to `folder`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *dict.fromkeys(shapes.WORDS)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    BertModel(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def tiny_config(mode: str, data: Path, text_encoder: Path) -> Config:
    settings = [
        f"mode={mode}", f"data.path={data}", f"text_encoder={text_encoder}", f"batch_size={BATCH}", "epochs=2",
        "data.time_len=20", "model.d_common=32", "model.cubemlp.d_hiddens=10-3-32=5-3-32",
        "model.cubemlp.d_outs=10-3-32=5-3-32", "objective.hidden=48", "objective.embed=32", "threads=1", "device=cpu",
        "data.length_rule=recorded", "train.amp=off",
        "output.report=false", "output.tensorboard=false", "output.progress=false", "output.features=false",
    ]  # fmt: skip
    return load_config("mosi", settings)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(modes: tuple[str, ...] = MODES) -> dict[str, dict[str, dict[str, Any]]]:
    """{mode: {stage: {counter: number, "operations": {name: calls}}}} of the engine as it is."""
    counters = {}
    with tempfile.TemporaryDirectory(prefix="bench-guard-") as name, _threads(1):
        folder = Path(name)
        encoder = tiny_text_encoder(folder / "encoder")
        counts = {"train": 3 * BATCH, "valid": 4, "test": 4}
        splits = {split: shapes.utterances(SHAPE, n, seed) for seed, (split, n) in enumerate(counts.items())}
        store = shapes.write_store(folder / "data", splits, str(encoder))
        for mode in modes:
            callback = _SecondBatches()
            with suppress(_Stop):
                train(tiny_config(mode, store, encoder), folder / mode, callbacks=[callback])
            counters[mode] = callback.counters_of
    return counters


def differences(recorded: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """One line for every counter that differs, with the operations whose calls differ."""
    lines = []
    for mode, stages in measured.items():
        for stage, counters in stages.items():
            before = recorded.get(mode, {}).get(stage, {})
            for name in COUNTERS:
                if before.get(name) != counters[name]:
                    lines.append(f"{mode} {stage} {name}: recorded {before.get(name)}, found {counters[name]}")
            if before and before["aten_calls"] != counters["aten_calls"]:
                old, new = before["operations"], counters["operations"]
                changed = [
                    f"{op} {old.get(op, 0)} -> {new.get(op, 0)}"
                    for op in sorted({*old, *new})
                    if old.get(op) != new.get(op)
                ]
                lines.append(f"{mode} {stage} operations: " + ", ".join(changed))
    return lines


def measure_launches() -> dict[str, dict[str, int]]:
    """{mode: {stage: GPU launches per batch}} of the flagship at B=32."""
    from bench import launches

    return launches.numbers(launches.measure())


def measure_host() -> dict[str, dict[str, int]]:
    """Launches and waits outside of graphs. They do not depend on Python's version, as its calls do."""
    from bench import host

    return host.outside_of_graphs(host.tiny)


def host_differences(recorded: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """One line for every number of the host's that differs."""
    return [
        f"host, {what}, {name}: recorded {recorded.get(what, {}).get(name)}, found {number}"
        for what, numbers in measured.items()
        for name, number in numbers.items()
        if recorded.get(what, {}).get(name) != number
    ]


def launch_differences(recorded: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """One line for every stage whose launches differ."""
    return [
        f"{mode} {stage} launches: recorded {recorded.get(mode, {}).get(stage)}, found {number}"
        for mode, stages in measured.items()
        for stage, number in stages.items()
        if recorded.get(mode, {}).get(stage) != number
    ]


def load() -> dict[str, Any]:
    return (
        json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"counters": {}, "floors": {}, "history": []}
    )


def floors() -> dict[str, float]:
    """{suite: least ratio of a quick run} on record for processors with this one's instructions; empty without any."""
    return load()["floors"].get(machine.instructions(), {})


def environment() -> dict[str, str]:
    """What the counters depend on beside the engine: another version's operations are others, and without a C++
    compiler the compiled kernels' fallbacks run."""
    from engine.kernels.compilers import compilers

    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    return versions | {"C++ compiler": "yes" if compilers() else "no"}


def other_environment(recorded: dict[str, Any]) -> list[str]:
    """The differences between this environment and that of the recorded counters."""
    known = recorded.get("environment", {})
    return [f"{k}: {v} (recorded: {known[k]})" for k, v in environment().items() if k in known and known[k] != v]


def update(reason: str) -> list[str]:
    """Record the present counters and the reason of the change. Returns the differences."""
    recorded, measured, launched, host = load(), measure(), measure_launches(), measure_host()
    lines = differences(recorded["counters"], measured) + launch_differences(recorded.get("launches", {}), launched)
    lines += host_differences(recorded.get("host", {}), host)
    recorded["counters"], recorded["launches"], recorded["host"] = measured, launched, host
    recorded["environment"] = environment()
    recorded["history"].append({"reason": reason, "changes": [li for li in lines if " operations: " not in li]})
    write_json(FILE, recorded)
    return lines


def measured_ratio(name: str, rounds: int = 3) -> float:
    """The ratio of a quick run of a suite."""
    from bench import runner

    return runner.run(name, runner.Setting(quick=True), rounds, torch.get_num_threads(), memory=False)["ratio"]


def update_floors(reason: str, names: tuple[str, ...] = FLOOR_SUITES) -> dict[str, float]:
    """Record floors of the quick suites' ratios: the present ratios times MARGIN."""
    measured = {name: round(MARGIN * measured_ratio(name), 2) for name in names}
    recorded, instructions = load(), machine.instructions()
    recorded["floors"].setdefault(instructions, {}).update(measured)
    changes = [f"floor of {name}, {instructions}: {floor}" for name, floor in measured.items()]
    recorded["history"].append({"reason": reason, "changes": changes})
    write_json(FILE, recorded)
    return measured


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.guard", description="deterministic counters of a training step"
    )
    parser.add_argument("--update", action="store_true", help="accept the present counters")
    parser.add_argument("--update-floors", nargs="*", metavar="NAME", help="accept the present ratios of quick suites")
    parser.add_argument("--reason", help="why they changed; kept in guard.json")
    a = parser.parse_args(arguments)
    updating = a.update or a.update_floors is not None
    if updating and not a.reason:
        parser.error("--update and --update-floors need --reason")
    if a.update:
        print("\n".join(update(a.reason)) or "nothing changed")
    if a.update_floors is not None:
        machine.pin_threads(machine.cores())
        print(update_floors(a.reason, tuple(a.update_floors) or FLOOR_SUITES))
    if updating:
        return 0
    recorded = load()
    if others := other_environment(recorded):
        print("not comparable: " + ", ".join(others), file=sys.stderr)
        return 2
    lines = differences(recorded["counters"], measure())
    lines += launch_differences(recorded.get("launches", {}), measure_launches())
    lines += host_differences(recorded.get("host", {}), measure_host())
    print("\n".join(lines) or "counters as recorded")
    if lines:
        print('If this is meant: python -m bench.guard --update --reason "..."', file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
