"""Neighbour estimates of single columns: how often their intervals hold the truth, and columns with ties."""

import math

import numpy as np
import pytest
import torch
from scipy.special import digamma

from engine import estimate_mi
from engine.information import neighbours
from engine.information.neighbours import Column, mixed_information, neighbour_ceiling, neighbour_information

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


# -- by hand ----------------------------------------------------------------------------------------------------------


def whole_numbers(count: int, below: int, seed: int) -> torch.Tensor:
    """Their sums and differences are exact, so that no rounding decides which row is nearer."""
    return torch.randint(below, (count,), generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("block", [60, 30])
def test_each_rows_share_by_the_definition(block, monkeypatch):
    """Kraskov et al. (2004), equation 8, of each block of rows on its own."""
    monkeypatch.setattr(neighbours, "BLOCK", block)
    monkeypatch.setattr(neighbours, "CHUNK", 7)
    x, y = whole_numbers(60, 500, 0), whole_numbers(60, 500, 1)
    found = neighbour_information(x, y)
    for row in range(60):
        others = [j for j in range(row // block * block, (row // block + 1) * block) if j != row]
        dx, dy = ((side[others] - side[row]).abs().numpy() for side in (x, y))
        for k in (3, 10):
            radius = np.sort(np.maximum(dx, dy))[k - 1]
            nearer = digamma((dx < radius).sum() + 1) + digamma((dy < radius).sum() + 1)
            assert found[k][row].item() == pytest.approx(digamma(k) + digamma(block) - nearer, abs=1e-12)


def test_the_ceiling_is_what_a_column_shares_with_itself(monkeypatch):
    x = whole_numbers(200, 2**40, 2)
    assert neighbour_ceiling(200) == pytest.approx(digamma(200) - digamma(3))
    assert neighbour_information(x, x)[3].mean().item() == pytest.approx(neighbour_ceiling(200), abs=1e-12)
    monkeypatch.setattr(neighbours, "BLOCK", 50)
    assert neighbour_information(x, x)[3].mean().item() == pytest.approx(neighbour_ceiling(200), abs=1e-12)
    assert neighbour_ceiling(200) == pytest.approx(digamma(50) - digamma(3))


@pytest.mark.parametrize("labelled", [False, True])
def test_each_rows_share_with_ties_and_categories_by_the_definition(labelled, monkeypatch):
    """Ross (2014) within categories, of one, two and three rows, too; Gao et al. (2017) where rows coincide."""
    monkeypatch.setattr(neighbours, "CHUNK", 7)
    x, y = whole_numbers(50, 300, 3), whole_numbers(50, 300, 4)
    x[:14] = y[:14] = 0
    y[14:18] = 0
    if labelled:
        x = torch.cat([torch.tensor([7.0, 8, 8, 9, 9, 9]), whole_numbers(44, 3, 5)])
    found = mixed_information(Column(x, labelled), Column(y, False))
    for row in range(50):
        others = [j for j in range(50) if j != row]
        dx, dy = ((side[others] - side[row]).abs().numpy() for side in (x, y))
        if labelled:
            dx = np.where(dx == 0, 0.0, np.inf)
        near = np.sort(np.maximum(dx, dy))
        for k in (3, 10):
            count = min(k, int(np.isfinite(near).sum()))
            if count == 0:
                assert found[k][row] == 0
                continue
            radius = near[count - 1]
            if radius == 0:
                count = (near == 0).sum() + 1
                beside = [(side == 0).sum() for side in (dx, dy)]
            else:
                beside = [(side < radius).sum() for side in (dx, dy)]
            expected = digamma(count) + digamma(50) - sum(digamma(n + 1) for n in beside)
            assert found[k][row].item() == pytest.approx(expected, abs=1e-12)
    alone = mixed_information(Column(x, labelled), Column(y, False), torch.arange(50), torch.Generator().manual_seed(0))
    for k in (3, 10):  # each row is a group of its own
        assert torch.allclose(alone[k], found[k], atol=1e-12)
