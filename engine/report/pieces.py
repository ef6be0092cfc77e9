"""Pieces of the page that several sections use: cards, tables, legends and curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.report.charts import escape, is_finite, lines
from engine.report.folder import Run, part
from engine.vocabulary import SPLITS

MOST_DOTS = 1500
"""Most dots of a chart. More would be neither light nor legible."""


def chart_of(run: Run, label: str, value: Callable[[Mapping[str, Any]], Any], scale: float = 1) -> str | None:
    def read(epoch: Mapping[str, Any], split: str) -> float | None:
        single = value(part(epoch, split))
        return scale * single if is_finite(single) else None

    epochs = [epoch["epoch"] for epoch in run.history]
    return lines(label, epochs, {s: [read(epoch, s) for epoch in run.history] for s in SPLITS}, run.best_epoch)


def at_best(run: Run, key: str) -> Any:
    return next((part(e, "valid").get(key) for e in run.history if e["epoch"] == run.best_epoch), None)


def table_of(head: str, rows: str, css: str = "full") -> str:
    return f'<div class="scroll"><table class="{css}"><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def card(title: str, content: str, about: str = "", side: str = "") -> str:
    small = f"<small>{escape(side)}</small>" if side else ""
    text = f"<p>{escape(about)}</p>" if about else ""
    return f'<div class="card"><h3>{escape(title)}{small}</h3>{text}{content}</div>'


def epoch_legend(run: Run, numbers: str = "") -> str:
    signs = {split: sign(34, f'<path class="line {split}" d="M2 7H32"/>') for split in SPLITS}
    there = [split for split in SPLITS if any(part(epoch, split) for epoch in run.history)]
    items = "".join(f"<li>{signs[split]}{split}</li>" for split in there)
    items += "<li>horizontally: epoch</li>"
    if run.best_epoch is not None:
        line = sign(10, '<path class="mark" d="M5 0V14"/>')
        items += f"<li>{line}best epoch on valid ({run.best_epoch}){numbers}</li>"
    return f'<ul class="legend">{items}</ul>'


def sign(width: int, drawing: str) -> str:
    return f'<svg viewBox="0 0 {width} 14" width="{width}" height="14" aria-hidden="true">{drawing}</svg>'


def spread_over(n: int, most: int) -> NDArray[np.integer]:
    """All of n positions, or `most` of them evenly spread."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).astype(int)
