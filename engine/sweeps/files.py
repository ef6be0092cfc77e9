"""What a sweep and a tuning leave in their folder: tables as CSV and JSON, and the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.files import write_json, write_text
from engine.metrics import csv_text
from engine.metrics.tables import write_rows
from engine.report.charts import escape, number, points
from engine.report.environment import environment
from engine.report.page import page_of
from engine.report.pieces import card, table_of
from engine.sweeps.plan import starts
from engine.sweeps.settings import value_text
from engine.sweeps.space import Range
from engine.sweeps.sweeping import Cell, SweepResult
from engine.sweeps.tuning import BEST_YAML, TRIALS, TuneResult, trial_name

REPORT, MOST_ROWS = "report.html", 1000
STATES = ("finished", "pruned", "failed", "running", "lost")


def write_sweep(result: SweepResult, base: Config) -> None:
    """Write sweep.json, sweep.csv and report.html."""
    content = result.as_json()
    write_json(result.out / "sweep.json", content)
    keys = list(dict.fromkeys(key for cell in result.cells for key in cell.setting.values))
    names = list(dict.fromkeys(name for row in content["settings"] for name in row["valid"]))
    rows = []
    for row, cell in zip(content["settings"], result.cells, strict=True):
        values = [_cell(cell.setting.values.get(key)) if key in cell.setting.values else "" for key in keys]
        means = [_cell(row["valid"].get(name, {}).get(part)) for name in names for part in ("mean", "std")]
        counts = [str(len(cell.valid)), str(len(cell.failed))]
        rows.append([str(row["rank"]), csv_text(row["name"]), *map(csv_text, values), *counts, *means])
    header = ["rank", "setting", *keys, "runs", "failed"]
    header += [f"valid {name} {part}" for name in names for part in ("mean", "std")]
    write_rows(result.out / "sweep.csv", header, rows)
    write_text(result.out / REPORT, _sweep_page(result, base))


def write_tuning(result: TuneResult, base: Config) -> None:
    """Write tune.json, tune.csv and report.html."""
    rows = [
        {
            "trial": trial.number, "state": trial.state, "value": trial.value, "settings": trial.values,
            "epochs": {str(epoch): value for epoch, value in sorted(trial.epochs.items())}, "problem": trial.problem,
        }
        for trial in result.trials
    ]  # fmt: skip
    best = result.best
    content = {
        "ranked_by": {"split": "valid", "metric": result.metric, "higher_is_better": result.higher_is_better},
        "space": {key: one.plain() for key, one in result.space.items()},
        "trials": rows,
        "best": None if best is None else {"trial": best.number, "value": best.value, "settings": best.values},
        "seeds": None if result.seeds is None else result.seeds.as_json(),
    }
    write_json(result.out / "tune.json", content)
    table = [
        [str(t.number), t.state, _cell(t.value), *(csv_text(_cell(t.values.get(key))) for key in result.space)]
        for t in result.trials
    ]
    write_rows(result.out / "tune.csv", ["trial", "state", f"valid {result.metric}", *result.space], table)
    write_text(result.out / REPORT, _tuning_page(result, base))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    return "" if value is None else value_text(value)


# -- pages ------------------------------------------------------------------------------------------


def _page(out: Path, kind: str, chips: Sequence[str], lead: str, sections: list[tuple[str, str, str]]) -> str:
    shown = [section for section in sections if section[2]]
    name = out.resolve().name
    items = "".join(f"<li>{escape(chip)}</li>" for chip in chips)
    body = [
        f'<header><h1>{escape(name)}</h1><ul class="chips">{items}</ul>{lead}</header>',
        "<nav>" + "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in shown) + "</nav>",
        *(f'<section id="{key}"><h2>{title}</h2>{content}</section>' for key, title, content in shown),
        f"<footer>Written by engine from the runs of this {kind}.</footer>",
    ]
    return page_of(f"{name} · engine {kind}", "\n".join(body))


def _chips(base: Config, out: Path) -> list[str]:
    begun = starts(out)
    chips = [f"preset {base.preset}"] if base.preset else []
    chips += [f"task {base.task}", f"mode {base.mode}", base.data.dataset, f"text {base.text_encoder}"]
    chips += [f"{base.epochs} epochs", f"{base.threads} threads a run"]
    if len(begun) > 1:
        chips.append(f"started {len(begun)} times, interrupted {len(begun) - 1}")
    return chips


def _sweep_page(result: SweepResult, base: Config) -> str:
    runs = len(result.cells) * len(result.seeds)
    ended = sum(len(cell.valid) + len(cell.failed) for cell in result.cells)
    chips = [f"sweep of {len(result.cells)} settings", f"seeds {_numbers(result.seeds)}", *_chips(base, result.out)]
    chips += [f"{ended} of {runs} runs ended"] if ended < runs else []
    return _page(
        result.out,
        "sweep",
        chips,
        _lead(result),
        [
            ("settings", "Settings", _settings_table(result)),
            ("chosen", "The chosen settings", _chosen_section(result)),
            ("runs", "Runs", _runs_table(result)),
            ("failed", "Failed runs", _failures(result)),
            ("base", "Settings of all runs", _base_section(base, result.out)),
        ],
    )


def _lead(result: SweepResult) -> str:
    chosen, metric = result.chosen, result.metric
    if chosen is None:
        return ""
    how = "highest" if result.higher_is_better else "lowest"
    valid = mean_std([chosen.valid[seed].get(metric) for seed in result.seeds])
    test = [chosen.test.get(seed, {}).get(metric) for seed in result.seeds]
    told = f" Its test {escape(metric)} is <b>{mean_std(test)}</b>." if _all_numbers(test) else ""
    over = f"mean over {len(result.seeds)} seeds" if len(result.seeds) > 1 else "one seed"
    return (
        f'<p class="lead">Chosen: <b>{escape(chosen.setting.name)}</b>, with the {how} valid {escape(metric)}, '
        f"<b>{valid}</b> ({over}).{told}</p>"
    )


def _settings_table(result: SweepResult) -> str:
    names = _names(result)
    head = "".join(f"<th>{escape(name)}<small>valid</small></th>" for name in names)
    rows = []
    for rank, cell in enumerate(result.cells[:MOST_ROWS], 1):
        about = "" if not cell.failed else f"<small>{len(cell.failed)} failed: {escape(_first(cell))}</small>"
        missing = len(cell.valid) + len(cell.failed) < len(result.seeds)
        about += f"<small>{len(cell.valid)} of {len(result.seeds)} runs ended</small>" if missing else ""
        cells = "".join(
            f'<td class="{"main" if name == result.metric else ""}">'
            f"{mean_std([one.get(name) for one in cell.valid.values()])}</td>"
            for name in names
        )
        rows.append(f"<tr><th>{rank}. {escape(cell.setting.name)}{about}</th><td>{len(cell.valid)}</td>{cells}</tr>")
    note = (
        f'<p class="muted">Means ± sample standard deviations over seeds, on valid at each run\'s best epoch. '
        f"The settings are ranked by valid {escape(result.metric)}; those that lack a run come last.</p>"
    )
    return f'{note}<div class="card">{table_of(f"<tr><th>Setting</th><th>Runs</th>{head}</tr>", "".join(rows))}</div>'


def _chosen_section(result: SweepResult) -> str:
    chosen = result.chosen
    if chosen is None:
        return ""
    rows = []
    for name in _names(result):
        valid = [chosen.valid[seed].get(name) for seed in result.seeds]
        test = [chosen.test.get(seed, {}).get(name) for seed in result.seeds]
        by_seed = "".join(f"<td>{number(value, 4)}</td>" for value in test) if len(test) <= 10 else ""
        rows.append(
            f'<tr><th>{escape(name)}</th><td>{mean_std(valid)}</td><td class="main">{mean_std(test)}</td>{by_seed}</tr>'
        )
    seeds = (
        "".join(f"<th>seed {seed}<small>test</small></th>" for seed in result.seeds) if len(result.seeds) <= 10 else ""
    )
    head = f"<tr><th></th><th>Valid<small>chose it</small></th><th>Test<small>chose nothing</small></th>{seeds}</tr>"
    note = (
        '<p class="muted">Test metrics are shown for these settings only, after they were chosen on valid. '
        "The other runs' test metrics were not read for this page.</p>"
    )
    return f'{note}<div class="card">{table_of(head, "".join(rows))}</div>'


def _runs_table(result: SweepResult) -> str:
    rows = []
    for cell in result.cells:
        for seed in result.seeds:
            if seed not in cell.valid:
                continue
            value = number(cell.valid[seed].get(result.metric), 4)
            rows.append(
                f"<tr><th>{escape(cell.setting.name)}</th><td>{seed}</td><td>{value}</td>"
                f"<td>{cell.best_epochs[seed]}</td></tr>"
            )
    head = (
        f"<tr><th>Setting</th><th>Seed</th><th>{escape(result.metric)}<small>valid</small></th><th>Best epoch</th></tr>"
    )
    more = f"<p>{len(rows) - MOST_ROWS} more are in sweep.json.</p>" if len(rows) > MOST_ROWS else ""
    table = table_of(head, "".join(rows[:MOST_ROWS]), "")
    return f"<details><summary>Every run</summary>{table}{more}</details>" if rows else ""


def _failures(result: SweepResult) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{seed}</td><td>{escape(error)}</td></tr>"
        for name, seed, error in result.failures[:MOST_ROWS]
    )
    return table_of("<tr><th>Setting</th><th>Seed</th><th>Error</th></tr>", rows, "plain") if rows else ""


def _base_section(base: Config, out: Path) -> str:
    versions = environment()
    versions.pop("device", None)
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in versions.items())
    rows += "".join(f"<tr><th>start {i}</th><td>{escape(when)}</td></tr>" for i, when in enumerate(starts(out), 1))
    return (
        f"<details><summary>Environment and starts</summary>{table_of('', rows, 'plain')}</details>"
        f"<details><summary>Settings</summary><pre>{escape(base.to_yaml())}</pre></details>"
    )


def _tuning_page(result: TuneResult, base: Config) -> str:
    counts = {state: sum(trial.state == state for trial in result.trials) for state in STATES}
    chips = ["tuning", *(f"{count} {state}" for state, count in counts.items() if count), *_chips(base, result.out)]
    seeds = result.seeds
    seeds_section = "" if seeds is None else _settings_table(seeds) + _chosen_section(seeds) + _failures(seeds)
    return _page(
        result.out,
        "tuning",
        chips,
        _tuning_lead(result),
        [
            ("best", "Best settings", _best_section(result)),
            ("seeds", "The best settings with several seeds", seeds_section),
            ("search", "The search", _search_section(result)),
            ("trials", "Trials", _trials_table(result)),
            ("base", "Settings of all trials", _base_section(base, result.out)),
        ],
    )


def _tuning_lead(result: TuneResult) -> str:
    best = result.best
    if best is None:
        return '<p class="lead">No trial has finished yet.</p>'
    how = "highest" if result.higher_is_better else "lowest"
    lead = (
        f'<p class="lead">Best of {len(result.ended)} trials: <b>{trial_name(best.number)}</b>, with the {how} valid '
        f"{escape(result.metric)}, <b>{number(best.value, 4)}</b>."
    )
    seeds = result.seeds
    if seeds is not None and (chosen := seeds.chosen) is not None:
        valid = mean_std([chosen.valid[seed].get(result.metric) for seed in seeds.seeds])
        test = [chosen.test.get(seed, {}).get(result.metric) for seed in seeds.seeds]
        told = f", test <b>{mean_std(test)}</b>" if _all_numbers(test) else ""
        lead += f" With {len(seeds.seeds)} seeds: valid <b>{valid}</b>{told}."
    return (
        f'{lead}</p><p class="muted">Trials are ranked and pruned on the valid split. No test metric was read before '
        "the best settings were chosen. The best of many valid values is too good by chance: the seeds' mean is "
        "the fairer number.</p>"
    )


def _best_section(result: TuneResult) -> str:
    if result.best is None:
        return ""
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(value_text(result.best.values[key]))}</td>"
        f"<td>{escape(one.text())}</td></tr>"
        for key, one in result.space.items()
        if key in result.best.values
    )
    table = table_of("<tr><th>Setting</th><th>Best</th><th>Searched</th></tr>", rows, "")
    return f'<div class="card">{table}</div><p class="muted">All settings are in {BEST_YAML}, for --config.</p>'


def _search_section(result: TuneResult) -> str:
    finished = [trial for trial in result.trials if trial.state == "finished"]
    if not finished:
        return ""
    shown = {"finished": 0, "pruned": 6}
    best, line = math.nan, []
    for trial in finished:
        value = float(trial.value or 0.0)
        better = best != best or (value > best if result.higher_is_better else value < best)
        line += [(trial.number, best)] if line else []
        best = value if better else best
        line.append((trial.number, best))
    dots = [
        (float(t.number), y, f"{trial_name(t.number)}\n{t.state}\nvalid {number(y, 4)}", shown[t.state])
        for t in result.trials
        if t.state in shown and (y := _level(result, t)) is not None
    ]
    about = f"valid {result.metric}; grey: pruned, at the best epoch so far; line: best so far"
    cards = [card("History", points("values over trials", dots, "trial", best=line), about)]
    for key, one in result.space.items():
        marks: list[tuple[float, float, str, int]] = []
        for trial in result.trials:
            y = _level(result, trial)
            if trial.state not in shown or key not in trial.values or y is None:
                continue
            value = trial.values[key]
            x = float(value) if isinstance(one, Range) else float(one.values.index(value))
            text = f"{trial_name(trial.number)}\n{key} {value_text(value)}\nvalid {number(y, 4)}"
            marks.append((x, y, text, shown[trial.state]))
        log = isinstance(one, Range) and one.log
        labels = () if isinstance(one, Range) else one.labels
        cards.append(card(key, points(f"values over {key}", marks, key, log, labels), f"valid {result.metric}"))
    return f'<div class="grid4 pal-q">{"".join(cards)}</div>'


def _level(result: TuneResult, trial: Any) -> float | None:
    """What a trial reached on valid."""
    if trial.value is not None:
        return float(trial.value)
    values = [value for value in trial.epochs.values() if value == value]
    return (max if result.higher_is_better else min)(values) if values else None


def _trials_table(result: TuneResult) -> str:
    sign = -1 if result.higher_is_better else 1

    def place(trial: Any) -> tuple[int, float, int]:
        return STATES.index(trial.state), sign * (trial.value or 0.0), trial.number

    rows = []
    for trial in sorted(result.trials, key=place)[:MOST_ROWS]:
        cells = "".join(
            f"<td>{escape(_short(trial.values[key])) if key in trial.values else ''}</td>" for key in result.space
        )
        about = f"<small>{escape(trial.problem)}</small>" if trial.problem else ""
        folder = f"{TRIALS}/{trial_name(trial.number)}" if trial.here else f"{trial_name(trial.number)}, elsewhere"
        rows.append(
            f"<tr><th>{folder}{about}</th><td>{trial.state}</td><td>{len(trial.epochs)}</td>"
            f'<td class="main">{number(trial.value, 4)}</td>{cells}</tr>'
        )
    head = "".join(f"<th>{escape(key)}</th>" for key in result.space)
    first = f"<th>Trial</th><th>State</th><th>Epochs</th><th>{escape(result.metric)}<small>valid</small></th>"
    head = f"<tr>{first}{head}</tr>"
    more = "" if len(result.trials) <= MOST_ROWS else f"<p>{len(result.trials) - MOST_ROWS} more are in tune.csv.</p>"
    return f'<div class="card">{table_of(head, "".join(rows))}</div>{more}'


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value_text(value)


def _names(result: SweepResult) -> list[str]:
    """The metrics that the runs have in common, the ranking one first."""
    found = [set(one) for cell in result.cells for one in cell.valid.values()]
    if not found:
        return []
    first = next(one for cell in result.cells for one in cell.valid.values())
    common = [name for name in first if all(name in one for one in found) and name not in ("loss", "task")]
    return sorted(common, key=lambda name: name != result.metric)


def _all_numbers(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, (int, float)) for value in values)


def mean_std(values: Sequence[Any]) -> str:
    if not _all_numbers(values):
        return "–"
    from engine.metrics import summary

    both = summary([{"x": value} for value in values])["x"]
    return number(both["mean"], 4) + (f" ± {number(both['std'], 4)}" if len(values) > 1 else "")


def _numbers(seeds: Sequence[int]) -> str:
    whole = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]}–{seeds[-1]}" if whole else ", ".join(map(str, seeds[:20]))


def _first(cell: Cell) -> str:
    return next(iter(cell.failed.values()))
