"""`report.html`: one self-contained page about a run, made from the run's folder alone.

Nothing is fetched when it is opened: charts are inline SVG, style and script are inline, and a Content-Security-Policy
forbids everything else. Pieces a run does not have are named on the page and left out.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from engine.config import FILE_BYTES, MOST_EPOCHS, parse_yaml
from engine.config import MODALITIES as CONFIGURED
from engine.errors import CheckpointError, DataError
from engine.files import parse_json, read_text, user_path, write_text
from engine.metrics import (
    PHQ_RANGE,
    Predictions,
    metrics_for,
    read_predictions,
    scale_of,
    selection,
    sentiment_classes,
    sims_classes,
)
from engine.readings import TEXTS, TermRow, best_rows, is_term, mark
from engine.report_charts import escape, is_finite, lines, number, scatter, shape, truth
from engine.run_folder import CONFIG, FEATURES, HISTORY, LARGEST, PREDICTIONS, TRUTH, verify
from engine.vocabulary import SPLITS

MOST_DOTS = 1500
"""Dots a chart holds at most; more would be neither light nor legible."""

MOST_SHOWN = 100
"""Terms, estimators, features or classes that a page shows; a run has 11."""

WIDEST = 2048
"""Features are drawn where either their rows or their columns are no more: the time is that number's cube."""

DEPRESSED = 10
"""The usual cut-off of the PHQ-8: a score of 10 or more."""


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

SCALE_MARKS = {"acc7": "mosi", "acc5_sims": "sims", "rmse_phq": "phq8", "rmse": "none"}
"""A metric that only runs of one scale have -> the scale."""

KINDS = {"mosi": "sentiment", "sims": "sims", "phq8": "avec2019"}

SIMS_NAMES = ("to −0.7", "to −0.1", "to 0.1", "to 0.7", "to 1")
"""The five classes of SIMS, by their upper edges."""

TERMS: dict[str, str] = {
    "I(F;T)": "what the fused feature keeps of text",
    "I(F;A)": "what the fused feature keeps of audio",
    "I(F;V)": "what the fused feature keeps of vision",
    "inv": "shared by the modalities: I(T;A) + I(T;V)",
    "spec_t": "on the label, from text only: I(T;C|A) + I(T;C|V) − I(T;A|C) − I(T;V|C)",
    "spec_a": "on the label, from audio only: I(A;C|T) − I(T;A|C)",
    "spec_v": "on the label, from vision only: I(V;C|T) − I(T;V|C)",
    "comp": "shared beyond the label: I(T;A|C) + I(T;V|C)",
}

MODALITIES = {"F": "F, fused", "T": "T, text", "A": "A, audio", "V": "V, vision"}


@dataclass
class Run:
    """What a run folder holds; `missing` says in words what it does not."""

    folder: Path
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    predictions: dict[str, Predictions] = field(default_factory=dict)
    truth: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def setting(self, *keys: str, default: Any = None) -> Any:
        """A value of the saved configuration, or the default where the file lacks it."""
        value: Any = self.config
        for key in keys:
            if not isinstance(value, Mapping) or key not in value:
                return default
            value = value[key]
        return value

    @property
    def kind(self) -> str:
        """classification; or by the scale of the labels: sentiment, sims, avec2019 or regression."""
        if self.setting("model", "task") == "classification" or "acc" in self.split_metrics("test"):
            return "classification"
        return KINDS.get(self.scale, "regression")

    @property
    def scale(self) -> str:
        """The scale of the labels: what the metrics tell, else the settings."""
        told = next((scale for key, scale in SCALE_MARKS.items() if key in self.split_metrics("test")), None)
        dataset, declared = (str(self.setting("data", k, default="auto")) for k in ("dataset", "label_scale"))
        return told or scale_of(dataset, declared)

    @property
    def selected_by(self) -> tuple[str, bool]:
        task = "classification" if self.kind == "classification" else "regression"
        return selection(str(self.setting("data", "dataset")), task, self.scale)

    @property
    def best_epoch(self) -> int | None:
        best = self.metrics.get("best_epoch")
        return best if isinstance(best, int) else None

    def split_metrics(self, name: str) -> dict[str, Any]:
        found = self.metrics.get(name)
        return found if isinstance(found, dict) else {}


def write_report(run: str | Path) -> Path:
    """Write `report.html` into a run folder from what lies there, atomically.

    Args:
        run: folder of a run; an unfinished one is reported as far as it came.

    Returns:
        The path of the page.

    Raises:
        CheckpointError: the folder is missing or holds no run, or a file of it is not what the run wrote.
        OutputError: the page cannot be written.
    """
    found = read_run(run)
    path = found.folder / "report.html"
    write_text(path, render(found))
    return path


def read_run(run: str | Path) -> Run:
    """Read everything but the features of a run folder.

    Raises:
        CheckpointError: it holds no run, or a file of it is not what the run wrote.
    """
    folder = user_path(run)
    if not folder.is_dir():
        raise CheckpointError(
            str(folder), "no such folder", "the output folder of `engine train`", "Give the folder passed to --out."
        )
    if not any((folder / name).is_file() for name in ("metrics.json", "history.jsonl", "predictions_test.csv")):
        raise CheckpointError(
            str(folder),
            "neither metrics.json nor history.jsonl nor predictions_test.csv",
            "the output folder of `engine train`",
            "Give the folder passed to --out.",
        )
    verify(folder, CONFIG, "metrics.json", HISTORY, TRUTH, *PREDICTIONS, *FEATURES)
    found = Run(folder)
    _read(found, "config.yaml", "the settings", lambda text: _read_config(found, text))
    _read(
        found, "metrics.json", "the final metrics (training has not finished)", lambda text: _read_metrics(found, text)
    )
    _read(found, "history.jsonl", "the curves", lambda text: _read_history(found, text))
    for split in ("valid", "test"):
        path = folder / f"predictions_{split}.csv"
        try:
            found.predictions[split] = read_predictions(path)
        except DataError as problem:
            absent = "is missing" if not path.exists() else f"cannot be read ({problem.found})"
            found.missing.append(f"{path.name} {absent}: no predictions of the {split} split.")
    if (folder / "truth.json").is_file():
        _read(found, "truth.json", "the comparison with the truth", lambda text: _read_truth(found, text))
    return found


def render(run: Run) -> str:
    """The page as HTML text."""
    sections = [
        ("results", "Results", _results(run)),
        ("curves", "Curves", _curves(run)),
        ("information", "Information", _information(run)),
        ("truth", "Truth", _truth(run)),
        ("predictions", "Predictions", _predictions(run)),
        ("features", "Features", _features(run)),
        ("run", "Run", _settings(run)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in shown)
    body = [_header(run), f"<nav>{links}</nav>"]
    body += [f'<section id="{name}"><h2>{title}</h2>{content}</section>' for name, title, content in shown]
    body.append("<footer>Written by engine from the files of the run folder. Information is in nats.</footer>")
    template = resources.files("engine").joinpath("report_template.html").read_text(encoding="utf-8")
    parts = {
        "title": escape(f"{run.folder.resolve().name} · engine run"),
        "groups": _palettes(),
        "body": "\n".join(body),
    }
    return re.sub(r"\[\[(\w+)\]\]", lambda match: parts[match[1]], template)


def environment(device: str = "cpu") -> dict[str, str]:
    """Versions and kind of machine, for `metrics.json` under `environment`. Names no user, host or path.

    Args:
        device: the torch device the run used; for CUDA its name is recorded.
    """
    versions = {"python": platform.python_version()}
    for name in ("engine", "torch", "transformers", "numpy", "safetensors", "triton"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions["system"] = f"{platform.system()} {platform.machine()}"
    versions["processor"] = f"{_processor()}, {cores} cores"
    if device.startswith("cuda"):
        import torch

        versions["device"] = torch.cuda.get_device_name(device)
    else:
        versions["device"] = device
    return versions


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.machine()


# Reading


def _read(run: Run, name: str, what: str, parse: Callable[[str], None]) -> None:
    path = run.folder / name
    try:
        parse(read_text(path, FILE_BYTES if name == CONFIG else LARGEST))
    except FileNotFoundError:
        run.missing.append(f"{name} is missing: no {what.removeprefix('the ')}.")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as problem:
        reason = " ".join(str(problem).split())[:120]
        run.missing.append(f"{name} cannot be read ({reason}): no {what.removeprefix('the ')}.")


def _read_config(run: Run, text: str) -> None:
    run.config_text = text
    loaded = parse_yaml(text)
    if not isinstance(loaded, dict):
        raise ValueError("not a mapping")
    run.config = loaded


def _read_metrics(run: Run, text: str) -> None:
    loaded = parse_json(text)
    if not isinstance(loaded, dict):
        raise ValueError("not a mapping")
    run.metrics = loaded


def _read_history(run: Run, text: str) -> None:
    rows = [line for line in text.splitlines() if line.strip()]
    for i, row in enumerate(rows):
        try:
            epoch = parse_json(row)
            if not isinstance(epoch, dict) or type(epoch.get("epoch")) is not int or abs(epoch["epoch"]) > MOST_EPOCHS:
                raise ValueError("no epoch number")
        except ValueError:
            # A run that was cut off leaves half a last line.
            run.missing.append(f"history.jsonl line {i + 1} cannot be read and is left out.")
            continue
        run.history.append(epoch)
    # A resumed run may have written an epoch twice: the later one holds.
    run.history = [by for _, by in sorted({epoch["epoch"]: epoch for epoch in run.history}.items())]


def _read_truth(run: Run, text: str) -> None:
    for row in parse_json(text)["latents"][:MOST_SHOWN]:
        estimates = row.get("estimates")
        run.truth.append(
            {**row, "name": str(row["name"]), "estimates": estimates if isinstance(estimates, dict) else {}}
        )


# Sections


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


def _results(run: Run) -> str:
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
    table = f'<div class="card">{_table(f"<tr><th></th>{head}</tr>", "".join(rows))}</div>'
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
    return f'<div class="card below">{_table(head, rows)}</div>'


def _spent(run: Run) -> str:
    tiles = []
    seconds = [epoch["seconds"] for epoch in run.history if is_finite(epoch.get("seconds"))]
    wall, rate, memory = (run.metrics.get(key) for key in ("wall_s", "samples_per_second", "peak_memory_mb"))
    if is_finite(wall):
        tiles.append(("Time", _duration(wall), "whole run"))
    if seconds:
        tiles.append(("Epoch", _duration(float(np.median(seconds))), "median"))
    if is_finite(rate):
        tiles.append(("Speed", f"{number(rate, 1)}/s", "samples a second"))
    if is_finite(waited := run.metrics.get("data_wait_share")):
        tiles.append(("Waiting", f"{waited:.1%}", "for data, of training"))
    if is_finite(memory):
        tiles.append(("Memory", f"{memory / 1024:.2f} GiB" if memory >= 1024 else f"{memory:.0f} MiB", "peak"))
    if not tiles:
        return ""
    inner = "".join(f'<div class="tile"><span>{a}</span><b>{b}</b><em>{c}</em></div>' for a, b, c in tiles)
    return f'<div class="tiles">{inner}</div>'


def _curves(run: Run) -> str:
    if not run.history:
        return ""
    cards = []
    shown = {key: metric for key, metric in METRICS.items() if metric.headline}
    for key, title in (("loss", "Loss"), ("task", "Task loss"), *((k, m.short or m.name) for k, m in shown.items())):
        about = {"loss": "task loss − weighted information", "task": f"{run.setting('train', 'loss') or ''}"}.get(key)
        about = _explained(shown[key]) if about is None else about
        scale = 100 if key in shown and shown[key].percent else 1
        chart = _chart(run, f"{title} over epochs", lambda split, key=key: split.get(key), scale)
        if chart:
            best = _at_best(run, key)
            value = shown[key].show(best) if key in shown else number(best)
            side = f"valid {value}" if is_finite(best) else ""
            cards.append(_card(title, chart, about, side))
    if not cards:
        return ""
    table = _history_table(run)
    legend = _legend(run, ", whose numbers stand beside the titles")
    return f'{legend}<div class="grid4">{"".join(cards)}</div>{table}'


def _history_table(run: Run) -> str:
    keys = [("loss", Metric("Loss")), *METRICS.items()]
    columns = [
        (split, key, metric)
        for key, metric in keys
        for split in SPLITS
        if any(is_finite(_part(epoch, split).get(key)) for epoch in run.history)
    ]
    head = "".join(f"<th>{metric.short or metric.name}<small>{split}</small></th>" for split, _, metric in columns)
    rows = "".join(
        f"<tr><th>{epoch['epoch']}</th>"
        + "".join(f"<td>{metric.show(_part(epoch, split).get(key))}</td>" for split, key, metric in columns)
        + "</tr>"
        for epoch in run.history
    )
    table = _table(f"<tr><th>Epoch</th>{head}</tr>", rows, "")
    return f"<details><summary>The numbers behind the curves</summary>{table}</details>"


def _explained(metric: Metric) -> str:
    """The explanation that goes with the short name."""
    return f"{metric.name.partition(', ')[2]}, {metric.about.rpartition(' (')[0]}" if metric.short else metric.about


def _information(run: Run) -> str:
    if not run.history:
        return ""
    terms = _names(run, "information")
    if not terms:
        reason = (
            "The objective was off (objective.enabled=false): the run trained on the task loss alone."
            if run.setting("objective", "enabled") is False
            else "No information terms are recorded: the first epoch has no bank of features, and none followed it."
        )
        return f"<p>{reason}</p>"
    about = _terms_of(run)
    cards = [_information_card(run, "information", name, about.get(name, "")) for name in terms]
    notes = [
        "Estimates in nats, averaged over an epoch's batches. The first epoch has no bank of features, hence no terms."
    ]
    batch, bound = run.setting("batch_size"), run.setting("objective", "bound")
    compat = run.setting("objective", "compat")
    if bound == "infonce" and isinstance(batch, int) and batch > 1:
        notes.append(f"InfoNCE cannot read more than log(batch size) = {math.log(batch):.2f} nats a pair.")
    if any("bank" in _part(epoch, "train") for epoch in run.history):
        notes.append(
            "The broad pale lines are read once an epoch on all rows of a split together, where InfoNCE’s ceiling is "
            "log(rows) and conditional terms are read as DV."
        )
    if compat == "mimrl" or (compat in (None, "auto") and run.setting("mode") == "faithful"):
        notes.append(
            "In the reference’s form a conditional estimate is 1 + half the symmetrised divergence: it reads 1, not 0, "
            "under independence. Read changes, not levels."
        )
    eleven = [_information_card(run, "estimators", name, "") for name in _names(run, "estimators")]
    details = (
        f'<details><summary>The {len(eleven)} estimators</summary><div class="grid4">{"".join(eleven)}</div></details>'
        if eleven
        else ""
    )
    table = _readings(run)
    return f'<p>{" ".join(notes)}</p>{_legend(run)}<div class="grid4">{"".join(cards)}</div>{table}{details}'


def _readings(run: Run) -> str:
    """What batches and what all rows together read of each term, with the ceiling and what it is worth."""
    epoch, found = best_rows(run.history, run.best_epoch)
    if not found:
        return ""
    splits = list(dict.fromkeys(row.split for row in found))
    heads = (("in batches", "the epoch’s mean"), ("on all rows", "together"), ("ceiling", "log(rows)"))
    head = "".join(f"<th>{split}, {name}<small>{about}</small></th>" for split in splits for name, about in heads)
    by_term: dict[str, dict[str, TermRow]] = {}
    for row in found:
        by_term.setdefault(row.term, {})[row.split] = row
    rows = "".join(
        f"<tr><th>{escape(term)}</th>{''.join(_reading_cells(of_term.get(split)) for split in splits)}</tr>"
        for term, of_term in by_term.items()
    )
    marked = dict.fromkeys(row.mark for row in found if row.mark)
    notes = "".join(f"<p><b>{name}</b>: {TEXTS[name]}</p>" for name in marked)
    title = f"The terms on all rows together, epoch {epoch}"
    about = "nats; in batches: by stage 2, of a term that is only a part by stage 1; held-out rows count most"
    return f'<div class="below">{_card(title, _table(f"<tr><th></th>{head}</tr>", rows) + notes, about)}</div>'


def _reading_cells(row: TermRow | None) -> str:
    if row is None:
        return "<td>–</td>" * 3
    small = f"<small>{row.mark}</small>" if row.mark else ""
    return f'<td>{number(row.batch)}</td><td class="main">{number(row.bank)}{small}</td><td>{number(row.ceiling)}</td>'


def _terms_of(run: Run) -> dict[str, str]:
    """What the terms are, their formulas without the modalities that the run does not have."""
    named = run.setting("data", "modalities")
    modalities = [m for m in CONFIGURED if m in named] if isinstance(named, list) else []
    if len(modalities) in (0, len(CONFIGURED)):
        return TERMS
    from engine.mimrl.terms import mimrl_expressions
    from engine.objective import without_features

    about = {}
    for e in without_features(mimrl_expressions([1.0] * 8), {m[0].upper() for m in CONFIGURED if m not in modalities}):
        words, colon, _ = TERMS[e.name].partition(": ")
        formula = "".join(f" {'−' if c < 0 else '+'} {term}" for term, c in e.coefficients).removeprefix(" + ")
        about[e.name] = f"{words}: {formula}" if colon else words
    return about


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
            if is_finite(value := _part(_part(epoch, split), group).get(name))
        ),
        None,
    )
    side = f"{last[0]} {number(last[1])} at last" if last else ""
    if last and mark(name, last[1], None) == "noise":
        side += ", noise"
    return _card(name, chart or '<p class="muted">no finite value</p>', about, side)


def _values(run: Run, split: str, group: str, name: str) -> list[float | None]:
    found = [_part(_part(epoch, split), group).get(name) for epoch in run.history]
    return [value if is_finite(value) else None for value in found]


def _ceilings(run: Run, name: str) -> dict[str, float]:
    """What a term cannot exceed in a batch and on all training rows, by the words that are drawn beside it."""
    known = _part(_part(run.history[-1], "train"), "bank_ceiling").get(name)
    batch, bound = run.setting("batch_size"), run.setting("objective", "bound")
    if not is_finite(known):
        return {}
    rows = {"ceiling, all training rows": known}
    if bound != "infonce" or not isinstance(batch, int) or not is_term(name):
        return rows
    return {f"ceiling, batch of {batch}": math.log(batch)} | rows


def _truth(run: Run) -> str:
    if not run.truth:
        return ""
    estimators = list(dict.fromkeys(name for row in run.truth for name in row["estimates"]))[:MOST_SHOWN]
    chart = truth(run.truth, estimators)
    marks = "".join(f"<li>{_sign(16, shape(k, 8, 7))}{escape(name)}</li>" for k, name in enumerate(estimators))
    signs = {name: _sign(10, f'<path class="{name}" d="M5 1V13"/>') for name in ("true", "ceiling")}
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
        " InfoNCE, and every bound made of it, cannot read more than the ceiling log B of a batch of B."
        if has_ceiling
        else ""
    )
    return (
        "<p>The estimators on the raw latents of the generated data, whose information is known."
        f'{note}</p><div class="card"><ul class="legend">{legend}</ul>{chart or ""}</div>'
        f'<div class="card below">{_table(f"<tr><th>nats</th><th>True</th>{head}{ceiling}</tr>", rows)}</div>'
    )


def _predictions(run: Run) -> str:
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
    scale, unit = (PHQ_RANGE, " (PHQ-8)") if run.kind == "avec2019" else (1.0, "")
    label, prediction = label * scale, prediction * scale
    if run.kind == "classification":
        classes = int(max(label.max(), prediction.max())) + 1
        if classes > MOST_SHOWN or min(label.min(), prediction.min()) < 0:
            return f"<p>Class numbers that are not 0 to {MOST_SHOWN - 1}: no table of confusions.</p>"
        names = [str(c) for c in range(classes)]
        matrix = _confusion(label.astype(int), prediction.astype(int), names)
        card = _card("Confusion by class", matrix, "rows: true, columns: predicted; shade: share of the row")
        return f'<p class="muted">{split.capitalize()} split, {len(ids)} samples.</p><div class="grid2">{card}</div>'

    shown = _subset(len(ids), MOST_DOTS)
    low, high = min(label.min(), prediction.min()), max(label.max(), prediction.max())
    room = 0.05 * (high - low) or 0.5
    texts = [f"{ids[i]}\ntrue {number(label[i], 2)}, predicted {number(prediction[i], 2)}" for i in shown]
    groups, palette, _ = _groups(run, label[shown] / scale)
    chart = scatter(
        f"predicted against true label, {split} split",
        label[shown],
        prediction[shown],
        groups,
        texts,
        f"true{unit}",
        f"predicted{unit}",
        (low - room, high + room),
    )
    some = f", {len(shown)} of them drawn" if len(shown) < len(ids) else ""
    cards = [f'<div class="{palette}">' + _card("Predicted against true", chart, "dotted: predicted = true") + "</div>"]
    if run.kind == "avec2019":
        names = [f"below {DEPRESSED}", f"{DEPRESSED} and more"]
        matrix = _confusion((label >= DEPRESSED).astype(int), (prediction >= DEPRESSED).astype(int), names)
        cards.append(
            _card(f"PHQ-8 of {DEPRESSED} and more", matrix, "rows: true, columns: predicted; shade: share of the row")
        )
    elif run.kind == "sims":
        matrix = _confusion(sims_classes(label, 5), sims_classes(prediction, 5), SIMS_NAMES)
        about = "five classes as in Acc-5; rows: true, columns: predicted; shade: share of the row"
        cards.append(_card("Confusion by class", matrix, about))
    elif run.kind == "sentiment":
        names = [f"{c:+d}".replace("-", "−") if c else "0" for c in range(-3, 4)]
        matrix = _confusion(sentiment_classes(label), sentiment_classes(prediction), names)
        cards.append(
            _card(
                "Confusion by class",
                matrix,
                "seven classes as in Acc-7; rows: true, columns: predicted; shade: share of the row",
            )
        )
    far = np.argsort(-np.abs(label - prediction), kind="stable")[:6]
    rows = "".join(
        f"<tr><th>{escape(ids[i])}</th>"
        + "".join(f"<td>{value:.2f}</td>" for value in (label[i], prediction[i], prediction[i] - label[i]))
        + "</tr>"
        for i in far
    )
    head = "<tr><th>Sample</th><th>True</th><th>Predicted</th><th>Error</th></tr>"
    beside = "".join(cards[1:]) + _card("The largest errors", _table(head, rows))
    cards[1:] = [f'<div class="column">{beside}</div>']
    count = f'<p class="muted">{split.capitalize()} split, {len(ids)} samples{some}.</p>'
    return f'{count}<div class="grid2">{"".join(cards)}</div>'


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


def _features(run: Run) -> str:
    test = run.predictions.get("test")
    splits = ("test", "valid", "train") if test is None or np.isfinite(test.label).any() else ("valid", "train", "test")
    split = next((s for s in splits if (run.folder / f"features_{s}.safetensors").is_file()), None)
    if split is None:
        return ""
    path = run.folder / f"features_{split}.safetensors"
    try:
        features, ids = _load_features(path)
    except Exception as problem:  # the library raises its own, undocumented kinds of error
        return f"<p>{path.name} cannot be read ({escape(' '.join(str(problem).split())[:120])}).</p>"
    label = features.pop("label", None)
    cards, legend, palette = [], "", ""
    for name, values in features.items():
        real = values.size and values.ndim and values.dtype.kind in "biuf"
        flat = values.reshape(len(values), -1).astype(np.float64) if real else np.zeros((0, 1))
        kept = np.isfinite(flat).all(axis=1)
        if label is not None and len(label) == len(flat):
            kept &= np.isfinite(label.reshape(len(label), -1)[:, 0])
        rows = np.flatnonzero(kept)
        if min(flat.shape) > WIDEST:
            cards.append(_card(MODALITIES.get(name, name), '<p class="muted">too many to be drawn</p>'))
            continue
        if len(rows) < 3:
            cards.append(_card(MODALITIES.get(name, name), '<p class="muted">fewer than three finite rows</p>'))
            continue
        plane, share = principal_plane(flat[rows])
        shown = _subset(len(rows), MOST_DOTS)
        rows, plane = rows[shown], plane[shown]
        texts = [ids[i] if i < len(ids) else f"sample {i}" for i in rows]
        groups = np.zeros(len(rows), dtype=int)
        if label is not None and len(label) == len(flat):
            colour = label.reshape(len(label), -1)[rows, 0].astype(np.float64)
            groups, palette, legend = _groups(run, colour)
            scale = PHQ_RANGE if run.kind == "avec2019" else 1.0
            texts = [f"{text}\nlabel {number(scale * c, 2)}" for text, c in zip(texts, colour, strict=True)]
        chart = scatter(
            f"features {name} in their principal plane", plane[:, 0], plane[:, 1], groups, texts, ticked=False
        )
        about = f"variance: {100 * share[0]:.0f} % across, {100 * share[1]:.0f} % up"
        cards.append(_card(MODALITIES.get(name, name), chart, about, f"{flat.shape[1]} dimensions"))
    if not cards:
        return ""
    lead = (
        f"<p>Features of the {split} split at the best epoch, each in the plane of its first two principal components, "
        "coloured by label.</p>"
    )
    return f'{lead}<div class="{palette or "pal-q"}">{legend}<div class="grid4">{"".join(cards)}</div></div>'


def principal_plane(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates [N, 2] of the rows of x [N, D] in the plane of their first two principal components, and the shares
    [2] of the variance on each. Deterministic: of each component the loading largest in size is positive."""
    centred = x - x.mean(axis=0)
    # The eigenvectors of the smaller of the two Gram matrices: far cheaper than a full SVD of many rows.
    wide = centred.shape[1] > centred.shape[0]
    values, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    values, vectors = values[::-1][:2].clip(min=0), vectors[:, ::-1][:, :2]
    axes = centred.T @ vectors if wide else vectors
    axes = axes / np.maximum(np.linalg.norm(axes, axis=0), np.finfo(np.float64).tiny)
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] < 0, -1, 1)
    plane, share = centred @ axes, values / max(float((centred**2).sum()), np.finfo(np.float64).tiny)
    missing = 2 - plane.shape[1]
    return np.pad(plane, ((0, 0), (0, missing))), np.pad(share, (0, missing))


def _load_features(path: Path) -> tuple[dict[str, NDArray[Any]], list[str]]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        features = {name: file.get_tensor(name) for name in file.keys()}
        listed = parse_json((file.metadata() or {}).get("ids", "[]"))
    order = [name for name in (*MODALITIES, "label") if name in features]
    order += sorted(set(features) - set(order))
    return {name: features[name] for name in order}, [str(name) for name in listed]


def _groups(run: Run, label: NDArray[np.float64]) -> tuple[NDArray[np.integer], str, str]:
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
        names = [f"{c:+d}".replace("-", "−") if c else "0" for c in range(-3, 4)]
    else:
        edges = np.linspace(label.min(), label.max(), 6)
        groups, palette, letter = np.digitize(label, edges[1:-1]), "pal-s", "s"
        names = [f"{number(a, 2)} to {number(b, 2)}" for a, b in itertools.pairwise(edges)]
    items = "".join(
        f'<li><span class="swatch" style="background:var(--{letter}{k})"></span>{name}</li>'
        for k, name in enumerate(names, first)
    )
    return groups, palette, f'<ul class="legend">{items}</ul>'


def _settings(run: Run) -> str:
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
    parts.append(f"<details open><summary>{title}</summary>{_table('', rows, 'plain')}</details>")
    if run.config_text:
        parts.append(
            f"<details><summary>Settings (config.yaml)</summary><pre>{escape(run.config_text)}</pre></details>"
        )
    return "".join(parts)


# Pieces


def _part(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = mapping.get(key)
    return value if isinstance(value, Mapping) else {}


def _chart(run: Run, label: str, value: Callable[[Mapping[str, Any]], Any], scale: float = 1) -> str | None:
    def read(epoch: Mapping[str, Any], split: str) -> float | None:
        found = value(_part(epoch, split))
        return scale * found if is_finite(found) else None

    epochs = [epoch["epoch"] for epoch in run.history]
    return lines(label, epochs, {s: [read(epoch, s) for epoch in run.history] for s in SPLITS}, run.best_epoch)


def _at_best(run: Run, key: str) -> Any:
    return next((_part(e, "valid").get(key) for e in run.history if e["epoch"] == run.best_epoch), None)


def _names(run: Run, group: str) -> list[str]:
    """Names of the recorded terms or estimators, the known ones first and in their order."""
    found = dict.fromkeys(
        name for epoch in run.history for split in SPLITS for name in _part(_part(epoch, split), group)
    )
    known = [name for name in TERMS if name in found] + [name for name in found if name not in TERMS]
    return known[:MOST_SHOWN]


def _table(head: str, rows: str, css: str = "full") -> str:
    return f'<div class="scroll"><table class="{css}"><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _card(title: str, content: str, about: str = "", side: str = "") -> str:
    small = f"<small>{escape(side)}</small>" if side else ""
    text = f"<p>{escape(about)}</p>" if about else ""
    return f'<div class="card"><h3>{escape(title)}{small}</h3>{text}{content}</div>'


def _legend(run: Run, numbers: str = "") -> str:
    signs = {split: _sign(34, f'<path class="line {split}" d="M2 7H32"/>') for split in SPLITS}
    there = [split for split in SPLITS if any(_part(epoch, split) for epoch in run.history)]
    items = "".join(f"<li>{signs[split]}{split}</li>" for split in there)
    items += "<li>horizontally: epoch</li>"
    if run.best_epoch is not None:
        line = _sign(10, '<path class="mark" d="M5 0V14"/>')
        items += f"<li>{line}best epoch on valid ({run.best_epoch}){numbers}</li>"
    return f'<ul class="legend">{items}</ul>'


def _sign(width: int, drawing: str) -> str:
    return f'<svg viewBox="0 0 {width} 14" width="{width}" height="14" aria-hidden="true">{drawing}</svg>'


def _palettes() -> str:
    rules = [
        f".pal-{p} .g{k} {{ stroke: var(--{p}{k}); }}" for p, n in (("d", 7), ("q", 8), ("s", 5)) for k in range(n)
    ]
    rules += [f".m{k} {{ fill: var(--q{k}); }} .m{k}.open {{ stroke: var(--q{k}); }}" for k in range(8)]
    return "\n".join(rules)


def _subset(n: int, most: int) -> NDArray[np.integer]:
    """All of n positions, or `most` of them evenly spread."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).astype(int)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
