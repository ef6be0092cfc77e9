"""Results as text: a few lines for the terminal, a table for the README."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.runner import meets, verdict

# further sides that the table names
OTHERS = {
    "compile": "torch.compile of the baseline",
    "linear_cross_entropy": "`F.linear_cross_entropy`",
    "torch": "loader torch",
    "dali": "loader dali",
}
START, END = "<!-- bench:start -->", "<!-- bench:end -->"


def describe(result: Mapping[str, Any]) -> str:
    """A few lines on one result."""
    lines = [f"{result['name']}: {result['title']}"]
    sides = {"engine": result["engine"], "baseline": result.get("baseline"), **result.get("others", {})}
    for side, s in sides.items():
        if s is None:
            continue
        number = f"{s['median']:.4g} {result['unit']}" if "unit" in result else seconds(s["median"])
        extra = f", {s['samples_per_second']:.4g} samples/s" if "samples_per_second" in s else ""
        extra += f", {s['extra_peak_bytes'] / 2**20:.1f} MiB extra at peak" if "extra_peak_bytes" in s else ""
        lines.append(f"  {side:22} {number} (p20 {s['p20']:.4g}, p80 {s['p80']:.4g}){extra}")
    lines += [f"  {line}" for line in verdict(result)]
    m = result["machine"]
    lines.append(f"  {result['rounds']} rounds, {m['threads']} threads, {_processor(m)}, commit {result['commit']}")
    return "\n".join(lines)


def seconds(value: float) -> str:
    """A time with three digits and the unit that suits it."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def readme_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row for every goal of every result, and for the ratios of a result that has no goals.

    The last columns are the time or memory of the other sides over the engine's, and the number of the machine.
    """
    places = sorted({_place(r) for r in results.values()})
    rows = [
        "| what | measured | floor | aim | engine | baseline | others / engine | on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results.values():
        for key, goal in (result["goals"] or dict.fromkeys(("ratio", "memory_ratio"))).items():
            if key in result:
                rows.append(f"{_row(result, key, goal)} {places.index(_place(result)) + 1} |")
    quick = [r["name"] for r in results.values() if r["quick"]]
    if quick:
        rows += ["", f"Quick runs on smaller shapes, not to be reported: {', '.join(quick)}."]
    legend = [f"{n}. {place}." for n, place in enumerate(places, 1)]
    return "\n".join([*rows, "", *legend]).rstrip()


def _row(result: Mapping[str, Any], key: str, goal: Mapping[str, float] | None) -> str:
    name = {"ratio": "speed", "memory_ratio": "extra peak memory", "gemm_fraction": "share of the GEMM ceiling"}
    what = result["title"] if key in ("ratio", "value") else f"{result['name']}: {name[key]}"
    engine, baseline, others = "", "", ""
    if key in ("ratio", "memory_ratio"):
        sides = [result["engine"], result["baseline"]]
        ratios = {
            OTHERS[name]: _times(result, side, key) for name, side in result.get("others", {}).items() if name in OTHERS
        }
        others = ", ".join(f"{name} {value:.3g}×" for name, value in ratios.items() if value)
        if key == "ratio":
            engine, baseline = (seconds(s["median"]) for s in sides)
        else:
            engine, baseline = (f"{s['extra_peak_bytes'] / 2**20:.1f} MiB" for s in sides)
    show = _shown(result, key)
    mark = "" if goal is None or meets(result[key], goal["floor"], key) else " (below floor)"
    floor, aim = ("", "") if goal is None else (show(goal["floor"]), show(goal["aim"]))
    return f"| {what} | {show(result[key])}{mark} | {floor} | {aim} | {engine} | {baseline} | {others} |"


def _times(result: Mapping[str, Any], side: Mapping[str, Any], key: str) -> float | None:
    """A further side's time or extra peak memory over the engine's; None where it was not measured."""
    name = "median" if key == "ratio" else "extra_peak_bytes"
    return side[name] / result["engine"][name] if name in side else None


def _shown(result: Mapping[str, Any], key: str):
    if key == "gemm_fraction" or (key == "value" and result["unit"] == "share"):
        return lambda v: f"{100 * v:.3g} %"
    if key == "value" and result["unit"] == "s":
        return lambda v: f"{v:.3g} s"
    if key == "value" and result["unit"] == "nats":
        return lambda v: f"{v:.3g} nats"
    return lambda v: f"{v:.3g}×"


def _processor(machine: Mapping[str, Any]) -> str:
    """The processor, with the instructions where the record names them."""
    return f"{machine['processor']} ({machine['instructions']})" if "instructions" in machine else machine["processor"]


def _place(result: Mapping[str, Any]) -> str:
    m, v = result["machine"], result["versions"]
    where = m.get("gpu") or f"{_processor(m)}, {m['threads']} threads of {m['cores']} cores"
    return f"{where}; Python {v['python']}, torch {v['torch']}; commit {result['commit']}"


def update_readme(path: Path, table: str, markers: tuple[str, str] = (START, END)) -> None:
    """Replace the text between the markers of `path`. Raises ValueError unless both are there, in order."""
    from engine.files import write_text

    text = path.read_text(encoding="utf-8")
    start, end = (text.find(marker) for marker in markers)
    if not 0 <= start < end:
        raise ValueError(f"{path}: no {markers[0]} before {markers[1]}")
    write_text(path, text[: start + len(markers[0])] + "\n\n" + table + "\n\n" + text[end:])
