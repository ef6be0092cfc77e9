"""The page: header, sections, style and the run's settings."""

from __future__ import annotations

import re
from importlib import resources

from engine.report.charts import escape, is_finite
from engine.report.environment import environment
from engine.report.features import features_section
from engine.report.folder import Run
from engine.report.information import information_section, truth_section
from engine.report.measures import METRICS
from engine.report.pieces import table_of
from engine.report.predictions import predictions_section
from engine.report.results import curves_section, results_section


def render(run: Run) -> str:
    """The page as HTML text."""
    sections = [
        ("results", "Results", results_section(run)),
        ("curves", "Curves", curves_section(run)),
        ("information", "Information", information_section(run)),
        ("truth", "Truth", truth_section(run)),
        ("predictions", "Predictions", predictions_section(run)),
        ("features", "Features", features_section(run)),
        ("run", "Run", settings_section(run)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in shown)
    body = [_header(run), f"<nav>{links}</nav>"]
    body += [f'<section id="{name}"><h2>{title}</h2>{content}</section>' for name, title, content in shown]
    body.append("<footer>Written by engine from the files of the run folder. Information is in nats.</footer>")
    return page_of(f"{run.folder.resolve().name} · engine run", "\n".join(body))


def page_of(title: str, body: str) -> str:
    """The page with this title, which is escaped, and this body, which is HTML."""
    template = resources.files("engine.report").joinpath("page.html").read_text(encoding="utf-8")
    parts = {"title": escape(title), "groups": _palettes(), "body": body}
    return re.sub(r"\[\[(\w+)\]\]", lambda match: parts[match[1]], template)


def _header(run: Run) -> str:
    key, _ = run.selected_by
    shown = METRICS[key]
    chips = [
        f"{label}{value}"
        for label, value in (
            ("preset ", run.setting("preset")),
            ("mode ", run.setting("mode")),
            ("", run.setting("data", "dataset")),
            ("text ", run.setting("text_encoder")),
            ("fusion ", run.setting("model", "fusion")),
            ("batch ", run.setting("batch_size")),
            ("seed ", run.setting("seed")),
        )
        if value not in (None, "")
    ]
    if run.history:
        chips.append(f"{len(run.history)} epoch{'s' if len(run.history) != 1 else ''}")
    lead = ""
    test = run.split_metrics("test").get(key)
    if is_finite(test) and run.best_epoch is not None:
        how = "highest" if run.selected_by[1] else "lowest"
        lead = (
            f'<p class="lead">Test {shown.name} <b>{shown.show(test)}</b> at epoch {run.best_epoch}, '
            f"the epoch of the {how} valid {shown.name}.</p>"
        )
    notes = "".join(f"<li>{escape(text)}</li>" for text in run.missing)
    return (
        f"<header><h1>{escape(run.folder.resolve().name)}</h1>"
        f'<ul class="chips">{"".join(f"<li>{escape(chip)}</li>" for chip in chips)}</ul>{lead}'
        + (f'<div class="note">Not in this run folder:<ul>{notes}</ul></div>' if notes else "")
        + "</header>"
    )


def settings_section(run: Run) -> str:
    recorded = run.metrics.get("environment")
    parts = []
    if isinstance(recorded, dict) and recorded:
        title, values = "Environment", recorded
    else:
        title, values = (
            "Environment of this report (the run recorded none)",
            environment(),
        )
        values.pop("device")
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in values.items())
    parts.append(f"<details open><summary>{title}</summary>{table_of('', rows, 'plain')}</details>")
    if run.config_text:
        parts.append(
            f"<details><summary>Settings (config.yaml)</summary><pre>{escape(run.config_text)}</pre></details>"
        )
    return "".join(parts)


def _palettes() -> str:
    rules = [
        f".pal-{p} .g{k} {{ stroke: var(--{p}{k}); }}" for p, n in (("d", 7), ("q", 8), ("s", 5)) for k in range(n)
    ]
    rules += [f".m{k} {{ fill: var(--q{k}); }} .m{k}.open {{ stroke: var(--q{k}); }}" for k in range(8)]
    return "\n".join(rules)
