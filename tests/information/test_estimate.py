"""The result: JSON and back, and when its flags are raised."""

import json
import math

import numpy as np
import pytest
import torch

from engine import estimate_cmi, estimate_mi
from engine.errors import EstimatorError
from engine.information.estimate import Estimate, value_flags


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns))


def test_json_and_back(tmp_path):
    x, y = normal(200, 3), normal(200, 2, 1)
    estimate = estimate_mi(x, y, steps=20, hidden=8, groups=np.arange(200) // 4)
    text = estimate.to_json(tmp_path / "estimate.json")
    for source in (text, tmp_path / "estimate.json", str(tmp_path / "estimate.json")):
        again = Estimate.from_json(source)
        assert again.pointwise is None and again.to_dict() == estimate.to_dict()
        assert again.interval == estimate.interval and again.flags == estimate.flags and again.groups == 50


def test_numbers_that_are_not_finite_are_null_in_json():
    estimate = Estimate(
        1.0, (0.0, 2.0), 0.1, "gaussian", {"gaussian": math.nan, "dv": 1.0}, 60, history=[{"held_out": -math.inf}]
    )
    record = json.loads(estimate.to_json())
    assert record["readings"] == {"gaussian": None, "dv": 1.0} and record["history"] == [{"held_out": None}]
    assert math.isnan(Estimate.from_json(estimate.to_json()).readings["gaussian"])


def test_what_an_estimate_holds_and_says():
    estimate = Estimate(
        0.5, (0.25, 0.75), 0.1, "counts", {"counts": 0.5}, 60, ("noise",), 4.0, torch.ones(60), [{"step": 0}], 3, 20
    )
    again = Estimate.from_json(estimate.to_json())
    assert (again.dropped, again.groups, again.ceiling, again.samples) == (3, 20, 4.0, 60)
    assert len(list(estimate)) == len(estimate) and {name: estimate[name] for name in estimate}["counts"] == 0.5
    assert str(estimate) == "0.500 nats, 95 % interval 0.250 to 0.750 (noise)"
    assert estimate == Estimate(*(getattr(estimate, name) for name in Estimate.__dataclass_fields__))
    values = {name: getattr(estimate, name) for name in Estimate.__dataclass_fields__}
    for change in ({"pointwise": torch.zeros(60)}, {"pointwise": None}, {"dropped": 4}):
        assert estimate != Estimate(**values | change)


@pytest.mark.parametrize("source", ["{", "{}", '{"value": []}', "nowhere.json", '{"a":' * 100_000])
def test_no_estimate_is_told_in_one_line(source):
    with pytest.raises(EstimatorError, match="no estimate") as caught:
        Estimate.from_json(source)
    assert "\n" not in str(caught.value)


def test_a_number_of_rows_that_is_infinite_is_no_estimate():
    estimate = Estimate(1.0, (0.0, 2.0), 0.1, "gaussian", {"gaussian": 1.0}, 60)
    with pytest.raises(EstimatorError, match="no estimate"):
        Estimate.from_json(estimate.to_json().replace('"samples": 60', '"samples": 1e999'))


def test_a_picture_of_an_unknown_format_is_one_line(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    estimate = Estimate(1.0, (0.0, 2.0), 0.1, "gaussian", {"gaussian": 1.0}, 60)
    with pytest.raises(EstimatorError, match=r"found a picture \.foo; expected one of .*png"):
        estimate.plot(tmp_path / "x.foo")
    assert not list(tmp_path.iterdir())


# -- flags: when they must be raised and when they must not -----------------------------------------------------------


def test_a_value_that_may_be_none():
    """Of the raw reading, and of the lowest one that is likely, by 1.96 standard errors."""
    assert value_flags(0.3, 0.197, 0.1) == [] and value_flags(0.3, 0.195, 0.1) == ["noise"]
    assert value_flags(-0.1, 0.3, 0.1) == ["below zero"]


def test_saturation_of_infonce_is_flagged_near_the_log_of_the_rows():
    """Folds of 200 rows: log 200 = 5.3. A Gaussian of 0.8 nats is far from it, one of 6 nats is beyond it."""
    x, noise = normal(1000, 2), normal(1000, 2, 1)
    for nats, flagged in ((0.8, False), (6.0, True)):
        rho = math.sqrt(-math.expm1(-nats))
        estimate = estimate_mi(x, rho * x + math.sqrt(1 - rho**2) * noise, bound="infonce", steps=60)
        assert estimate.ceiling == pytest.approx(math.log(200)) and estimate["infonce"] < estimate.ceiling
        assert ("saturated" in estimate.flags) == flagged, estimate


def test_saturation_of_neighbours_is_flagged():
    x, noise = normal(1000, 2).T
    for scale, flagged in ((1.0, False), (1e-4, True)):
        estimate = estimate_mi(x, x + scale * noise)
        assert ("saturated" in estimate.flags) == flagged
    z = normal(1000, 1, 2)
    for scale, flagged in ((1.0, False), (1e-6, True)):
        assert ("saturated" in estimate_cmi(x, x + scale * noise, z, steps=20, hidden=8).flags) == flagged


def test_training_that_ends_while_it_still_gains_is_flagged_and_training_that_converged_is_not():
    x = normal(600, 2)
    y = np.sin(3 * x[:, 0]) + 0.2 * normal(600, 1, 1)[:, 0]
    short, long = (estimate_mi(x, y, steps=steps, hidden=32, batch_size=128) for steps in (100, 1500))
    assert "not converged" in short.flags and "not converged" not in long.flags
    assert short.history[-1]["step"] == 100 and long.history[-1]["step"] < 1500
    assert short.value < long.value


def test_training_of_a_conditional_estimate_that_ends_early_is_flagged():
    z = normal(1000, 1, 2)
    x = normal(1000, 1)[:, 0]
    rho = np.where(z[:, 0] > 0, 0.9, -0.9)
    y = rho * x + math.sqrt(1 - 0.81) * normal(1000, 1, 1)[:, 0]
    short, long = (estimate_cmi(x, y, z, steps=steps) for steps in (60, 800))
    assert "not converged" in short.flags and "not converged" not in long.flags
    assert [check["step"] for check in short.history][:2] == [0, 10] and long.value > short.value


def test_overfitting_is_flagged_with_many_columns_and_not_with_few():
    x = normal(300, 40)
    y = x[:, :1] + normal(300, 1, 1)
    assert "overfitted" in estimate_mi(x, y, steps=100).flags
    assert "overfitted" not in estimate_mi(x[:, :2], y, steps=100).flags
