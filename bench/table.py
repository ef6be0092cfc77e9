"""Results as text: one for the terminal, a table for the README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.runner import verdict


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
    lines.append(f"  {result['rounds']} rounds, {m['threads']} threads, {m['processor']}, commit {result['commit']}")
    return "\n".join(lines)


def seconds(value: float) -> str:
    """A time with three digits and the unit that suits it."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1 or unit == "µs":
            return f"{value * factor:.3g} {unit}"
    raise AssertionError
