"""Rows of `python -m bench.gpu` for single operations of a step, each against plain torch in its kernels' place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import machine, shapes, stages, whole
from bench.timing import precision
from engine.kernels.registry import families, is_plain, setting, use_backend

Entry = dict[str, Any]
Work = Callable[[], list[Tensor]]
OFF = 1e-3  # most that a result may differ from plain torch's, over its largest number
LIMIT = 60  # seconds for a whole command


def off(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, over the largest number of the tensor."""
    return max(
        float((f.double() - e.double()).abs().max() / e.double().abs().max().clamp(min=1e-30))
        for f, e in zip(found, expected, strict=True)
    )


def plainly(family: str, work: Work) -> Work:
    """The same work with plain torch in the place of a folder's kernels."""

    def run() -> list[Tensor]:
        already = [name for name in families() if is_plain(name)]
        with use_backend(setting(), plain=[*already, family]):
            return work()

    return run


def gradients(out: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The results, and the gradients of their sum of squares."""
    total = sum((o.float() ** 2).sum() for o in out)
    return [*(o.detach() for o in out), *torch.autograd.grad(total, leaves)]


# -- the operations ---------------------------------------------------------------------------------------------------


def update(context: Any) -> tuple[Work, Work]:
    """Clipping, AdamW and the average of MiniLM's number of weights: in one pass, and by torch."""
    from engine.kernels.update import Settings, Table, inspect, move
    from engine.kernels.update.reference import Weight

    sizes = [(40, 8), (8,), (3,)] if context.quick else [(30522, 384), *[(1536, 384), (384, 1536), (384,)] * 12]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=generator).to(context.device) for size in sizes]
    gradient = [torch.randn(size, generator=generator).to(context.device) for size in sizes]
    length = torch.stack([g.norm() for g in gradient]).norm()
    gradient = [0.9 / length * g for g in gradient]  # clipping in place changes nothing, and costs the same
    one = torch.full((), 0.02, device=context.device)
    fused = [p.clone() for p in start]
    averages = [p.clone() for p in start]
    weights = [
        Weight(p, torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=p.device), a, 0)
        for p, a in zip(fused, averages, strict=True)
    ]
    table = Table(weights, [Settings(weight_decay=0.01, decoupled=True)])
    rates = torch.full((1,), 1e-3, device=context.device)

    def ours() -> list[Tensor]:
        where = table.gradients(gradient)
        move(table, where, rates, norm=1.0, stats=inspect(table, where), average=one)
        # the table holds addresses: here the tensors are kept
        return [w.parameter for w in weights] + [w.average for w in weights]

    theirs, means = [nn.Parameter(p.clone()) for p in start], [p.clone() for p in start]
    for p, g in zip(theirs, gradient, strict=True):
        p.grad = g.clone()
    on_gpu = theirs[0].is_cuda  # then a graph holds it, too
    optimizer = torch.optim.AdamW(theirs, 1e-3, weight_decay=0.01, fused=True, capturable=on_gpu)

    @torch.no_grad()
    def apart() -> list[Tensor]:
        nn.utils.clip_grad_norm_(theirs, 1.0)
        optimizer.step()
        torch._foreach_lerp_(means, [p.detach() for p in theirs], 0.02)
        return [*(p.detach() for p in theirs), *means]

    return ours, apart


def stacked(context: Any) -> tuple[Work, Work]:
    """The fusion encoder's cube from three encoders' sequences, with dropout, forward and backward."""
    from engine.kernels.stacked import stack_sequences
    from engine.kernels.transformer import draw_seed

    rows, width, size = (3, 8, 6) if context.quick else (32, 128, 100)
    generator = torch.Generator().manual_seed(0)
    lengths = [torch.randint(1, n + 1, (rows,), generator=generator) for n in (size // 2, size, size + 4)]
    sequences = [
        torch.randn(rows, int(n.max()), width, generator=generator).to(context.device).requires_grad_() for n in lengths
    ]
    valid = [n.to(context.device) for n in lengths]
    seed = draw_seed(torch.device(context.device))

    def work() -> list[Tensor]:
        cube, means = stack_sequences(
            sequences, valid, size, fill=[True, False, False], rates=[0.1] * 3, hidden=[0.0] * 3, seed=seed
        )
        return gradients([cube, *means], sequences)

    return work, plainly("stacked", work)


def recurrent(context: Any) -> tuple[Work, Work]:
    """A sequence encoder: both directions of a GRU, their sum through LayerNorm and ReLU; forward and backward."""
    from engine.kernels.recurrent.op import bidirectional_norm, parameters

    rows, steps, width, hidden = (3, 7, 5, 8) if context.quick else (32, 128, 20, 128)
    torch.manual_seed(0)
    gru = nn.GRU(width, hidden, bidirectional=True, batch_first=True).to(context.device)
    norm = nn.LayerNorm(hidden).to(context.device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, steps, width, generator=generator).to(context.device).requires_grad_()
    length = torch.randint(1, steps + 1, (rows,), generator=generator).to(context.device)
    leaves = [x, *gru.parameters(), *norm.parameters()]

    def work() -> list[Tensor]:
        return gradients([bidirectional_norm(x, length, parameters(gru), "gru", norm, True)], leaves)

    return work, plainly("recurrent", work)


def embeddings(context: Any) -> tuple[Work, Work]:
    """A text encoder's embeddings through LayerNorm and dropout, forward and backward."""
    from engine.kernels.transformer import draw_seed, plan
    from engine.kernels.transformer.embedding import embed_norm
    from engine.kernels.transformer.op import runs_kernels
    from engine.kernels.transformer.sums import parts_of

    rows, length, words, width = (3, 5, 40, 16) if context.quick else (32, 40, 30522, 384)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, words, (rows, length), generator=generator).to(context.device)
    tables = tuple(
        torch.randn(n, width, generator=generator).to(context.device).requires_grad_() for n in (words, 512, 2)
    )
    weight, shift = (torch.full((width,), v, device=context.device, requires_grad=True) for v in (1.0, 0.0))
    seed = draw_seed(torch.device(context.device))
    leaves = [*tables, weight, shift]

    def work() -> list[Tensor]:
        parts = None
        if runs_kernels(tables[0]):
            (parts,) = parts_of([(plan.norm_programs(ids.numel(), width), (weight, shift, None))])
        y, _ = embed_norm(ids, None, tables, weight, shift, seed=seed, p=0.1, padding=0, parts=parts)
        return gradients([y], leaves)

    return work, plainly("transformer", work)


OPERATIONS = {"update": update, "stack_sequences": stacked, "recurrent": recurrent, "embeddings": embeddings}


def operations(context: Any) -> Iterator[Entry]:
    """Operations of a step by the engine's kernels and by plain torch in their place; results are compared first."""
    from bench.gpu_rows import measured, short

    for name, make in OPERATIONS.items():
        row = {"row": f"op_{name}"}
        if context.left() < 5:
            return
        try:
            with precision("fp32", context.device):
                ours, plain = make(context)
                if (difference := off(ours(), plain())) > OFF:
                    yield {**row, "side": "engine", "red": f"off by {difference:.1e}", "error": difference}
                    continue
                for side, entry in measured(context, {"engine": ours, "eager": plain}).items():
                    yield {**row, "side": side, **entry, "error": difference}
        except Exception as cause:
            yield {**row, "side": "engine", "failed": short(cause)}


# -- the whole command ------------------------------------------------------------------------------------------------


def command(context: Any) -> Iterator[Entry]:
    """`engine train` with the preset mosi from a shell: with the kernels that earlier groups compiled, then with none.

    It trains on real MOSI where the environment's ENGINE_MOSI_FILES names a folder of it.
    """
    from bench.gpu_rows import MOSI, configured, short

    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as place:
        folder = Path(place)
        real = os.environ.get("ENGINE_MOSI_FILES")
        words = [f"device={context.device}", "seed=0", "epochs=8", "output.report=false", "output.tensorboard=false"]
        if context.quick:
            config = configured("fast", folder, context, MOSI, shapes.mosi)
            settings = folder / "settings.yaml"
            config.save(settings)
            start = ["--config", str(settings)]
            words = [words[0], "epochs=2", *words[3:]]
        else:
            data = real or str(stages.write_data(folder / "data", shapes.mosi(MOSI)))
            start = ["--preset", "mosi", "--data", data]
        for kernels, cache in (("kept", {}), ("compiled", {"TRITON_CACHE_DIR": str(folder / "cache")})):
            entry = {"row": f"command_{kernels}", "side": "engine", "real": real is not None}
            if context.left() < 10:
                return
            out = folder / kernels
            line = [sys.executable, "-m", "engine", "train", *start, "--out", str(out), *words]
            begun = time.monotonic()
            try:
                done = subprocess.run(
                    line, cwd=machine.ROOT, env=os.environ | cache, capture_output=True, text=True,
                    timeout=max(5.0, min(LIMIT, context.left())),
                )  # fmt: skip
                if done.returncode != 0:
                    yield {**entry, "failed": done.stderr[-600:]}
                    return
                lines = (out / "history.jsonl").read_text(encoding="utf-8").splitlines()
                entry["seconds"] = time.monotonic() - begun
                entry["epochs"] = [json.loads(text)["seconds"] for text in lines]
                entry["phases"] = whole.phases(done.stdout, out, entry["seconds"])
                if real:
                    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
                    entry["test"] = metrics.get("test")
                yield entry
            except subprocess.TimeoutExpired:
                yield {**entry, "more_than_seconds": time.monotonic() - begun}
                return
            except Exception as cause:
                yield {**entry, "failed": short(cause)}
                return
