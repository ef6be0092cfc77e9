"""The sections of information terms and of estimates beside a known truth."""

from __future__ import annotations

import math

from engine.objective.readings import TEXTS, TermRow, best_rows, is_term, mark
from engine.report.charts import escape, is_finite, lines, number, shape, truth
from engine.report.folder import MOST_SHOWN, Run, part
from engine.report.pieces import card, epoch_legend, sign, table_of
from engine.report.words import words_of
from engine.vocabulary import SPLITS


def information_section(run: Run) -> str:
    if not run.history:
        return ""
    terms = _names(run, "information")
    if not terms:
        reason = (
            "The objective was off (objective.enabled=false): the run trained on the task loss alone."
            if run.setting("objective", "enabled") is False
            else "No information terms are recorded. The first epoch has no bank of features, and no other followed."
        )
        return f"<p>{reason}</p>"
    words = words_of(run)
    about = words.terms(run.config)
    cards = [_information_card(run, "information", name, about.get(name, "")) for name in terms]
    notes = [
        "Estimates in nats, averaged over the batches of an epoch. The first epoch has no bank of features, and so no "
        "terms."
    ]
    batch, bound = run.setting("batch_size"), run.setting("objective", "bound")
    if bound == "infonce" and isinstance(batch, int) and batch > 1:
        notes.append(f"InfoNCE cannot read more than log(batch size) = {math.log(batch):.2f} nats per pair.")
    if any("bank" in part(epoch, "train") for epoch in run.history):
        notes.append(
            "The broad pale lines are read once per epoch on all rows of a split together. There InfoNCE’s ceiling is "
            "log(rows), and conditional terms are read as DV."
        )
    notes.append(words.note(run.config))
    each = [_information_card(run, "estimators", name, "") for name in _names(run, "estimators")]
    details = (
        f'<details><summary>The {len(each)} estimators</summary><div class="grid4">{"".join(each)}</div></details>'
        if each
        else ""
    )
    table = _readings(run) + _left(run)
    lead = f"<p>{' '.join(filter(None, notes))}</p>{epoch_legend(run)}"
    return f'{lead}<div class="grid4">{"".join(cards)}</div>{table}{details}'


def _readings(run: Run) -> str:
    """A table of each term's reading in batches and on all rows together, with its ceiling and its marks."""
    epoch, readings = best_rows(run.history, run.best_epoch)
    if not readings:
        return ""
    splits = list(dict.fromkeys(row.split for row in readings))
    heads = (("in batches", "the epoch’s mean"), ("on all rows", "together"), ("ceiling", "log(rows)"))
    head = "".join(f"<th>{split}, {name}<small>{about}</small></th>" for split in splits for name, about in heads)
    by_term: dict[str, dict[str, TermRow]] = {}
    for row in readings:
        by_term.setdefault(row.term, {})[row.split] = row
    rows = "".join(
        f"<tr><th>{escape(term)}</th>{''.join(_reading_cells(of_term.get(split)) for split in splits)}</tr>"
        for term, of_term in by_term.items()
    )
    marked = dict.fromkeys(row.mark for row in readings if row.mark)
    notes = "".join(f"<p><b>{name}</b>: {TEXTS[name]}</p>" for name in marked)
    title = f"The terms on all rows together, epoch {epoch}"
    about = "in nats; batches: terms in stage 2, their parts in stage 1; trust held-out rows most"
    return f'<div class="below">{card(title, table_of(f"<tr><th></th>{head}</tr>", rows) + notes, about)}</div>'


def _left(run: Run) -> str:
    """A table of what probes find of the terms that were minimised: term, reading, and what is left where."""
    left = {name: part(part(run.metrics, "left"), name) for name in list(part(run.metrics, "left"))[:MOST_SHOWN]}
    splits = [split for split in ("valid", "test") if any(part(of_one, split) for of_one in left.values())]
    if not splits:
        return ""
    heads = ("kNN", "linear", "chance", "left")
    head = "<th></th><th>reading</th>" + "".join(f"<th>{split}, {name}</th>" for split in splits for name in heads)
    rows = ""
    for name, of_one in left.items():
        cells = f"<th>{escape(name)}</th><td>{number(of_one.get('reading'))}</td>"
        for split in splits:
            found = part(of_one, split)
            kind = {"r2": "R²", "accuracy": "accuracy"}.get(str(found.get("kind")), "")
            cells += "".join(f"<td>{number(found.get(key))}</td>" for key in ("knn", "linear", "chance"))
            cells += f'<td class="main">{number(found.get("left"))}<small>{kind}</small></td>'
        rows += f"<tr>{cells}</tr>"
    note = (
        "How well the second feature is predicted from the first, by nearest neighbours and by ridge regression, which "
        "learnt from the training rows. Left is the better of the two, above chance. Chance is 0 for R², the commonest "
        "class for accuracy, and what the condition alone gives for a conditional term. Much can be left although a "
        "term reads 0 nats."
    )
    return (
        f'<div class="below">{card("What is left of minimised terms", table_of(f"<tr>{head}</tr>", rows), note)}</div>'
    )


def _reading_cells(row: TermRow | None) -> str:
    if row is None:
        return "<td>–</td>" * 3
    small = f"<small>{row.mark}</small>" if row.mark else ""
    return f'<td>{number(row.batch)}</td><td class="main">{number(row.bank)}{small}</td><td>{number(row.ceiling)}</td>'


def _information_card(run: Run, group: str, name: str, about: str) -> str:
    chart = lines(
        f"{name} in nats over epochs",
        [epoch["epoch"] for epoch in run.history],
        {split: _values(run, split, group, name) for split in SPLITS}
        | {f"{split} rows": _values(run, split, "bank", name) for split in ("train", "valid")},
        run.best_epoch,
        _ceilings(run, name),
    )
    last = next(
        (
            (split, value)
            for epoch in reversed(run.history)
            for split in ("valid", "train")
            if is_finite(value := part(part(epoch, split), group).get(name))
        ),
        None,
    )
    side = f"{last[0]} {number(last[1])} at last" if last else ""
    if last and mark(name, last[1], None) == "noise":
        side += ", noise"
    return card(name, chart or '<p class="muted">no finite value</p>', about, side)


def _values(run: Run, split: str, group: str, name: str) -> list[float | None]:
    values = [part(part(epoch, split), group).get(name) for epoch in run.history]
    return [value if is_finite(value) else None for value in values]


def _ceilings(run: Run, name: str) -> dict[str, float]:
    """What a term cannot exceed, {label in the chart: nats}: in a batch, and on all training rows."""
    known = part(part(run.history[-1], "train"), "bank_ceiling").get(name)
    batch, bound = run.setting("batch_size"), run.setting("objective", "bound")
    if not is_finite(known):
        return {}
    rows = {"ceiling, all training rows": known}
    if bound != "infonce" or not isinstance(batch, int) or not is_term(name):
        return rows
    return {f"ceiling, batch of {batch}": math.log(batch)} | rows


def truth_section(run: Run) -> str:
    if not run.truth:
        return ""
    estimators = list(dict.fromkeys(name for row in run.truth for name in row["estimates"]))[:MOST_SHOWN]
    chart = truth(run.truth, estimators)
    marks = "".join(f"<li>{sign(16, shape(k, 8, 7))}{escape(name)}</li>" for k, name in enumerate(estimators))
    signs = {name: sign(10, f'<path class="{name}" d="M5 1V13"/>') for name in ("true", "ceiling")}
    has_ceiling = any(is_finite(row.get("ceiling")) for row in run.truth)
    legend = f"<li>{signs['true']}true</li>{marks}" + (f"<li>{signs['ceiling']}ceiling</li>" if has_ceiling else "")
    head = "".join(f"<th>{escape(name)}</th>" for name in estimators)
    rows = "".join(
        f'<tr><th>{escape(row["name"])}</th><td class="main">{number(row.get("true"))}</td>'
        + "".join(f"<td>{number(row['estimates'].get(name))}</td>" for name in estimators)
        + (f"<td>{number(row.get('ceiling'))}</td>" if has_ceiling else "")
        + "</tr>"
        for row in run.truth
    )
    ceiling = "<th>Ceiling</th>" if has_ceiling else ""
    note = (
        " InfoNCE and the bounds made of it cannot read more than log B in a batch of B, their ceiling."
        if has_ceiling
        else ""
    )
    return (
        "<p>Estimates on the raw latents of the generated data, whose information is known."
        f'{note}</p><div class="card"><ul class="legend">{legend}</ul>{chart or ""}</div>'
        f'<div class="card below">{table_of(f"<tr><th>nats</th><th>True</th>{head}{ceiling}</tr>", rows)}</div>'
    )


def _names(run: Run, group: str) -> list[str]:
    """Names of the recorded terms or estimators, the known ones first and in their order."""
    recorded = dict.fromkeys(
        name for epoch in run.history for split in SPLITS for name in part(part(epoch, split), group)
    )
    known = [name for name in words_of(run).terms(run.config) if name in recorded]
    return list(dict.fromkeys([*known, *recorded]))[:MOST_SHOWN]
