"""`estimate_cmi` against closed forms, on independent data, and on what users hand in. Gaussian chains: tests/truth."""

import math

import numpy as np
import pytest
import torch

from engine import estimate_cmi
from engine.errors import EstimatorError
from engine.information.cmi import _neighbour_shuffle
from tests.information import cmi_cases, knn


def normal(n: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, columns))


def chain(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """I(X;Y|Z) = log(4 / 3) / 2 = 0.1438."""
    x, e, f = normal(n, 3, seed).T
    return x, x + e, x + e + f


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, n, steps", [("sine, 2", 3000, 300), ("spread, 1", 2000, 200)])
def test_conditional_independence(name, n, steps):
    samples, truth = cmi_cases.CASES[name]
    assert truth == 0
    estimate = estimate_cmi(*samples(n, 0), steps=steps)
    assert estimate.value < 0.02 and estimate.readings["dv"] > -0.03


@pytest.mark.slow
@pytest.mark.parametrize("n", [5000, 10_000])
@pytest.mark.parametrize("name", [name for name, (_, truth) in cmi_cases.CASES.items() if truth == 0])
def test_conditional_independence_in_more_dimensions(name, n):
    estimate = estimate_cmi(*cmi_cases.CASES[name][0](n, 0))
    print(f"\n{name}, {n}: {estimate}, {estimate.readings}")
    assert estimate.value < 0.02


@pytest.mark.parametrize(
    "name, n, steps", [("sign, 1", 3000, 500), ("label, 3", 2000, 100), ("published F, 10", 4000, 50)]
)
def test_dependence(name, n, steps):
    samples, truth = cmi_cases.CASES[name]
    estimate = estimate_cmi(*samples(n, 0), steps=steps)
    assert abs(estimate.value - truth) < max(0.1 * truth, 0.1), estimate.readings


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (_, truth) in cmi_cases.CASES.items() if truth > 0])
def test_dependence_of_many_kinds(name):
    samples, truth = cmi_cases.CASES[name]
    estimate = estimate_cmi(*samples(10_000, 0))
    neighbours = knn.frenzel_pompe(*samples(10_000, 0))
    print(f"\n{name}: true {truth:.3f}, nearest neighbours {neighbours:.3f}, {estimate}, {estimate.readings}")
    assert abs(estimate.value - truth) < max(0.1 * truth, 0.1)


def test_nearest_neighbours_and_ours():
    """Ten columns of z already leave nearest neighbours at less than half of 2.308 nats."""
    samples, truth = cmi_cases.CASES["published F, 10"]
    data = samples(2000, 1)
    assert knn.frenzel_pompe(*data) < truth / 2
    assert estimate_cmi(*data, steps=50).value == pytest.approx(truth, abs=0.1)
    x, y, z = chain(2000)
    assert knn.frenzel_pompe(x, y, z) == pytest.approx(0.1438, abs=0.05)  # in few columns they are right


def test_outliers_do_no_harm():
    x, e, z = normal(3000, 3).T
    y = 0.75 * x + math.sqrt(1 - 0.75**2) * e + z
    clean = estimate_cmi(x, y, z, steps=50)
    assert clean.value == pytest.approx(-0.5 * math.log(1 - 0.75**2), abs=0.05)
    x[:5], y[2:7], z[4:9] = 1e4, -1e4, 1e4
    spoilt = estimate_cmi(x, y, z, steps=50)
    assert spoilt.value == pytest.approx(clean.value, abs=0.02)
    assert "heavy tails" in spoilt.flags and "heavy tails" not in clean.flags


def test_a_monotone_map_changes_nothing():
    x, y, z = chain(1000)
    plain, bent = estimate_cmi(x, y, z, steps=100), estimate_cmi(np.exp(3 * x), y**3, z, steps=100)
    assert bent.value == pytest.approx(plain.value, abs=0.02)


def test_the_interval_covers():
    """In 95 of 100 runs if it is right; here at least 26 of 30, and it is no wider than it need be."""
    truth, inside, widths = math.log(4 / 3) / 2, 0, []
    for seed in range(30):
        low, high = estimate_cmi(*chain(400, seed), steps=5, hidden=8, seed=seed).interval
        inside += low <= truth <= high
        widths.append(high - low)
    assert inside >= 26
    assert np.mean(widths) < 0.14  # the samples alone leave 4 x 0.5 sqrt(.25) / 20 = 0.1


# -- what is on the border --------------------------------------------------------------------------------------------


def test_x_that_is_z():
    _, y, z = chain(1000)
    estimate = estimate_cmi(z, y, z, steps=50)
    assert estimate.value < 0.02


def test_y_that_is_x():
    """Infinite; what is given is about log N, and flagged."""
    x, _, z = chain(1000)
    estimate = estimate_cmi(x, x, z, steps=50)
    assert estimate.value > 0.8 * math.log(1000) and "saturated" in estimate.flags
    assert math.isfinite(estimate.interval[1])


def test_two_equal_columns_of_x():
    x, y, z = chain(1000)
    one, two = estimate_cmi(x, y, z, steps=25), estimate_cmi(np.stack([x, x], 1), y, z, steps=25)
    assert two.value == pytest.approx(one.value, abs=0.03)


def test_constant_columns():
    x, y, z = chain(600)
    wide = [np.stack([v, np.full(600, 518.123)], 1) for v in (x, y, z)]
    plain, estimate = estimate_cmi(x, y, z, steps=25), estimate_cmi(*wide, steps=25)
    assert estimate.value == pytest.approx(plain.value, abs=1e-9)
    assert "constant columns" in estimate.flags and "constant columns" not in plain.flags
    nothing = estimate_cmi(np.zeros(600), y, z)
    assert nothing.value == 0 and nothing["dv"] == 0 and nothing.interval == (0, 0)
    without = estimate_cmi(x, y, np.zeros(600), steps=25)  # I(X;Y) = log(2) / 2
    assert without.value == pytest.approx(math.log(2) / 2, abs=0.08)


def test_repeated_rows_are_flagged_and_no_evidence():
    x, y, z = chain(300)
    once, often = (estimate_cmi(*(np.tile(v, times) for v in (x, y, z)), steps=24) for times in (1, 10))
    assert "repeated rows" in often.flags and "repeated rows" not in once.flags
    assert often.value == pytest.approx(once.value, abs=0.05)
    assert often.standard_error == pytest.approx(once.standard_error, rel=0.3)
    independent = estimate_cmi(*(np.tile(v, 10) for v in normal(300, 3).T), steps=48)
    assert independent.value < 0.02


def test_more_columns_of_z_than_rows():
    z = normal(300, 400)
    x = z[:, 0] + normal(300, 1, 1)[:, 0]
    estimate = estimate_cmi(x, x + normal(300, 1, 2)[:, 0], z, steps=25)
    assert 0.2 < estimate.value < 0.5  # log(2) / 2 = 0.35
    nothing = estimate_cmi(x, z[:, 0] + normal(300, 1, 2)[:, 0], z, steps=25)
    assert nothing.interval[0] < 0.1


def test_categories():
    """Given z of two columns, x and y are correlated by 0.6 in half of the categories."""
    rng = np.random.default_rng(0)
    z = rng.integers(0, 2, (4000, 2))
    x, e = rng.normal(size=(2, 4000))
    rho = np.where(z[:, 0] == z[:, 1], 0.6, 0.0)
    y = rho * x + np.sqrt(1 - rho**2) * e + 10 * z[:, 1]
    estimate = estimate_cmi(x, y, z, discrete=True, steps=400)
    assert estimate.value == pytest.approx(-0.25 * math.log(1 - 0.36), abs=0.03)


# -- the result -------------------------------------------------------------------------------------------------------


def test_result():
    estimate = estimate_cmi(*chain(600), steps=48)
    assert estimate["dv"] == estimate["ldr"] == estimate["nwj"] == pytest.approx(float(estimate), abs=0.01)
    assert {"x given y", "y given x", "gaussian", "training"} <= set(estimate.readings)
    assert estimate.pointwise.shape == (600,) and estimate.pointwise.dtype == torch.float64
    assert estimate.pointwise.mean().item() == pytest.approx(estimate["dv"], abs=0.002)
    assert estimate.ceiling == pytest.approx(math.log(600))
    assert [r["step"] for r in estimate.history] == [0, 10, 20, 30, 40, 48]
    low, high = estimate.interval
    assert low <= estimate.value <= high


def test_negative_readings_are_given_as_zero():
    estimate = next(
        e for e in (estimate_cmi(*normal(200, 3, seed).T, steps=5, seed=seed) for seed in range(20)) if e["dv"] < 0
    )
    assert estimate.value == 0 and {"below zero", "noise"} <= set(estimate.flags)
    assert estimate.interval[0] == 0 and "null" not in estimate.readings


def test_a_small_value_is_compared_with_a_null():
    estimate = estimate_cmi(*chain(4000, 1), steps=100)
    assert abs(estimate["null"]) < 0.02 and "noise" not in estimate.flags
    assert estimate.value == pytest.approx(estimate["dv"] - max(estimate["null"], 0))
    assert estimate.value == pytest.approx(math.log(4 / 3) / 2, abs=0.04)


def test_equal_seeds_give_equal_results():
    x, y, z = chain(600)
    torch.manual_seed(1)
    first = estimate_cmi(x, y.tolist(), torch.tensor(z), steps=20, seed=4)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert estimate_cmi(x, y, z, steps=20, seed=4) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert estimate_cmi(x, y, z, steps=20, seed=5) != first


def test_shuffle_among_neighbours():
    z = torch.from_numpy(normal(500, 1))
    order = _neighbour_shuffle(z, 5, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(500))
    assert (order == torch.arange(500)).float().mean() < 0.02
    assert (z[order] - z).abs().median() < 0.03  # of a spread of 1


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, columns", [(50, 1), (60, 5), (60, 30)])
def test_few_rows(n, columns):
    x, y, z = (normal(n, columns, seed) for seed in range(3))
    estimate = estimate_cmi(x, y, z, steps=5)
    assert all(math.isfinite(v) for v in (estimate.value, *estimate.interval, *estimate.readings.values()))
    assert estimate.interval[0] < 0.3


@pytest.mark.parametrize(
    "change, found",
    [
        ({"x": torch.zeros(99)}, "99, 100 and 100 rows"),
        ({"y": torch.zeros(100, 2, 2)}, r"y \[100, 2, 2\]"),
        ({"x": torch.zeros(100, 0)}, r"x \[100, 0\]"),
        ({"z": torch.zeros(100, 0)}, r"z \[100, 0\]"),
        ({"z": torch.full((100,), math.nan)}, "100 non-finite entries in z"),
        ({"x": np.array(["a"] * 100)}, "x: ndarray with entries of type <U1"),
        ({"k": 0}, "k = 0"),
        ({"steps": 0}, "steps = 0"),
        ({"method": "product"}, "option method"),
        ({"held_out": 0.5}, "option held_out"),
        ({"discrete": True}, "a discrete z of 100 categories in 100 rows"),
        ({"x": torch.zeros(49), "y": torch.zeros(49), "z": torch.zeros(49)}, "49 samples; expected at least 50"),
    ],
)
def test_bad_input(change, found):
    samples = dict(zip("xyz", chain(100), strict=True))
    with pytest.raises(EstimatorError, match=found) as caught:
        estimate_cmi(**samples | change)
    assert "\n" not in str(caught.value)
