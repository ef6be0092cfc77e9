"""Tables of metrics and predictions: means over seeds, CSV files, and the names other toolkits give the metrics."""

from __future__ import annotations

import csv
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.errors import DataError
from engine.files import atomic_path

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
"""Our names -> those in the logs of the published code, whose MAE of AVEC2019 stays in [0, 1]."""

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
"""Our names -> the columns of MMSA's result tables for MOSI and MOSEI."""

mmsa_sims_names: dict[str, str] = {
    "mae_sims": "MAE",
    "corr_sims": "Corr",
    "acc2_sims": "Mult_acc_2",
    "acc3_sims": "Mult_acc_3",
    "acc5_sims": "Mult_acc_5",
    "f1_sims": "F1_score",
}
"""Our names -> the columns of MMSA's result tables for SIMS. MMSA clips to +-1 before it takes MAE and Corr."""


def summary(runs: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and spread over runs (seeds) of every number that the runs have in common.

    >>> summary([{"mae": 0.5}, {"mae": 0.75}])["mae"]["mean"]
    0.625

    Args:
        runs: flat metrics, one mapping per run. A missing value (None or NaN) makes the mean NaN: the sample never
            becomes smaller.

    Returns:
        key -> {"mean", "std", "runs"}. std is the sample standard deviation (n-1), NaN for a single run. MMSA's own
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
        metrics: flat (one row), or the dictionary of metrics.json. There each inner mapping (`valid`, `test`,
            `oracle_test`) becomes a row, named in the column `split`. The run's own numbers (`best_epoch`, `wall_s`,
            ...) repeat in every row. NaN and None are empty cells.
    """
    rows = {name: value for name, value in metrics.items() if isinstance(value, Mapping)}
    rows = {name: value for name, value in rows.items() if all(_is_number(cell) for cell in value.values())}
    shared = {name: value for name, value in metrics.items() if _is_number(value)}
    columns = list(dict.fromkeys([key for row in rows.values() for key in row] + list(shared)))
    table = [{"split": name, **shared, **row} for name, row in rows.items()] or [shared]
    if rows:
        columns = ["split", *columns]
    write_rows(path, columns, [[_cell(row.get(column)) for column in columns] for row in table])


def write_summary_csv(path: str | Path, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write means over runs as MMSA does, atomically: its columns, and cells `(mean, std)` of 100 x the value.

    Args:
        runs: name of the model -> metrics of its runs.
    """
    tables = {name: summary(many) for name, many in runs.items()}
    keys = list(dict.fromkeys(key for table in tables.values() for key in table))

    def cell(value: dict[str, float] | None) -> str:
        return "" if value is None else f"({100 * value['mean']:.2f}, {100 * value['std']:.2f})"

    rows = [[csv_text(name), *(cell(table.get(key)) for key in keys)] for name, table in tables.items()]
    columns = mmsa_sims_names if "acc5_sims" in keys else mmsa_names
    write_rows(path, ["Model", *(columns.get(key, key) for key in keys)], rows)


@dataclass
class Predictions:
    """What a predictions CSV holds, in file order.

    Attributes:
        label, prediction: float32 [N]; class numbers for classification. The label is NaN where there is none.
        scores: float32 [N, C], or None.
    """

    ids: list[str]
    label: NDArray[np.float32]
    prediction: NDArray[np.float32]
    scores: NDArray[np.float32] | None = None


def write_predictions(
    path: str | Path, ids: Sequence[str], label: ArrayLike, prediction: ArrayLike, scores: ArrayLike | None = None
) -> None:
    """Write `id,label,prediction[,score_0,...]` in the given order, atomically. Ids are written by `csv_text`.

    Args:
        label, prediction: [N] or [N, 1]. Numbers have as many digits as give the same float32 back. A label of NaN
            stands for no label and becomes an empty cell.
        scores: [N, C] for classification.

    Raises:
        DataError: the columns differ in length.
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
            "equal numbers of each",
            "Pass the ids, labels and predictions of one split.",
        )
    label = columns.pop(0)
    known = ("" if np.isnan(value) else _number(value) for value in label)
    rows = (
        [csv_text(name), cell, *(_number(column[i]) for column in columns)]
        for i, (name, cell) in enumerate(zip(ids, known, strict=True))
    )
    write_rows(path, names, rows)


def read_predictions(path: str | Path) -> Predictions:
    """Read what `write_predictions` wrote. Ids are as they were before `csv_text`.

    Raises:
        DataError: the file is missing, or it is not such a table.
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


# What a spreadsheet takes for a formula. A video's name may begin with "-": plain words are no formula and stay.
_FORMULA = re.compile(r"'*(?![-+][\w.\[\]$-]*\Z)[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]", re.ASCII)


def csv_text(text: str) -> str:
    """A text as a cell of a CSV. Where a spreadsheet would run it as a formula, an apostrophe goes in front.

    A text that looks like such a cell gets an apostrophe too, so that `text_of_csv` gives every text back.

    >>> csv_text("=1+1"), csv_text("video-1")
    ("'=1+1", 'video-1')
    """
    return f"'{text}" if _FORMULA.match(text) else text


def text_of_csv(cell: str) -> str:
    """The text that `csv_text` made the cell from."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float, np.number)) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    return "" if value is None or value != value else str(value)


def _number(value: np.float32) -> str:
    # numpy prints the shortest digits that read back as the same float32
    return str(int(value)) if np.isfinite(value) and value == int(value) and abs(value) < 1e7 else str(value)


def write_rows(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write cells as CSV, atomically."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        plain = csv.writer(file, lineterminator="\n")
        quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        plain.writerow(header)
        for row in rows:
            # Python < 3.13 leaves a bare carriage return unquoted, and readers take it for the end of the row.
            (quoted if any("\r" in cell for cell in row) else plain).writerow(row)
