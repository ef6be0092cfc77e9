"""Flags of columns, which both estimators make in one way, and copies of rows."""

import numpy as np
import pytest
import torch

from engine.information.cmi import estimate_cmi
from engine.information.columns import column_flags, copies
from engine.information.mi import estimate_mi


def normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def flags(values: torch.Tensor) -> list[str]:
    return column_flags(values, values)


def test_flags_of_columns():
    plain = normal(1000, 3)
    assert flags(plain) == []
    constant, discrete, heavy = plain.clone(), plain.clone(), plain.clone()
    constant[:, 1], discrete[:, 1], heavy[7, 1] = 5.0, torch.arange(1000) % 99, 40.0
    assert flags(constant) == ["constant columns"]
    assert flags(discrete) == ["discrete columns"]
    assert column_flags(discrete, discrete[:, :1]) == []  # the second column is read as categories
    assert flags(heavy) == ["heavy tails"]
    assert flags(plain.repeat(2, 1)) == ["repeated rows"]


def test_one_row_in_a_hundred_may_be_a_copy():
    values = normal(1000, 2)
    values[:10] = values[10:20]
    assert flags(values) == []
    values[30] = values[31]
    assert flags(values) == ["repeated rows"]


def test_copies_have_one_number():
    values = normal(200, 2)
    values[3] = values[150]
    number = copies(values)
    assert number[3] == number[150] and len(number.unique()) == 199
    bits = torch.arange(200)[:, None] % 2
    assert torch.equal(copies(bits), torch.arange(200))  # equal rows of no continuous column are no copies


@pytest.mark.parametrize("values, flagged", [(20, True), (2, False)])
def test_both_estimators_flag_discrete_columns_that_they_read_by_rank(values, flagged):
    generator = np.random.default_rng(0)
    z, noise = generator.normal(size=(2, 300))
    x = np.clip(np.round((z + noise) * values / 6), -values // 2, values // 2 - 1)  # up to `values` values
    conditional = estimate_cmi(x, noise, z, steps=5, hidden=8)
    assert ("discrete columns" in conditional.flags) == flagged
    if flagged:
        assert "discrete columns" in estimate_mi(x, noise, steps=5, hidden=8).flags
