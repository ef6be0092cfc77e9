"""How the report shows each metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.report.charts import is_finite, number


@dataclass
class Metric:
    """How a metric is shown: name, what it means, percent or not, digits."""

    name: str
    about: str = ""
    percent: bool = False
    short: str = ""
    headline: bool = True

    def show(self, value: Any) -> str:
        if not is_finite(value):
            return "–"
        return f"{100 * value:.2f} %" if self.percent else number(value)


METRICS: dict[str, Metric] = {
    "mae": Metric("MAE", "mean absolute error, lower is better"),
    "corr": Metric("Corr", "Pearson correlation"),
    "acc7": Metric("Acc-7", "rounded to −3 … 3", True),
    "acc5": Metric("Acc-5", "rounded to −2 … 2", True),
    "acc2_non0": Metric("Acc-2, negative / positive", "labels of 0 dropped (non0)", True, "Acc-2 non0"),
    "acc2_has0": Metric("Acc-2, negative / non-negative", "all samples (has0)", True, "Acc-2 has0"),
    "f1_non0": Metric("F1, negative / positive", "weighted, labels of 0 dropped (non0)", True, "F1 non0", False),
    "f1_has0": Metric("F1, negative / non-negative", "weighted, all samples (has0)", True, "F1 has0", False),
    "acc2_sims": Metric("Acc-2", "two classes of [−1, 1], cut at 0 (SIMS)", True),
    "acc3_sims": Metric("Acc-3", "three classes of [−1, 1], cut at ±0.1 (SIMS)", True),
    "acc5_sims": Metric("Acc-5", "five classes of [−1, 1], cut at ±0.1 and ±0.7 (SIMS)", True),
    "f1_sims": Metric("F1", "weighted, of the two classes (SIMS)", True, "", False),
    "mae_sims": Metric("MAE, clipped", "both clipped to ±1, as MMSA does (SIMS)", False, "", False),
    "corr_sims": Metric("Corr, clipped", "both clipped to ±1, as MMSA does (SIMS)", False, "", False),
    "ccc": Metric("CCC", "concordance correlation, higher is better"),
    "rmse": Metric("RMSE", "root mean squared error, lower is better"),
    "rmse_phq": Metric("RMSE", "points of PHQ-8, lower is better"),
    "mae_phq": Metric("MAE", "points of PHQ-8, lower is better"),
    "acc": Metric("Accuracy", "", True),
    "f1": Metric("F1", "weighted", True),
}
