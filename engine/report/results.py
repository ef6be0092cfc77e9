"""The sections of results and of curves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.metrics import metrics_for
from engine.report.charts import escape, is_finite, number
from engine.report.folder import MOST_SHOWN, Run, part
from engine.report.measures import METRICS, Metric
from engine.report.pieces import at_best, card, chart_of, epoch_legend, table_of
from engine.vocabulary import SPLITS


def results_section(run: Run) -> str:
    test = run.split_metrics("test")
    if not test and not run.split_metrics("valid"):
        return ""
    keys = [key for key in METRICS if key in test or key in run.split_metrics("valid")]
    shown = test or run.split_metrics("valid")
    tiles = "".join(
        f'<div class="tile"><span>{metric.short or metric.name}</span><b>{metric.show(shown.get(key))}</b>'
        f"<em>{_explained(metric)}</em></div>"
        for key, metric in METRICS.items()
        if metric.headline and key in keys
    )
    baseline = _constant(run)
    oracle = run.split_metrics("oracle_test")
    oracle_epoch = oracle.get("epoch")
    best = "best-valid epoch" if run.best_epoch is None else f"epoch {run.best_epoch}, best on valid"
    columns: list[tuple[str, str, str, Mapping[str, Any]]] = [
        *([("Test", best, "main", test)] if test else []),
        ("Valid", best, "" if test else "main", run.split_metrics("valid")),
    ]
    if baseline:
        columns.append(("Constant", "the valid labels’ mean, on test", "", baseline))
    if oracle:
        where = "" if oracle_epoch is None else f"epoch {oracle_epoch}, best on test: "
        columns.append(("Oracle", f"{where}not for reporting", "oracle", oracle))
    head = "".join(f'<th class="{css}">{name}<small>{escape(about)}</small></th>' for name, about, css, _ in columns)
    rows = []
    for key in keys:
        cells = "".join(f'<td class="{css}">{METRICS[key].show(values.get(key))}</td>' for _, _, css, values in columns)
        rows.append(f"<tr><th>{METRICS[key].name}<small>{METRICS[key].about}</small></th>{cells}</tr>")
    table = f'<div class="card">{table_of(f"<tr><th></th>{head}</tr>", "".join(rows))}</div>'
    per_class = _per_class(test)
    oracle_note = (
        '<p class="muted small below">The oracle column picks its epoch by looking at the test labels. Many published '
        "numbers are picked that way; it is shown for comparison with them and is no result of this run.</p>"
        if oracle
        else ""
    )
    which = "Test split" if test else "Valid split (there are no metrics of the test split)"
    tiles_title = f'<p class="muted">{which}, {escape(best)}.</p>'
    return f'{tiles_title}<div class="tiles">{tiles}</div>{table}{oracle_note}{per_class}{_spent(run)}'


def _constant(run: Run) -> dict[str, float]:
    """Metrics on test of predicting the mean label of the valid split."""
    valid, test = run.predictions.get("valid"), run.predictions.get("test")
    if run.kind == "classification" or valid is None or test is None or not len(valid.label) or not len(test.label):
        return {}
    if not (np.isfinite(valid.label).all() and np.isfinite(test.label).all()):
        return {}
    constant = np.full(len(test.label), valid.label.astype(np.float64).mean())
    return metrics_for("custom", "regression", run.scale)(constant, test.label)


def _per_class(test: Mapping[str, Any]) -> str:
    classes = sorted(int(key.removeprefix("recall_")) for key in test if re.fullmatch(r"recall_[0-9]{1,6}", key))
    classes = classes[:MOST_SHOWN]
    if not classes:
        return ""
    percent = Metric("", percent=True)
    rows = "".join(
        f"<tr><th>class {c}</th>"
        + "".join(f"<td>{percent.show(test.get(f'{name}_{c}'))}</td>" for name in ("recall", "precision", "f1"))
        + "</tr>"
        for c in classes
    )
    head = "<tr><th></th><th>Recall</th><th>Precision</th><th>F1</th></tr>"
    return f'<div class="card below">{table_of(head, rows)}</div>'


def _spent(run: Run) -> str:
    tiles = []
    seconds = [epoch["seconds"] for epoch in run.history if is_finite(epoch.get("seconds"))]
    wall, rate, memory = (run.metrics.get(key) for key in ("wall_s", "samples_per_second", "peak_memory_mb"))
    if is_finite(wall):
        tiles.append(("Time", _duration(wall), "whole run"))
    if seconds:
        tiles.append(("Epoch", _duration(float(np.median(seconds))), "median"))
    if is_finite(rate):
        tiles.append(("Speed", f"{number(rate, 1)}/s", "samples per second"))
    if is_finite(waited := run.metrics.get("data_wait_share")):
        tiles.append(("Waiting", f"{waited:.1%}", "for data, of training"))
    if is_finite(memory):
        tiles.append(("Memory", f"{memory / 1024:.2f} GiB" if memory >= 1024 else f"{memory:.0f} MiB", "peak"))
    if not tiles:
        return ""
    inner = "".join(f'<div class="tile"><span>{a}</span><b>{b}</b><em>{c}</em></div>' for a, b, c in tiles)
    return f'<div class="tiles">{inner}</div>'


def curves_section(run: Run) -> str:
    if not run.history:
        return ""
    cards = []
    shown = {key: metric for key, metric in METRICS.items() if metric.headline}
    for key, title in (("loss", "Loss"), ("task", "Task loss"), *((k, m.short or m.name) for k, m in shown.items())):
        about = {"loss": "task loss − weighted information", "task": f"{run.setting('train', 'loss') or ''}"}.get(key)
        about = _explained(shown[key]) if about is None else about
        scale = 100 if key in shown and shown[key].percent else 1
        chart = chart_of(run, f"{title} over epochs", lambda split, key=key: split.get(key), scale)
        if chart:
            best = at_best(run, key)
            value = shown[key].show(best) if key in shown else number(best)
            side = f"valid {value}" if is_finite(best) else ""
            cards.append(card(title, chart, about, side))
    if not cards:
        return ""
    table = _history_table(run)
    legend = epoch_legend(run, ", whose numbers stand beside the titles")
    return f'{legend}<div class="grid4">{"".join(cards)}</div>{table}'


def _history_table(run: Run) -> str:
    keys = [("loss", Metric("Loss")), *METRICS.items()]
    columns = [
        (split, key, metric)
        for key, metric in keys
        for split in SPLITS
        if any(is_finite(part(epoch, split).get(key)) for epoch in run.history)
    ]
    head = "".join(f"<th>{metric.short or metric.name}<small>{split}</small></th>" for split, _, metric in columns)
    rows = "".join(
        f"<tr><th>{epoch['epoch']}</th>"
        + "".join(f"<td>{metric.show(part(epoch, split).get(key))}</td>" for split, key, metric in columns)
        + "</tr>"
        for epoch in run.history
    )
    table = table_of(f"<tr><th>Epoch</th>{head}</tr>", rows, "")
    return f"<details><summary>The numbers behind the curves</summary>{table}</details>"


def _explained(metric: Metric) -> str:
    """The explanation that goes with the short name."""
    return f"{metric.name.partition(', ')[2]}, {metric.about.rpartition(' (')[0]}" if metric.short else metric.about


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
