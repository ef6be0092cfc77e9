"""The five mutual-information terms of MIMRL at once against five separate eager estimators."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.baselines import mimrl
from bench.runner import Setting, Work, assert_same_gradient, products
from engine.kernels.critics import cpu

TITLE = "five grouped critics + InfoNCE, forward and backward, B=128, against five separate eager estimators"
GOALS = {"ratio": (2.0, 2.6)}
SIDES = ("engine", "baseline", "compile")
SLOW_SIDES = ("compile",)
DIM, BATCH = 128, 128
PAIRS = (("F", "T"), ("F", "A"), ("F", "V"), ("T", "A"), ("T", "V"))


def features(setting: Setting, batch: int = BATCH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(batch, DIM, generator=generator)
    return {
        name: (drawn + torch.randn(batch, DIM, generator=generator)).to(setting.device).requires_grad_()
        for name in "FTAV"
    }


def estimators(setting: Setting):
    """The engine's objective of the five terms and five baseline estimators with the same weights."""
    from engine import MI, Objective

    torch.manual_seed(0)
    objective = Objective([MI(x, y) for x, y in PAIRS], dims=dict.fromkeys("FTAV", DIM)).to(setting.device)
    eager = torch.nn.ModuleList(mimrl.MIEstimator(DIM, DIM, mimrl.settings()) for _ in PAIRS).to(setting.device)
    names = {"g": "MLP_g", "h": "MLP_h"}
    for term, estimator in zip(objective.terms, eager, strict=True):
        state = objective.estimators[term.key].critic.state_dict()
        renamed = {f"{names[k.split('.')[0]]}.{k.split('.', 1)[1]}": v for k, v in state.items()}
        estimator.critic_model.load_state_dict(copy.deepcopy(renamed))
    return objective, eager


def engine_loss(objective, rows: dict[str, Tensor]) -> Tensor:
    return objective.estimator_loss(rows).loss


def eager_loss(eager, rows: dict[str, Tensor]) -> Tensor:
    return sum(estimator(rows[x], rows[y])[1] for estimator, (x, y) in zip(eager, PAIRS, strict=True))


def build(side: str, setting: Setting) -> Work:
    objective, eager = estimators(setting)
    rows = features(setting)
    module = objective if side == "engine" else eager
    loss = engine_loss if side == "engine" else eager_loss
    if side == "compile":
        loss = torch.compile(eager_loss)
    leaves = [*module.parameters(), *rows.values()]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(module, rows).backward()

    return Work(run, samples=BATCH)


class _Timed:
    """The compiled kernel, with the seconds that its functions take."""

    def __init__(self, library: Any):
        self.library, self.seconds = library, 0.0

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.library, name)

        def run(*arguments: Any) -> None:
            start = time.perf_counter()
            function(*arguments)
            self.seconds += time.perf_counter() - start

        return run


def details(setting: Setting, works: dict[str, Work], numbers: dict[str, list[float]]) -> dict[str, Any]:
    """Time of the matrix products alone, and on a CPU the seconds per call in the compiled kernel."""
    shares = products(works["baseline"], statistics.median(numbers["engine"]), setting)
    library = cpu.library(torch.float32)
    if setting.device != "cpu" or library is None:
        return shares
    calls, timed = 100, _Timed(library)
    with patch.object(cpu, "library", lambda dtype: timed):
        for _ in range(calls):
            works["engine"].run()
    return {**shares, "kernel_seconds": timed.seconds / calls}


def gate(setting: Setting) -> None:
    objective, eager = estimators(setting)
    ours, theirs = features(setting, 33), features(setting, 33)
    a, b = engine_loss(objective, ours), eager_loss(eager, theirs)
    a.backward()
    b.backward()
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name in "FTAV":
        assert_same_gradient(ours[name].grad, theirs[name].grad, name)
    gradients = objective.estimator_state(grads=True)
    for (name, gradient), other in zip(gradients.items(), eager.parameters(), strict=True):
        assert_same_gradient(gradient, other.grad, name)
