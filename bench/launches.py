"""python -m bench launches: GPU launches of the two-stage step's stages, counted without a GPU.

    python -m bench launches                 a table
    python -m bench launches --json          {"fast": {"stage1": n, "stage2": n, "draw": n, "collect": n}, ...}
    python -m bench launches --detail        by operation, part and calling line, and what involves the host

Counted at B=32 with the preset mosi on random data of MOSI's shape: the MiniLM text encoder, AMP in bf16. Nothing runs
on a GPU: `bench.pretend` has CPU tensors answer as if they were on one, and counts. What is counted is one call of a
stage's static function, which is what a CUDA graph holds; "draw" is what of it takes product rows, and is not in the
stages' numbers.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import shapes, stages
from bench.pretend import HostTraffic, HostTrafficError, PretendedGpu, Seen
from bench.stages import MODES, STAGES

__all__ = ["HostTraffic", "HostTrafficError", "PretendedGpu", "Seen", "count", "measure", "numbers"]


def count(fn: Callable[[], Any], gpu: PretendedGpu | None = None, warm: bool = True) -> Seen:
    """Launches of one call of `fn` on a GPU.

    Args:
        fn: anything to call; tensors made before count as on the GPU.
        gpu: the entered context that `fn` was prepared in; None makes one for the call.
        warm: call it once before counting, because the first call prepares what later calls reuse.
    """
    if gpu is None:
        with PretendedGpu() as gpu:
            return count(fn, gpu, warm)
    if warm:
        fn()
    with gpu.watch() as seen:
        fn()
    return seen


def measure(modes: tuple[str, ...] = MODES, check: bool = False) -> dict[str, dict[str, Seen]]:
    """{mode: {stage: launches of one batch}}.

    check: also compare with what operations declare, see `Seen.differ`, and note the lines that call them.
    """
    seen = {}
    for mode in modes:
        torch.manual_seed(0)
        anomalies = torch.autograd.set_detect_anomaly(check, check_nan=False)  # keeps the lines of forward passes
        with (
            anomalies,
            PretendedGpu(check=check) as gpu,
            tempfile.TemporaryDirectory(prefix="bench-launches-") as folder,
        ):
            data = stages.write_data(Path(folder) / "data", shapes.mosi(2 * stages.BATCH))
            trainer = stages.ready(stages.settings(mode, data, "cuda", "train.graphs=emulate"))
            seen[mode] = of_epochs(trainer, gpu)
    return seen


def of_epochs(trainer: Any, gpu: PretendedGpu) -> dict[str, Seen]:
    """{stage: launches of its last batch} in the second epoch with a bank."""
    seen_in: dict[str, Seen] = {}
    graphs, bank = trainer.step.static.graphs, None
    run = graphs.run

    def counted(key: tuple, function: Callable[[], None]) -> None:
        with gpu.watch() as seen:
            run(key, function)
        seen_in[key[0]] = seen

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(graphs, "run", counted))
        # the step's own watch asks operations for their device, which is truly the CPU
        stack.enter_context(mock.patch.object(graphs, "_watching", False))
        # results of the engine's operations are placeholders: whether they are finite says nothing
        stack.enter_context(mock.patch.object(torch, "isfinite", lambda x: torch.ones_like(x, dtype=torch.bool)))
        stack.enter_context(mock.patch.object(type(trainer.step), "_check_finite", lambda step, result: None))
        for number in range(2):
            bank = stages.epoch(trainer, number, bank)
        if "collect" not in seen_in:  # faithful mode takes features anew in every batch of stage 1
            trainer.step.static.collect(trainer.loaders["train"], bank.size, lambda stage, number: None)
    return seen_in


def numbers(seen: dict[str, dict[str, Seen]]) -> dict[str, dict[str, int]]:
    """{mode: {stage: launches}}. Product rows are counted apart, as "draw"."""
    return {mode: _numbers(parts) for mode, parts in seen.items()}


def _numbers(parts: dict[str, Seen]) -> dict[str, int]:
    draws = {stage: seen.by_part["products"] for stage, seen in parts.items()}
    counts = {stage: parts[stage].launches - draws[stage] for stage in ("stage1", "stage2", "collect")}
    return {
        "stage1": counts["stage1"],
        "stage2": counts["stage2"],
        "draw": draws["stage2"],
        "collect": counts["collect"],
    }


def table(seen: dict[str, dict[str, Seen]]) -> str:
    lines = [f"{'mode':10}" + "".join(f"{stage:>10}" for stage in STAGES)]
    for mode, counts in numbers(seen).items():
        lines.append(f"{mode:10}" + "".join(f"{counts[stage]:10}" for stage in STAGES))
    return "\n".join(lines)


def detail(seen_in: dict[str, dict[str, Seen]]) -> str:
    """Launches of every stage by part, by operation with its calls, and by line; and whatever involves the host."""
    lines = []
    for mode, parts in seen_in.items():
        for stage, seen in parts.items():
            lines.append(f"\n{mode} {stage}: {seen.launches} launches")
            lines.append("  " + ", ".join(f"{part} {n}" for part, n in seen.by_part.most_common()))
            for name, n in seen.by_operation.most_common():
                if n:
                    lines.append(f"  {n:6}  {name} ({seen.calls[name]} calls)")
            lines += [f"  {n:6}  {name}, {line}" for (line, name), n in sorted(seen.by_line.items())]
            lines += [f"  host:   {what} ({n} times)" for what, n in seen.traffic.most_common()]
            lines += [f"  not counted: engine.{name}: {why}" for name, why in seen.failed.items()]
            lines += [f"  engine.{n}: declares {a}, its host function has {b}" for n, (a, b) in seen.differ.items()]
    return "\n".join(lines).lstrip("\n")
