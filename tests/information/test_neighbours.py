"""Neighbour estimates of single columns: how often their intervals hold the truth, and columns with ties."""

import math

import numpy as np
import pytest

from engine import estimate_mi

ROWS = 500


def gaussian(seed: int, rho: float, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    x, noise = np.random.default_rng(seed).normal(size=(2, rows))
    return x, rho * x + math.sqrt(1 - rho * rho) * noise


def information_of_rounded(step: float, rho: float) -> float:
    """I(round(x); y) of a Gaussian pair: the sum over x's cells of an integral over y, in nats."""
    edges = np.arange(-8.5 * step, 8.6 * step, step) if step > 1 else np.arange(-8 - step / 2, 8 + step, step)
    y = np.linspace(-8, 8, 2001)
    below = np.vectorize(lambda t: 0.5 * math.erfc(-t / math.sqrt(2)))
    given_y = np.diff(below((edges[:, None] - rho * y) / math.sqrt(1 - rho * rho)), axis=0)
    alone = np.diff(below(edges))[:, None]
    weight = np.exp(-y * y / 2) / math.sqrt(2 * math.pi) * (y[1] - y[0])
    found = (given_y > 1e-300) & (alone > 1e-300)
    logs = np.log(np.where(found, given_y, 1.0) / np.where(found, alone, 1.0))
    return float((given_y * logs * found * weight).sum())


@pytest.mark.parametrize(("rho", "seeds"), [(0.0, 100), (0.5, 200), (0.9, 200)])
def test_intervals_hold_the_truth_in_95_of_100_cases(rho, seeds):
    """Without allowing for neighbours that rows share, 93 of 100 intervals did."""
    truth = -0.5 * math.log(1 - rho * rho)
    estimates = [estimate_mi(*gaussian(seed, rho)) for seed in range(seeds)]
    assert {e.method for e in estimates} == {"neighbours"}
    inside = sum(e.interval[0] <= truth <= e.interval[1] for e in estimates)
    assert inside >= 0.95 * seeds
    spread = np.std([e.readings["neighbours"] for e in estimates], ddof=1)
    assert np.mean([e.standard_error for e in estimates]) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize(("step", "rho"), [(0.02, 0.0), (0.05, 0.0), (0.07, 0.0), (0.05, 0.9)])
def test_a_rounded_column_reads_what_it_holds(step, rho):
    """Ties as neighbours at distance 0 read 0.02 to 0.1 nats of independent columns, by the rounding alone."""
    values = []
    for seed in range(20):
        x, y = gaussian(seed, rho)
        estimate = estimate_mi(np.round(x / step) * step, y)
        if estimate.method == "neighbours":
            values.append(estimate.readings["neighbours"])
    assert len(values) >= 10
    error = 3 * np.std(values, ddof=1) / math.sqrt(len(values))
    assert np.mean(values) == pytest.approx(information_of_rounded(step, rho), abs=error + 0.01)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_label_and_a_rounded_column(shift):
    """The truth: a sum over the cells of the rounded column, of two Gaussians `shift` apart."""
    step = 0.02
    edges = np.arange(-8 - step / 2, 9 + step, step)
    below = np.vectorize(lambda t: 0.5 * math.erfc(-t / math.sqrt(2)))
    cells = np.stack([np.diff(below(edges - mean)) for mean in (0.0, shift)])
    truth = float((cells / 2 * np.log((cells + 1e-300) / (cells.mean(0) + 1e-300))).sum())
    values = []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        label = generator.integers(0, 2, ROWS)
        y = np.round((generator.normal(size=ROWS) + shift * label) / step) * step
        values.append(estimate_mi(label, y, discrete="x").readings["neighbours"])
    assert np.mean(values) == pytest.approx(truth, abs=3 * np.std(values, ddof=1) / math.sqrt(20) + 0.005)


def test_a_column_that_is_often_zero_beside_a_continuous_one():
    """x is y's noisy copy in half of the rows and 0 in the others: half of the copy's information."""
    values = []
    for seed in range(20):
        x, y = gaussian(seed, 0.8)
        x[np.random.default_rng(1000 + seed).random(ROWS) < 0.5] = 0
        values.append(estimate_mi(x, y).readings["neighbours"])
    truth = 0.5 * -0.5 * math.log(1 - 0.8**2)
    assert np.mean(values) == pytest.approx(truth, abs=3 * np.std(values, ddof=1) / math.sqrt(20) + 0.01)


def test_ties_are_broken_by_the_seed_alone():
    x, y = gaussian(0, 0.5)
    x = x.round(1)
    first, again, other = (estimate_mi(x, y, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.value != other.value
    distinct = gaussian(0, 0.5)
    assert estimate_mi(*distinct, seed=0) == estimate_mi(*distinct, seed=1)
