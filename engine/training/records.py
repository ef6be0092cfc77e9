"""Records: what is kept of every epoch, and which epoch is the best."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from engine.config import Config
from engine.files import finite
from engine.step.averages import EpochResult
from engine.task import find_task

Record = dict[str, Any]
"""One line of history.jsonl."""


def metrics_of(config: Config, result: EpochResult) -> dict[str, float]:
    """The task's metrics of predictions on labels."""
    compute = find_task(config.task).metrics(config)
    return compute(result.prediction.float().cpu().numpy(), result.target.cpu().numpy())


def record_of(config: Config, result: EpochResult) -> Record:
    """What a record keeps of one split."""
    record: Record = {"loss": result.loss, "task": result.task}
    if result.information:
        record["information"] = result.information
    if result.estimators:
        record["estimators"] = result.estimators
    if result.prediction is not None:
        record |= metrics_of(config, result)
    return record


def line_of(record: Record) -> str:
    """The record as a line of history.jsonl; numbers that are not finite become null."""
    return json.dumps(finite(record), allow_nan=False) + "\n"


def parse_line(line: str | bytes) -> Record:
    """The record of a line of history.jsonl; null becomes NaN again."""
    return json.loads(line, object_hook=_with_nan)


def _with_nan(values: Record) -> Record:
    return {k: math.nan if v is None else v for k, v in values.items()}


@dataclass
class Selection:
    """How epochs are compared.

    >>> low, high = {"valid": {"mae": 0.7}}, {"valid": {"mae": 0.9}}
    >>> Selection("mae", higher_is_better=False).best([high, low], "valid") is low
    True
    """

    metric: str
    higher_is_better: bool

    def better(self, a: Record, b: Record, split: str) -> bool:
        """Whether epoch `a` beats epoch `b` on `split`. A metric that is NaN never wins."""
        x, y = a[split][self.metric], b[split][self.metric]
        if y != y:
            return x == x
        return x > y if self.higher_is_better else x < y

    def best(self, history: list[Record], split: str) -> Record:
        """The best epoch on `split`; of equal ones the first."""
        best = history[0]
        for record in history[1:]:
            if self.better(record, best, split):
                best = record
        return best

    def improved(self, history: list[Record], record: Record) -> bool:
        """Whether a new epoch is better on valid than all of `history`."""
        return not history or self.better(record, self.best(history, "valid"), "valid")
