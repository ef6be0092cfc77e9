"""InfoNCE of a batch whose scores would fill a gigabyte, against scores in memory."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.baselines import mimrl
from bench.runner import Setting, Work, over_batches
from engine.kernels import infonce

TITLE = "InfoNCE of separate embeddings, d=128, B=16,384, forward and backward, against all scores in memory"
GOALS = {"ratio": (1.0, 1 / 0.7), "memory_ratio": (20.0, 100.0)}
SIDES = ("engine", "baseline", "linear_cross_entropy", "compile")
SLOW_SIDES = ("compile",)
MEMORY = ("engine", "baseline", "linear_cross_entropy")
ROUNDS = 5
WIDTH, BATCH, QUICK_BATCH = 128, 16384, 2048


def embeddings(batch: int, setting: Setting) -> tuple[Tensor, Tensor]:
    """Embeddings x and y [B, 128] that depend on each other, with scores of order 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, WIDTH, generator=generator)
    y = (x + torch.randn(batch, WIDTH, generator=generator)) / math.sqrt(2)
    scale = WIDTH**-0.25
    return tuple((scale * v).to(setting.device).requires_grad_() for v in (x, y))


def dense(x: Tensor, y: Tensor) -> Tensor:
    """The bound in nats from scores [B, B]: rows are y, columns are x."""
    return mimrl.bound_value("infonce", y @ x.t(), None, 0.01, 1.0)


def chunked(x: Tensor, y: Tensor) -> Tensor:
    """The same by torch's chunked linear cross-entropy."""
    target = torch.arange(len(x), device=x.device)
    options = torch.nn.LinearCrossEntropyOptions()
    return math.log(len(x)) - functional.linear_cross_entropy(y, x, target, options=options)


def streamed(x: Tensor, y: Tensor) -> Tensor:
    return math.log(len(x)) - infonce(y, x)


def work(function, batch: int, setting: Setting) -> Work:
    x, y = embeddings(batch, setting)

    def run() -> None:
        x.grad = y.grad = None
        function(x, y).backward()

    return Work(run, samples=batch)


FUNCTIONS = {"engine": streamed, "baseline": dense, "linear_cross_entropy": chunked}


def build(side: str, setting: Setting) -> Work:
    """`side` may name a batch size, such as engine@4096."""
    side, _, size = side.partition("@")
    function = torch.compile(dense) if side == "compile" else FUNCTIONS[side]
    return work(function, int(size) if size else QUICK_BATCH if setting.quick else BATCH, setting)


def details(setting: Setting, works: dict[str, Work], numbers: dict[str, list[float]]) -> dict[str, Any]:
    """Time and memory over the batch size. All scores are kept in memory only up to a few gigabytes."""
    if setting.quick:
        return {}
    sizes = tuple(256 * 2**i for i in range(8))
    batches = {"engine": sizes, "linear_cross_entropy": sizes, "baseline": sizes[:-1]}
    return {"curve": over_batches(sys.modules[__name__], "streaming_infonce", batches, setting)}


def gate(setting: Setting) -> None:
    expected = None
    for function in (dense, streamed, chunked):
        x, y = embeddings(257, setting)
        value = function(x, y)
        value.backward()
        result = (value.detach(), x.grad, y.grad)
        if expected is not None:
            for a, b in zip(result, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        expected = result
