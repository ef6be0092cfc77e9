"""Runs that compile nothing import neither torch's compiler nor transformers."""

import functools
import subprocess
import sys

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

from engine.config import Config
from engine.step.fused import _is_torchs
from engine.training import parts
from engine.training.without_compiler import step_without_compiler
from tests.small_runs import changed


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_run_reads_neither_transformers_nor_the_compiler(config, tmp_path):
    changed(config, epochs=1, output={"tensorboard": True}).save(tmp_path / "settings.yaml")
    code = """
import sys
from engine import load_config, train
train(load_config(sys.argv[1]), sys.argv[2])
print(sorted({"transformers", "torch._dynamo", "triton", "scipy"} & set(sys.modules)))
"""
    assert python(code, str(tmp_path / "settings.yaml"), str(tmp_path / "run")) == "[]"


def test_optimisers_are_as_torch_has_them_afterwards():
    code = """
import sys
import torch
from torch.optim import optimizer as torch_optimizer
from engine.config import Config
from engine.step.fused import _is_torchs
from engine.training import parts
from engine.training.without_compiler import without_compiler
methods = [m.__wrapped__ for m in vars(torch.optim.Optimizer).values() if hasattr(m, "__wrapped__")]
before = [dict(vars(m)) for m in methods]
with without_compiler():
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]).zero_grad()
    assert [dict(vars(m)) for m in methods] != before and "torch._dynamo" not in sys.modules
assert [dict(vars(m)) for m in methods] == before
torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
print("torch._dynamo" in sys.modules)
"""
    assert python(code) == "True"


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_a_step_without_the_compiler_is_the_step(kind):
    """With a schedule, hooks and a closure, which torch puts around it."""
    found = []
    for plain in (False, True):
        weight = torch.nn.Parameter(torch.arange(4.0))
        optimizer = kind([weight], lr=0.1, fused=True)
        if plain:
            step_without_compiler(optimizer)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        called = []
        optimizer.register_step_pre_hook(lambda *_, called=called: called.append("before"))
        optimizer.register_step_post_hook(lambda *_, called=called: called.append("after"))

        def closure(weight=weight, called=called):
            called.append(torch.is_grad_enabled())
            weight.grad = weight.detach() + 1
            return 3.0

        values = []
        for _ in range(3):
            values.append(optimizer.step(closure))
            schedule.step()
        found.append((values, called, weight.detach(), optimizer.param_groups[0]["lr"]))
    assert found[0][:2] == found[1][:2] == ([3.0] * 3, ["before", True, "after"] * 3)
    assert torch.equal(found[0][2], found[1][2]) and found[0][3] == found[1][3]


@pytest.mark.parametrize("layer", ["around", "between", "of a later torch"])
def test_a_step_that_is_wrapped_otherwise_stays(layer, monkeypatch):
    calls, torchs = [], torch.optim.Adam.step
    graded = torchs.__wrapped__

    def counted(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            calls.append(1)
            return function(*args, **kwargs)

        return wrapper

    later = "def _use_grad(self, *args):\n    calls.append(1)\n    return step(self, *args)"
    place = {"calls": calls, "step": graded.__wrapped__}
    exec(compile(later, torch_optimizer.__file__, "exec"), place)
    new = functools.update_wrapper(place["_use_grad"], graded.__wrapped__)
    wrapped = {
        "around": counted(torchs),
        "between": torch.optim.Adam.profile_hook_step(counted(graded)),
        "of a later torch": torch.optim.Adam.profile_hook_step(new),
    }[layer]
    wrapped.hooked = True
    monkeypatch.setattr(torch.optim.Adam, "step", wrapped)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.Adam([weight], fused=True)
    step_without_compiler(optimizer)
    with torch.no_grad():
        optimizer.step()
    assert calls and "step" not in vars(optimizer) and (weight < 1).all()


def test_on_a_gpu_the_update_in_one_pass_finds_torchs_own_step():
    """`engine.step.fused` leaves an optimiser with a step of its own alone."""
    config = Config(train={"schedule": {"kind": "plateau"}})
    for device, replaced in (("cpu", True), ("meta", False)):
        optimizer = parts._optimizer(config, [{"params": [torch.nn.Parameter(torch.ones(1, device=device))]}], 0.1)
        assert ("step" in vars(optimizer)) is replaced
        assert _is_torchs(optimizer) is not replaced
