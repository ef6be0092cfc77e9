"""The matrix of a table: values, intervals, categories, blocks, conditions, and what can be done with it."""

import json
import math

import numpy as np
import pandas as pd
import pytest

import engine
from engine import mi_matrix
from engine.errors import EstimatorError

ROWS = 800


def table() -> pd.DataFrame:
    """a and b share log(2) / 2; the label is the sign of c; d is alone."""
    generator = np.random.default_rng(0)
    a, noise, c, d = generator.normal(size=(4, ROWS))
    return pd.DataFrame(
        {
            "a": a,
            "b": a + noise,
            "label": np.where(c > 0, "up", "down"),
            "c": c + 0.3 * generator.normal(size=ROWS),
            "d": d,
        }
    )


def test_values_against_the_truth():
    matrix = mi_matrix(table())
    assert matrix.names == ["a", "b", "label", "c", "d"]
    assert np.array_equal(matrix.values, matrix.values.T, equal_nan=True)
    assert np.isnan(matrix.values.diagonal()).all() and np.isnan(matrix.low.diagonal()).all()
    assert matrix.values[0, 1] == pytest.approx(0.5 * math.log(2), abs=0.08)
    assert matrix.low[0, 1] < 0.5 * math.log(2) < matrix.high[0, 1]
    # I(label; c) = log 2 - E H(p), p the probability of "up" given c, by a large sample
    x = np.random.default_rng(1).normal(size=400_000)
    shifted = x + 0.3 * np.random.default_rng(2).normal(size=400_000)
    from scipy.special import entr, ndtr

    up = ndtr(shifted / (0.3 * math.sqrt(1 + 0.3**2)))  # x given c is N(c / 1.09, .09 / 1.09)
    truth = math.log(2) - (entr(up) + entr(1 - up)).mean()
    assert matrix.values[2, 3] == pytest.approx(truth, abs=0.05)
    assert matrix.low[:, 4][:4].max() == 0


def test_each_entry_is_the_estimate_of_its_pair():
    frame = table()
    matrix = mi_matrix(frame, columns=["label", "a", "c"], seed=4)
    assert list(matrix.estimates) == [("label", "a"), ("label", "c"), ("a", "c")]
    assert matrix.estimates["a", "c"] == engine.estimate_mi(frame["a"], frame["c"], seed=4)
    assert matrix.estimates["label", "c"] == engine.estimate_mi(frame["label"], frame["c"], discrete="x", seed=4)
    assert matrix.values[1, 2] == matrix.estimates["a", "c"].value
    assert (matrix.low[1, 2], matrix.high[1, 2]) == matrix.estimates["a", "c"].interval
    tied = frame[["a", "c"]].round(2)  # the seed decides the order of equal values
    first, other = (mi_matrix(tied, seed=seed).estimates["a", "c"] for seed in (0, 4))
    assert other == engine.estimate_mi(tied["a"], tied["c"], seed=4) != first


def test_few_values_are_categories_unless_told_otherwise():
    values = np.random.default_rng(0).normal(size=(200, 3))
    values[:, 0] = np.round(values[:, 0])  # 7 values or so
    assert mi_matrix(values).estimates["0", "1"].method == "neighbours within categories"
    plain = mi_matrix(values, discrete=False, steps=20, hidden=8).estimates["0", "1"]
    assert "categories" not in plain.method and "discrete columns" in plain.flags
    assert mi_matrix(values, discrete=[0]).estimates["0", "2"].method == "neighbours within categories"
    digits = np.random.default_rng(1).integers(12, size=(2000, 2))
    assert mi_matrix(digits, discrete=True).estimates["0", "1"].method == "counts"
    for count, few in ((10, True), (11, False)):
        values[:, 0] = np.arange(200) % count
        frame = pd.DataFrame(values).astype(object)  # numbers, whatever the type of their column
        method = mi_matrix(frame, columns=[0, 1], steps=5, hidden=8).estimates["0", "1"].method
        assert ("categories" in method) == few


def test_blocks_of_columns():
    frame = table()
    matrix = mi_matrix(frame, columns={"first": ["a", "d"], "second": ["b"]}, steps=100)
    assert matrix.names == ["first", "second"]
    assert matrix.values[0, 1] == pytest.approx(0.5 * math.log(2), abs=0.1)


def test_given():
    """a and b share nothing but the noise of c once c is known."""
    generator = np.random.default_rng(0)
    c, e, f = generator.normal(size=(3, 600))
    frame = pd.DataFrame({"a": c + e, "b": c + f, "c": c})
    matrix = mi_matrix(frame, given="c", steps=20, hidden=8)
    assert matrix.names == ["a", "b"] and matrix.given == ["c"]
    assert matrix.values[0, 1] < 0.02 and mi_matrix(frame).values[0, 1] > 0.1
    assert matrix.estimates["a", "b"] == engine.estimate_cmi(frame["a"], frame["b"], c, steps=20, hidden=8)


def test_missing_entries_and_groups():
    values = np.random.default_rng(0).normal(size=(300, 3))
    values[:4, 0] = math.nan
    with pytest.raises(EstimatorError, match="mi_matrix, 0 and 1: found 4 non-finite entries"):
        mi_matrix(values)
    matrix = mi_matrix(values, missing="drop", groups=np.arange(300) // 3)
    assert matrix.estimates["0", "1"].dropped == 4 and matrix.estimates["1", "2"].dropped == 0
    assert matrix.estimates["1", "2"].groups == 100


def test_a_matrix_can_be_shown_and_kept(tmp_path):
    matrix = mi_matrix(table()[["a", "b", "label"]])
    frame = matrix.to_frame()
    assert frame.loc["a", "b"] == matrix.values[0, 1] and list(frame.columns) == matrix.names
    record = json.loads(matrix.to_json(tmp_path / "matrix.json"))
    assert record == json.loads((tmp_path / "matrix.json").read_text()) == matrix.to_dict()
    assert record["values"][0][0] is None and record["low"][0][1] == matrix.low[0, 1]
    assert record["high"][0][1] == matrix.high[0, 1] > record["values"][0][1] > matrix.low[0, 1]
    assert all(entry["flags"] for entry in record["flags"]) and f"{matrix.values[0, 1]:.3f}" in str(matrix)
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    assert matrix.plot(tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options, match",
    [
        ({"columns": ["e"]}, "column 'e'; expected one of a, b, label, c, d"),
        ({"columns": ["a"]}, "1 columns; expected two columns or blocks"),
        ({"given": 9}, "column 9"),
        ({"given": "c", "columns": ["a", "b", "c"]}, "column c twice"),
        ({"columns": {"q": ["a", "b"], "r": "b"}}, "column b twice"),
        ({"discrete": "auto", "columns": {"q": ["a", "z"], "r": "b"}}, "column 'z'"),
        ({"discrete": False}, "column label: .*"),
        ({"steps": 0}, "steps = 0"),
    ],
)
def test_refused_in_one_line(options, match):
    with pytest.raises(EstimatorError, match=match) as caught:
        mi_matrix(table(), **options)
    assert "\n" not in str(caught.value)


def test_columns_of_one_name_are_refused():
    with pytest.raises(EstimatorError, match="several columns of one name"):
        mi_matrix(pd.DataFrame(np.zeros((60, 2)), columns=["a", "a"]))


def test_groups_in_another_order_are_refused():
    """As `estimate_mi` refuses them: rows pair by position, and the index says otherwise."""
    groups = pd.Series(np.arange(300) // 5).sample(frac=1, random_state=0)
    with pytest.raises(EstimatorError, match="an index of frame and of groups with the same labels in another order"):
        mi_matrix(pd.DataFrame(np.random.default_rng(0).normal(size=(300, 2))), groups=groups)


def test_integers_that_are_names_of_columns():
    """An integer is a column's name or its number. Where these are two columns, it is refused."""
    values = np.random.default_rng(0).normal(size=(300, 3))
    frame = pd.DataFrame(values, columns=[10, 20, 30])
    assert mi_matrix(frame, columns=[30, 10]).names == mi_matrix(frame, columns=[2, 0]).names == ["30", "10"]
    frame.columns = [2, 1, 0]
    with pytest.raises(EstimatorError, match="column 2, the name of one column and the number of another"):
        mi_matrix(frame, columns=[2, 1])
    assert mi_matrix(frame, columns=["2", 1]).names == ["2", "1"]
    with pytest.raises(EstimatorError, match="column 0, the name of one column and the number of another"):
        engine.estimate_mi(frame, values[:, 0], discrete={"x": [0]})


@pytest.mark.parametrize(
    "options, match",
    [
        ({"stepz": 3}, "the setting 'stepz'; expected one of bound, steps,"),
        ({"x": 3}, "the setting 'x'"),
        ({"columns": 3}, "3 for columns; expected names or numbers"),
        ({"discrete": None}, "None for columns"),
        ({"given": 1.5}, "1.5 for columns"),
        ({"seed": "a"}, "seed = 'a'; expected an integer"),
    ],
)
def test_arguments_of_other_types_are_refused(options, match):
    with pytest.raises(EstimatorError, match=match):
        mi_matrix(table()[["a", "b"]], **options)


def test_a_table_without_columns_is_refused():
    with pytest.raises(EstimatorError, match="a table without columns"):
        mi_matrix(table()[[]])
