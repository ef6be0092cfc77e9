"""What users hand to an estimate: names, categories, missing entries, indexes, groups."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from engine import estimate_cmi, estimate_mi
from engine.errors import EstimatorError
from engine.information.inputs import read_inputs, varying_columns
from engine.samples import as_codes

ROWS = 60
NAN = math.nan


def frame() -> pd.DataFrame:
    generator = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "age": generator.normal(size=ROWS),
            "job": np.array(["cook", "smith", "clerk"])[np.arange(ROWS) % 3],
            "mood": pd.Categorical(np.array(["sad", "glad"])[np.arange(ROWS) % 2], categories=["sad", "glad"]),
        }
    )


def read(x, y=None, discrete=False, groups=None, missing="raise"):
    y = np.arange(float(len(x))) if y is None else y
    return read_inputs("here", {"x": x, "y": y}, discrete, groups, missing, ("x", "y"))


def refused(match: str, *arguments, **options) -> None:
    with pytest.raises(EstimatorError, match=match) as caught:
        read(*arguments, **options)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("here: ")


# -- categories -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "discrete", ["job", ["job"], {"x": ["job"]}, {"x": [1]}, {"x": 1}, {"x": [-2]}, {"x": np.array([1])}]
)
def test_columns_are_named_in_many_ways(discrete):
    side = read(frame(), discrete=discrete).sides["x"]
    assert side.discrete.tolist() == [False, True, True]  # the type of "mood" says so itself
    assert side.values[:4, 1].tolist() == [1.0, 2.0, 0.0, 1.0]  # clerk, cook, smith
    assert side.values[:3, 2].tolist() == [1.0, 0.0, 1.0]


def test_whole_sides():
    both = read(np.arange(ROWS) % 4, np.arange(ROWS) % 3, discrete=True).sides
    assert both["x"].wholly_discrete and both["y"].wholly_discrete
    one = read(np.arange(ROWS) % 4, np.arange(ROWS) % 3, discrete="y").sides
    assert not one["x"].wholly_discrete and one["y"].wholly_discrete
    text = read([["a", 1.5], ["b", 2.5]] * 30, discrete={"x": [0]}).sides["x"]
    assert text.values[:2].tolist() == [[0.0, 1.5], [1.0, 2.5]] and text.discrete.tolist() == [True, False]
    series = read(pd.Series(["u", "v"] * 30, name="word"), discrete="word").sides["x"]
    assert series.wholly_discrete and series.labels == ["word"]


def test_a_side_and_a_column_of_one_name():
    named = pd.DataFrame({"y": np.arange(ROWS) % 3, "b": np.arange(float(ROWS))})
    refused("which is a side and a column of x", named, discrete="y")
    assert read(named, discrete={"x": ["y"]}).sides["x"].discrete.tolist() == [True, False]


def test_a_name_of_several_columns_names_them_all():
    twice = pd.DataFrame(np.arange(ROWS)[:, None] % 3 * np.ones(3), columns=["a", "a", "b"])
    for discrete in ("a", {"x": ["a"]}):
        assert read(twice, discrete=discrete).sides["x"].discrete.tolist() == [True, True, False]
    assert not read(twice, discrete=None).sides["x"].discrete.any()


def test_columns_keep_their_kinds_and_names_without_the_constant_ones():
    table = frame()[["job", "age", "mood"]].assign(job="cook")
    side = varying_columns(read(table, discrete="job").sides["x"])
    assert side.discrete.tolist() == [False, True] and side.labels == ["age", "mood"] and side.width == 2


def test_codes():
    assert as_codes("here", "x", np.array([10.0, -1.0, 10.0])).tolist() == [1.0, 0.0, 1.0]
    mixed = as_codes("here", "x", ["b", 3, None, "b", NAN, pd.NA, pd.NaT])
    assert mixed[:2].tolist() == [1.0, 0.0] and mixed[3] == 1.0 and mixed[[2, 4, 5, 6]].isnan().all()
    assert as_codes("here", "x", torch.tensor([5, 2, 5])).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "discrete, match",
    [
        (3.5, "discrete 3.5; expected names or numbers of columns"),
        ("jobs", "discrete column 'jobs'; expected one of x, y, 'age', 'job', 'mood'"),
        (1, r'Write discrete=\{"x": \[1\]\}'),
        ({"z": True}, "discrete names 'z'"),
        ({"x": ["jobs"]}, "discrete column 'jobs' of x; expected one of 'age', 'job', 'mood'"),
        ({"y": [1]}, "discrete column 1 of y; expected one of 0 to 0"),
        ({"x": True, "y": True}, "a discrete x of 60 categories in 60 rows, column 'age'"),
    ],
)
def test_columns_that_are_not_there(discrete, match):
    refused(match, frame(), discrete=discrete)


def test_text_is_refused_unless_it_is_named():
    refused("column 'job' of x: .*Name columns of text", frame())
    refused("Name columns of text or categories in discrete=", np.array(["a", "b"] * 30))
    refused("Name columns of text or categories in discrete=", frame()[["age", "job"]])


# -- missing entries and other data that cannot be read ---------------------------------------------------------------


def test_missing_entries_are_located():
    values = np.arange(2.0 * ROWS).reshape(ROWS, 2)
    values[7, 1], values[9, 0] = NAN, NAN
    refused(r"2 non-finite entries in x, the first \(nan\) in row 7, column 1", values)
    named = pd.DataFrame(values, columns=["a", "b"])
    refused("in row 7, column 'b'", named)
    refused("1 non-finite entries in y, the first .* in row 3", np.arange(60.0), [1.0, 2, 3, None] + [5.0] * 56)
    refused("missing 'skip'; expected one of raise, drop", values, missing="skip")


def test_rows_with_missing_entries_are_dropped_and_counted():
    x, y = np.random.default_rng(0).normal(size=(2, 200))
    holes = x.copy()
    holes[[3, 50]] = NAN
    label = np.where(y > 0, "up", "down").astype(object)
    label[[50, 60]] = None
    kept = np.setdiff1d(np.arange(200), [3, 50, 60])
    groups = (np.arange(200) // 2).astype(float)
    estimate = estimate_mi(holes, label, discrete="y", missing="drop")
    expected = estimate_mi(x[kept], label[kept], discrete="y")
    assert (estimate.dropped, estimate.samples, expected.dropped) == (3, 197, 0) and estimate.value == expected.value
    groups[10:12] = NAN
    inputs = read(holes, y, groups=groups, missing="drop")
    assert inputs.dropped == 4 and inputs.groups == 99 and len(inputs.sides["y"].values) == 196
    rare = np.where(np.isnan(holes), "only here", label)  # a category of dropped rows alone leaves no gap
    codes = read(holes, rare, discrete="y", missing="drop").sides["y"].values.unique()
    assert codes.tolist() == [0.0, 1.0]
    masked = np.ma.array(x, mask=np.arange(200) < 5)
    assert estimate_mi(masked, y, missing="drop").dropped == 5
    assert read(pd.Series(x).astype("Float64").where(x > -1), y, missing="drop").dropped == (x <= -1).sum()


def test_infinite_entries_are_never_dropped():
    values = np.arange(60.0)
    values[5] = math.inf
    refused(r"1 non-finite entries in x, the first \(inf\) in row 5", values, missing="drop")


def test_too_few_rows_are_left():
    values = np.arange(60.0)
    values[:20] = NAN
    refused("40 samples after 20 with missing entries were dropped", values, missing="drop")


@pytest.mark.parametrize(
    "values, do",
    [
        (scipy.sparse.eye(60).tocsr(), "Make it dense"),
        (torch.eye(60).to_sparse(), "Make it dense"),
        (pd.Series(pd.date_range("2020-01-01", periods=60)), "Turn dates into numbers first"),
        (np.arange("2020-01-01", "2020-03-01", dtype="datetime64[D]"), "Turn dates into numbers first"),
    ],
)
def test_what_cannot_be_read_says_what_to_do(values, do):
    refused(do, values, np.zeros(60))


@pytest.mark.parametrize("values", [None, {"a": [1.0]}, (i for i in range(60))])
def test_what_is_no_array(values):
    refused("x: (NoneType|dict|generator); expected an array", values, np.zeros(60))


def test_memory_layouts_give_the_same_numbers():
    x = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
    expected = read(x).sides["x"].values
    forms = [
        x[::-1].copy()[::-1],
        np.asfortranarray(x),
        x.astype(">f4"),
        pd.DataFrame(x),
        torch.tensor(x).requires_grad_(),
    ]
    assert all(torch.equal(read(form).sides["x"].values, expected) for form in forms)
    assert torch.equal(read(x.astype(np.float16)).sides["x"].values, torch.tensor(x).half().double())
    assert torch.equal(read(x > 0).sides["x"].values, (torch.tensor(x) > 0).double())


# -- rows that pair up ------------------------------------------------------------------------------------------------


def test_an_index_in_another_order_is_refused():
    """Positions would pair rows of different subjects."""
    x = pd.Series(np.arange(60.0), index=[f"s{i}" for i in range(60)], name="x")
    shuffled = x.sample(frac=1, random_state=0)
    refused("same labels in another order.*Pass y.loc", x, shuffled)
    assert torch.equal(read(x, shuffled.loc[x.index]).sides["y"].values, read(x, x).sides["y"].values)
    assert read(x, shuffled.to_numpy()).dropped == 0
    other = pd.Series(np.arange(60.0), index=range(100, 160))
    assert len(read(x, other).sides["x"].values) == 60  # other labels: rows pair by position
    refused("same labels in another order", x, np.zeros(60), groups=shuffled)


# -- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "groups, match",
    [
        (np.arange(60) % 19, "19 groups; expected at least 20"),
        (np.arange(59), "groups of 59 rows and 1 columns; expected one entry for each of 60 rows"),
        (np.zeros((60, 2)), "groups of 60 rows and 2 columns"),
        ([None] + ["a"] * 59, "1 rows without a group, the first in row 0"),
    ],
)
def test_groups_that_cannot_be_used(groups, match):
    refused(match, np.arange(60.0), groups=groups)


def test_the_least_that_is_enough():
    """20 groups, and five rows a category."""
    assert read(np.arange(60.0), groups=np.arange(60) % 20).groups == 20
    assert read(np.arange(60) % 12, discrete={"x": True}).sides["x"].values.max() == 11
    refused("a discrete x of 13 categories in 60 rows", np.arange(60) % 13, discrete={"x": True})


def test_groups_may_have_names():
    inputs = read(np.arange(60.0), groups=[f"subject {i % 30}" for i in range(60)])
    assert inputs.groups == 30 and torch.equal(inputs.group[:30], inputs.group[30:])


def test_both_estimators_take_the_same_options():
    table = frame()
    x, e = np.random.default_rng(1).normal(size=(2, ROWS))
    estimate = estimate_cmi(table[["age", "job"]], x + e, x, discrete="job", steps=5, hidden=8)
    assert math.isfinite(estimate.value) and estimate.dropped == 0
    with pytest.raises(EstimatorError, match="estimate_cmi: found 60, 60 and 59 rows of x, y, z"):
        estimate_cmi(x, e, x[1:], steps=5)


@pytest.mark.parametrize("seed", ["a", 1.5, None, True, 2**70, -(2**70)])
def test_seeds_that_are_no_integers_are_refused(seed):
    x = np.random.default_rng(0).normal(size=(3, 60))
    for estimate, arguments in ((estimate_mi, x[:2]), (estimate_cmi, x)):
        with pytest.raises(EstimatorError, match=r"found seed = .*; expected an integer"):
            estimate(*arguments, seed=seed)
    assert estimate_mi(*x[:2], seed=np.int64(3)) == estimate_mi(*x[:2], seed=3)


def test_integers_that_float64_merges_are_refused():
    y = np.random.default_rng(0).normal(size=60)
    with pytest.raises(EstimatorError, match=r"x with integers of 2\*\*53 or more"):
        estimate_mi(np.arange(60) + 2**60, y)
    estimate_mi(np.arange(60) * 10**9 + 1_700_000_000 * 10**9, y)  # nanoseconds, a second apart
    with pytest.raises(EstimatorError, match=r"x: list .*expected an array of real numbers"):
        estimate_mi([10**400] * 60, y)


def test_a_masked_array_of_text_is_refused():
    with pytest.raises(EstimatorError, match="expected an array of real numbers"):
        estimate_mi(np.ma.array(["a", "b"] * 30), np.arange(60.0))


def test_every_pair_of_indexes_is_compared():
    """Also where an argument between them has other labels."""
    x, y = np.random.default_rng(0).normal(size=(2, 60))
    groups = pd.Series(np.arange(60) // 2).sample(frac=1, random_state=0)
    with pytest.raises(EstimatorError, match="an index of x and of groups"):
        estimate_mi(pd.Series(x), pd.Series(y, index=range(100, 160)), groups=groups)
