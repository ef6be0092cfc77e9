"""How often the 95 % interval holds the truth: many seeds of tasks with known information, few rows each.

python -m bench.mi.coverage --seeds 40 --rows 1000 --out coverage.json
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bench.mi import conditional_tasks, tasks
from bench.mi.tasks import Array, Task, line_entropy, normal_log_density, pairs
from engine import estimate_cmi, estimate_mi
from engine.information.estimate import Estimate

CUBE_NOISE = 1.0
LEVELS = np.array([-3.0, -1.0, 1.0, 3.0])
ZERO_SHARE = 0.4


@cache
def cases() -> dict[str, tuple[Task, Callable[..., Estimate], dict[str, Any]]]:
    """{name: (task, estimator, its options)}."""
    own, conditional = tasks.tasks(), conditional_tasks.tasks()
    five = pairs(tasks.correlation(1.0, 5), 5)
    mi = [
        (Task("gaussian, 1 column", 0.5 * math.log(2), pairs(math.sqrt(0.5), 1), tasks.GAUSS), {}),
        (Task("gaussian, 5 columns", 1.0, five, tasks.GAUSS), {}),
        (Task("cubic", _cubic_information(), _cubic, tasks.LINE), {}),
        (Task("cubes of 5 columns", 1.0, tasks.transformed(five, lambda v: v**3), tasks.UNCHANGED), {}),
        (own["own-channel-8"], {}),
        (own["own-independent-gauss-5d"], {}),
        (own["own-independent-uniform-1d"], {}),
        (own["own-cross"], {}),
        (own["own-label-shift"], {}),
        (own["own-label-shift"], {"discrete": {"x": True}}),
        (Task("label against 3 columns", _label_information(), _label, tasks.LINE), {"discrete": {"x": True}}),
        (Task("often exactly 0", _zero_information(), _zeros, "H(zeros) + share log(2) / 2"), {}),
    ]  # fmt: skip
    cmi = [
        (conditional["cmi-linear-1d"], {}),
        (conditional["cmi-chain-2d"], {}),
        (Task("collider", -0.5 * math.log(1 - 0.25), _collider, "partial correlation -1/2"), {}),
        (conditional["cmi-null-linear-2d"], {}),
        (conditional["cmi-null-bent-1d"], {}),
        (Task("label given z", _label_information(), _label_given_z, tasks.LINE), {"discrete": {"x": True}}),
    ]
    named = {}
    for estimator, group in ((estimate_mi, mi), (estimate_cmi, cmi)):
        for task, options in group:
            named[task.name + ", discrete=" * bool(options) + "x" * bool(options)] = task, estimator, options
    return named


def _cubic(rows: int, generator: np.random.Generator) -> tuple[Array, Array]:
    x = generator.standard_normal((rows, 1))
    return x, x**3 + CUBE_NOISE * generator.standard_normal((rows, 1))


def _cubic_information() -> float:
    """The entropy of x³ plus noise, by integrals over a line, less the noise's."""
    x = np.linspace(-6, 6, 4001)
    weight = np.exp(normal_log_density(x, 0, 1)) * (x[1] - x[0])

    def log_density(y: Array) -> Array:
        near = [weight @ np.exp(normal_log_density(at, x**3, CUBE_NOISE)) for at in y]
        return np.log(np.maximum(near, 1e-300))

    noise = 0.5 * math.log(2 * math.pi * math.e * CUBE_NOISE**2)
    return line_entropy(log_density, -220, 220, 1761) - noise


def _label(rows: int, generator: np.random.Generator) -> tuple[Array, Array]:
    """Names of four classes, out of order, whose means differ in the first of three columns."""
    label = generator.integers(4, size=(rows, 1))
    y = generator.standard_normal((rows, 3))
    y[:, :1] += LEVELS[label]
    return np.array([2.0, 0.0, 3.0, 1.0])[label], y


def _label_information() -> float:
    def density(at: Array) -> Array:
        return np.logaddexp.reduce([normal_log_density(at, level, 1) for level in LEVELS], axis=0) - math.log(4)

    return line_entropy(density, -14, 14) - 0.5 * math.log(2 * math.pi * math.e)


def _zeros(rows: int, generator: np.random.Generator) -> tuple[Array, Array]:
    """Both columns are 0 in the same rows, and elsewhere Gaussian of correlation 1/√2."""
    x, y = pairs(math.sqrt(0.5), 1)(rows, generator)
    kept = generator.random((rows, 1)) >= ZERO_SHARE
    return x * kept, y * kept


def _zero_information() -> float:
    return tasks.binary_entropy(ZERO_SHARE) + (1 - ZERO_SHARE) * 0.5 * math.log(2)


def _collider(rows: int, generator: np.random.Generator) -> tuple[Array, ...]:
    """x and y are independent; given their sum plus noise, their correlation is -1/2."""
    x, y, noise = generator.standard_normal((3, rows, 1))
    return x, y, x + y + noise


def _label_given_z(rows: int, generator: np.random.Generator) -> tuple[Array, ...]:
    label, y = _label(rows, generator)
    z = generator.standard_normal((rows, 2))
    return label, y[:, :1] + z[:, :1] * 2, z


def coverage(name: str, seeds: range, rows: int, **settings: Any) -> dict[str, Any]:
    """How many intervals of a case hold its truth, the mean error of the values, and seconds an estimate."""
    task, estimator, options = cases()[name]
    values, widths, inside, started = [], [], 0, time.process_time()
    for seed in seeds:
        sample = task.sample(rows, seed)
        estimate = estimator(*(sample[key] for key in "xyz" if key in sample), seed=seed, **options, **settings)
        low, high = estimate.interval
        inside += low <= task.truth <= high
        values.append(estimate.value)
        widths.append(high - low)
    return {
        "case": name, "truth": task.truth, "rows": rows, "seeds": len(seeds), "inside": inside,
        "bias": float(np.mean(values) - task.truth), "spread": float(np.std(values)), "width": float(np.mean(widths)),
        "seconds": (time.process_time() - started) / len(seeds),
    }  # fmt: skip


def markdown(records: list[dict[str, Any]]) -> str:
    lines = [
        "| case | rows | truth | intervals that hold it | mean error | spread over seeds | mean width | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        lines.append(
            f"| {r['case']} | {r['rows']} | {r['truth']:.3f} | {r['inside']} of {r['seeds']} | {r['bias']:+.3f} | "
            f"{r['spread']:.3f} | {r['width']:.3f} | {r['seconds']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=40, help="how many")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--steps", type=int, help="of training, if not the default")
    parser.add_argument("--cases", nargs="+", default=list(cases()))
    parser.add_argument("--out", type=Path, help="keep the records in this JSON file")
    a = parser.parse_args()
    records, settings = [], {} if a.steps is None else {"steps": a.steps}
    for name in a.cases:
        records.append(coverage(name, range(a.seeds), a.rows, **settings))
        print(markdown(records).splitlines()[-1], flush=True)
        if a.out:
            a.out.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
