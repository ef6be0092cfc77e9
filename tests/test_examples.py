"""The examples do what their text says."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    """The examples import `compare`, which lies beside them."""
    monkeypatch.syspath_prepend(EXAMPLES)


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where processes that it starts find it
    spec.loader.exec_module(module)
    return module


def test_an_information_term_helps_a_foreign_model():
    script = example("foreign_model")
    without, with_term = script.main(0.0), script.main(1.0)
    assert with_term[1] > without[1] + 1  # nats that the views share
    assert with_term[0] > without[0] + 0.01  # accuracy on new events


@pytest.mark.parametrize("name", ["mmim_style", "club_style", "supcon", "clip_style"])
def test_the_engine_trains_as_the_plain_version_does(name):
    """Roundoff grows with the steps, so the first ones are compared."""
    script = example(name)
    ours, plain = script.train("engine", 8), script.train("plain", 8)
    assert ours.losses == pytest.approx(plain.losses, abs=2e-4)
    assert ours.score == pytest.approx(plain.score, abs=0.01)


def test_minimising_the_upper_bound_makes_the_encoding_forget_the_style():
    script = example("club_style")
    without, with_term = script.train("engine", weight=0.0), script.train("engine")
    assert without.score > 0.7 and with_term.score < without.score - 0.15


def test_supervised_contrast_separates_the_classes():
    script = example("supcon")
    assert script.train("engine", 10).score > script.train("engine", 1).score


def test_a_comparison_is_printed(monkeypatch, capfd):
    """What the script does as a program; each side is one in a process of its own."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / "supcon.py"), "--steps", "3", "--rounds", "1"])
    runpy.run_path(sys.argv[0], run_name="__main__")
    title, engine, plain, difference = capfd.readouterr().out.splitlines()
    assert title.split() == ["final", "loss", "accuracy", "CPU", "s", "peak", "MiB"]
    assert engine.startswith("engine") and plain.startswith("plain")
    assert float(engine.split()[1]) == pytest.approx(float(plain.split()[1]), abs=2e-4)  # as both are rounded
    assert float(difference.split()[-1]) < 1e-4


def test_an_upper_bound_removes_more_than_training_without_one():
    script = example("leak")
    without, with_term = script.train("none"), script.train("club")
    assert without["knn"] > 0.4 and without["linear"] > 0.4
    assert with_term["knn"] < 0.2 and with_term["linear"] < 0.2
    assert with_term["loss"] < 0.2  # M, of variance 1, is still there
