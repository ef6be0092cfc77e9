"""Metrics of sentiment regression, depression severity (AVEC2019) and classification.

The definitions are those that MulT, MISA, MMIM, MMSA and MIMRL share. The scale of the labels (`SCALES`) decides which
of them apply: accuracies cut that scale into classes and mean nothing on another one.

Published tables mix two conventions for the two classes of MOSI and MOSEI, so both are always computed. `non0` drops
labels of exactly 0 and asks positive or negative. `has0` keeps every sample and asks non-negative or negative.
docs/metrics.md says where the field's toolkits disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.errors import DataError

Metrics = dict[str, float]

PREDICTIONS = "predictions"
"""How an error names predictions that are not finite."""

PHQ_RANGE = 25.0
"""AVEC2019 labels are PHQ-8 scores divided by 25."""

SCALES: dict[str, tuple[float, float]] = {"mosi": (-3.0, 3.0), "sims": (-1.0, 1.0), "phq8": (0.0, 1.0)}
"""Scales of labels that have metrics of their own, with their ends. "none" stands for any other scale."""

DATASET_SCALES = {"mosi": "mosi", "mosei": "mosi", "sims": "sims", "avec2019": "phq8"}
"""`data.dataset` -> the scale of its labels. The scale of a custom data set is not known."""

SIMS_EDGES: dict[int, tuple[float, ...]] = {2: (0.0,), 3: (-0.1, 0.1), 5: (-0.7, -0.1, 0.1, 0.7)}
"""Number of classes -> where MMSA cuts [-1, 1]. Each class holds its upper edge."""


def regression_metrics(prediction: ArrayLike, target: ArrayLike, swapped_f1: bool = False) -> Metrics:
    """Metrics of sentiment intensity in [-3, 3], computed in float64.

    >>> regression_metrics([1.0, -2.0], [1.5, -2.0])["mae"]
    0.25

    Args:
        prediction: [N] or [N, 1], not clipped beforehand.
        target: the same number of values.
        swapped_f1: weight the F1 by how often each class is predicted, not by how often it is true. MulT and MISA
            report that, because they swap the arguments of `f1_score`.

    Returns:
        Accuracies and F1 are fractions, not percent. F1 is the weighted one.

        `mae`.
        `corr`: Pearson; NaN where either side is constant, or for one sample.
        `acc7`, `acc5`: both sides clipped to +-3 (+-2) and rounded half to even, as `np.round` does.
        `acc2_non0`, `f1_non0`: labels of 0 dropped, > 0 against <= 0; NaN if every label is 0.
        `acc2_has0`, `f1_has0`: all samples, >= 0 against < 0.

    Raises:
        DataError: the sizes differ, there is nothing to measure, or a value is not finite.
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
        Accuracies and F1 are fractions, not percent.

        `mae`, `corr`: as `regression_metrics`.
        `mae_sims`, `corr_sims`: of values clipped to +-1.
        `acc2_sims`, `acc3_sims`, `acc5_sims`: of values clipped to +-1 and cut into classes at `SIMS_EDGES`.
        `f1_sims`: weighted, of the two classes.

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
    """Metrics for any scale: `mae`, `corr`, `ccc`, `rmse`, in the labels' own unit, computed in float64.

    >>> plain_metrics([1.0, 3.0], [1.0, 1.0])["rmse"]
    1.4142135623730951

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
        `ccc`: concordance correlation with population moments; 0 where one side is constant, NaN where both are the
        same constant.
        `rmse_phq`, `mae_phq`: in points of PHQ-8, 25 times the error. The published code scales only the RMSE.

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
        scores: logits [N, C], of which the largest wins and the first of equals; or one logit per sample ([N] or
            [N, 1]), where > 0 is class 1.
        target: [N] or [N, 1] class numbers 0 .. C-1, integers or integral floats.

    Returns:
        `acc`; `f1` (weighted); and for each class c `recall_c` and `f1_c`, NaN where the class does not occur, and
        `precision_c`, NaN where it is never predicted.

    Raises:
        DataError: the sizes differ, there is nothing to measure, a score is not finite, or a label is no class.
    """
    s = np.asarray(scores, dtype=np.float64)
    s = s.reshape(len(s), -1) if s.ndim else s.reshape(1, 1)
    y = np.asarray(target, dtype=np.float64).reshape(-1)
    if len(s) != len(y) or not len(y):
        raise DataError(
            "classification_metrics",
            f"scores of {len(s)} samples and {len(y)} labels",
            "one label per sample and at least one sample",
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
    """The scale of the labels: `data.label_scale`, or that of `data.dataset`. "none" where it is not known.

    >>> scale_of("mosei"), scale_of("custom"), scale_of("custom", "sims")
    ('mosi', 'none', 'sims')
    """
    return DATASET_SCALES.get(dataset, "none") if label_scale == "auto" else label_scale


def metrics_for(dataset: str, task: str, label_scale: str = "auto") -> Callable[[ArrayLike, ArrayLike], Metrics]:
    """The metrics a run is judged by: `f(prediction or scores, target) -> metrics`."""
    if task == "classification":
        return classification_metrics
    by_scale = {"mosi": regression_metrics, "sims": sims_metrics, "phq8": avec2019_metrics}
    return by_scale.get(scale_of(dataset, label_scale), plain_metrics)


def selection(dataset: str, task: str, label_scale: str = "auto") -> tuple[str, bool]:
    """The metric that chooses the best epoch on the valid split: (key, whether higher is better).

    >>> selection("mosi", "regression")
    ('mae', False)
    """
    if task == "classification":
        return "acc", True
    phq = dataset == "avec2019" or scale_of(dataset, label_scale) == "phq8"
    return ("ccc", True) if phq else ("mae", False)


def weighted_f1(prediction: ArrayLike, target: ArrayLike, swapped: bool = False) -> float:
    """Mean of the classes' F1, weighted by how often each is true (`swapped`: predicted). NaN without samples.

    It equals scikit-learn's `f1_score(target, prediction, average="weighted")`; `swapped` exchanges the arguments.
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
    """Classes 0 .. 2 limit of intensities [N]: clipped to +-limit, then rounded half to even. Class 0 is -limit.

    >>> sentiment_classes([-3.0, 0.4, 9.0]).tolist()
    [0, 3, 6]
    """
    return (np.round(np.clip(np.asarray(values, dtype=np.float64), -limit, limit)) + limit).astype(np.int64)


def sims_classes(values: ArrayLike, classes: int) -> NDArray[np.int64]:
    """Classes of SIMS intensities [N], clipped to +-1 and cut into 2, 3 or 5 classes as MMSA does.

    Values are compared in float32, the type of labels and predictions. In float64 a label of 0.1 would lie above the
    edge 0.1.
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
            "equal numbers of both, and at least one",
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
            else "Correct the labels of the data file.",
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
