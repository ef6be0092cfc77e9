"""Bounds by a conditional on Gaussians of known information, and what bounds leave of a disturbance.

    python -m bench.upper

writes bench/results/bounds/upper_bounds.json and prints both tables of docs/objective.md. The second table is made by
examples/leak.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
from typing import Any

from bench import machine

CASES = ((1, 0.5), (1, 0.9), (5, 0.5), (5, 0.9), (20, 0.3), (20, 0.6))
BOUNDS = ("club", "club_sample", "l1out", "ba")
STEPS, BATCH, READINGS = 1000, 256, 100
LONGER = 10_000  # steps of the case whose conditional learns slowest
RESULT = machine.ROOT / "bench" / "results" / "bounds" / "upper_bounds.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.upper", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3, help="of the second table (3)")
    a = parser.parse_args(arguments)
    machine.pin_environment(a.threads)
    machine.pin_threads(a.threads)
    record: dict[str, Any] = {
        "machine": machine.machine(a.threads), "versions": machine.versions(), "commit": machine.commit(),
        "steps": STEPS, "batch": BATCH, "readings": READINGS, "seeds": a.seeds,
    }  # fmt: skip
    print("| d | rho | information | CLUB by the true q | " + " | ".join(BOUNDS) + " |\n|" + "---|" * (4 + len(BOUNDS)))
    record["gaussians"] = [_gaussian(dim, rho) for dim, rho in CASES]
    value, error = _trained("l1out", 20, 0.3, LONGER)
    record["longer"] = {"dim": 20, "rho": 0.3, "steps": LONGER, "l1out": value, "l1out_error": error}
    print(f"\nd = 20, rho = 0.3, l1out after {LONGER} steps: {value:.3f} ± {error:.3f}")
    print("\n| bound | reading, nats | kNN R² left | linear R² left | task loss |\n|---|---|---|---|---|")
    record["leak"] = _leaks(a.seeds)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return 0


def _gaussian(dim: int, rho: float) -> dict[str, Any]:
    """Readings of trained estimators on new rows, x ~ N(0, I), y = rho x + noise of variance 1 - rho²."""
    row: dict[str, Any] = {"dim": dim, "rho": rho, "information": -0.5 * dim * math.log(1 - rho * rho)}
    row["oracle_club"] = dim * rho * rho / (1 - rho * rho)
    for bound in BOUNDS:
        row[bound], row[f"{bound}_error"] = _trained(bound, dim, rho)
    cells = " | ".join(f"{row[bound]:.2f} ± {row[f'{bound}_error']:.2f}" for bound in BOUNDS)
    print(f"| {dim} | {rho} | {row['information']:.2f} | {row['oracle_club']:.2f} | {cells} |", flush=True)
    return row


def _trained(bound: str, dim: int, rho: float, steps: int = STEPS) -> tuple[float, float]:
    """Mean of the readings on new rows, and its standard error."""
    import torch

    from engine import MIEstimator

    torch.manual_seed(0)
    estimator = MIEstimator(dim, dim, bound=bound, hidden=128, layers=1)
    optimizer = torch.optim.Adam(estimator.parameters(), 5e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)

    def batch() -> tuple[Any, Any]:
        x = torch.randn(BATCH, dim)
        return x, rho * x + math.sqrt(1 - rho * rho) * torch.randn(BATCH, dim)

    for _ in range(steps):
        optimizer.zero_grad()
        estimator(*batch()).loss.backward()
        optimizer.step()
        rates.step()
    estimator.eval()
    with torch.no_grad():
        readings = [estimator(*batch()).value.item() for _ in range(READINGS)]
    return statistics.mean(readings), statistics.stdev(readings) / math.sqrt(READINGS)


def _leaks(seeds: int) -> dict[str, dict[str, list[float]]]:
    """Each method's numbers by seed, from examples/leak.py."""
    spec = importlib.util.spec_from_file_location("leak", machine.ROOT / "examples" / "leak.py")
    leak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(leak)
    found = {}
    for method, weight in [*((method, leak.WEIGHT) for method in leak.METHODS), ("infonce", 1.0)]:
        name = method if weight == leak.WEIGHT else f"{method}, weight {weight:g}"
        rows = [leak.train(method, seed, weight=weight) for seed in range(seeds)]
        found[name] = {key: [row[key] for row in rows if math.isfinite(row[key])] for key in rows[0]}
        cells = (f"{statistics.mean(v):.2f} ({min(v):.2f} to {max(v):.2f})" if v else "" for v in found[name].values())
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
