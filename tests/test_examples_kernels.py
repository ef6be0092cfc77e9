"""The outsider's scripts: trained with the operation and with the eager loss they end at the same loss."""

import importlib.util
import math
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from engine import kernels

EXAMPLES = Path(__file__).parents[1] / "examples"
PAGE = (EXAMPLES.parent / "docs" / "kernels.md").read_text()


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_simclr_converges_as_eager_does():
    script = example("simclr")
    ours, eager = script.train(script.streaming), script.train(script.nt_xent)
    assert eager[-1] < eager[0] - 0.5
    assert ours[:10] == pytest.approx(eager[:10], abs=1e-4)
    # roundoff grows with the steps: near in the end, not equal
    assert sum(ours[-10:]) / 10 == pytest.approx(sum(eager[-10:]) / 10, abs=0.02)


def test_cpc_converges_as_eager_does():
    script = example("cpc")
    (ours, temperature), (eager, expected) = script.train(script.streaming), script.train(script.eager)
    assert eager[-1] < eager[0] - 0.5
    assert ours[:10] == pytest.approx(eager[:10], abs=1e-4)
    assert sum(ours[-10:]) / 10 == pytest.approx(sum(eager[-10:]) / 10, abs=0.02)
    assert temperature == pytest.approx(expected, rel=0.02) and temperature < 0.9


@pytest.mark.parametrize("name", ["simclr", "cpc"])
def test_scripts_run(name):
    done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nats" in done.stdout.splitlines()[-2]


def test_calls_of_the_page_run():
    table = PAGE.split("## What you have")[1].split("\n\n")[1]
    calls = [c for c in re.findall(r"`([^`]+)`", table) if re.search(r"(?<!_)infonce\(|siglip\(|mi_lower_bound\(", c)]
    assert len(calls) >= 18
    size, width = 6, 4
    for code in calls:
        space = {"torch": torch, "infonce": kernels.infonce, "mi_lower_bound": kernels.mi_lower_bound, "B": size}
        names = ("z1", "z2", "image", "text", "q", "k", "queue", "prediction", "future")
        space |= {name: torch.randn(size, width) for name in names}
        space |= {"z": torch.randn(2 * size, width), "scores": torch.randn(size, size), "a": torch.randn(size, 1)}
        space |= {"own": torch.randn(size, 3, width), "siglip": kernels.siglip, "temperature": 0.1, "bias": -10.0}
        space |= {"y": torch.arange(size) % 3, "y_queue": torch.arange(size) % 3, "ids": torch.arange(size) // 2}
        space |= {"columns": torch.stack([torch.arange(size), torch.full((size,), -1)], 1)}
        space |= {"mask": torch.eye(size, dtype=torch.bool).roll(1, 0)}
        space |= {"log_temperature": torch.zeros(()), "log_ema": torch.tensor(-math.inf)}
        exec(code, space)


def test_names_of_the_page_exist():
    for name in re.findall(r"`(engine\.[\w.]+)", PAGE):
        pkgutil.resolve_name(name.rstrip("."))  # imports what nobody has imported yet
    assert all(f"`{name}" in PAGE or f"{name}(" in PAGE for name in kernels.__all__)
