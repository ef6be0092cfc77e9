"""Flags of columns, which both estimators make in one way, and copies of rows."""

import numpy as np
import pytest
import torch

from engine.information.cmi import estimate_cmi
from engine.information.columns import column_flags, copies, indicators, robust
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
    assert column_flags(heavy, heavy, torch.tensor([False, True, False])) == []  # the number of a category
    heavy[7, 1] = 25.0  # of a column whose robust deviation is about 1
    assert flags(heavy) == []
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


@pytest.mark.parametrize("rows, values", [(100, 10), (1000, 50)])
def test_a_column_of_few_values_is_not_continuous(rows, values):
    """Few are ten, or 5 % of the rows."""
    few, more = (torch.arange(rows)[:, None] % n for n in (values, values + 1))
    assert torch.equal(copies(few), torch.arange(rows)) and len(copies(more).unique()) == values + 1


def test_robust_deviations_are_those_of_a_normal_column():
    scores = normal(4001, 1)
    found = robust(3 * scores + 5)
    assert found.std().item() == pytest.approx(1, rel=0.05) and found.median() == 0
    spoiled = 3 * scores + 5
    spoiled[:40] = 1e6
    assert torch.allclose(robust(spoiled)[40:], found[40:], atol=0.1)
    often = torch.zeros(1000, 1, dtype=torch.float64)
    often[:200, 0] = torch.arange(1.0, 201.0)  # both quartiles are 0: the ordinary deviation
    assert torch.allclose(robust(often), often / often.std(correction=0))


def test_indicators_of_categories():
    """Centred, of unit variance, but for a rare category."""
    column = torch.tensor([0.0] * 48 + [1.0] * 40 + [2.0] * 10 + [3.0] * 2)[:, None]
    found = indicators(torch.cat([column, 1 - column.clamp(max=1)], 1))
    assert found.shape == (100, 4)  # the first value of each has none
    for i, (value, share, scale) in enumerate([(1, 0.4, 0.24**0.5), (2, 0.1, 0.3), (3, 0.02, 0.2)]):
        assert torch.allclose(found[:, i], ((column[:, 0] == value).double() - share) / scale)
    assert torch.allclose(found[:, 3], ((column[:, 0] == 0).double() - 0.48) / (0.48 * 0.52) ** 0.5)


@pytest.mark.parametrize("values, flagged", [(20, True), (2, False)])
def test_both_estimators_flag_discrete_columns_that_they_read_by_rank(values, flagged):
    generator = np.random.default_rng(0)
    z, noise = generator.normal(size=(2, 300))
    x = np.clip(np.round((z + noise) * values / 6), -values // 2, values // 2 - 1)  # up to `values` values
    conditional = estimate_cmi(x, noise, z, steps=5, hidden=8)
    assert ("discrete columns" in conditional.flags) == flagged
    if flagged:
        assert "discrete columns" in estimate_mi(x, noise, steps=5, hidden=8).flags
