"""Categories and mixed columns: values against closed forms and quadrature."""

import math

import numpy as np
import pytest
import torch

from engine import estimate_cmi, estimate_mi
from engine.information.neighbours import Column, merge_rare, mixed_information, neighbour_information

LEVELS = np.array([-3.0, -1.0, 1.0, 3.0])
NAMES = np.array(["north", "west", "east", "south"])  # in the order of the levels, which is not that of the alphabet


def label_information() -> float:
    """I(label; level + N(0, 1)) by quadrature: the entropy of the mixture less that of its parts."""
    at = np.linspace(-12, 12, 20_001)
    density = np.exp(-0.5 * (at[:, None] - LEVELS) ** 2).mean(1) / math.sqrt(2 * math.pi)
    return float(np.trapezoid(-density * np.log(density), at) - 0.5 * math.log(2 * math.pi * math.e))


def labels(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    generator = np.random.default_rng(seed)
    label = generator.integers(4, size=rows)
    return NAMES[label], LEVELS[label] + generator.normal(size=rows), generator


def holds(estimate, truth: float, error: float) -> None:
    assert estimate.value == pytest.approx(truth, abs=error), estimate
    assert estimate.interval[0] <= truth <= estimate.interval[1], estimate


def test_a_label_of_text_and_a_column():
    label, y, _ = labels(2000)
    estimate = estimate_mi(label, y, discrete="x")
    holds(estimate, label_information(), 0.05)
    assert estimate.method == "neighbours within categories" and estimate.flags == ()
    assert estimate_mi(y, label, discrete="y").value == pytest.approx(estimate.value, abs=1e-9)


def test_a_label_and_several_columns():
    label, y, generator = labels(1500)
    wide = np.stack([y, *generator.normal(size=(2, 1500))], 1)
    holds(estimate_mi(label, wide, discrete="x", steps=300), label_information(), 0.06)


def test_a_label_beside_a_continuous_column():
    """x is a label and a column; y depends on both. I = I(label; y) + I(column; y | label)."""
    generator = np.random.default_rng(1)
    label, x, noise = generator.integers(3, size=1500), *generator.normal(size=(2, 1500))
    sign = np.array([1.0, -1.0, 0.0])[label]
    rho = 0.8 * sign
    y = rho * x + np.sqrt(1 - rho**2) * noise  # N(0, 1) for each label, so that the label alone tells nothing
    truth = 2 / 3 * -0.5 * math.log(1 - 0.64)
    estimate = estimate_mi(np.stack([[7, 900, 3][i] for i in label])[:, None] * [1, 0] + x[:, None] * [0, 1], y,
                           discrete={"x": [0]}, steps=600)  # fmt: skip
    holds(estimate, truth, 0.08)
    assert not {"discrete columns", "heavy tails"} & set(estimate.flags)


def test_two_labels_of_text():
    generator = np.random.default_rng(2)
    x = generator.integers(4, size=3000)
    y = np.where(generator.random(3000) < 0.3, generator.integers(4, size=3000), x)
    p = 0.7 + 0.3 / 4
    truth = math.log(4) + p * math.log(p) + (1 - p) * math.log(0.3 / 4)
    estimate = estimate_mi(NAMES[x], NAMES[::-1][y], discrete=True)
    holds(estimate, truth, 0.04)
    assert estimate.method == "counts" and estimate.flags == ()


def test_columns_that_are_often_exactly_zero():
    """Both are 0 in the same 40 % of rows. I = H(0.4) + 0.6 log(2) / 2."""
    generator = np.random.default_rng(3)
    x, noise = generator.normal(size=(2, 2000))
    kept = generator.random(2000) >= 0.4
    truth = -0.4 * math.log(0.4) - 0.6 * math.log(0.6) + 0.6 * 0.5 * math.log(2)
    estimate = estimate_mi(x * kept, (x + noise) * kept)
    holds(estimate, truth, 0.06)
    assert "repeated rows" not in estimate.flags


def test_copies_of_rows_are_not_taken_for_frequent_values():
    """Ten copies of each of 30 independent rows."""
    x, y = np.random.default_rng(0).normal(size=(2, 30))
    estimate = estimate_mi(np.tile(x, 10), np.tile(y, 10), steps=20, hidden=8)
    assert "repeated rows" in estimate.flags and estimate.interval[0] == 0 and estimate.value < 0.2


def test_rare_categories_are_read_as_one():
    label, y, _ = labels(1000)
    rare = label.astype(object)
    rare[:6] = [f"only {i}" for i in range(6)]
    estimate = estimate_mi(rare, y, discrete="x")
    holds(estimate, label_information(), 0.07)
    assert "rare categories" in estimate.flags
    merged, found = merge_rare(torch.tensor([0.0, 0, 0, 1, 2, 3, 3, 3]), 2)
    assert found and merged.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert not merge_rare(torch.tensor([0.0, 0, 1, 1]), 2)[1]


def test_a_category_that_does_not_occur_in_a_fold():
    """Its indicator is then constant in the training rows of that fold."""
    label, y, generator = labels(300)
    rare = label.astype(object)
    rare[:2] = ["once", "once"]
    estimate = estimate_mi(
        rare, np.stack([y, generator.normal(size=300)], 1), discrete="x", groups=np.arange(300) // 3, steps=50
    )
    assert estimate.interval[0] <= label_information() <= estimate.interval[1]


def test_mixed_information_of_continuous_columns_is_that_of_neighbours():
    """Without ties and categories both are the same formula (Kraskov et al. 2004)."""
    x, noise = torch.randn(2, 700, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x + noise
    mixed, plain = mixed_information(Column(x, False), Column(y, False)), neighbour_information(x, y)
    for k in (3, 10):  # whether the k-th neighbour itself is nearer than it is decided by the last bit of a sum
        assert (mixed[k] - plain[k]).abs().median() < 1e-12
        assert mixed[k].mean().item() == pytest.approx(plain[k].mean().item(), abs=2e-3)


def test_neighbours_within_categories_by_hand():
    """Ross (2014): psi(N) + psi(k) - psi(N of the label) - psi(rows nearer than the k-th of the label, and itself)."""
    y = torch.tensor([0.0, 1, 2, 3, 10, 11, 12, 13.5], dtype=torch.float64)
    label = torch.tensor([0.0, 0, 0, 1, 1, 1, 0, 1], dtype=torch.float64)
    shares = mixed_information(Column(label, True), Column(y, False))[3]
    digamma = torch.special.digamma(torch.arange(1.0, 10.0, dtype=torch.float64))  # of n at n - 1
    # row 0: its label's third neighbour is 12 away; nearer than that are 1, 2, 3, 10, 11
    assert shares[0].item() == pytest.approx((digamma[7] + digamma[2] - digamma[3] - digamma[5]).item())
    # row 7: the third neighbour is 10.5 away; nearer are 10, 11, 12
    assert shares[7].item() == pytest.approx((digamma[7] + digamma[2] - digamma[3] - digamma[3]).item())


# -- conditional ------------------------------------------------------------------------------------------------------


def test_a_label_of_text_given_z():
    label, y, generator = labels(1500)
    z = generator.normal(size=1500)
    estimate = estimate_cmi(label, y + 2 * z, z, discrete="x", steps=200)
    holds(estimate, label_information(), 0.08)


def test_a_mixed_side_given_z():
    """x is a label and a column. Given z the label tells nothing alone, and decides the sign of the correlation."""
    generator = np.random.default_rng(4)
    z, x, noise = generator.normal(size=(3, 2000))
    label = generator.integers(2, size=2000)
    rho = np.where(label == 1, 0.8, -0.8)
    y = rho * x + math.sqrt(1 - 0.64) * noise + z
    estimate = estimate_cmi(np.stack([40 * label, x], 1), y, z, discrete={"x": [0]}, steps=400)
    holds(estimate, -0.5 * math.log(1 - 0.64), 0.1)


def test_z_of_a_label_and_a_column():
    """x and y share a column and a label, and nothing else."""
    generator = np.random.default_rng(5)
    z, e, f = generator.normal(size=(3, 1500))
    label = generator.integers(6, size=1500)
    shift = np.array([0.0, 5, -3, 2, 9, -7])[label]
    mixed = np.stack([label, z], 1)
    estimate = estimate_cmi(z + shift + e, z - shift + f, mixed, discrete={"z": [0]}, steps=100)
    assert estimate.value < 0.02 and estimate.interval[0] == 0
