"""The outsider's scripts: trained with the operation and with the eager loss they end at the same loss."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


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
