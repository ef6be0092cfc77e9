"""Run every suite in a process of its own; then draw plots and make the README's table from the results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import machine
from bench.runner import NAMES


def run_all(
    only: Sequence[str] | None,
    results: Path,
    quick: bool,
    rounds: int | None,
    threads: int,
    device: str,
    readme: Path | None,
    say: Callable[[str], None],
) -> int:
    """Measure the suites into `results`/NAME.json, draw plots and print the table. Returns the number of failed suites.

    `readme`: a file that gets the table, too, between its markers.
    """
    from bench.plots import draw
    from bench.table import readme_table, update_readme

    failed = []
    for name in only or NAMES:
        path = results.absolute() / f"{name}.json"
        path.unlink(missing_ok=True)  # a suite that fails leaves no older result behind
        command = [sys.executable, "-m", "bench", "run", name, "--json", "--out", str(path)]
        command += ["--threads", str(threads), "--device", device]
        command += ["--quick"] if quick else []
        command += ["--rounds", str(rounds)] if rounds else []
        if subprocess.run(command, cwd=machine.ROOT, stdout=subprocess.DEVNULL, env=os.environ).returncode != 0:
            failed.append(name)
            say(f"{name}: failed")
    results_of = load_results(results)
    for path in draw(results_of, results):
        say(f"drawn: {path}")
    table = readme_table(results_of)
    print(table)
    if readme is not None:
        update_readme(readme, table)
    return len(failed)


def load_results(folder: Path) -> dict[str, dict[str, Any]]:
    """{name: result} of the JSON files in `folder`, in the suites' order."""
    contents = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    contents = {name: result for name, result in contents.items() if "goals" in result}  # others are not suites'
    order = [*NAMES, *sorted(set(contents) - set(NAMES))]
    return {name: contents[name] for name in order if name in contents}
