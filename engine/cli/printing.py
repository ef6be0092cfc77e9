"""What commands print: lines without control characters, and tables."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import printable


def say(text: object, file: Any = None) -> None:
    """Print a line. Nothing in it acts on the terminal."""
    print(printable(text), file=file)


def print_notes(notes: Sequence[str]) -> None:
    """Print notes to standard error, one per line."""
    for note in notes:
        say(f"note: {note}", file=sys.stderr)


def console() -> Any:
    """Where tables are printed."""
    from rich.console import Console

    # A pipe or a file has no width of its own, and rich's 80 columns squeeze the tables.
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


def print_metrics(metrics: dict[str, Any], title: str) -> None:
    """One row per metric."""
    from rich.table import Table

    table = Table("metric", "value")
    table.columns[1].justify = "right"
    for name, value in metrics.items():
        table.add_row(name, _number(value))
    say(title)
    console().print(table)


def print_seeds(metrics: list[dict[str, Any]], seeds: list[int], split: str) -> None:
    """One column per seed, then mean ± sample standard deviation."""
    from rich.table import Table

    from engine.metrics import summary

    table = Table("metric", *(f"seed {seed}" for seed in seeds), "mean ± std")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, both in summary(metrics).items():
        spread = f" ± {both['std']:.4f}" if len(seeds) > 1 else ""
        table.add_row(name, *(_number(one.get(name)) for one in metrics), f"{both['mean']:.4f}{spread}")
    print(f"{split} metrics at each run's best epoch, {len(seeds)} seeds")
    console().print(table)


def print_information(run: Path, best_epoch: int | None) -> None:
    """The information terms of a run, read on all rows."""
    from engine.objective.readings import print_rows

    path = run / "history.jsonl"
    if path.exists():
        history = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        print_rows(console(), history, best_epoch)


def print_results(out: Path) -> None:
    """Where to look next. Files that are not there are left out."""
    for label, name in (("report", "report.html"), ("metrics", "metrics.json"), ("summary", "summary.json")):
        if (out / name).exists():
            say(f"{label}: {out / name}")


def print_keys(keys: Sequence[Any]) -> None:
    """A table of settings: key, default, values and meaning."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("key", "default", "values and meaning", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    table.columns[1].overflow = "fold"
    for key in keys:
        table.add_row(key.name, escape(key.default), escape(meaning(key)))
    console().print(table)


def meaning(key: Any) -> str:
    """A key's description, with its values in front where they are a choice."""
    choice = "|" in key.type and not key.type.startswith(("true", "integer", "number"))
    return f"{key.type}. {key.description}" if choice else key.description


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "-" if value is None else str(value)
