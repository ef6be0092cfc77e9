"""A model of a GPU's work in the flagship's step beside its products: launches, traffic and synchronisations.

    python -m bench.traffic              the tables
    python -m bench.traffic --update     the tables of docs/kernels_inside.md, from them and from tests/aot/budgets.json
    python -m bench.traffic --dispatch   the modelled entries of engine/kernels/dispatch.json

Nothing is timed. The step runs on the CPU and is counted as it would run on a GPU: operations of `torch.ops.engine` by
the launches that they declare, or by the calls of their host function where that is torch's own; every other
aten operation that computes is one launch, of the eager baseline and of the engine alike. An operation reads its inputs
once and writes its outputs once; what the caches save between operations is not modelled.

Counted: CubeMLP and all eleven estimators, forward and backward, B=128. Not counted: text encoder, recurrences, the
drawing of product rows, optimisers.

Another model gives an operation's time from its products, bytes and launches, at the rates that were measured on one
chip, and stands beside what was measured: `infonce_cost`, `operation_table`. The dispatch table takes it where nothing
was measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bench import machine
from bench.baselines import mimrl
from bench.suites import cubemlp
from engine.kernels import dispatch, registry
from engine.kernels.cmi import op as cmi
from engine.kernels.critics import op as critics
from engine.kernels.cube_mix.cpu import SHORT
from engine.kernels.mi_bounds import op as mi_bounds
from engine.kernels.mi_bounds import plan
from engine.kernels.mlp import plan as plan_of_tiles
from engine.mimrl.settings import MIMRLObjectiveConfig as ObjectiveConfig
from engine.mimrl.terms import mimrl_objective
from tests.aot import budgets

BATCH, WIDTH = 128, 128
PAGE = machine.ROOT / "docs" / "kernels_inside.md"
ARCHS = (80, 90, 100)
# Operations that compute nothing, beside views.
NOTHING = ("empty", "new_empty", "_unsafe_view")


def _cube_backward(x: Tensor, weights: tuple[Tensor | None, ...]) -> int:
    """Bytes that one kernel of the backward pass writes and another reads: the gradients of both layers' outputs."""
    hidden, d_out = len(weights[0]), len(weights[2])
    short = max(x.shape[1], hidden, d_out) <= SHORT
    return 0 if short else 2 * 4 * (hidden + d_out) * x.shape[0] * x.shape[2]


def _pair_backward(mixed: Tensor, channel: tuple[Tensor | None, ...]) -> int:
    """The same of the channels, and the gradient of what they read."""
    return _cube_backward(mixed.flatten(0, 1)[..., None], channel) + 2 * _size(mixed)


def _tower_bytes(name: str, *args: Any) -> int:
    """Hidden layers are read again by the next layer; their gradients are written, and read twice."""
    backward = name.endswith("backward")
    x = args[1][0] if backward else args[0]
    first, rest = args[2][:: 1 if backward else 2], args[3][:: 1 if backward else 2]
    count, hidden = sum(len(w) for w in first), 4 * len(x) * sum(w.shape[0] * w.shape[2] for w in rest)
    size = 3 * hidden if backward else hidden
    if name == "critics_grouped_infonce":
        # embeddings and the derivatives of scores: written, read twice
        size += 3 * 4 * count * len(x) * rest[-1].shape[1] + 3 * 4 * (count // 2) * len(x) ** 2
    return size


def _concat_bytes(name: str, *args: Any) -> int:
    """A pair's layers, as often as a slab's kernels and products read and write them."""
    x, y, layers = args[1:4] if name.endswith("backward") else args[:3]
    depth, backward = len(layers) // 2 - 2, not name.endswith("forward") and any(args[-2:])
    passes = 2 + 4 * depth + (4 + 7 * depth if backward else 0)
    return 4 * len(x) * len(y) * len(layers[0]) * passes


def _classifier_bytes(name: str, *args: Any) -> int:
    """As `_tower_bytes`; the gradients of all hidden layers have the rows that logits have gradients for."""
    if name == "cmi_forward":
        first, _, rest, joint, _, product, _ = args
        return 4 * len(first) * (len(joint[0]) + len(product[0])) * sum(w.shape[2] for w in rest[::2])
    joint_grad, product_grad, first, rest = args[:4]
    rows = joint_grad.shape[1] + (0 if product_grad is None else product_grad.shape[1])
    return 3 * 4 * len(first) * rows * sum(w.shape[2] for w in rest)


# Bytes beside inputs and outputs of operations that declare their launches.
DECLARED: dict[str, Callable[..., int]] = {
    "critics_mlp_forward": _tower_bytes,
    "critics_mlp_backward": _tower_bytes,
    "critics_grouped_infonce": _tower_bytes,
    "critics_grouped_infonce_backward": _tower_bytes,
    "critics_concat_forward": _concat_bytes,
    "critics_concat_backward": _concat_bytes,
    "critics_concat_infonce": _concat_bytes,
    "cmi_forward": _classifier_bytes,
    "cmi_backward": _classifier_bytes,
    "cmi_read": lambda *a: 0,
    "cmi_read_backward": lambda *a: 0,
}


def _declared(name: str) -> Callable[..., tuple[int, int]]:
    return lambda *arguments: (registry.launches(name, *arguments), 0)


# Launches, and bytes beside inputs and outputs, of other operations with Triton kernels.
KERNELS: dict[str, Callable[..., tuple[int, int]]] = {
    **{name: _declared(name) for name in ("mi_infonce", "mi_infonce_keys", "mi_statistics", "mi_gradients")},
    "cube_mix_forward": lambda *a: (registry.launches("cube_mix_forward", *a), 0),
    "cube_mix_backward": lambda *a: (registry.launches("cube_mix_backward", *a), _cube_backward(a[1], a[3:10])),
    # the cube with its modalities mixed is an output, and read back
    "cube_pair_forward": lambda x, *a: (registry.launches("cube_pair_forward", x, *a), 4 * x[:, 0].numel() * len(a[2])),
    "cube_pair_backward": lambda *a: (registry.launches("cube_pair_backward", *a), _pair_backward(a[2], a[11:18])),
}


@dataclass
class Count:
    launches: int = 0
    bytes: int = 0
    syncs: int = 0


class Counter(TorchDispatchMode):
    """Counts within its context."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("engine::")
        if func.namespace == "engine" and name not in KERNELS and name not in DECLARED:
            with self:  # torch's own operations, on a GPU as here
                return registry._operations[name].cuda(*args, **kwargs)
        out = func(*args, **kwargs)
        if name.endswith("_local_scalar_dense"):
            self.count.syncs += 1
            return out
        returns = [r.alias_info for r in func._schema.returns]
        views = returns and all(r is not None and not r.is_write for r in returns)
        if views or name.removeprefix("aten::").startswith(NOTHING):
            return out
        launches, more = 1, 0
        if name in DECLARED:
            launches, more = registry.launches(name, *args), DECLARED[name](name, *args)
        elif func.namespace == "engine":
            launches, more = KERNELS[name](*args)
        read = {k: v for k, v in kwargs.items() if k not in ("out", "grad_input")}
        tensors = [*tree_iter((args, read)), *tree_iter(out)]
        self.count.launches += launches
        self.count.bytes += more + sum(_size(t) for t in tensors if isinstance(t, Tensor))
        return out


def _size(tensor: Tensor) -> int:
    """Bytes of the distinct elements: an expanded dimension is read once."""
    shape = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(n if s else 1 for n, s in shape)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within the context operations choose as they would for CUDA tensors."""
    with ExitStack() as stack:
        for module in (registry, mi_bounds, critics, cmi):
            stack.enter_context(mock.patch.object(module, "backend_for", _triton))
        yield


def _triton(tensor: Tensor, op: str | None = None) -> str:
    return "triton"


Side = tuple[Callable[[], Tensor], torch.nn.Module]


def parts() -> dict[str, tuple[Side, Side]]:
    """For every part of the step its loss and the tensors that get gradients: eager baseline and engine."""
    from bench.runner import Setting

    torch.manual_seed(0)
    ours, theirs = cubemlp.modules(Setting())
    drawn = torch.randn(BATCH, *cubemlp.SHAPE[0])
    c = mimrl.settings(cmi_embed_dim=WIDTH)
    objective = mimrl_objective(ObjectiveConfig(compat="none"), WIDTH, WIDTH)
    eager_mi = torch.nn.ModuleList(mimrl.MIEstimator(WIDTH, WIDTH, c) for _ in mimrl.MI_PAIRS)
    eager_cmi = torch.nn.ModuleList(mimrl.CMIEstimator(c) for _ in mimrl.CMI_TRIPLES)
    estimators = torch.nn.ModuleList([eager_mi, eager_cmi])
    rows = {name: torch.randn(BATCH, WIDTH) for name in "FTAV"} | {"C": torch.randn(BATCH, 1)}
    products = objective.sample_products(rows, BATCH, torch.Generator().manual_seed(0))
    tuples = {name: tuple(three) for name, three in products.items()}
    triples = [t for t in objective.terms if t.given is not None]

    def leaves(stage: int) -> dict[str, Tensor]:
        return {name: leaf(v) if stage == 2 and name != "C" else v for name, v in rows.items()}

    def eager(stage: int) -> Side:
        def loss() -> Tensor:
            features, values = leaves(stage), []
            for pair, estimator in zip(mimrl.MI_PAIRS, eager_mi, strict=True):
                x, y = pair.upper().split("_")
                values.append(estimator(features[x], features[y])[stage == 1])
            for term, estimator in zip(triples, eager_cmi, strict=True):
                joint = tuple(features[n] for n in (term.x, term.y, term.given))
                values.append(estimator(joint, tuples[str(term)])[stage == 1])
            return sum(values) if stage == 1 else -sum(values)

        return loss, estimators

    def engine(stage: int) -> Side:
        def loss() -> Tensor:
            features = leaves(stage)
            if stage == 1:
                return objective.estimator_loss(features, products).loss
            with frozen(objective):
                return objective.model_loss(features, products).loss

        return loss, objective

    return {
        "CubeMLP, forward and backward": (
            (lambda: theirs(leaf(drawn)).sum(), theirs),
            (lambda: ours(leaf(drawn)).sum(), ours),
        ),
        "eleven estimators, stage 1": (eager(1), engine(1)),
        "eleven estimators, stage 2": (eager(2), engine(2)),
    }


def leaf(value: Tensor) -> Tensor:
    """A tensor of the same values with a gradient of its own."""
    return value.detach().requires_grad_()


@contextmanager
def frozen(module: torch.nn.Module) -> Iterator[None]:
    """Within the context the estimators' weights get no gradients, as in stage 2 of mode fast."""
    for p in module.parameters():
        p.requires_grad_(False)
    yield
    for p in module.parameters():
        p.requires_grad_(True)


def measure() -> dict[str, tuple[Count, Count]]:
    """{part: (eager, engine)}, counted in a second call. The first call's preparations are not counted."""
    counts_of = {}
    for name, both in parts().items():
        counts = []
        for loss, module in both:
            for _ in range(2):
                module.zero_grad(set_to_none=True)
                with as_on_a_gpu(), Counter() as counter:
                    loss().backward()
            counts.append(counter.count)
        counts_of[name] = tuple(counts)
    return counts_of


def traffic_table(counted: dict[str, tuple[Count, Count]]) -> str:
    lines = [
        "| part of the step, B=128 | launches, eager | engine | memory traffic in MB, eager | engine"
        " | host syncs, eager | engine |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (eager, ours) in counted.items():
        sizes = [f"{c.bytes / 1e6:,.0f}" for c in (eager, ours)]
        lines.append(
            f"| {name} | {eager.launches} | {ours.launches} | {sizes[0]} | {sizes[1]} | {eager.syncs} | {ours.syncs} |"
        )
    return "\n".join(lines)


# One NVIDIA H200, torch 2.11.0+cu130, triton 3.6.0, 2026-11-27: TFLOP/s of products, bytes a millisecond of a copy.
CHIP = "2026-11-27 NVIDIA H200, torch 2.11.0+cu130, triton 3.6.0"
RATES = {"bf16": 807, "tf32": 420, "fp32": 51}
COPY = 4.2e9
# Milliseconds of InfoNCE there, forward and backward, as a replayed CUDA graph, by rows, width, precision.
MEASURED = {
    (1024, 128, "bf16"): {"fused": 0.046, "eager": 0.046},
    (1024, 128, "fp32"): {"fused": 0.534, "eager": 0.066},
    (4096, 128, "bf16"): {"fused": 0.204, "eager": 0.260},
    (4096, 128, "tf32"): {"fused": 0.686, "eager": 0.245},
    (4096, 128, "fp32"): {"eager": 0.463},
    (16384, 128, "bf16"): {"fused": 0.740, "eager": 3.392},
    (16384, 128, "tf32"): {"chunked": 2.031, "eager": 2.837},
    (16384, 128, "fp32"): {"eager": 6.383},
    (65536, 128, "bf16"): {"fused": 11.35},
    (16384, 512, "bf16"): {"chunked": 2.360, "eager": 4.075},
    (16384, 768, "bf16"): {"chunked": 3.050, "eager": 4.594},
    (16384, 768, "fp32"): {"eager": 25.85},
}
# The same of chunked fp32 as it was before its products were split.
UNSPLIT = {(4096, 128): 0.371, (16384, 128): 5.602, (16384, 768): 25.21}
# Fitted to these. Of a fused program: rows that it owns, and microseconds for each column that passes by it.
FUSED_ROWS, FUSED_PASS = 128, {"bf16": 0.0235, "tf32": 0.084, "fp32": 0.26}
PROCESSORS = 132  # that hold a program each
LIBRARY_SHARE = {"bf16": 0.75, "tf32": 0.75, "fp32": 1.0}  # of the rate, that products of a chunk reach
NODE = 0.002  # milliseconds of a small kernel within a graph


@dataclass(frozen=True)
class Cost:
    """The cost of one InfoNCE, forward and backward: matrix products, bytes per pair, milliseconds."""

    products: int
    pair_bytes: int
    milliseconds: float


def infonce_cost(rows: int, width: int, precision: str, algorithm: str, groups: int = 1, mean: bool = True) -> Cost:
    """Milliseconds of a replayed graph: products and bytes of scores at the chip's rates, and its small kernels.

    A fused program goes past all columns once forward and once backward, and takes the same time for each of them.

    Args:
        precision: "bf16", "tf32" or "fp32".
        algorithm: "fused", "chunked" or "eager".
        mean: the mean of the losses; otherwise a bound that takes statistics first and gradients afterwards.
    """
    size = 2 if precision == "bf16" else 4
    pairs = groups * rows * rows
    if algorithm == "fused":
        products, pair_bytes, nodes = (4 if mean else 5), 0, (8 if mean else 20)
        turns = math.ceil(groups * math.ceil(rows / FUSED_ROWS) / PROCESSORS)
        device = turns * products / 2 * rows * FUSED_PASS[precision] * max(1, width / 128) / 1e3
        return Cost(products, pair_bytes, device + nodes * NODE)
    if algorithm == "chunked":
        # scores written and read (a row's second reading finds it in the cache), their gradient written, read twice
        products, beside, times = (3 if mean else 4), (2 if size == 2 else 0), 1
        if split := precision == "fp32" and pairs * width >= plan.LEAST_SPLIT:
            precision, size, beside, times = "bf16", 2 * plan.PARTS, 2 * plan.PARTS, len(plan.KEPT)
        pair_bytes = (8 if mean else 16) + 3 * size
        parts = plan.chunks(groups, rows, rows, beside)
        nodes = (4 * parts + 7 if mean else 6 * parts + 20) + (5 * parts if split else 0)
        share = LIBRARY_SHARE[precision]
        products *= times
    else:
        # scores written, log-softmax and its gradient (two read, one written each), two products of the gradient
        products, pair_bytes, nodes, share = 3, 4 * 9, 12, 1.0
    device = products * 2 * pairs * width / (share * RATES[precision]) / 1e9 + pair_bytes * pairs / COPY
    return Cost(products, pair_bytes, device + nodes * NODE)


def infonce_table() -> str:
    lines = [
        "| rows | width | precision | products | bytes a pair | modelled, ms | measured, ms | eager, measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (rows, width, precision), times in MEASURED.items():
        for algorithm in ("fused", "chunked") if width <= plan.MAX_WIDTH else ("chunked",):
            cost = infonce_cost(rows, width, precision, algorithm)
            measured = [f"{times[name]:.3g}" if name in times else "-" for name in (algorithm, "eager")]
            if algorithm == "chunked" and precision == "fp32" and (before := UNSPLIT.get((rows, width))):
                measured[0] = f"(unsplit {before:.3g})"
            lines.append(
                f"| {rows:,} | {width} | {precision}, {algorithm} | {cost.products} | {cost.pair_bytes} "
                f"| {cost.milliseconds:.3g} | {measured[0]} | {measured[1]} |"
            )
    return "\n".join(lines)


# Milliseconds on the same chip as a replayed graph, forward and backward: the engine, the engine's kernels before they
# were made anew, eager torch. None: not measured.
MEASURED_OPERATIONS = {
    "concat critic + InfoNCE, B=256": {"tf32": (0.785, 1.95, 1.18), "fp32": (1.62, 5.8, 2.42)},
    "five critics + InfoNCE, B=128": {"tf32": (0.093, None, 1.01), "fp32": (0.129, 0.275, 1.23)},
    "CubeMLP, B=128": {"tf32": (None, 1.57, 8.1), "fp32": (None, 2.58, 8.6)},
}


def operations() -> dict[str, tuple[float, Count]]:
    """{operation of MEASURED_OPERATIONS: (FLOPs of the eager module's products, what the engine is counted to do)}."""
    from torch.utils.flop_counter import FlopCounterMode

    from bench.runner import Setting
    from bench.suites import concat_critic, critics, cubemlp

    counted = {}
    for name, suite in zip(MEASURED_OPERATIONS, (concat_critic, critics, cubemlp), strict=True):
        engine, eager = (suite.build(side, Setting()).run for side in ("engine", "baseline"))
        with FlopCounterMode(display=False) as flops:
            eager()
        with as_on_a_gpu(), Counter() as counter:
            engine()
        counted[name] = flops.get_total_flops(), counter.count
    return counted


def operation_table(counted: dict[str, tuple[float, Count]]) -> str:
    """A table of modelled times: products and bytes at the chip's rates, one after the other, plus the launch times."""
    lines = [
        "| operation | products, GFLOP | MB | launches | precision | modelled, ms | measured | before | eager |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (flops, count) in counted.items():
        for precision, times in MEASURED_OPERATIONS[name].items():
            modelled = flops / RATES[precision] / 1e9 + count.bytes / COPY + count.launches * NODE
            shown = " | ".join("not yet" if t is None else f"{t:.3g}" for t in times)
            lines.append(
                f"| {name} | {flops / 1e9:.3g} | {count.bytes / 1e6:,.0f} | {count.launches} | {precision} "
                f"| {modelled:.3g} | {shown} |"
            )
    return "\n".join(lines)


# Microseconds of a hidden layer of ten towers, 256 wide, at B=32 in fp32: measured on CHIP within stage 1, in wide
# tiles. What a launch takes but for its steps is a guess, and so is the rate of what a cache holds.
LAYER, START = 11.0, 2.5
CACHE, CACHED = 50e6, 2  # bytes of the cache, and its rate in that of a copy
# The concat critic with InfoNCE at B=256: its products, and its launches beside those of slabs.
CONCAT_GFLOP, OUTER = 77.4, 17


def layer_microseconds(tile: tuple[int, int, int, int, int], width: int = 256) -> float:
    """A program takes one step after the other, and loads stages - 1 steps ahead: what waits is a load."""
    steps, ahead = width / 32, plan_of_tiles.WIDE["tf32x3"][4] - 1
    latency = (LAYER - START) / steps * ahead
    return START + width / tile[2] * latency / (tile[4] - 1)


def tile_table() -> str:
    lines = ["| precision | wide, µs | deep, µs |", "|---|---|---|"]
    for name, precision in (("fp32", "tf32x3"), ("tf32", "tf32"), ("bf16", "bf16")):
        times = [layer_microseconds(tiles[precision]) for tiles in plan_of_tiles.LAYERS.values()]
        lines.append(f"| {name} | {times[0]:.1f} | {times[1]:.1f} |")
    return "\n".join(lines)


def slab_table() -> str:
    """The concat critic with InfoNCE, B=256, by kinds of slabs. Buffers: what a slab's layers and gradients take."""
    from engine.kernels.critics import slabs

    rows, hidden, depth = 256, 256, 2
    lines = [
        "| precision | slabs | buffers, MB | MB | launches | modelled, ms |",
        "|---|---|---|---|---|---|",
    ]
    passes = 2 + 4 * depth + 4 + 7 * depth  # as `_concat_bytes`
    for precision, size in (("tf32", 4), ("bf16", 2)):
        for name, buffers, share in (("before", depth + 3, 1), ("slabs", depth + 2, 1), ("half_slabs", depth + 2, 2)):
            with mock.patch.object(slabs, "_dtype", lambda size=size: torch.float32 if size == 4 else torch.bfloat16):
                count = OUTER + slabs.launches(rows, rows, hidden, depth, "infonce", True, share)
            held = buffers * slabs.SLAB_NUMBERS // share * size
            traffic = passes * rows * rows * hidden * size
            rate = COPY * (CACHED if held <= CACHE else 1)
            time = CONCAT_GFLOP / RATES[precision] + traffic / rate + count * NODE
            lines.append(f"| {precision} | {name} | {held / 1e6:.0f} | {traffic / 1e6:,.0f} | {count} | {time:.2f} |")
    return "\n".join(lines)


def dispatch_entries() -> list[dict[str, Any]]:
    """Entries of the dispatch table. Times that were not measured are modelled."""
    entries = []
    for operation in ("infonce", "mi_bound"):
        for precision in RATES:
            for sizes in plan.CLASSES:
                rows, width, groups = sizes["rows"], sizes["width"], sizes["groups"]
                exact = MEASURED.get((rows, width, precision), {}) if operation == "infonce" and groups == 1 else {}
                times = {
                    name: exact[name]
                    if name in exact
                    else infonce_cost(rows, width, precision, name, groups, operation == "infonce").milliseconds
                    for name, takes in plan.CANDIDATES.items()
                    # other bounds in plain torch make more passes over the scores than are counted here
                    if takes(sizes) and (name != "eager" or operation == "infonce")
                }
                source = "modelled (bench/traffic.py)"
                if exact:
                    source = f"measured {CHIP}, as a graph: {', '.join(exact)}; others {source}"
                entries.append(
                    {
                        "operation": operation, "precision": precision, "architecture": "sm90", "sizes": dict(sizes),
                        "algorithm": min(times, key=times.get),
                        "milliseconds": {name: round(time, 3) for name, time in times.items()}, "source": source,
                    }
                )  # fmt: skip
    return entries


def kernel_table(budgets: dict[str, dict[str, int]]) -> str:
    """One row per kernel, with the most that any of its configurations takes."""
    kernels: dict[str, dict[int, list[dict[str, int]]]] = {}
    for key, report in budgets.items():
        name, arch = key.split("@sm_")
        kernels.setdefault(name.split("/")[0], {}).setdefault(int(arch), []).append(report)
    lines = [
        "| kernel | configurations | registers, sm_80 / sm_90 / sm_100 | shared memory, KiB | spills |",
        "|---|---|---|---|---|",
    ]
    for name, by_arch in sorted(kernels.items()):
        most = {k: [max(r[k] for r in by_arch[a]) for a in ARCHS] for k in ("regs", "shared", "stack", "spills")}
        shared = " / ".join(f"{n / 1024:.0f}" for n in most["shared"])
        spills = sum(most["stack"]) + sum(most["spills"])
        registers = " / ".join(map(str, most["regs"]))
        lines.append(f"| `{name}` | {len(by_arch[ARCHS[0]])} | {registers} | {shared} | {spills} |")
    return "\n".join(lines)


def update(page: Path = PAGE) -> None:
    """Put the tables between their markers."""
    text = page.read_text(encoding="utf-8")
    for name, table in (
        ("kernels", kernel_table(budgets.newest())),
        ("traffic", traffic_table(measure())),
        ("infonce", infonce_table()),
        ("operations", operation_table(operations())),
        ("tiles", tile_table()),
        ("slabs", slab_table()),
    ):
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    page.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help="write the tables of docs/kernels_inside.md")
    parser.add_argument(
        "--dispatch", action="store_true", help="write modelled entries of engine/kernels/dispatch.json"
    )
    options = parser.parse_args(arguments)
    if options.dispatch:
        dispatch.write(dispatch.TABLE, dispatch_entries())
    elif options.update:
        update()
    else:
        print(traffic_table(measure()), infonce_table(), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
