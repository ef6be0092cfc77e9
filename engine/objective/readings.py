"""Information terms estimated on many rows at once, and when not to trust such a reading. All values are in nats."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NEAR_CEILING = 1.0
"""A bound this close to its ceiling is saturated: even an exact critic reads .4 nats or more too little there."""

NOISE = 0.15
"""Conditional readings below this are noise: on independent data, nearest-neighbour product rows read .08 to .19."""

TEXTS = {
    "at its ceiling": f"The reading is within {NEAR_CEILING:g} nat of log(rows). Even a perfect critic reads .4 nats "
    "or more too little there, so the information is higher than the number.",
    "noise": f"A conditional reading within {NOISE:g} nats of 0 cannot be told from 0. Product rows come from nearest "
    "neighbours in the condition, and where that has five or more dimensions they make independent data read .08 to "
    ".19 nats.",
    "below 0": "Information is never negative. The estimator has not converged, or it has memorised its training rows "
    "and fails on others. The number says nothing about the information.",
}
"""Why a marked reading cannot be trusted, by mark."""


@dataclass(frozen=True)
class Reading:
    """A term or an expression estimated on many rows, in nats.

    Attributes:
        value: the estimate; NaN where the term was skipped.
        ceiling: the largest value that the estimator can give on these rows; None where it has no such limit.
    """

    value: float
    ceiling: float | None = None

    @classmethod
    def of_sum(cls, parts: Sequence[tuple[float, Reading]]) -> Reading:
        """The reading of Σ coefficient · reading.

        It has a ceiling where every part has one and no part is subtracted.

        >>> Reading.of_sum([(1.0, Reading(2.0, 3.5)), (0.5, Reading(1.0, 4.0))])
        Reading(value=2.5, ceiling=5.5)
        """
        parts = [(c, reading) for c, reading in parts if c != 0]
        ceilings = [c * r.ceiling for c, r in parts if c > 0 and r.ceiling is not None]
        return cls(sum(c * r.value for c, r in parts), sum(ceilings) if len(ceilings) == len(parts) else None)


def mark(term: str, value: float | None, ceiling: float | None) -> str:
    """Why a reading cannot be trusted: a key of `TEXTS`, or "" where it can.

    >>> mark("I(T;A|C)", 0.1, None), mark("I(F;T)", 4.9, 5.5)
    ('noise', 'at its ceiling')

    Args:
        term: its name, such as "I(T;A|C)".
        value: the reading; None or NaN where there is none.
        ceiling: the reading's ceiling, if it has one.
    """
    if value is None or not math.isfinite(value):
        return ""
    if ceiling is not None and value > ceiling - NEAR_CEILING:
        return "at its ceiling"
    if "|" in term and not term.endswith(" by club") and abs(value) < NOISE:
        return "noise"
    return "below 0" if value < 0 else ""


@dataclass(frozen=True)
class TermRow:
    """One term at one epoch: the mean of its batch readings, and its reading on all rows. None where there is none."""

    term: str
    split: str
    batch: float | None
    bank: float | None
    ceiling: float | None

    @property
    def mark(self) -> str:
        return mark(self.term, self.bank, self.ceiling)


def term_rows(record: Mapping[str, Any], splits: Sequence[str] = ("train", "valid")) -> list[TermRow]:
    """The terms of a record of history.jsonl, by term and then by split. Empty where no rows were read together.

    Batch readings come from stage 2 or from evaluation. A training term that occurs only within a sum has those of
    stage 1.
    """
    parts = {split: _group(record, split) for split in splits}
    names = dict.fromkeys(name for part in parts.values() for name in _group(part, "bank") if is_term(name))
    return [
        TermRow(
            name,
            split,
            _number(_group(part, "information").get(name, _group(part, "estimators").get(name))),
            _number(_group(part, "bank")[name]),
            _number(_group(part, "bank_ceiling").get(name)),
        )
        for name in names
        for split, part in parts.items()
        if name in _group(part, "bank")
    ]


def best_rows(history: Sequence[Mapping[str, Any]], best: int | None) -> tuple[int | None, list[TermRow]]:
    """The number and the rows of the best epoch, or of the last epoch read on all rows where the best one was not.

    Args:
        history: records of history.jsonl.
        best: the number of the best epoch, if known.
    """
    ordered = sorted(history, key=lambda record: (record["epoch"] == best, record["epoch"]), reverse=True)
    return next(((r["epoch"], rows) for r in ordered if (rows := term_rows(r))), (None, []))


def print_rows(console: Any, history: Sequence[Mapping[str, Any]], best: int | None) -> None:
    """Print the terms of the best epoch on a rich console, and explain every mark. Without readings print nothing."""
    from rich import box
    from rich.table import Table

    epoch, rows = best_rows(history, best)
    if not rows:
        return
    title = f"Information terms on all rows together, epoch {epoch} (nats; conditional terms: DV)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("term", "train, batches", "train, all rows", "ceiling", "valid, all rows", "ceiling"):
        table.add_column(name, justify="left" if name == "term" else "right")
    table.add_column("note")
    for term, of_term in itertools.groupby(rows, lambda row: row.term):
        of_split = {row.split: row for row in of_term}
        train, valid = of_split.get("train"), of_split.get("valid")
        values = [train and train.batch, *(x for r in (train, valid) for x in (r and r.bank, r and r.ceiling))]
        marks = {row.mark for row in of_split.values()}
        each = "; ".join(f"{split}: {row.mark}" for split, row in of_split.items() if row.mark)
        note = marks.pop() if len(marks) == 1 else each
        table.add_row(term, *("-" if value is None else f"{value:.3f}" for value in values), note)
    console.print(table)
    for name in dict.fromkeys(row.mark for row in rows if row.mark):
        console.print(f"[bold]{name}[/]: {TEXTS[name]}", highlight=False)


def _group(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    group = values.get(key)
    return group if isinstance(group, Mapping) else {}


def _number(value: Any) -> float | None:
    """A finite number, or None. A history may hold null, or anything that a stranger wrote there."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond what a float holds
        return None


def is_term(name: str) -> bool:
    """Whether a name is that of a single term, I(x;y) or I(x;y|z), with a bound of its own or not, and not of a sum.

    >>> is_term("I(F;T)"), is_term("I(Z;S) by club"), is_term("I(T;A)+I(T;V)")
    (True, True, False)
    """
    quantity, closed, own = name.partition(")")
    return quantity.startswith("I(") and bool(closed) and re.fullmatch(r"( by [\w ]+)?", own) is not None
