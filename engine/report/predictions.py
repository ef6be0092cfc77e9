"""The section of predictions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.metrics import PHQ_RANGE, sentiment_classes, sims_classes
from engine.report.charts import escape, number, scatter
from engine.report.folder import MOST_SHOWN, Run
from engine.report.pieces import MOST_DOTS, card, spread_over, table_of

DEPRESSED = 10
"""The usual cut-off of the PHQ-8: a score of 10 or more."""

SIMS_NAMES = ("to −0.7", "to −0.1", "to 0.1", "to 0.7", "to 1")
"""The five classes of SIMS, by their upper edges."""

SENTIMENT_NAMES = tuple(f"{c:+d}".replace("-", "−") if c else "0" for c in range(-3, 4))
"""The seven classes of MOSI and MOSEI."""

Values = NDArray[np.float64]

SHADES = "rows: true, columns: predicted; shade: share of the row"


def predictions_section(run: Run) -> str:
    there = [split for split in ("test", "valid") if split in run.predictions]
    if not there:
        return ""
    split = next((s for s in there if np.isfinite(run.predictions[s].label).any()), there[0])
    table = run.predictions[split]
    kept = np.isfinite(table.label) & np.isfinite(table.prediction)
    label, prediction = table.label[kept].astype(np.float64), table.prediction[kept].astype(np.float64)
    ids = [name for name, keep in zip(table.ids, kept, strict=True) if keep]
    if not ids:
        return f"<p>No finite label with a finite prediction in predictions_{split}.csv.</p>"
    if run.kind == "classification":
        return _classes(label, prediction, split)

    scale = PHQ_RANGE if run.kind == "avec2019" else 1.0
    label, prediction = label * scale, prediction * scale
    shown = spread_over(len(ids), MOST_DOTS)
    limits = min(label.min(), prediction.min()), max(label.max(), prediction.max())
    chart = _predicted_against_true(run, split, label[shown], prediction[shown], [ids[i] for i in shown], limits)
    beside = _confusion_card(run, label, prediction) + _largest_errors(ids, label, prediction)
    some = f", {len(shown)} of them drawn" if len(shown) < len(ids) else ""
    count = f'<p class="muted">{split.capitalize()} split, {len(ids)} samples{some}.</p>'
    return f'{count}<div class="grid2">{chart}<div class="column">{beside}</div></div>'


def _classes(label: Values, prediction: Values, split: str) -> str:
    classes = int(max(label.max(), prediction.max())) + 1
    if classes > MOST_SHOWN or min(label.min(), prediction.min()) < 0:
        return f"<p>Class numbers that are not 0 to {MOST_SHOWN - 1}: no table of confusions.</p>"
    matrix = _confusion(label.astype(int), prediction.astype(int), [str(c) for c in range(classes)])
    shown = card("Confusion by class", matrix, SHADES)
    return f'<p class="muted">{split.capitalize()} split, {len(label)} samples.</p><div class="grid2">{shown}</div>'


def _predicted_against_true(
    run: Run, split: str, label: Values, prediction: Values, ids: Sequence[str], limits: tuple[float, float]
) -> str:
    low, high = limits
    room = 0.05 * (high - low) or 0.5
    texts = [
        f"{name}\ntrue {number(true, 2)}, predicted {number(predicted, 2)}"
        for name, true, predicted in zip(ids, label, prediction, strict=True)
    ]
    scale, unit = (PHQ_RANGE, " (PHQ-8)") if run.kind == "avec2019" else (1.0, "")
    groups, palette, _ = label_groups(run, label / scale)
    chart = scatter(
        f"predicted against true label, {split} split",
        label,
        prediction,
        groups,
        texts,
        f"true{unit}",
        f"predicted{unit}",
        (low - room, high + room),
    )
    return f'<div class="{palette}">' + card("Predicted against true", chart, "dotted: predicted = true") + "</div>"


def _confusion_card(run: Run, label: Values, prediction: Values) -> str:
    """Confusions of the classes that the labels' scale has; nothing for other scales."""
    if run.kind == "avec2019":
        names = [f"below {DEPRESSED}", f"{DEPRESSED} and more"]
        matrix = _confusion((label >= DEPRESSED).astype(int), (prediction >= DEPRESSED).astype(int), names)
        return card(f"PHQ-8 of {DEPRESSED} and more", matrix, SHADES)
    if run.kind == "sims":
        matrix = _confusion(sims_classes(label, 5), sims_classes(prediction, 5), SIMS_NAMES)
        return card("Confusion by class", matrix, f"five classes as in Acc-5; {SHADES}")
    if run.kind == "sentiment":
        matrix = _confusion(sentiment_classes(label), sentiment_classes(prediction), SENTIMENT_NAMES)
        return card("Confusion by class", matrix, f"seven classes as in Acc-7; {SHADES}")
    return ""


def _largest_errors(ids: Sequence[str], label: Values, prediction: Values) -> str:
    far = np.argsort(-np.abs(label - prediction), kind="stable")[:6]
    rows = "".join(
        f"<tr><th>{escape(ids[i])}</th>"
        + "".join(f"<td>{value:.2f}</td>" for value in (label[i], prediction[i], prediction[i] - label[i]))
        + "</tr>"
        for i in far
    )
    head = "<tr><th>Sample</th><th>True</th><th>Predicted</th><th>Error</th></tr>"
    return card("The largest errors", table_of(head, rows))


def _confusion(true: NDArray[np.integer], predicted: NDArray[np.integer], names: Sequence[str]) -> str:
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (true, predicted), 1)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for i, name in enumerate(names):
        cells = []
        for j, count in enumerate(counts[i]):
            share = count / max(counts[i].sum(), 1)
            css = " ".join(word for word, on in (("hit", i == j), ("strong", share > 0.55), ("zero", count == 0)) if on)
            cells.append(f'<td class="{css}" style="--share:{share:.3f}">{count}</td>')
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    return f'<table class="confusion"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def label_groups(run: Run, label: NDArray[np.float64]) -> tuple[NDArray[np.integer], str, str]:
    """Colour group of each label, the palette's class, and the legend."""
    first = 0
    if run.kind == "classification":
        groups, palette, letter = label.astype(int) % 8, "pal-q", "q"
        names = [str(c) for c in range(min(8, int(label.max()) + 1))]
    elif run.kind == "avec2019":
        groups = np.clip(PHQ_RANGE * label // 5, 0, 4).astype(int)
        palette, letter, names = "pal-s", "s", ["PHQ-8 below 5", "5–9", "10–14", "15–19", "20 and more"]
    elif run.kind == "sims":
        first, letter, names = 1, "d", list(SIMS_NAMES)  # the middle five of seven colours
        groups, palette = sims_classes(label, 5) + first, "pal-d"
    elif run.kind == "sentiment":
        groups, palette, letter = sentiment_classes(label), "pal-d", "d"
        names = list(SENTIMENT_NAMES)
    else:
        edges = np.linspace(label.min(), label.max(), 6)
        groups, palette, letter = np.digitize(label, edges[1:-1]), "pal-s", "s"
        names = [f"{number(a, 2)} to {number(b, 2)}" for a, b in itertools.pairwise(edges)]
    items = "".join(
        f'<li><span class="swatch" style="background:var(--{letter}{k})"></span>{name}</li>'
        for k, name in enumerate(names, first)
    )
    return groups, palette, f'<ul class="legend">{items}</ul>'
