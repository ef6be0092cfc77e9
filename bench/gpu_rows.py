"""What `python -m bench.gpu` measures, in order of importance: groups of rows. Each group is a generator of entries.

An entry is {"row", "side", the case's sizes and precision, and what was measured}: `ms` (median, the sides taking
turns), `graph_ms` (the same work replayed as a CUDA graph), `wall_ms`, `device_ms`, `launches`, `extra_mib`, `error`;
or why it was not: `failed` (an exception), `red` (the engine's result is wrong, so that its time would mean nothing).
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import epochs, guard, shapes, stages
from bench.runner import Setting
from bench.timing import Clock, error_of, precision
from engine.config import Config

Entry = dict[str, Any]
MOSI, MOSEI = 1284, 16326  # training samples


@dataclass
class Context:
    """Where and for how long: `deadline` is a time of `time.monotonic`."""

    device: str
    quick: bool = False
    rounds: int = 3
    deadline: float = math.inf

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)
        self.setting = Setting(self.quick, self.device)

    def left(self) -> float:
        return self.deadline - time.monotonic()


def short(cause: BaseException) -> str:
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"


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
    for side, ms in clock.interleaved(running, context.rounds).items():
        entries[side]["ms"] = ms
    replays = {}
    for side, run in running.items():
        entry = entries[side]
        try:
            entry |= {"wall_ms": clock.wall(run, 3 if context.quick else 10), **(clock.traced(run) if traces else {})}
            if (peak := clock.peak_mib(run)) is not None:
                entry["extra_mib"] = peak
        except Exception as cause:
            entry["failed"] = short(cause)
        if graphs and side != "compile":
            try:
                replays[side] = clock.graph(run)
            except Exception as cause:
                entry["graph_failed"] = short(cause)
    for side, ms in clock.interleaved(replays, context.rounds).items():
        entries[side]["graph_ms"] = ms
    return entries


# -- the step ---------------------------------------------------------------------------------------------------------


def configured(mode: str, folder: Path, context: Context, samples: int, make: Any, *words: str) -> Config:
    """Settings of a run on generated data in `folder`; a quick one has a tiny text encoder."""
    if not context.quick:
        return stages.settings(mode, stages.write_data(folder / "data", make(samples)), context.device, *words)
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
        yield from epoch(f"epoch_{mode}", config, context, {"samples": MOSI, "B": config.batch_size})
        yield from batches(mode, config, context)
        eagerly = stages.prepare(with_graphs(config, "off"), stages.BANK if not context.quick else 24)
        for stage in ("stage2", "stage1", "draw", "collect"):
            times = measured(context, {"eager": eagerly[stage]}, graphs=stage in ("stage1", "stage2"))
            yield {"row": f"{stage}_{mode}", "side": "uncaptured", "B": config.batch_size, **times["eager"]}


def with_graphs(config: Config, graphs: str) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"graphs": graphs})})


def batches(mode: str, config: Config, context: Context) -> Iterator[Entry]:
    """Time per batch of each stage as training runs it: a whole pass of replayed graphs, divided by its batches."""
    clock = context.clock
    trainer = stages.ready(with_graphs(config, "auto" if clock.cuda else "emulate"))
    for stage, (run, count) in stages.passes(trainer).items():
        entry = {"row": f"{stage}_{mode}", "side": "engine", "B": config.batch_size}
        try:
            times = {"wall_ms": clock.wall(run, 1 if context.quick else 3), **clock.traced(run)}
            yield entry | {key: number / count for key, number in times.items()}
        except Exception as cause:
            yield entry | {"failed": short(cause)}


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
        # what is read back is the checkpoint, which the epoch's seconds leave out
        if traced := context.clock.traced(run, without="Memcpy DtoH"):
            entry |= traced | {"busy": traced["device_ms"] / 1e3 / entry["seconds"]}
        yield entry | {"first_epoch_s": first}
    finally:
        run.close()


def eager_epoch(context: Context) -> Iterator[Entry]:
    """An epoch of the eager baseline on ready-made batches, in float32 as in the published code."""
    if context.quick:
        yield {"row": "epoch_fast", "side": "baseline", "failed": "needs MiniLM: left out of quick runs"}
        return
    work = epochs.build_baseline(shapes.mosi(MOSI), context.setting)
    seconds = [context.clock.wall(work.run, 1) / 1e3 for _ in range(1)]
    yield {"row": "epoch_fast", "side": "baseline", "samples": MOSI, "seconds": seconds[0]}


def mosei(context: Context) -> Iterator[Entry]:
    """Epochs on data of MOSEI's shape and size at B=128."""
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as place:
        config = configured("fast", Path(place), context, MOSEI, shapes.mosei, "batch_size=128")
        yield from epoch("epoch_mosei", config, context, {"samples": MOSEI, "B": config.batch_size})


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

    for name, suite in (("concat_critic", concat_critic), ("cubemlp", cubemlp), ("five_critics", critics)):
        try:
            with precision("fp32", context.device):
                suite.gate(context.setting)
        except Exception as cause:
            yield {"row": name, "side": "engine", "red": short(cause)}
            continue
        for kind in ("fp32",) if context.quick or name == "five_critics" else ("tf32", "bf16", "fp32"):
            if context.left() < 5:
                return
            sides, works = {}, []
            case = {"row": name, "precision": kind}
            compiled = ("compile",) if kind == "tf32" else ()  # it takes half a minute each
            for side in ("engine", "baseline", *compiled):
                try:
                    works.append(suite.build(side, context.setting))
                    sides["eager" if side == "baseline" else side] = _in_precision(works[-1].run, kind, context)
                except Exception as cause:
                    yield {**case, "side": side, "failed": short(cause)}
            for side, entry in measured(context, sides).items():
                yield {**case, "B": works[0].samples, "side": side, **entry}


def _in_precision(run: Callable[[], Any], kind: str, context: Context) -> Callable[[], Any]:
    def call() -> None:
        with precision(kind, context.device):
            run()

    return call


# -- product rows -----------------------------------------------------------------------------------------------------


def draws(context: Context) -> Iterator[Entry]:
    """Six sets of product rows per batch; and, on sides that can, a whole epoch of them and one batch of that."""
    from bench.suites import knn
    from engine.kernels import knn_product

    try:
        knn.gate(context.setting)
    except Exception as cause:
        yield {"row": "draws", "side": "engine", "red": short(cause)}
        return
    for size, batch in ((300, 16),) if context.quick else ((MOSI, 32), (MOSEI, 128)):
        if context.left() < 5:
            return
        case = {"row": "draws", "N": size, "B": batch}
        rows = knn.bank(size, context.setting)
        generator = torch.Generator().manual_seed(0)
        sampler = knn_product.ProductSampler(knn_product.Bank(rows), knn.NEIGHBOURS, **knn.MODES["engine"])
        asked = torch.arange(batch // knn.NEIGHBOURS, device=context.device)

        def brute(rows: dict = rows, asked: Tensor = asked) -> Any:
            return [torch.cdist(rows[n][asked], rows[n]).topk(knn.NEIGHBOURS, largest=False) for n in "TAV"]

        times = measured(
            context,
            {"engine": lambda s=sampler, b=batch, g=generator: s.draw(knn.TERMS, b, g), "torch": brute},
            graphs=False,
        )
        for side, entry in times.items():
            yield {**case, "side": side, **entry}
        if not hasattr(knn_product, "draw_epoch"):
            continue
        batches = [batch] * (size // batch)

        def whole(sampler: Any = sampler, batches: list[int] = batches, generator: Any = generator) -> Any:
            return knn_product.draw_epoch(sampler, knn.TERMS, batches, generator)

        try:
            drawn = whole()
            times = measured(context, {"epoch": whole}, graphs=False)
            times |= measured(context, {"take": lambda drawn=drawn: drawn.take(1)})
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
    """Measure every operation with several algorithms and keep the result: engine/kernels/dispatch.json."""
    try:
        from engine.kernels import dispatch
    except ImportError:
        yield {"row": "tune", "side": "engine", "failed": "this version has no dispatch table"}
        return
    if not context.clock.cuda:
        yield {"row": "tune", "side": "engine", "failed": "a table is of a GPU"}
        return
    dispatch._import_operations()
    for name in sorted(n for n, known in dispatch._operations.items() if known.work is not None):
        if context.left() < 10:
            return
        try:
            entries = dispatch.measure(name, context.device)
            dispatch.write(dispatch.TABLE, entries)
            yield {"row": "tune", "side": "engine", "operation": name, "entries": len(entries)}
        except Exception as cause:
            yield {"row": "tune", "side": "engine", "operation": name, "failed": short(cause)}


@dataclass(frozen=True)
class Group:
    """`most`: seconds it may take. `least`: it does not start with fewer seconds left."""

    run: Callable[[Context], Iterator[Entry]]
    most: float
    least: float = 20.0


GROUPS = {
    "ceilings": Group(ceilings, 20),
    "step_fast": Group(lambda context: step("fast", context), 150),
    "infonce": Group(infonce, 100),
    "modules": Group(modules, 100),
    "step_faithful": Group(lambda context: step("faithful", context), 90),
    "draws": Group(draws, 40),
    "mosei": Group(mosei, 150, 60),
    "eager_epoch": Group(eager_epoch, 120, 60),
}
TUNE = Group(tune, 300)
