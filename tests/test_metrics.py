import csv
import math
import os
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from engine.errors import DataError, OutputError
from engine.metrics import (
    avec2019_metrics,
    classification_metrics,
    metrics_for,
    mmsa_names,
    mmsa_sims_names,
    plain_metrics,
    read_predictions,
    reference_names,
    regression_metrics,
    selection,
    sentiment_classes,
    sims_classes,
    sims_metrics,
    summary,
    weighted_f1,
    write_metrics_csv,
    write_predictions,
    write_summary_csv,
)

REGRESSION_KEYS = ("mae", "corr", "acc7", "acc5", "acc2_non0", "acc2_has0", "f1_non0", "f1_has0")
SIMS_KEYS = ("mae", "corr", "mae_sims", "corr_sims", "acc2_sims", "acc3_sims", "acc5_sims", "f1_sims")
AVEC2019_KEYS = ("ccc", "rmse_phq", "mae_phq")
PLAIN_KEYS = ("mae", "corr", "ccc", "rmse")


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@st.composite
def pairs(draw):
    """Predictions and labels on a grid that holds zeros, halves and values beyond the scale, in float32."""
    n = draw(st.integers(1, 40))
    grid = st.sampled_from([-3.5, -3, -2.5, -1.5, -0.5, -0.0, 0.0, 0.5, 1.5, 2.5, 3.0, 7.0])
    value = st.one_of(grid, st.floats(-4, 4, width=32))
    arrays = hnp.arrays(np.float32, n, elements=value)
    return draw(arrays), draw(arrays)


@settings(max_examples=60, deadline=None)
@given(pairs())
def test_regression_against_sklearn(pair):
    p, y = pair
    ours = regression_metrics(p, y)
    swapped = regression_metrics(p, y, swapped_f1=True)
    assert tuple(ours) == REGRESSION_KEYS
    p64, y64 = p.astype(np.float64), y.astype(np.float64)
    assert ours["mae"] == pytest.approx(np.abs(p64 - y64).mean())
    assert ours["acc7"] == np.mean(np.round(np.clip(p, -3, 3)) == np.round(np.clip(y, -3, 3)))
    assert ours["acc5"] == np.mean(np.round(np.clip(p, -2, 2)) == np.round(np.clip(y, -2, 2)))
    assert ours["acc2_has0"] == pytest.approx(accuracy_score(y >= 0, p >= 0))
    assert ours["f1_has0"] == pytest.approx(f1_score(y >= 0, p >= 0, average="weighted"))
    assert swapped["f1_has0"] == pytest.approx(f1_score(p >= 0, y >= 0, average="weighted"))
    kept = y != 0
    if kept.any():
        assert ours["acc2_non0"] == pytest.approx(accuracy_score(y[kept] > 0, p[kept] > 0))
        assert ours["f1_non0"] == pytest.approx(f1_score(y[kept] > 0, p[kept] > 0, average="weighted"))
        assert swapped["f1_non0"] == pytest.approx(f1_score(p[kept] > 0, y[kept] > 0, average="weighted"))
    else:
        assert math.isnan(ours["acc2_non0"]) and math.isnan(ours["f1_non0"])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_corr_and_ccc_against_numpy(seed, n, scale, shift):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=n)
    p = scale * (y + rng.normal(size=n)) + shift
    assert regression_metrics(p, y)["corr"] == pytest.approx(np.corrcoef(p, y)[0, 1], abs=1e-9)
    expected = 2 * np.mean((p - p.mean()) * (y - y.mean())) / (p.var() + y.var() + (p.mean() - y.mean()) ** 2)
    ours = avec2019_metrics(p, y)
    assert tuple(ours) == AVEC2019_KEYS
    assert ours["ccc"] == pytest.approx(expected, abs=1e-12)
    assert ours["rmse_phq"] == pytest.approx(25 * np.sqrt(np.mean((p - y) ** 2)))
    assert ours["mae_phq"] == pytest.approx(25 * np.mean(np.abs(p - y)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(2, 6))
def test_classification_against_sklearn(seed, n, classes):
    rng = np.random.default_rng(seed)
    scores, y = rng.normal(size=(n, classes)).astype(np.float32), rng.integers(0, classes, n)
    p = scores.argmax(1)
    ours = classification_metrics(scores, y.astype(np.float32)[:, None])
    assert ours["acc"] == pytest.approx(accuracy_score(y, p))
    assert ours["f1"] == pytest.approx(f1_score(y, p, average="weighted"))
    precision, recall, f1, support = precision_recall_fscore_support(y, p, labels=range(classes), zero_division=np.nan)
    for c in range(classes):
        assert ours[f"precision_{c}"] == pytest.approx(precision[c], nan_ok=True)
        assert ours[f"recall_{c}"] == pytest.approx(recall[c], nan_ok=True)
        if support[c]:
            assert ours[f"f1_{c}"] == pytest.approx(f1[c])
        else:
            assert math.isnan(ours[f"f1_{c}"])


def test_binary_from_one_logit():
    ours = classification_metrics([-1.0, 2.0, 0.0, 3.0], [0, 1, 1, 0])
    assert ours["acc"] == 0.5 and ours["recall_1"] == 0.5 and ours["precision_1"] == 0.5


def test_rounding_is_half_to_even():
    # .5 -> 0, 1.5 -> 2, 2.5 -> 2 (not 3), -2.5 -> -2; 3.5 is clipped to 3
    p, y = np.array([0.5, 1.5, 2.5, -2.5, 3.5]), np.array([0.0, 2.0, 2.0, -2.0, 3.0])
    assert regression_metrics(p, y)["acc7"] == 1.0
    assert regression_metrics(p, np.array([1.0, 1.0, 3.0, -3.0, 4.0]))["acc7"] == 0.2
    # five classes: 2.5 and 3 are both clipped to 2
    assert regression_metrics([2.5, -9.0], [3.0, -2.0])["acc5"] == 1.0
    assert sentiment_classes([-9, -2.5, -0.5, 0.5, 1.5, 3]).tolist() == [0, 1, 3, 3, 5, 6]


def test_a_prediction_of_zero_counts_as_not_positive_and_as_not_negative():
    ours = regression_metrics([0.0, 0.0], [1.0, -1.0])
    assert ours["acc2_non0"] == 0.5 and ours["acc2_has0"] == 0.5
    assert regression_metrics([0.0], [1.0])["acc2_non0"] == 0.0
    assert regression_metrics([0.0], [1.0])["acc2_has0"] == 1.0


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e-30, 1e30])
def test_constants(constant):
    y = np.linspace(-1, 1, 7)
    assert math.isnan(regression_metrics(np.full(7, constant), y)["corr"])
    assert math.isnan(regression_metrics(y, np.full(7, constant))["corr"])
    assert math.isnan(avec2019_metrics(np.full(7, constant), np.full(7, constant))["ccc"])
    assert avec2019_metrics(np.full(7, 0.1), y)["ccc"] == pytest.approx(0, abs=1e-15)


def test_correlation_of_tiny_and_huge_values():
    y = np.arange(5.0)
    for scale in (1e-200, 1e200):
        assert regression_metrics(y * scale, y)["corr"] == pytest.approx(1)


def test_one_sample_and_all_zero_labels():
    ours = regression_metrics([1.0], [0.0])
    assert math.isnan(ours["corr"]) and math.isnan(ours["acc2_non0"]) and math.isnan(ours["f1_non0"])
    assert ours["acc2_has0"] == 1.0 and ours["mae"] == 1.0


def test_single_class():
    assert weighted_f1([1, 1], [1, 1]) == 1.0
    assert weighted_f1([0, 1], [1, 1]) == pytest.approx(2 / 3)
    ours = classification_metrics([[2.0, 1.0], [3.0, 0.0]], [0, 0])
    assert ours["acc"] == 1.0 and math.isnan(ours["recall_1"]) and math.isnan(ours["precision_1"])


SIMS_GRID = [-1.5, -1, -0.8, -0.7, -0.4, -0.1, -0.0, 0.0, 0.1, 0.2, 0.7, 0.8, 1.0, 3.0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.one_of(st.sampled_from(SIMS_GRID), st.floats(-2, 2, width=32))] * 2), min_size=1))
def test_sims_against_intervals_and_sklearn(pairs):
    """MMSA's classes are the intervals (edge, next edge] of values clipped to +-1, in float32."""
    p, y = np.array(pairs, np.float32).T
    ours = sims_metrics(p, y)
    assert tuple(ours) == SIMS_KEYS
    clipped = [np.clip(v, np.float32(-1), np.float32(1)) for v in (p, y)]

    def classes(v, *edges):
        bounds = np.array([-1.01, *edges, 1.01], np.float32)
        return [next(k for k in range(len(edges) + 1) if bounds[k] < x <= bounds[k + 1]) for x in v]

    for n, edges in ((2, [0]), (3, [-0.1, 0.1]), (5, [-0.7, -0.1, 0.1, 0.7])):
        a, b = (classes(v, *edges) for v in clipped)
        assert ours[f"acc{n}_sims"] == pytest.approx(accuracy_score(b, a))
        assert sims_classes(y, n).tolist() == b
    a, b = (classes(v, 0) for v in clipped)
    assert ours["f1_sims"] == pytest.approx(f1_score(b, a, average="weighted"))
    assert ours["mae"] == pytest.approx(np.abs(p.astype(float) - y).mean())
    assert ours["mae_sims"] == pytest.approx(np.abs(clipped[0].astype(float) - clipped[1]).mean())


def test_a_constant_on_the_sims_scale(tmp_path):
    y = np.round(np.linspace(-1, 1, 11), 1)
    ours = metrics_for("sims", "regression")(np.zeros(11), y)
    # of -1, -.8 .. 1: six are in [-1, 0], one in (-.1, .1]
    assert ours["acc2_sims"] == pytest.approx(6 / 11)
    assert ours["acc3_sims"] == ours["acc5_sims"] == pytest.approx(1 / 11)
    write_summary_csv(tmp_path / "s.csv", {"m": [ours, ours]})
    header, row = csv.reader((tmp_path / "s.csv").read_text().splitlines())
    found = dict(zip(header, row, strict=True))
    assert found["Mult_acc_5"] == "(9.09, 0.00)" and found["Mult_acc_2"] == "(54.55, 0.00)"
    assert set(mmsa_sims_names.values()) < set(found) and "Mult_acc_7" not in found


@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 3.0), (1.0, 7.0)])
def test_a_custom_scale_has_no_classes(values, tmp_path):
    y = np.linspace(*values, 9)
    ours = metrics_for("custom", "regression")(y + 0.5, y)
    assert tuple(ours) == PLAIN_KEYS
    assert ours["mae"] == pytest.approx(0.5) and ours["rmse"] == pytest.approx(0.5)
    assert ours["corr"] == pytest.approx(1) and ours["ccc"] == pytest.approx(2 * y.var() / (2 * y.var() + 0.25))
    write_summary_csv(tmp_path / "s.csv", {"m": [ours]})
    assert (tmp_path / "s.csv").read_text().splitlines()[0] == "Model,MAE,Corr,ccc,rmse"


@pytest.mark.parametrize("call", [regression_metrics, avec2019_metrics, sims_metrics, plain_metrics])
def test_bad_values(call):
    with pytest.raises(DataError, match="2 predictions and 3 labels"):
        call([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(DataError, match="0 predictions"):
        call([], [])
    with pytest.raises(DataError, match="predictions: found 1 of 2 not finite"):
        call([math.nan, 0.0], [1.0, 2.0])
    with pytest.raises(DataError, match="labels: found 1 of 2 not finite"):
        call([1.0, 0.0], [1.0, math.inf])


def test_bad_classes():
    for target in ([0, 3], [0, 0.5], [-1, 0]):
        with pytest.raises(DataError, match="class numbers 0 to 2"):
            classification_metrics(np.eye(3)[:2], target)
    with pytest.raises(DataError, match="scores of 2 samples and 1 labels"):
        classification_metrics(np.eye(2), [0])


def test_choice_by_dataset_and_task():
    assert metrics_for("mosi", "regression") is metrics_for("custom", "regression", "mosi") is regression_metrics
    assert metrics_for("custom", "regression") is metrics_for("mosei", "regression", "none") is plain_metrics
    assert metrics_for("sims", "regression") is metrics_for("custom", "regression", "sims") is sims_metrics
    assert selection("custom", "regression", "phq8") == ("ccc", True)
    assert selection("avec2019", "regression", "none") == ("ccc", True)
    assert metrics_for("avec2019", "regression") is avec2019_metrics
    assert metrics_for("mosei", "classification") is classification_metrics
    assert selection("mosi", "regression") == ("mae", False)
    assert selection("avec2019", "regression") == ("ccc", True)
    assert selection("avec2019", "classification") == ("acc", True)
    for dataset in ("mosi", "mosei", "sims", "avec2019", "custom"):
        assert selection(dataset, "regression")[0] in metrics_for(dataset, "regression")([0.1, 0.2], [0.0, 1.0])


def test_names_of_others_cover_ours():
    assert set(REGRESSION_KEYS) == set(mmsa_names) and set(REGRESSION_KEYS) <= set(reference_names)
    assert set(mmsa_sims_names) | {"mae", "corr"} == set(SIMS_KEYS)
    classes = {key for key in (*REGRESSION_KEYS, *SIMS_KEYS) if key.startswith(("acc", "f1"))}
    assert len(classes) == 10, "an accuracy of one scale has the name of another's"
    assert len(set(reference_names.values())) == len(reference_names)


def test_summary():
    runs = [{"mae": 0.7, "corr": 0.8, "name": "a"}, {"mae": 0.8, "corr": None}, {"mae": 0.9, "corr": 0.7}]
    result = summary(runs)
    assert set(result) == {"mae", "corr"}
    assert result["mae"] == {"mean": pytest.approx(0.8), "std": pytest.approx(0.1), "runs": 3}
    assert math.isnan(result["corr"]["mean"])
    assert math.isnan(summary(runs[:1])["mae"]["std"])
    with pytest.raises(DataError, match="found no runs"):
        summary([])


def test_tables(tmp_path):
    metrics = {
        "best_epoch": 3,
        "valid": {"mae": 0.7, "corr": math.nan},
        "test": {"mae": 0.75, "corr": 0.8},
        "oracle_test": {"mae": 0.74, "corr": 0.81, "epoch": 5},
        "wall_s": 12.5,
        "environment": {"python": "3.11"},
    }
    write_metrics_csv(tmp_path / "metrics.csv", metrics)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["valid", "test", "oracle_test"]
    assert rows[0]["corr"] == "" and float(rows[1]["corr"]) == 0.8 and rows[2]["epoch"] == "5"
    assert {row["best_epoch"] for row in rows} == {"3"} and "environment" not in rows[0]
    write_metrics_csv(tmp_path / "flat.csv", {"mae": 0.5, "corr": None})
    assert (tmp_path / "flat.csv").read_text() == "mae,corr\n0.5,\n"
    write_summary_csv(tmp_path / "mean.csv", {"mimrl": [{"mae": 0.7, "acc7": 0.4}, {"mae": 0.8, "acc7": 0.5}]})
    assert (tmp_path / "mean.csv").read_text().splitlines() == [
        "Model,MAE,Mult_acc_7",
        'mimrl,"(75.00, 7.07)","(45.00, 7.07)"',
    ]


IDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.lists(IDS, max_size=20), st.integers(0, 4))
def test_predictions_round_trip(tmp_path_factory, data, ids, classes):
    path = tmp_path_factory.mktemp("round") / "predictions_test.csv"
    floats = st.floats(width=32)
    label = data.draw(hnp.arrays(np.float32, len(ids), elements=floats))
    prediction = data.draw(hnp.arrays(np.float32, (len(ids), 1), elements=floats))
    scores = data.draw(hnp.arrays(np.float32, (len(ids), classes), elements=floats)) if classes and ids else None
    write_predictions(path, ids, label, prediction, scores)
    back = read_predictions(path)
    assert back.ids == ids
    np.testing.assert_array_equal(back.label, label)
    np.testing.assert_array_equal(back.prediction, prediction[:, 0])
    if scores is None:
        assert back.scores is None
    else:
        np.testing.assert_array_equal(back.scores, scores)


def test_predictions_file_is_plain(tmp_path):
    path = tmp_path / "p.csv"
    write_predictions(path, ["-a$_$1", 'say "x", y'], np.array([1, 0.1], np.float32), np.array([0.25, -2], np.float32))
    assert path.read_text() == 'id,label,prediction\n-a$_$1,1,0.25\n"say ""x"", y",0.1,-2\n'


def test_bad_prediction_files(tmp_path):
    path = tmp_path / "p.csv"
    with pytest.raises(DataError, match="expected a predictions CSV"):
        read_predictions(path)
    for text, where in (("", "line 1"), ("id,label\n", "line 1"), ("id,label,prediction,other\n", "line 1")):
        path.write_text(text)
        with pytest.raises(DataError, match=where):
            read_predictions(path)
    for row in ("a,1", "a,1,x", "a,1,2,3"):
        path.write_text(f"id,label,prediction\nb,1,2\n{row}\n")
        with pytest.raises(DataError, match="row 2"):
            read_predictions(path)
    with pytest.raises(DataError, match="2 ids, 2 labels, 1 predictions"):
        write_predictions(path, ["a", "b"], [1, 2], [1])
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="found a file where a folder is needed"):
        write_predictions(tmp_path / "file" / "p.csv", ["a"], [1], [1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "p.csv"]


FORMULAS = [
    "=1+1",
    "@SUM(A1)",
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "\tx",
    "\rx",
    "'=x",
    "''@x",
    "-1+HYPERLINK(0)",
    "\uff1dx",
]
PLAIN = ["a", "-3g5yACwYnA_1", "-THoVjtIkeU[3]", "-1.5", "+a", "'a", "''", "", "a=b", "video$_$1", "x'=1"]


def test_no_spreadsheet_runs_an_id(tmp_path):
    ids = FORMULAS + PLAIN
    numbers = np.linspace(-2, 2, len(ids), dtype=np.float32)
    write_predictions(tmp_path / "p.csv", ids, numbers, -numbers)
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    assert [row[0] for row in rows] == [f"'{text}" for text in FORMULAS] + PLAIN
    assert [float(row[1]) for row in rows] == pytest.approx(numbers, rel=1e-6)  # a negative number stays one
    found = read_predictions(tmp_path / "p.csv")
    assert found.ids == ids
    assert np.array_equal(found.label, numbers) and np.array_equal(found.prediction, -numbers)
    write_summary_csv(tmp_path / "s.csv", {"=cmd|x": [{"mae": 1.0}]})
    assert (tmp_path / "s.csv").read_text().splitlines()[1].startswith("'=cmd|x,")


def test_predictions_of_another_form_are_told(tmp_path):
    path = tmp_path / "p.csv"
    os.mkfifo(path)
    with pytest.raises(DataError, match="found no file; expected a predictions CSV"):
        read_predictions(path)
