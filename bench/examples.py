"""The examples' versions with the engine beside their plain versions: python -m bench.examples [--page FILE]

Both sides of an example run in fresh processes that take turns. Times are those that the process computed: a busy
machine does not show in them. The result is kept in bench/results/examples.json, and `--page` puts its table into a
page.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from bench import machine

RESULT = machine.ROOT / "bench" / "results" / "examples.json"
START, END = "<!-- examples:start -->", "<!-- examples:end -->"
EXAMPLES = {
    "mmim_style": ("MMIM-style fusion", "two-stage step with five MI terms", "error on new"),
    "club_style": ("CLUB-style disentangling", "a term by `club`", "style left"),
    "supcon": ("supervised contrast", "`infonce(labels=)`", "accuracy"),
    "clip_style": ("CLIP-style, 2 processes", "`infonce(gather=True)`", "right text found"),
}
"""{script: (what it is, what the engine's version uses, its score)}."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.examples", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs (3)")
    parser.add_argument("--steps", type=int, help="fewer steps than the examples take")
    parser.add_argument("--only", nargs="+", choices=list(EXAMPLES), default=list(EXAMPLES))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--page", type=Path, help="put the table of the result into this page")
    a = parser.parse_args(arguments)
    machine.pin_environment(1)
    sys.path.insert(0, str(machine.ROOT / "examples"))
    compare = importlib.import_module("compare")
    measured = {}
    for name in a.only:
        script = machine.ROOT / "examples" / f"{name}.py"
        sides = compare.compare(script, a.steps, a.rounds)
        measured[name] = {
            "steps": len(sides["engine"]["losses"]),
            "first_steps_differ_by": compare.difference(sides),
            **{side: {key: value for key, value in row.items() if key != "losses"} for side, row in sides.items()},
        }
        print(name, json.dumps(measured[name]))
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine.machine(1), "versions": machine.versions(), "commit": machine.commit(),
        "rounds": a.rounds, "examples": measured,
    }  # fmt: skip
    a.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if a.page is not None:
        text = a.page.read_text(encoding="utf-8")
        before, after = text.split(START)[0], text.split(END)[1]
        a.page.write_text(f"{before}{START}\n\n{table(result)}\n\n{END}{after}", encoding="utf-8")
    return 0


def table(result: dict[str, Any]) -> str:
    """One row per example, engine / plain, and the line that says where it was measured."""
    rows = [
        "| example | engine's part | final loss | score | first 10 steps differ by | CPU seconds | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in result["examples"].items():
        title, part, score = EXAMPLES[name]
        ours, plain = found["engine"], found["plain"]
        both = [f"{ours[key]:{form}} / {plain[key]:{form}}" for key, form in FIGURES if ours[key] is not None]
        loss, scores, *rest = both
        title = f"[{title}](../examples/{name}.py)"
        rows.append(
            f"| {title} | {part} | {loss} | {score} {scores} | {found['first_steps_differ_by']:.0e} | "
            f"{' | '.join(rest)} |"
        )
    m = result["machine"]
    return "\n".join([
        *rows, "",
        f"Engine / plain, medians of {result['rounds']} runs in turns, one thread a process; {m['processor']}, "
        f"torch {result['versions']['torch']}, {result['date']}, commit {result['commit']}.",
    ])  # fmt: skip


FIGURES = (("final_loss", ".3f"), ("score", ".3f"), ("seconds", ".1f"), ("peak_mib", ".1f"))

if __name__ == "__main__":
    raise SystemExit(main())
