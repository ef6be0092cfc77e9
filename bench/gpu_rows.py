"""What `python -m bench.gpu` measures, in order of importance: groups of rows. Each group is a generator of entries.

An entry is {"row", "side", the case's sizes and precision, and what was measured}: `ms` (median, the sides taking
turns), `graph_ms` (the same work replayed as a CUDA graph), `wall_ms`, `device_ms`, `launches`, `extra_mib`, `error`;
or why it was not: `failed` (an exception), `red` (the engine's result is wrong, so that its time would mean nothing).
A row that fails leaves the others of its group alone.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import epochs, guard, shapes, stages
from bench.gpu_operations import command, operations
from bench.machine import ROOT
from bench.runner import Setting
from bench.timing import Clock, error_of, precision
from engine.config import Config

Entry = dict[str, Any]
MOSI, MOSEI = 1284, 16326  # training samples


@dataclass
class Context:
    """Where and for how long: `deadline` is a time of `time.monotonic`.

    rehearse: run what a GPU runs, small and on the CPU, within `bench.gpu_rehearsal.pretended_gpu`.
    """

    device: str
    quick: bool = False
    rounds: int = 3
    deadline: float = math.inf
    rehearse: bool = False

    def __post_init__(self) -> None:
        self.clock = Clock(self.device, True if self.rehearse else None)
        self.setting = Setting(self.quick, self.device)

    def left(self) -> float:
        return self.deadline - time.monotonic()


def short(cause: BaseException) -> str:
    """The error in one line, with the last place of this project that it came through."""
    trace, place = cause.__traceback__, ""
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.is_relative_to(ROOT / "engine") or file.is_relative_to(ROOT / "bench"):
            place = f" ({file.relative_to(ROOT)}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}{place}"


def kept(row: str, entries: Iterator[Entry], side: str = "engine") -> Iterator[Entry]:
    """The entries, up to the first failure, which becomes an entry of `row`."""
    try:
        yield from entries
    except Exception as cause:
        yield {"row": row, "side": side, "failed": short(cause)}


def measured(
    context: Context, sides: dict[str, Callable[[], Any]], graphs: bool = True, traces: bool = True
) -> dict[str, Entry]:
    """{side: what was measured}. A side that fails gives its reason, and the others go on without it."""
    clock, entries, running = context.clock, {side: {} for side in sides}, {}
    for side, run in sides.items():
        try:
            run()
            running[side] = run
        except Exception as cause:
            entries[side]["failed"] = short(cause)

    def failed(side: str, cause: Exception) -> None:
        entries[side]["failed"] = short(cause)
        running.pop(side)

    for side, ms in clock.interleaved(dict(running), context.rounds, failed=failed).items():
        entries[side]["ms"] = ms
    replays = {}
    for side, run in running.items():
        entry = entries[side]
        try:
            entry["wall_ms"] = clock.wall(run, 3 if context.quick else 10)
            if (peak := clock.peak_mib(run)) is not None:
                entry["extra_mib"] = peak
        except Exception as cause:
            entry["failed"] = short(cause)
        try:
            entry |= clock.traced(run) if traces else {}
        except Exception as cause:
            entry["trace_failed"] = short(cause)
        if graphs and side != "compile":
            try:
                replays[side] = clock.graph(run)
            except Exception as cause:
                entry["graph_failed"] = short(cause)

    def broke(side: str, cause: Exception) -> None:
        entries[side]["graph_failed"] = short(cause)

    for side, ms in clock.interleaved(replays, context.rounds, failed=broke).items():
        entries[side]["graph_ms"] = ms
    return entries


# -- the step ---------------------------------------------------------------------------------------------------------


def configured(mode: str, folder: Path, context: Context, samples: int, make: Any, *words: str) -> Config:
    """Settings of a run on generated data in `folder`; a quick one has a tiny text encoder."""
    if not context.quick:
        return stages.settings(mode, stages.write_data(folder / "data", make(samples)), context.device, *words)
    make(4), stages.settings(mode, folder, "cpu", *words)  # what the whole run makes of them is not used
    encoder = guard.tiny_text_encoder(folder / "encoder")
    data = shapes.utterances(guard.SHAPE, 3 * guard.BATCH)
    config = guard.tiny_config(mode, stages.write_data(folder / "data", data, str(encoder)), encoder)
    return config.model_copy(update={"device": context.device})


def step(mode: str, context: Context) -> Iterator[Entry]:
    """The stages of a MOSI-shaped step, each eagerly, traced and as a graph; and whole epochs of `engine.train`."""
    name = f"step_{mode}"
    gate = {"fast": epochs.gate_fast, "faithful": epochs.gate_faithful}[mode]
    try:
        with precision("fp32", context.device):
            gate(context.setting)
    except Exception as cause:
        yield {"row": name, "side": "engine", "red": short(cause)}
        return
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as place:
        config = configured(mode, Path(place), context, MOSI, shapes.mosi)
        yield from kept(
            f"epoch_{mode}", epoch(f"epoch_{mode}", config, context, {"samples": MOSI, "B": config.batch_size})
        )
        yield from kept(f"batches_{mode}", batches(mode, config, context))
        if context.left() > 10:
            yield from kept(f"batches_{mode}", uncaptured(mode, config, context), "uncaptured")


def uncaptured(mode: str, config: Config, context: Context) -> Iterator[Entry]:
    """Time per batch of each stage run eagerly, and as one graph."""
    eagerly = stages.prepare(with_graphs(config, "off"), stages.BANK if not context.quick else 24)
    for stage in ("stage2", "stage1", "draw", "collect"):
        if context.left() < 5:
            return
        times = measured(context, {"eager": eagerly[stage]}, graphs=stage in ("stage1", "stage2"))
        yield {"row": f"{stage}_{mode}", "side": "uncaptured", "B": config.batch_size, **times["eager"]}


def with_graphs(config: Config, graphs: str) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"graphs": graphs})})


def batches(mode: str, config: Config, context: Context) -> Iterator[Entry]:
    """Time per batch of each stage as training runs it: a whole pass of replayed graphs, divided by its batches."""
    clock = context.clock
    trainer = stages.ready(with_graphs(config, "auto" if clock.device.type == "cuda" else "emulate"))
    for stage, (run, count) in stages.passes(trainer).items():
        entry = {"row": f"{stage}_{mode}", "side": "engine", "B": config.batch_size}
        try:
            entry["wall_ms"] = clock.wall(run, 1 if context.quick else 3) / count
            yield entry  # and again with its trace, which might not end
            if traced := clock.traced(run):
                yield entry | {key: number / count for key, number in traced.items()}
        except Exception as cause:
            yield {**entry, "trace_failed" if "wall_ms" in entry else "failed": short(cause)}


def epoch(name: str, config: Config, context: Context, case: Entry) -> Iterator[Entry]:
    """Seconds of steady-state epochs, and the share of one in which the GPU is busy."""
    config = config.model_copy(update={"epochs": 100000})
    start = time.monotonic()
    run = epochs.EngineEpochs(config)
    try:
        first = time.monotonic() - start
        run()  # the first with information terms: kernels are compiled, graphs captured
        seconds: list[float] = []
        while len(seconds) < (1 if context.quick else 7):
            seconds.append(run())
            if len(seconds) >= 2 and context.left() < 3 * seconds[-1] + 5:
                break
        entry = {"row": name, "side": "engine", **case, "seconds": statistics.median(seconds), "all": seconds}
        entry["first_epoch_s"] = first
        yield entry  # and again with its trace, which might not end
        try:
            # what is read back is the checkpoint, which the epoch's seconds leave out
            if traced := context.clock.traced(run, without="Memcpy DtoH"):
                yield entry | traced | {"busy": traced["device_ms"] / 1e3 / entry["seconds"]}
        except Exception as cause:
            yield entry | {"trace_failed": short(cause)}
    finally:
        run.close()


def eager_epoch(context: Context) -> Iterator[Entry]:
    """An epoch of the eager baseline on ready-made batches, in float32 as in the published code."""
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as place:
        encoder = str(guard.tiny_text_encoder(Path(place) / "encoder")) if context.quick else "minilm"
        samples = shapes.utterances(guard.SHAPE, 2 * guard.BATCH) if context.quick else shapes.mosi(MOSI)
        work = epochs.build_baseline(samples, context.setting, encoder)
        context.clock.synchronize()
        start = time.monotonic()
        work.run()  # the first epoch, which is the warm-up, has run
        context.clock.synchronize()
        yield {"row": "epoch_fast", "side": "baseline", "samples": MOSI, "seconds": time.monotonic() - start}


def mosei(context: Context) -> Iterator[Entry]:
    """Epochs on data of MOSEI's shape and size at B=128."""
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as place:
        config = configured("fast", Path(place), context, MOSEI, shapes.mosei, "batch_size=128")
        yield from kept(
            "epoch_mosei", epoch("epoch_mosei", config, context, {"samples": MOSEI, "B": config.batch_size})
        )


# -- InfoNCE ----------------------------------------------------------------------------------------------------------

INFONCE = (  # rows, width, precisions: those of the table first
    (16384, 128, ("bf16", "tf32", "fp32")), (16384, 512, ("bf16",)), (16384, 768, ("bf16",)), (65536, 128, ("bf16",)),
    (1024, 128, ("fp32", "bf16")), (4096, 128, ("bf16", "tf32", "fp32")), (16384, 768, ("fp32",)),
)  # fmt: skip
QUICK_INFONCE = ((96, 16, ("fp32",)), (96, 160, ("fp32",)))
DENSE_MOST = 16384  # rows of the largest matrix of scores that eager torch is asked to hold
# |loss - exact| / |exact| beyond which a result counts as wrong
RED = {"fp32": 1e-5, "tf32": 2e-3, "bf16": 5e-3}


def embeddings(rows: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """q and k [rows, width] that depend on each other, with scores of order 1."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(rows, width, generator=generator)
    q = (k + torch.randn(rows, width, generator=generator)) / math.sqrt(2)
    return tuple((width**-0.25 * v).to(device) for v in (q, k))


def dense(q: Tensor, k: Tensor) -> Tensor:
    """InfoNCE's loss from all scores in memory."""
    return F.cross_entropy((q @ k.t()).float(), torch.arange(len(q), device=q.device))


def exact_infonce(q: Tensor, k: Tensor, chunk: int = 2048) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64, one chunk of rows at a time."""
    q, k = q.double(), k.double()
    value, dq, dk = q.new_zeros(()), torch.empty_like(q), torch.zeros_like(k)
    for start in range(0, len(q), chunk):
        rows = slice(start, start + chunk)
        scores = q[rows] @ k.t()
        value += (scores.logsumexp(1) - scores.diagonal(start)[: len(scores)]).sum() / len(q)
        slope = scores.softmax(1)
        slope[torch.arange(len(slope)), torch.arange(start, start + len(slope))] -= 1
        slope /= len(q)
        dq[rows] = slope @ k
        dk += slope.t() @ q[rows]
    return value, dq, dk


def libraries() -> tuple[dict[str, Callable], dict[str, str]]:
    """{side: loss of q and k} of the kernel libraries that are installed, and why the others are absent."""
    others: dict[str, Callable] = {}
    absent = {}
    try:
        from cut_cross_entropy import linear_cross_entropy

        others["cce"] = lambda q, k: linear_cross_entropy(q, k, torch.arange(len(q), device=q.device), filter_eps=None)
    except Exception as cause:
        absent["cce"] = short(cause)
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        others["liger"] = lambda q, k: liger(k, q, torch.arange(len(q), device=q.device))
    except Exception as cause:
        absent["liger"] = short(cause)
    return others, absent


def infonce(context: Context) -> Iterator[Entry]:
    """The engine against eager torch, torch.compile and kernel libraries; errors against float64."""
    from engine.kernels import infonce as ours

    others, absent = libraries()
    for side, why in absent.items():
        yield {"row": "infonce", "side": side, "failed": why}
    compiled = torch.compile(dense, dynamic=False)
    for rows, width, precisions in QUICK_INFONCE if context.quick else INFONCE:
        if context.left() < 5:
            return
        given = embeddings(rows, width, context.device)
        for name in precisions:
            sides = {"engine": ours}
            if rows <= DENSE_MOST:
                sides["eager"] = dense
                if width == 128 and rows == DENSE_MOST and not context.quick:
                    sides["compile"] = compiled
            # neither has a float32 backward pass of float32's accuracy
            sides |= {} if name == "fp32" else others
            yield from _infonce_case(context, given, name, sides)


def _infonce_case(context: Context, given: tuple[Tensor, Tensor], name: str, sides: dict) -> Iterator[Entry]:
    rows, width = given[0].shape
    case = {"row": "infonce", "B": rows, "d": width, "precision": name}
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    q, k = (v.to(dtype) for v in given)
    # autocast would not touch the operation; the inputs' type decides
    with precision("tf32" if name == "tf32" else "fp32", context.device):
        exact = exact_infonce(q, k)
        runs, errors = {}, {}
        for side, loss in sides.items():
            leaves = [v.detach().clone().requires_grad_() for v in (q, k)]

            def run(loss: Callable = loss, leaves: list[Tensor] = leaves) -> Tensor:
                for leaf in leaves:
                    leaf.grad = None
                value = loss(*leaves)
                value.backward()
                return value

            try:
                value = run().detach()
                result = (value, *(leaf.grad for leaf in leaves))
                errors[side] = [error_of(f, e) for f, e in zip(result, exact, strict=True)]
                if side == "engine" and not errors[side][0] <= RED[name]:
                    yield {**case, "side": side, "red": f"loss off by {errors[side][0]:.1e}", "error": errors[side]}
                    continue
                runs[side] = run
            except Exception as cause:
                yield {**case, "side": side, "failed": short(cause)}
        for side, entry in measured(context, runs, traces=False).items():
            yield {**case, "side": side, **entry, "error": errors[side]}


# -- the flagship's parts ---------------------------------------------------------------------------------------------


def modules(context: Context) -> Iterator[Entry]:
    """Concat critic, CubeMLP, five critics: the engine against the eager modules and torch.compile of them."""
    from bench.suites import concat_critic, critics, cubemlp

    suites = {"cubemlp": cubemlp, "concat_critic": concat_critic, "five_critics": critics}
    right = []
    for name, suite in suites.items():
        try:
            with precision("fp32", context.device):
                suite.gate(context.setting)
            right.append(name)
        except Exception as cause:
            yield {"row": name, "side": "engine", "red": short(cause)}
    kinds = ("fp32",) if context.quick else ("tf32", "bf16", "fp32")
    for name in right:
        for kind in ("fp32",) if name == "five_critics" else kinds:
            if context.left() < 5:
                return
            yield from kept(name, _module(context, name, suites[name], kind, ("engine", "baseline")))
    for name in right:  # compiling takes half a minute each
        if name == "five_critics" or context.quick or context.left() < 45:
            continue
        yield from kept(name, _module(context, name, suites[name], kinds[0], ("compile",)))


def _module(context: Context, name: str, suite: Any, kind: str, sides: Sequence[str]) -> Iterator[Entry]:
    runs, size = {}, 0
    case = {"row": name, "precision": kind}
    for side in sides:
        try:
            work = suite.build(side, context.setting)
            size, runs[side] = work.samples, _in_precision(work.run, kind, context)
        except Exception as cause:
            yield {**case, "side": "eager" if side == "baseline" else side, "failed": short(cause)}
    for side, entry in measured(context, runs).items():
        yield {**case, "B": size, "side": "eager" if side == "baseline" else side, **entry}


def _in_precision(run: Callable[[], Any], kind: str, context: Context) -> Callable[[], Any]:
    def call() -> None:
        with precision(kind, context.device):
            run()

    return call


# -- product rows -----------------------------------------------------------------------------------------------------


def draws(context: Context) -> Iterator[Entry]:
    """Six sets of product rows per batch; and, on sides that can, a whole epoch of them and one batch of that."""
    from bench.suites import knn

    try:
        knn.gate(context.setting)
    except Exception as cause:
        yield {"row": "draws", "side": "engine", "red": short(cause)}
        return
    for size, batch in ((300, 16),) if context.quick else ((MOSI, 32), (MOSEI, 128)):
        if context.left() < 5:
            return
        yield from kept("draws", _draws(context, size, batch))


def _draws(context: Context, size: int, batch: int) -> Iterator[Entry]:
    from bench.suites import knn
    from engine.kernels import knn_product

    case = {"row": "draws", "N": size, "B": batch}
    rows = knn.bank(size, context.setting)
    generator = torch.Generator().manual_seed(0)
    sampler = knn_product.ProductSampler(knn_product.Bank(rows), knn.NEIGHBOURS, **knn.MODES["engine"])
    asked = torch.arange(batch // knn.NEIGHBOURS, device=context.device)

    def brute() -> Any:
        return [torch.cdist(rows[n][asked], rows[n]).topk(knn.NEIGHBOURS, largest=False) for n in "TAV"]

    times = measured(
        context,
        {"engine": lambda: sampler.draw(knn.TERMS, batch, generator), "torch": brute},
        graphs=False,
    )
    for side, entry in times.items():
        yield {**case, "side": side, **entry}
    batches = [batch] * (size // batch)

    def whole() -> Any:
        return knn_product.draw_epoch(sampler, knn.TERMS, batches, generator)

    try:
        drawn = whole()
        times = measured(context, {"epoch": whole}, graphs=False)
        times |= measured(context, {"take": lambda: drawn.take(1)})
        for side, entry in times.items():
            yield {**case, "row": "epoch_draws" if side == "epoch" else "take_rows", "side": "engine", **entry}
    except Exception as cause:
        yield {**case, "row": "epoch_draws", "side": "engine", "failed": short(cause)}


def ceilings(context: Context) -> Iterator[Entry]:
    """The limits of the chip: products of 8192 in every precision, and copying."""
    size = 256 if context.quick else 8192
    for name in ("fp32",) if context.quick else ("bf16", "tf32", "fp32"):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        a, b = (torch.randn(size, size, device=context.device, dtype=dtype) for _ in range(2))
        with precision("tf32" if name == "tf32" else "fp32", context.device):
            ms = context.clock.interleaved({"product": lambda a=a, b=b: a @ b}, 1)["product"]
        yield {"row": "ceiling", "side": "torch", "precision": name, "tflops": 2 * size**3 / ms / 1e9}
    x = torch.empty(2**20 if context.quick else 2**30, dtype=torch.int8, device=context.device)
    y = torch.empty_like(x)
    ms = context.clock.interleaved({"copy": lambda: y.copy_(x)}, 1)["copy"]
    yield {"row": "ceiling", "side": "torch", "copy_tb_s": 2 * x.numel() / ms / 1e9}


def tune(context: Context) -> Iterator[Entry]:
    """Measure every operation with several algorithms and keep the result: engine/kernels/dispatch.json.

    The entries hold what was measured, too: `python -m bench.gpu --adopt DIR` puts it into the table elsewhere.
    """
    from engine.kernels import dispatch

    if not context.clock.cuda:
        yield {"row": "tune", "side": "engine", "failed": "a table is of a GPU"}
        return
    dispatch._import_operations()
    for name in sorted(n for n, known in dispatch._operations.items() if known.work is not None):
        if context.left() < 10:
            return
        try:
            small = {"precisions": ("fp32",), "classes": _small(name), "milliseconds": 1.0} if context.quick else {}
            entries = dispatch.measure(name, context.device, **small)
            if not context.quick:
                dispatch.write(dispatch.TABLE, entries)
            yield {"row": "tune", "side": "engine", "operation": name, "entries": len(entries), "table": entries}
        except Exception as cause:
            yield {"row": "tune", "side": "engine", "operation": name, "failed": short(cause)}


def _small(operation: str) -> list[dict[str, int]]:
    """Sizes at which a CPU tries an operation's candidates."""
    from engine.kernels import dispatch

    return [{name: min(size, 32) for name, size in dispatch._operations[operation].classes[0].items()}]


@dataclass(frozen=True)
class Group:
    """`most`: seconds it may take. `least`: it does not start with fewer seconds left."""

    run: Callable[[Context], Iterator[Entry]]
    most: float
    least: float = 20.0


GROUPS = {
    "step_fast": Group(lambda context: step("fast", context), 120),
    "operations": Group(operations, 45),
    "modules": Group(modules, 90),
    "command": Group(command, 75),
    "step_faithful": Group(lambda context: step("faithful", context), 80),
    "mosei": Group(mosei, 120, 50),
    "ceilings": Group(ceilings, 25),
    "draws": Group(draws, 40),
    "infonce": Group(infonce, 100),
    "eager_epoch": Group(eager_epoch, 100, 50),
}
TUNE = Group(tune, 300)
