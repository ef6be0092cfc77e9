"""Accuracy of trained runs as a committed result.

    python -m bench.accuracy fast=runs/fast faithful=runs/faithful --out bench/results/mosi_accuracy.json

Each folder holds one run folder a seed, as `engine train … seeds=0-2` writes them. Prints the README's table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.machine import commit
from engine import metrics
from engine.files import write_json

COLUMNS = ("mae", "corr", "acc7", "acc2_non0", "acc2_has0")


def collect(folder: Path) -> dict[str, Any]:
    """Every seed's numbers and their mean and sample standard deviation."""
    runs = {p.parent.name: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*/metrics.json"))}
    tests = [run["test"] for run in runs.values()]
    return {
        "test": metrics.summary(tests),
        "valid_mae": metrics.summary([run["valid"] for run in runs.values()])["mae"],
        "oracle_test_mae": metrics.summary([run["oracle_test"] for run in runs.values()])["mae"],
        "runs": runs,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: one row a name, test metrics at the best-valid epoch as mean ± standard deviation over seeds."""
    head = ["mode", "seeds", "MAE", "Corr", "Acc-7", "Acc-2 neg/pos", "Acc-2 neg/non-neg", "oracle MAE"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, result in results.items():
        cells = [name, str(len(result["runs"]))]
        cells += [f"{result['test'][k]['mean']:.3f} ± {result['test'][k]['std']:.3f}" for k in COLUMNS]
        cells.append(f"{result['oracle_test_mae']['mean']:.3f}")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=commit(), help="the commit that the runs were trained at")
    arguments = parser.parse_args()
    pairs = (pair.split("=", 1) for pair in arguments.runs)
    results = {name: collect(Path(folder)) for name, folder in pairs}
    if arguments.out is not None:
        write_json(arguments.out, {"name": "mosi_accuracy", "commit": arguments.commit, "results": results})
    print(table(results))


if __name__ == "__main__":
    main()
