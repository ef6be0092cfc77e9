"""Estimate what is not yet on record, a record at a time, in processes of one core each."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine
from bench.mi import conditional_tasks, records, samples, tasks
from bench.mi.methods import METHODS, Worker, WorkerError
from engine.errors import EngineError

CMI = "cmi-"  # how names of tasks with a z begin
SIGNIFICANT = 5

Job = tuple[str, int, int, str]  # task, rows, seed, method


def own_tasks() -> dict[str, tasks.Task]:
    """{name: task} of all tasks that need no package: of I(X;Y) and of I(X;Y|Z)."""
    return tasks.tasks() | conditional_tasks.tasks()


def names(folder: Path, patterns: Iterable[str] = ()) -> list[str]:
    """Tasks of ours and of `folder` that match one of the patterns (all where there is none), sorted.

    Raises:
        EngineError: a pattern that no task matches.
    """
    known = sorted(own_tasks().keys() | {path.name.split("__")[0] for path in folder.glob("*__*__*.npz")})
    patterns = tuple(patterns)
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in known):
            raise EngineError(
                "--tasks", pattern, "a task of python -m bench.mi list", "Export bmi's tasks first if it is one."
            )
    return [name for name in known if not patterns or any(fnmatch(name, p) for p in patterns)]


def plan(tasks: Iterable[str], sizes: Iterable[int], seeds: Iterable[int], methods: Iterable[str]) -> list[Job]:
    """Every method on every file that it can read, seed by seed, so that an interrupted run has all tasks."""
    tasks, sizes, methods = list(tasks), list(sizes), list(methods)
    return [
        (task, rows, seed, method)
        for seed in seeds
        for rows in sizes
        for method in methods
        for task in tasks
        if ("cmi" if task.startswith(CMI) else "mi") in METHODS[method].kinds
    ]


def run(
    jobs: Iterable[Job],
    folder: Path,
    path: Path,
    pythons: Mapping[str, str],
    processes: int = 1,
    limit: float = 600,
    retry: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> int:
    """Run the jobs whose records `path` lacks, and append theirs; how many were run.

    Args:
        folder: of the samples; those of our own tasks are written where they are missing.
        pythons: {family: interpreter} of the packages that are compared.
        limit: CPU seconds after which an estimate is given up and recorded as failed.
        retry: run again what failed.
    """
    known = records.done(records.read(path), retry)
    todo = [job for job in jobs if job not in known]
    _prepare(todo, folder)
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in todo:
        waiting.put(job)
    place = {"processor": machine.machine(1)["processor"], "commit": machine.commit()}
    lock, count = threading.Lock(), 0

    def keep(record: dict[str, Any]) -> None:
        nonlocal count
        with lock:
            records.append(path, record)
            count += 1
            outcome = f"{record['value']:.4f}" if "value" in record else record["error"]
            say(
                f"{count}/{len(todo)} {record['method']}, {record['task']}, {record['rows']} rows, "
                f"seed {record['seed']}: {outcome} (true {record['truth']:.4f}), {record['seconds']:.1f} s"
            )

    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            _work(waiting, folder, pythons, limit, place, keep)
        except BaseException as problem:  # handed to the caller below
            failures.append(problem)

    threads = [threading.Thread(target=guarded, daemon=True) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return count


def _prepare(jobs: Iterable[Job], folder: Path) -> None:
    known = own_tasks()
    for task, rows, seed, _ in jobs:
        if task in known:
            samples.export({task: known[task].sample}, folder, [rows], [seed], say=lambda text: None)
        elif not samples.path(folder, task, rows, seed).exists():
            raise EngineError(
                str(folder),
                f"no samples of {task} with {rows} rows and seed {seed}",
                samples.path(folder, task, rows, seed).name,
                "Write them with python -m bench.mi export, in an environment that has bmi.",
            )


def _work(waiting, folder: Path, pythons, limit: float, place: dict[str, Any], keep) -> None:
    """Take jobs until none is left; a worker lives as long as its method goes on."""
    worker: Worker | None = None
    current = ""
    try:
        while True:
            try:
                task, rows, seed, method = waiting.get_nowait()
            except queue.Empty:
                return
            if worker is None or method != current:
                if worker is not None:
                    worker.close()
                worker, current = Worker(method, pythons), method
            record = {"task": task, "rows": rows, "seed": seed, "method": method}
            record["truth"] = _truth(samples.path(folder, task, rows, seed))
            versions = worker.versions
            try:
                answer = worker.ask(samples.path(folder, task, rows, seed), seed, limit)
            except WorkerError as problem:
                worker.close()
                worker = None
                answer = {"error": str(problem), "seconds": limit, "cpu_seconds": limit}
            keep(record | _rounded(answer) | place | {"versions": versions})
    finally:
        if worker is not None:
            worker.close()


def _truth(path: Path) -> float:
    with np.load(path) as file:
        return float(f"{float(file['truth']):.{SIGNIFICANT + 3}g}")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT}g}")
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return {k: _rounded(v) for k, v in value.items()} if isinstance(value, dict) else value
