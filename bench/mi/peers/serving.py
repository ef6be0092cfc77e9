"""The worker of a run: a line on the standard input names a file of samples, a line of output answers."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

import numpy as np

Estimate = Callable[[dict[str, np.ndarray], int], dict[str, Any]]


def serve(estimate: Estimate, packages: Iterable[str]) -> None:
    """Answer every line {"path", "seed", "limit"} with `estimate`'s entries and its seconds, until the input ends.

    An estimate that takes more CPU seconds than its limit ends the process (SIGXCPU). Time that other programs take
    from this one does not count.

    Args:
        estimate: (arrays of the file, seed) -> {"value": nats, ...}; what it raises is answered as {"error"}.
        packages: whose versions are told in the first line.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a package prints must not end up among the answers
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + job["limit"]), hard))
        print(json.dumps(_answer(estimate, job)), file=answers, flush=True)


def _answer(estimate: Estimate, job: dict[str, Any]) -> dict[str, Any]:
    with np.load(job["path"]) as file:
        arrays = {name: file[name] for name in "xyz" if name in file}
    return timed(estimate, arrays, job["seed"])


def timed(estimate: Estimate, arrays: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """`estimate`'s entries, or {"error"}, with "seconds" and "cpu_seconds"."""
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        answer = estimate(arrays, seed)
    except Exception as error:  # any package may fail in any way; the run goes on and the failure is on record
        answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    else:
        if not np.isfinite(answer["value"]):
            answer = {"error": f"value {answer['value']}"}
    return answer | {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
