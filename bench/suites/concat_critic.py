"""InfoNCE with the concatenated critic, whose baseline forms all B² pairs."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from bench.baselines import mimrl
from bench.runner import Setting, Work, over_batches
from engine import MIEstimator
from engine.mimrl.published import PublishedMIEstimator

TITLE = "concat critic + InfoNCE, B=256, forward and backward, against the tensor of all pairs"
GOALS = {"ratio": (2.0, 1 / 0.35), "memory_ratio": (10.0, 30.0)}
SIDES = ("engine", "baseline", "compile")
SLOW_SIDES = ("compile",)
MEMORY = ("engine", "baseline")
WIDTH, HIDDEN, BATCH, QUICK_BATCH = 128, 256, 256, 64
NARROW = 64  # hidden width of the critic that the curve follows to where one of 256 would take an hour


def features(batch: int, setting: Setting) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, WIDTH, generator=generator)
    y = x + torch.randn(batch, WIDTH, generator=generator)
    return tuple(v.to(setting.device).requires_grad_() for v in (x, y))


def estimators(setting: Setting, hidden: int = HIDDEN) -> tuple[MIEstimator, mimrl.MIEstimator]:
    """Both sides' estimators, with the same weights. The published class orients scores as the baseline does."""
    torch.manual_seed(0)
    theirs = mimrl.MIEstimator(WIDTH, WIDTH, mimrl.settings(critic="concat", critic_hidden=hidden))
    ours = PublishedMIEstimator(WIDTH, WIDTH, critic="concat", hidden=hidden)
    state = theirs.critic_model.MLP_f.state_dict()
    ours.critic.f.load_state_dict(state)
    return ours.to(setting.device), theirs.to(setting.device)


def engine_loss(estimator: MIEstimator, x: Tensor, y: Tensor) -> Tensor:
    return estimator(x, y).loss


def eager_loss(estimator: mimrl.MIEstimator, x: Tensor, y: Tensor) -> Tensor:
    return estimator(x, y)[1]


def work(side: str, batch: int, setting: Setting) -> Work:
    ours, theirs = estimators(setting, NARROW if side == "engine_hidden_64" else HIDDEN)
    module = theirs if side in ("baseline", "compile") else ours
    loss = {"baseline": eager_loss}.get(side, engine_loss) if side != "compile" else torch.compile(eager_loss)
    x, y = features(batch, setting)

    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = y.grad = None
        loss(module, x, y).backward()

    return Work(run, samples=batch)


def build(side: str, setting: Setting) -> Work:
    """`side` may name a batch size (engine@512) or narrower hidden layers (engine_hidden_64)."""
    side, _, size = side.partition("@")
    return work(side, int(size) if size else QUICK_BATCH if setting.quick else BATCH, setting)


def details(setting: Setting, works: dict[str, Work], numbers: dict[str, list[float]]) -> dict[str, Any]:
    """Time and memory over the batch size. All pairs are formed only up to a few gigabytes."""
    if setting.quick:
        return {}
    doubled = [64 * 2**i for i in range(10)]  # 64 to 32,768
    batches = {"engine": doubled[:7], "baseline": doubled[:5], "engine_hidden_64": doubled[2:]}
    return {"curve": over_batches(sys.modules[__name__], "concat_critic", batches, setting)}


def gate(setting: Setting) -> None:
    results = []
    for module, loss in zip(estimators(setting), (engine_loss, eager_loss), strict=True):
        x, y = features(33, setting)
        value = loss(module, x, y)
        value.backward()
        results.append([value.detach(), x.grad, y.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
