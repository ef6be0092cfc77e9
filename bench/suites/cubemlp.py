"""The flagship pair of CubeMLP blocks against eager modules that permute the cube for every axis."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

from bench.baselines import mimrl
from bench.runner import Setting, Work, assert_same_gradient, products
from engine.mimrl.names import reference_to_engine
from engine.model.cubemlp import CubeMLP

TITLE = "CubeMLP, 100-3-128 to 50-3-128 to 10-3-128, B=128, forward and backward, against eager"
GOALS = {"ratio": (2.5, 4.0)}
SIDES = ("engine", "baseline", "compile")
SLOW_SIDES = ("compile",)
BATCH, QUICK_BATCH = 128, 16
SHAPE = ([100, 3, 128], [[50, 3, 128], [10, 3, 128]], [[50, 3, 128], [10, 3, 128]])


def name_in_engine(name: str) -> str:
    """The engine's name for a parameter of the baseline's CubeMLP."""
    return reference_to_engine(f"mlp_encoder.{name}").removeprefix("fusion.")


def modules(setting: Setting) -> tuple[CubeMLP, nn.Module]:
    """The engine's and the baseline's modules, with the same weights."""
    torch.manual_seed(0)
    d_in, d_hiddens, d_outs = SHAPE
    theirs = mimrl.CubeMLP(d_in, d_hiddens, d_outs, [True, True], "gelu", True, False)
    ours = CubeMLP(d_in, d_hiddens, d_outs, activate="gelu")
    state = {name_in_engine(k): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(state)
    return ours.to(setting.device), theirs.to(setting.device)


def build(side: str, setting: Setting) -> Work:
    ours, theirs = modules(setting)
    module = {"engine": ours, "baseline": theirs}.get(side) or torch.compile(theirs)
    batch = QUICK_BATCH if setting.quick else BATCH
    x = torch.randn(batch, *SHAPE[0], device=setting.device, requires_grad=True)
    cotangent = torch.randn(batch, *SHAPE[2][-1], device=setting.device)

    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        (module(x) * cotangent).sum().backward()

    return Work(run, samples=batch)


def details(setting: Setting, works: dict[str, Work], numbers: dict[str, list[float]]) -> dict[str, Any]:
    """Time of the matrix products alone."""
    return products(works["baseline"], statistics.median(numbers["engine"]), setting)


def gate(setting: Setting) -> None:
    ours, theirs = modules(setting)
    x = torch.randn(5, *SHAPE[0], device=setting.device)
    cotangent = torch.randn(5, *SHAPE[2][-1], device=setting.device)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    result, expected = ours(a), theirs(b)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    (result * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    assert_same_gradient(a.grad, b.grad, "x")
    gradients = {name_in_engine(k): p.grad for k, p in theirs.named_parameters()}
    for key, parameter in ours.named_parameters():
        assert_same_gradient(parameter.grad, gradients[key], key)
