"""Information does not change when a constant is added: float64 columns far from 0 (absolute times, coordinates)."""

import math

import numpy as np
import pytest
import torch

import engine
from engine.kernels.knn_product import label_strata, product_indices, stratified_product_indices
from engine.kernels.knn_product.reference import narrow

TRUTH = -0.5 * math.log(1 - 0.81)
OFFSETS = (1e7, -1.7e9)


def samples(n=1500):
    rng = np.random.default_rng(0)
    x = rng.normal(size=n)
    return x, 0.9 * x + math.sqrt(1 - 0.81) * rng.normal(size=n), rng.normal(size=n)


def test_mutual_information():
    x, y, _ = samples()
    at_zero = engine.estimate_mi(x, y)["value"]
    assert at_zero == pytest.approx(TRUTH, abs=0.1)
    for offset in OFFSETS:
        found = engine.estimate_mi(x + offset, torch.from_numpy(y - offset))
        assert found["value"] == pytest.approx(at_zero, abs=0.02)


def test_conditional_mutual_information():
    x, y, z = samples()
    at_zero = engine.estimate_cmi(x, y, z, steps=50)["dv"]
    assert at_zero == pytest.approx(TRUTH, abs=0.05)
    for offset in OFFSETS:
        found = engine.estimate_cmi(x + offset, y - offset, z + offset, steps=50)["dv"]
        assert found == pytest.approx(at_zero, abs=0.01)


def test_conditional_mutual_information_given_categories():
    x, y, z = samples()
    label = np.round(z).clip(-1, 1)
    at_zero = engine.estimate_cmi(x, y, label, steps=100, discrete=True)["ldr"]
    for far in (label + 1.7e9, label.astype(np.int64) + (1 << 40)):
        assert engine.estimate_cmi(x, y, far, steps=100, discrete=True)["ldr"] == pytest.approx(at_zero, abs=1e-6)


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("offset", [2.0**33, -(2.0**33)])
def test_neighbours(columns, offset):
    """Values on a grid, so that adding the offset is exact: the same rows, ties included."""
    z = torch.randint(-500, 500, (400, columns), generator=torch.Generator().manual_seed(0)).double() / 64
    indices = [product_indices(v, 40, 3, torch.Generator().manual_seed(1)) for v in (z, z.float(), z + offset)]
    assert all(torch.equal(a, b) for other in indices[1:] for a, b in zip(indices[0], other, strict=True))


def test_strata():
    label = torch.arange(120) % 3
    far = label + (1 << 40)
    for value in (label.float(), label.double() + 1.7e9, far):
        assert torch.equal(label_strata(value, 5).group, label)
        neighbour, query = stratified_product_indices(value, 10, 2, torch.Generator().manual_seed(0))
        assert torch.equal(label[neighbour], label[query.repeat_interleave(2)])


def test_values_that_float32_holds_stay_as_they_are():
    for value in (torch.tensor([0.1, 2e9]), torch.tensor([0.5, -3.0]).double(), torch.tensor([1, 5]), torch.empty(0)):
        assert torch.equal(narrow(value), value.float())
    assert narrow(torch.tensor([[1e9 + 0.25, 7.0], [1e9, 8.0], [1e9 - 1, 9.0]], dtype=torch.float64)).tolist() == [
        [0.25, -1.0],
        [0.0, 0.0],
        [-1.0, 1.0],
    ]
    assert narrow(torch.tensor([0.1, math.nan], dtype=torch.float64)).isnan().any()
