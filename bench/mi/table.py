"""Records as a table of estimates, a summary and a plot. Equal records give equal text."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.mi.methods import METHODS
from bench.mi.records import Record

START, END = "<!-- mi_benchmark:start -->", "<!-- mi_benchmark:end -->"
ENGINE = "engine"
GROUPS = {"bmi": "tasks of bmi", "own": "tasks of our own", "cmi": "conditional information"}
OFF_NATS, OFF_SHARE = 0.1, 0.1


# -- numbers --------------------------------------------------------------------------------------


def group(task: str) -> str:
    """ "own", "cmi" or "bmi", by the name of a task."""
    first = task.split("-")[0]
    return first if first in ("own", "cmi") else "bmi"


def error(runs: Sequence[Record]) -> float | None:
    """Mean distance from the truth over the runs of one task that gave a value; None where none did."""
    errors = [abs(r["value"] - r["truth"]) for r in runs if "value" in r]
    return statistics.fmean(errors) if errors else None


def off(runs: Sequence[Record]) -> tuple[bool, bool]:
    """Whether a task's error is more than .1 nats, and whether it is more than 10 % of the truth.

    Where the truth is 0 the second is as the first. A task with a run that failed is off by both.
    """
    mean = error(runs)
    if mean is None or any("value" not in r for r in runs):
        return True, True
    truth = runs[0]["truth"]
    return mean > OFF_NATS, mean > (OFF_SHARE * truth or OFF_NATS)


def covered(runs: Iterable[Record]) -> tuple[int, int]:
    """How many intervals hold the truth, of how many."""
    covered = [r["interval"][0] <= r["truth"] <= r["interval"][1] for r in runs if "interval" in r]
    return sum(covered), len(covered)


def summary(runs: Sequence[Record]) -> dict[str, Any]:
    """What one method did on several tasks; the mean absolute error weighs every task alike."""
    tasks = _by(runs, "task")
    errors = [e for e in map(error, tasks.values()) if e is not None]
    offs = [off(of_task) for of_task in tasks.values()]
    return {
        "tasks": len(tasks),
        "runs": len(runs),
        "failed": sum("value" not in r for r in runs),
        "error": statistics.fmean(errors) if errors else None,
        "off": sum(nats or share for nats, share in offs),
        "off_both": sum(nats and share for nats, share in offs),
        "covered": covered(runs),
        "seconds": statistics.median(r["cpu_seconds"] for r in runs),
    }


# -- text -----------------------------------------------------------------------------------------


def markdown(records: Sequence[Record]) -> str:
    """Summaries of every number of rows, the largest number's tasks one by one, and where it was measured."""
    if not records:
        return "No records yet: see `python -m bench.mi run`."
    sizes = sorted({r["rows"] for r in records}, reverse=True)
    parts = []
    for rows in sizes:
        parts += [f"### Summary, {rows:,} rows", _summaries([r for r in records if r["rows"] == rows])]
    largest = [r for r in records if r["rows"] == sizes[0]]
    for name, title in GROUPS.items():
        chosen = [r for r in largest if group(r["task"]) == name]
        if chosen:
            parts += [f"### {title.capitalize()}, {sizes[0]:,} rows", _estimates(chosen)]
    return "\n\n".join([*parts, *_places(records)])


def _summaries(records: Sequence[Record]) -> str:
    head = ["estimator", "tasks", "runs", "mean absolute error", "off by > .1 nats or > 10 %", "off by both"]
    head += ["intervals that hold the truth", "median CPU seconds"]
    lines = []
    for name, title in GROUPS.items():
        chosen = [r for r in records if group(r["task"]) == name]
        methods = _by(chosen, "method")
        for method in [m for m in METHODS if m in methods]:
            s = summary(methods[method])
            held, intervals = s["covered"]
            lines.append(
                [
                    f"{METHODS[method].label}, {title}",
                    str(s["tasks"]),
                    str(s["runs"]) + (f" ({s['failed']} failed)" if s["failed"] else ""),
                    _nats(s["error"]),
                    str(s["off"]),
                    str(s["off_both"]),
                    f"{held} of {intervals} ({100 * held / intervals:.0f} %)" if intervals else "",
                    f"{s['seconds']:.3g}",
                ]
            )
    return _table(head, lines)


def _estimates(records: Sequence[Record]) -> str:
    """One row a task; the estimate nearest to the truth in bold."""
    by_task = _by(records, "task")
    present = {r["method"] for r in records}
    # the bounds of the engine on request have their place in the summary
    peers = [m for m in METHODS if m in present and METHODS[m].family != ENGINE]
    head = ["task", "true", ENGINE, "error", "in interval", "CPU s"]
    head += [f"{METHODS[m].label}{' (CPU s)' if number == 0 else ''}" for number, m in enumerate(peers)]
    lines = []
    for task in sorted(by_task, key=lambda t: (by_task[t][0]["truth"] == 0, t)):
        methods = _by(by_task[task], "method")
        truth = by_task[task][0]["truth"]
        means = {m: _mean(methods.get(m, [])) for m in (ENGINE, *peers)}
        distances = {m: abs(v - truth) for m, v in means.items() if v is not None}
        best = min(distances.values()) if distances else None

        def shown(method: str, means=means, methods=methods, distances=distances, best=best) -> str:
            if means[method] is None:
                return "failed" if method in methods else ""
            text = _nats(means[method])
            return f"**{text}**" if distances[method] == best else text

        ours = methods.get(ENGINE, [])
        held, intervals = covered(ours)
        row = [f"`{task}`", _nats(truth), shown(ENGINE), _nats(error(ours)) if ours else ""]
        row += [f"{held}/{intervals}" if intervals else "", _seconds(ours)]
        row += [f"{shown(m)}{f' ({_seconds(methods[m])})' if m in methods else ''}" for m in peers]
        lines.append(row)
    return _table(head, lines)


def _places(records: Sequence[Record]) -> list[str]:
    versions: dict[str, set[str]] = {}
    for record in records:
        text = ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))
        versions.setdefault(METHODS[record["method"]].family, set()).add(text)
    processors = sorted({r["processor"] for r in records})
    commits = sorted({r["commit"] for r in records if METHODS[r["method"]].family == ENGINE} - {""})
    return [
        f"Measured on {'; '.join(processors)}, one core an estimate. "
        + " ".join(f"{family}: {'; '.join(sorted(versions[family]))}." for family in sorted(versions))
        + (f" Engine at commit {', '.join(commits)}." if commits else "")
    ]


def _by(records: Iterable[Record], key: str) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record[key], []).append(record)
    return groups


def _mean(runs: Sequence[Record]) -> float | None:
    values = [r["value"] for r in runs if "value" in r]
    return statistics.fmean(values) if values else None


def _nats(value: float | None) -> str:
    """Three decimals, without "-0.000"."""
    return "failed" if value is None else f"{value + 0.0:.3f}".replace("-0.000", "0.000")


def _seconds(runs: Sequence[Record]) -> str:
    return f"{statistics.median(r['cpu_seconds'] for r in runs):.2g}" if runs else ""


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*rows, *("| " + " | ".join(line) + " |" for line in lines)])


# -- plot -----------------------------------------------------------------------------------------


def plot(records: Sequence[Record], path: Path) -> Path:
    """Estimate against truth at the largest number of rows: one panel an estimator, the mean over seeds a point."""
    from bench.plots import pyplot_for_files, save

    pyplot = pyplot_for_files()
    rows = max(r["rows"] for r in records)
    methods = _by([r for r in records if r["rows"] == rows and "value" in r], "method")
    shown = [m for m in METHODS if m in methods and (m == ENGINE or METHODS[m].family != ENGINE)]
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(2.6 * columns, 2.7 * lines), squeeze=False)
    top = 1.3 * max(max(r["truth"], r["value"]) for m in shown for r in methods[m])
    for axis, method in zip(axes.flat, shown, strict=False):
        _panel(axis, method, methods[method], top)
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    save(pyplot, figure, path)
    return path


COLOURS = {"bmi": "#4477aa", "own": "#228833", "cmi": "#cc3311"}
TICKS = (0, 0.5, 1, 2, 5, 10)
LINEAR = 1.0  # nats: beyond, the axes are logarithmic


def _panel(axis: Any, method: str, records: Sequence[Record], top: float) -> None:
    """The points of one estimator, with the mean interval where it states one."""
    axis.plot([0, top], [0, top], color="black", linewidth=0.6)
    for name, colour in COLOURS.items():
        tasks = list(_by([r for r in records if group(r["task"]) == name], "task").values())
        if tasks:
            axis.plot([t[0]["truth"] for t in tasks], [_mean(t) for t in tasks], ".", color=colour, label=GROUPS[name])
        for task in tasks:
            ends = [r["interval"] for r in task if "interval" in r]
            if ends:
                low, high = (statistics.fmean(side) for side in zip(*ends, strict=True))
                axis.plot([task[0]["truth"]] * 2, [low, high], color=colour, linewidth=0.7)
    axis.set(title=METHODS[method].label, xlabel="true, nats", ylabel="estimate, nats")
    for which in (axis.set_xscale, axis.set_yscale):
        which("symlog", linthresh=LINEAR)
    shown = [t for t in TICKS if t <= top]
    axis.set(xticks=shown, yticks=shown, xticklabels=shown, yticklabels=shown, xlim=(-0.05, top))
    axis.set_ylim(min(-0.1, *(r["value"] for r in records)), top)
    axis.minorticks_off()
