"""The examples do what their text says."""

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_information_term_helps_a_foreign_model():
    script = example("foreign_model")
    without, with_term = script.main(0.0), script.main(1.0)
    assert with_term[1] > without[1] + 1  # nats that the views share
    assert with_term[0] > without[0] + 0.01  # accuracy on new events


def test_an_upper_bound_removes_more_than_training_without_one():
    script = example("leak")
    without, with_term = script.train("none"), script.train("club")
    assert without["knn"] > 0.4 and without["linear"] > 0.4
    assert with_term["knn"] < 0.2 and with_term["linear"] < 0.2
    assert with_term["loss"] < 0.2  # M, of variance 1, is still there
