"""Samples of the public benchmark bmi (PyPI `benchmark-mi`), for `python -m bench.mi export`.

Imported only there: bmi needs jax and numpy below 2, so that it usually lives in an environment of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def tasks() -> dict[str, Callable[[int, int], dict[str, np.ndarray]]]:
    """{task's id: (rows, seed) -> {"x", "y", "truth"}} of all tasks of bmi's benchmark."""
    import bmi

    return {name: _sampler(task) for name, task in bmi.benchmark.BENCHMARK_TASKS.items()}


def _sampler(task) -> Callable[[int, int], dict[str, np.ndarray]]:
    def sample(rows: int, seed: int) -> dict[str, np.ndarray]:
        x, y = task.sample(rows, seed)
        return {"x": np.asarray(x), "y": np.asarray(y), "truth": np.asarray(float(task.mutual_information))}

    return sample
