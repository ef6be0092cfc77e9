"""Samples in whatever form users have them: the same numbers, or an error that names what is wrong."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from engine import estimate_cmi, estimate_mi
from engine.errors import EstimatorError
from engine.samples import as_samples

DATA = np.arange(12, dtype=np.float64).reshape(6, 2) / 4


class Frame:
    """What data frames of several libraries have in common."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.values if dtype is None else self.values.astype(dtype)


def same(values, expected=DATA) -> None:
    samples = as_samples("here", "x", values)
    assert samples.dtype == torch.float64 and samples.is_contiguous()
    assert np.array_equal(samples.numpy(), expected)


@pytest.mark.parametrize("values", [
    DATA, DATA.astype(">f8"), DATA.astype("<f4"), DATA.astype(">f4"), DATA.astype(np.float16), DATA[::-1][::-1],
    np.asfortranarray(DATA), DATA.tolist(), tuple(map(tuple, DATA)), list(DATA), DATA.astype(object),
    np.ma.array(DATA), np.repeat(DATA, 2, 0)[::2], torch.tensor(DATA), torch.tensor(DATA, requires_grad=True),
    list(torch.tensor(DATA)), Frame(DATA), Frame(DATA.astype(object)),
], ids=lambda v: type(v).__name__)  # fmt: skip
def test_the_same_numbers(values):
    same(values)


def test_other_shapes_and_types():
    same(DATA[::-1], DATA[::-1])
    same(DATA[:, ::-1], DATA[:, ::-1])
    same(Frame(DATA[:, 0]), DATA[:, :1])
    same([True, False], np.array([[1.0], [0.0]]))
    same(np.array([3, 255], dtype=np.uint8), np.array([[3.0], [255.0]]))
    same(np.array([[1, True], [2.0, False]], dtype=object), np.array([[1.0, 1], [2, 0]]))
    same([torch.tensor(1.5), 2], np.array([[1.5], [2.0]]))


def test_data_are_copied():
    own = DATA.copy()
    as_samples("here", "x", own).zero_()
    assert np.array_equal(own, DATA)


@pytest.mark.parametrize(("values", "match"), [
    (np.array(["1.5", "2"]), "entries of type <U3"),
    (["1.5", "2"], "entries of type <U3"),
    (np.array([b"1", b"2"]), "entries of type"),
    (np.array(["1", 2.0], dtype=object), "entries of type object"),
    (Frame(np.array([[1.0, "u"], [2.0, "v"]], dtype=object)), "entries of type object"),
    (np.array(["2020-01-01", "2020-01-02"], dtype="datetime64[D]"), "datetime64"),
    (np.zeros(3, dtype=[("a", "f8")]), "entries of type"),
    (np.array([1j, 2]), "entries of type complex128"),
    (torch.tensor([1j, 2]), "complex64"),
    (torch.eye(3).to_sparse(), "sparse"),
    (torch.ones(3, device="meta"), "on meta"),
    ([[1.0, 2.0], [3.0]], "list"),
    ([object()], "list"),
    ({"a": [1.0]}, "dict"),
    (None, "NoneType"),
    (np.zeros((4, 0)), r"x \[4, 0\]"),
    (np.zeros((4, 2, 2)), r"x \[4, 2, 2\]"),
    (3.0, r"x \[\]"),
    (np.ma.array([1.0, 2.0], mask=[True, False]), "1 non-finite"),
    ([1.0, None], "1 non-finite"),
    ([1.0, math.inf, math.nan], "2 non-finite"),
], ids=lambda v: v if isinstance(v, str) else type(v).__name__)  # fmt: skip
def test_refused_in_one_line(values, match):
    with pytest.raises(EstimatorError, match=match) as caught:
        as_samples("here", "x", values)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("here: ")


def test_sparse_matrices_are_refused():
    with pytest.raises(EstimatorError, match=r"x: .*array of real numbers"):
        as_samples("here", "x", scipy.sparse.eye(3))


class TestPandas:
    def test_the_same_numbers(self):
        same(pd.DataFrame(DATA, index=[5, 4, 3, 2, 1, 0]))  # rows by position
        same(pd.DataFrame({"a": DATA[:, 0], "b": DATA[:, 1].astype("float32")}))
        same(pd.DataFrame(DATA).astype("Float64"))
        same(pd.DataFrame({"a": [1, 2], "b": [True, False]}), np.array([[1.0, 1], [2, 0]]))
        same(pd.Series(DATA[:, 0]), DATA[:, :1])
        same(pd.Series([1, 2, None]).dropna().astype("Int64"), np.array([[1.0], [2.0]]))

    def test_refused(self):
        dates = pd.to_datetime(["2020-01-01", "2020-01-02"])
        for values in (pd.DataFrame({"a": [1.0], "b": ["u"]}), pd.Series(["u"]), pd.Series(["1"]), pd.Series(dates),
                       pd.Series(["u", "v"], dtype="category"), pd.Series([1, None], dtype="Int64")):  # fmt: skip
            with pytest.raises(EstimatorError) as caught:
                as_samples("here", "x", values)
            assert "\n" not in str(caught.value)


def pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 2))
    return x, x[:, :1] + rng.normal(size=(n, 1))


def test_estimates_do_not_depend_on_the_form():
    x, y = pairs(120)
    z = (x[:, 0] > 0).astype(float)
    settings = {"steps": 5, "batch_size": 8, "hidden": 8}
    expected = estimate_mi(x, y, **settings)["value"]
    conditional = estimate_cmi(x, y, z, discrete=True, k=2, **settings)
    for form in (Frame, lambda v: v.astype(">f8"), lambda v: v[::-1].copy()[::-1], torch.tensor, np.ndarray.tolist):
        assert estimate_mi(form(x), form(y), **settings)["value"] == expected
        assert estimate_cmi(form(x), form(y), form(z[:, None]), discrete=True, k=2, **settings) == conditional


@pytest.mark.parametrize(("options", "match"), [
    ({"steps": 0}, "steps = 0"), ({"steps": -1}, "steps = -1"), ({"steps": 2.0}, "steps = 2.0"),
    ({"hidden": 0}, "hidden = 0"), ({"batch_size": 0}, "batch_size = 0"), ({"lr": 0.0}, "lr = 0.0"),
    ({"lr": math.nan}, "lr = nan"), ({"steps": "9"}, "steps = '9'"), ({"steps": True}, "steps = True"),
])  # fmt: skip
def test_options_out_of_range(options, match):
    x, y = pairs(120)
    for estimate in (lambda o: estimate_mi(x, y, **o), lambda o: estimate_cmi(x, y, y, **o)):
        with pytest.raises(EstimatorError, match=match) as caught:
            estimate({"batch_size": 8, "steps": 2} | options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"alpha": 2.0}, {"smile_tau": -1.0}])
def test_options_of_bounds_out_of_range(options):
    x, y = pairs(120)
    with pytest.raises(EstimatorError, match=f"{next(iter(options))} = "):
        estimate_mi(x, y, batch_size=8, steps=2, **options)
