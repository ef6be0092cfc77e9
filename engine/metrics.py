"""Metrics of sentiment regression, depression severity (AVEC2019) and classification, and the tables they are saved in.

The definitions are the ones MulT, MISA, MMIM, MMSA and MIMRL share. Which of them apply depends on the scale of the
labels (`SCALES`): accuracies cut that scale into classes, and mean nothing on another one. Both two-class conventions
of MOSI and MOSEI are always computed, since published tables mix them: `non0` drops labels of exactly 0 and asks
positive or negative; `has0` keeps every sample and asks non-negative or negative. docs/metrics.md says where the
field's toolkits disagree.
"""

from __future__ import annotations

import csv
import math
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.errors import DataError
from engine.files import atomic_path

Metrics = dict[str, float]

PREDICTIONS = "predictions"
"""What an error names when a model's predictions are not finite."""

PHQ_RANGE = 25.0
"""AVEC2019 labels are PHQ-8 scores divided by 25."""

SCALES: dict[str, tuple[float, float]] = {"mosi": (-3.0, 3.0), "sims": (-1.0, 1.0), "phq8": (0.0, 1.0)}
"""Scales of labels with metrics of their own -> their ends. "none" stands for any other scale."""

DATASET_SCALES = {"mosi": "mosi", "mosei": "mosi", "sims": "sims", "avec2019": "phq8"}
"""`data.dataset` -> the scale of its labels; a custom data set has none that is known."""

SIMS_EDGES: dict[int, tuple[float, ...]] = {2: (0.0,), 3: (-0.1, 0.1), 5: (-0.7, -0.1, 0.1, 0.7)}
"""Number of classes -> where MMSA cuts [-1, 1]; each class holds its upper edge."""

REGRESSION_KEYS = ("mae", "corr", "acc7", "acc5", "acc2_non0", "acc2_has0", "f1_non0", "f1_has0")
SIMS_KEYS = ("mae", "corr", "mae_sims", "corr_sims", "acc2_sims", "acc3_sims", "acc5_sims", "f1_sims")
AVEC2019_KEYS = ("ccc", "rmse_phq", "mae_phq")
PLAIN_KEYS = ("mae", "corr", "ccc", "rmse")

reference_names: dict[str, str] = {
    "mae": "mae",
    "corr": "corr",
    "acc7": "7-class_acc",
    "acc5": "5-class_acc",
    "acc2_non0": "2(pos/neg)-class_acc",
    "acc2_has0": "2(nneg/neg)-class_acc",
    "f1_non0": "2(pos/neg)-class_f1",
    "f1_has0": "2(nneg/neg)-class_f1",
    "ccc": "ccc",
    "rmse_phq": "rmse_times_25",
}
"""Our names -> those in the reference's logs. `mae_phq` is absent: the reference leaves its MAE in [0, 1]."""

mmsa_names: dict[str, str] = {
    "mae": "MAE",
    "corr": "Corr",
    "acc7": "Mult_acc_7",
    "acc5": "Mult_acc_5",
    "acc2_non0": "Non0_acc_2",
    "acc2_has0": "Has0_acc_2",
    "f1_non0": "Non0_F1_score",
    "f1_has0": "Has0_F1_score",
}
"""Our names -> the columns of MMSA's result tables of MOSI and MOSEI."""

mmsa_sims_names: dict[str, str] = {
    "mae_sims": "MAE",
    "corr_sims": "Corr",
    "acc2_sims": "Mult_acc_2",
    "acc3_sims": "Mult_acc_3",
    "acc5_sims": "Mult_acc_5",
    "f1_sims": "F1_score",
}
"""Our names -> the columns of MMSA's result tables of SIMS. MMSA clips to +-1 before it takes MAE and Corr."""


def regression_metrics(prediction: ArrayLike, target: ArrayLike, swapped_f1: bool = False) -> Metrics:
    """Metrics of sentiment intensity in [-3, 3], computed in float64.

    Args:
        prediction: [N] or [N, 1], not clipped beforehand.
        target: the same number of values.
        swapped_f1: weight the F1 by how often each class is predicted instead of how often it is true, which is what
            MulT and MISA report (they pass the arguments of `f1_score` the other way round).

    Returns:
        `mae`; `corr` (Pearson; NaN where either side is constant, or for one sample); `acc7`, `acc5` (both sides
        clipped to +-3, +-2 and rounded half to even, as `np.round` does); `acc2_non0`, `f1_non0` (labels of 0 dropped,
        > 0 against <= 0; NaN if every label is 0); `acc2_has0`, `f1_has0` (all samples, >= 0 against < 0). F1 is the
        weighted one. Accuracies and F1 are fractions, not percent.

    Raises:
        DataError: sizes differ, nothing to measure, or a value is not finite.
    """
    p, y = _pair(prediction, target)
    kept = y != 0
    return {
        "mae": float(np.mean(np.abs(p - y))),
        "corr": _correlation(p, y),
        "acc7": _rounded_accuracy(p, y, 3.0),
        "acc5": _rounded_accuracy(p, y, 2.0),
        "acc2_non0": _accuracy(p[kept] > 0, y[kept] > 0),
        "acc2_has0": _accuracy(p >= 0, y >= 0),
        "f1_non0": weighted_f1(p[kept] > 0, y[kept] > 0, swapped_f1),
        "f1_has0": weighted_f1(p >= 0, y >= 0, swapped_f1),
    }


def sims_metrics(prediction: ArrayLike, target: ArrayLike) -> Metrics:
    """Metrics of sentiment intensity in [-1, 1] (SIMS), as MMSA computes them, in float64.

    Args:
        prediction: [N] or [N, 1], not clipped beforehand.
        target: the same number of values.

    Returns:
        `mae`, `corr` as `regression_metrics`. The others are of values clipped to +-1: `mae_sims`, `corr_sims`;
        `acc2_sims`, `acc3_sims`, `acc5_sims` (classes cut at `SIMS_EDGES`); `f1_sims` (weighted, of the two classes).
        Accuracies and F1 are fractions, not percent.

    Raises:
        DataError: as `regression_metrics`.
    """
    p, y = _pair(prediction, target)
    low, high = SCALES["sims"]
    clipped_p, clipped_y = np.clip(p, low, high), np.clip(y, low, high)
    classes = {n: (sims_classes(p, n), sims_classes(y, n)) for n in SIMS_EDGES}
    return {
        "mae": float(np.mean(np.abs(p - y))),
        "corr": _correlation(p, y),
        "mae_sims": float(np.mean(np.abs(clipped_p - clipped_y))),
        "corr_sims": _correlation(clipped_p, clipped_y),
        **{f"acc{n}_sims": _accuracy(*pair) for n, pair in classes.items()},
        "f1_sims": weighted_f1(*classes[2]),
    }


def plain_metrics(prediction: ArrayLike, target: ArrayLike) -> Metrics:
    """Metrics that hold on any scale: `mae`, `corr`, `ccc`, `rmse`, in the labels' own unit, computed in float64.

    Raises:
        DataError: as `regression_metrics`.
    """
    p, y = _pair(prediction, target)
    return {
        "mae": float(np.mean(np.abs(p - y))),
        "corr": _correlation(p, y),
        "ccc": _concordance(p, y),
        "rmse": float(np.sqrt(np.mean((p - y) ** 2))),
    }


def avec2019_metrics(prediction: ArrayLike, target: ArrayLike) -> Metrics:
    """Metrics of depression severity, from values in [0, 1] (PHQ-8 / 25), computed in float64.

    Returns:
        `ccc`: concordance correlation with population moments (0 where one side is constant; NaN where both are the
        same constant); `rmse_phq` and `mae_phq` in points of PHQ-8 (x 25; the reference scales only the RMSE).

    Raises:
        DataError: as `regression_metrics`.
    """
    p, y = _pair(prediction, target)
    error = PHQ_RANGE * (p - y)
    return {
        "ccc": _concordance(p, y),
        "rmse_phq": float(np.sqrt(np.mean(error**2))),
        "mae_phq": float(np.mean(np.abs(error))),
    }


def classification_metrics(scores: ArrayLike, target: ArrayLike) -> Metrics:
    """Metrics of class scores against true classes.

    Args:
        scores: logits [N, C], the largest wins, the first of equals; or one logit a sample ([N] or [N, 1]), where > 0
            is class 1.
        target: [N] or [N, 1] class numbers 0 .. C-1, integers or integral floats.

    Returns:
        `acc`, `f1` (weighted); and for each class c `recall_c`, `precision_c`, `f1_c`, NaN where the class does not
        occur (for precision: is never predicted).

    Raises:
        DataError: sizes differ, nothing to measure, a score is not finite, or a label is no class.
    """
    s = np.asarray(scores, dtype=np.float64)
    s = s.reshape(len(s), -1) if s.ndim else s.reshape(1, 1)
    y = np.asarray(target, dtype=np.float64).reshape(-1)
    if len(s) != len(y) or not len(y):
        raise DataError(
            "classification_metrics",
            f"scores of {len(s)} samples and {len(y)} labels",
            "one label a sample and at least one sample",
            "Pass the scores and labels of the same, non-empty split.",
        )
    _finite("scores", s)
    classes = max(s.shape[1], 2)
    if not np.all((y == np.floor(y)) & (y >= 0) & (y < classes)):
        bad = y[~((y == np.floor(y)) & (y >= 0) & (y < classes))][0]
        raise DataError(
            "labels", f"{bad:g}", f"class numbers 0 to {classes - 1}", "Set model.num_class to the number of classes."
        )
    p = (s[:, 0] > 0).astype(np.int64) if s.shape[1] == 1 else s.argmax(axis=1)
    y = y.astype(np.int64)
    result = {"acc": _accuracy(p, y), "f1": weighted_f1(p, y)}
    for c in range(classes):
        hit, predicted, true = np.sum((p == c) & (y == c)), np.sum(p == c), np.sum(y == c)
        result[f"recall_{c}"] = float(hit / true) if true else math.nan
        result[f"precision_{c}"] = float(hit / predicted) if predicted else math.nan
        result[f"f1_{c}"] = float(2 * hit / (predicted + true)) if true else math.nan
    return result


def scale_of(dataset: str, label_scale: str = "auto") -> str:
    """The scale of the labels, "none" where it is not known: `data.label_scale`, or what `data.dataset` stands for."""
    return DATASET_SCALES.get(dataset, "none") if label_scale == "auto" else label_scale


def metrics_for(dataset: str, task: str, label_scale: str = "auto") -> Callable[[ArrayLike, ArrayLike], Metrics]:
    """The metrics a run is judged by: `f(prediction or scores, target) -> metrics`."""
    if task == "classification":
        return classification_metrics
    by_scale = {"mosi": regression_metrics, "sims": sims_metrics, "phq8": avec2019_metrics}
    return by_scale.get(scale_of(dataset, label_scale), plain_metrics)


def selection(dataset: str, task: str, label_scale: str = "auto") -> tuple[str, bool]:
    """(key, higher is better) of the metric by which the best epoch is chosen, on the valid split only."""
    if task == "classification":
        return "acc", True
    phq = dataset == "avec2019" or scale_of(dataset, label_scale) == "phq8"
    return ("ccc", True) if phq else ("mae", False)


def weighted_f1(prediction: ArrayLike, target: ArrayLike, swapped: bool = False) -> float:
    """Mean of the classes' F1, weighted by how often each is true (`swapped`: predicted). NaN without samples.

    Equal to scikit-learn's `f1_score(target, prediction, average="weighted")`; swapped, to the arguments exchanged.
    """
    p, y = np.asarray(prediction).reshape(-1), np.asarray(target).reshape(-1)
    if not len(y):
        return math.nan
    total = 0.0
    for c in np.union1d(p, y):
        hit, predicted, true = np.sum((p == c) & (y == c)), np.sum(p == c), np.sum(y == c)
        total += (predicted if swapped else true) * 2 * hit / (predicted + true)
    return float(total / len(y))


def sentiment_classes(values: ArrayLike, limit: int = 3) -> NDArray[np.int64]:
    """Intensities [N] -> classes 0 .. 2 limit (0 is -limit): clipped to +-limit, rounded half to even."""
    return (np.round(np.clip(np.asarray(values, dtype=np.float64), -limit, limit)) + limit).astype(np.int64)


def sims_classes(values: ArrayLike, classes: int) -> NDArray[np.int64]:
    """Intensities [N] of SIMS -> classes 0 .. classes - 1 (2, 3 or 5), cut as MMSA does after clipping to +-1.

    Compared in float32, the type of labels and predictions: in float64 a label of 0.1 would lie above the edge 0.1.
    """
    clipped = np.clip(np.asarray(values, dtype=np.float32), *SCALES["sims"])
    return np.digitize(clipped, np.asarray(SIMS_EDGES[classes], dtype=np.float32), right=True)


def _pair(prediction: ArrayLike, target: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    p = np.asarray(prediction, dtype=np.float64).reshape(-1)
    y = np.asarray(target, dtype=np.float64).reshape(-1)
    if len(p) != len(y) or not len(y):
        raise DataError(
            "metrics",
            f"{len(p)} predictions and {len(y)} labels",
            "as many of one as of the other, and at least one",
            "Pass the predictions and labels of the same, non-empty split.",
        )
    _finite(PREDICTIONS, p)
    _finite("labels", y)
    return p, y


def _finite(what: str, values: NDArray[np.float64]) -> None:
    bad = int(np.sum(~np.isfinite(values)))
    if bad:
        raise DataError(
            what,
            f"{bad} of {values.size} not finite",
            "finite numbers",
            "Training has diverged: lower train.lr, or set train.clip_norm."
            if what != "labels"
            else "Mend the labels of the data file.",
        )


def _mean(x: NDArray[np.float64]) -> float:
    return float(x[0]) if np.all(x == x[0]) else float(np.mean(x))


def _correlation(p: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    if np.all(p == p[0]) or np.all(y == y[0]):
        return math.nan
    p, y = p - np.mean(p), y - np.mean(y)
    # Scaled first, so that squares of tiny or huge values neither vanish nor overflow.
    p, y = p / np.max(np.abs(p)), y / np.max(np.abs(y))
    return float(np.clip(np.sum(p * y) / np.sqrt(np.sum(p * p) * np.sum(y * y)), -1.0, 1.0))


def _concordance(p: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    # A constant's variance must be exactly 0: its mean is rounded, and 0/0 would otherwise come out as any number.
    mean_p, mean_y = _mean(p), _mean(y)
    spread = np.mean((p - mean_p) ** 2) + np.mean((y - mean_y) ** 2) + (mean_p - mean_y) ** 2
    covariance = np.mean((p - mean_p) * (y - mean_y))
    return float(2 * covariance / spread) if spread > 0 else math.nan


def _rounded_accuracy(p: NDArray[np.float64], y: NDArray[np.float64], limit: float) -> float:
    return _accuracy(np.round(np.clip(p, -limit, limit)), np.round(np.clip(y, -limit, limit)))


def _accuracy(prediction: NDArray[Any], target: NDArray[Any]) -> float:
    return float(np.mean(prediction == target)) if len(target) else math.nan


# Tables


def summary(runs: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and spread over runs (seeds) of every number the runs have in common.

    Args:
        runs: flat metrics, one mapping a run. Missing values (None, or NaN) make the mean NaN, never a smaller sample.

    Returns:
        key -> {"mean", "std", "runs"}; std is the sample standard deviation (n-1), NaN for a single run. MMSA's own
        tables divide by n.
    """
    runs = list(runs)
    if not runs:
        raise DataError("summary", "no runs", "at least one", "Give the metrics of at least one run.")
    result: dict[str, dict[str, float]] = {}
    for key in runs[0]:
        if not all(key in run and _is_number(run[key]) for run in runs):
            continue
        values = np.array([math.nan if run[key] is None else run[key] for run in runs], dtype=np.float64)
        std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        result[key] = {"mean": float(np.mean(values)), "std": std, "runs": len(values)}
    return result


def write_metrics_csv(path: str | Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics as one wide table, atomically.

    Args:
        metrics: either flat (one row), or the dictionary of metrics.json: each inner mapping (`valid`, `test`,
            `oracle_test`) becomes a row named in the column `split`, and the run's own numbers (`best_epoch`,
            `wall_s`, ...) repeat in every row. NaN and None are empty cells.
    """
    rows = {name: value for name, value in metrics.items() if isinstance(value, Mapping)}
    rows = {name: value for name, value in rows.items() if all(_is_number(cell) for cell in value.values())}
    shared = {name: value for name, value in metrics.items() if _is_number(value)}
    columns = list(dict.fromkeys([key for row in rows.values() for key in row] + list(shared)))
    table = [{"split": name, **shared, **row} for name, row in rows.items()] or [shared]
    if rows:
        columns = ["split", *columns]
    _write_rows(path, columns, [[_cell(row.get(column)) for column in columns] for row in table])


def write_summary_csv(path: str | Path, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write means over runs with MMSA's columns and cells, `(mean, std)` of 100 x the value, atomically.

    Args:
        runs: name of the model -> metrics of its runs.
    """
    tables = {name: summary(many) for name, many in runs.items()}
    keys = list(dict.fromkeys(key for table in tables.values() for key in table))

    def cell(value: dict[str, float] | None) -> str:
        return "" if value is None else f"({100 * value['mean']:.2f}, {100 * value['std']:.2f})"

    rows = [[csv_text(name), *(cell(table.get(key)) for key in keys)] for name, table in tables.items()]
    columns = mmsa_sims_names if "acc5_sims" in keys else mmsa_names
    _write_rows(path, ["Model", *(columns.get(key, key) for key in keys)], rows)


@dataclass
class Predictions:
    """What a predictions CSV holds, in file order.

    label, prediction: float32 [N] (classification: class numbers), the label NaN where there is none.
    scores: float32 [N, C] or None.
    """

    ids: list[str]
    label: NDArray[np.float32]
    prediction: NDArray[np.float32]
    scores: NDArray[np.float32] | None = None


def write_predictions(
    path: str | Path, ids: Sequence[str], label: ArrayLike, prediction: ArrayLike, scores: ArrayLike | None = None
) -> None:
    """Write `id,label,prediction[,score_0,...]` in the order given, atomically; ids as `csv_text` makes them.

    Args:
        label, prediction: [N] or [N, 1]; scores: [N, C] for classification. Numbers are written with as many digits as
            bring the same float32 back. A label of NaN, of a sample without one, becomes an empty cell.

    Raises:
        DataError: the columns are not equally long.
        OutputError: the file cannot be written.
    """
    columns = [np.asarray(label, dtype=np.float32).reshape(-1), np.asarray(prediction, dtype=np.float32).reshape(-1)]
    names = ["id", "label", "prediction"]
    if scores is not None:
        table = np.asarray(scores, dtype=np.float32).reshape(len(ids), -1)
        columns += list(table.T)
        names += [f"score_{c}" for c in range(table.shape[1])]
    lengths = {len(ids), *(len(column) for column in columns)}
    if len(lengths) > 1:
        raise DataError(
            str(path),
            f"{len(ids)} ids, {len(columns[0])} labels, {len(columns[1])} predictions",
            "as many of each",
            "Pass the ids, labels and predictions of one split.",
        )
    label = columns.pop(0)
    known = ("" if np.isnan(value) else _number(value) for value in label)
    rows = (
        [csv_text(name), cell, *(_number(column[i]) for column in columns)]
        for i, (name, cell) in enumerate(zip(ids, known, strict=True))
    )
    _write_rows(path, names, rows)


def read_predictions(path: str | Path) -> Predictions:
    """Read what `write_predictions` wrote; ids are as they were before `csv_text`.

    Raises:
        DataError: the file is missing, or is no such table.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for without end
            raise DataError(str(path), "no file", "a predictions CSV", "Run `engine predict` again.")
        with path.open(newline="", encoding="utf-8") as file:
            return _predictions(csv.reader(file), path)
    except (OSError, UnicodeDecodeError, csv.Error) as cause:
        raise DataError(str(path), f"{cause}", "a predictions CSV", "Run `engine predict` again.") from cause


def _predictions(rows: Iterator[list[str]], path: Path) -> Predictions:
    header = next(rows, [])
    scores = [f"score_{c}" for c in range(len(header) - 3)]
    if header != ["id", "label", "prediction", *scores]:
        raise DataError(
            f"{path} line 1",
            f"{','.join(header)[:80] or 'nothing'}",
            "id,label,prediction[,score_0,...]",
            "Choose another file.",
        )
    ids, values = [], array("f")
    for row in rows:
        try:
            if len(row) != len(header):
                raise ValueError(f"{len(row)} cells")
            with np.errstate(over="ignore"):  # 1e300 is infinite
                values.extend([np.float32(row[1] or "nan"), *(np.float32(cell) for cell in row[2:])])
        except ValueError as cause:
            where = f"{path} row {len(ids) + 1}"
            raise DataError(
                where, str(cause), f"an id and {len(header) - 1} numbers", "Run `engine predict` again."
            ) from cause
        ids.append(text_of_csv(row[0]))
    table = np.array(values, dtype=np.float32).reshape(len(ids), len(header) - 1)
    return Predictions(ids, table[:, 0], table[:, 1], table[:, 2:] if scores else None)


# What a spreadsheet takes for a formula. A video's name may begin with "-": plain words call nothing and stay.
_FORMULA = re.compile(r"'*(?![-+][\w.\[\]$-]*\Z)[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]", re.ASCII)


def csv_text(text: str) -> str:
    """A text as a cell of a CSV: with an apostrophe in front where a spreadsheet would run it as a formula.

    So is a text that is such a cell already: `text_of_csv` gives every text back.
    """
    return f"'{text}" if _FORMULA.match(text) else text


def text_of_csv(cell: str) -> str:
    """The text of which `csv_text` made the cell."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float, np.number)) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    return "" if value is None or value != value else str(value)


def _number(value: np.float32) -> str:
    # numpy prints the shortest digits that read back as the same float32
    return str(int(value)) if np.isfinite(value) and value == int(value) and abs(value) < 1e7 else str(value)


def _write_rows(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        plain = csv.writer(file, lineterminator="\n")
        quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        plain.writerow(header)
        for row in rows:
            # Python < 3.13 leaves a bare carriage return unquoted, and readers take it for the end of the row.
            (quoted if any("\r" in cell for cell in row) else plain).writerow(row)
