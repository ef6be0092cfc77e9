"""Errors of `engine.estimate_mi` where information has a closed form. See bench/mi for other tasks and packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.mi import table, tasks
from bench.mi.peers.own import estimate
from bench.mi.peers.serving import timed
from bench.runner import Setting, Work

TITLE = "estimate_mi: mean absolute error over the tasks in closed form, 10,000 rows"
GOALS = {"value": (0.04, 0.03)}
VALUE = "nats"
SIDES = ("engine",)
ROUNDS = 1
METHOD = "engine"
ROWS, QUICK_ROWS = 10_000, 2_000
QUICK_TASKS = ("own-independent-gauss-5d", "own-additive-0.3", "own-cross")


class Estimates:
    """Each call estimates every task once with a new seed, and returns the mean absolute error in nats."""

    def __init__(self, setting: Setting) -> None:
        known = tasks.tasks()
        self.tasks = [known[name] for name in (QUICK_TASKS if setting.quick else known)]
        self.rows = QUICK_ROWS if setting.quick else ROWS
        self.records: list[dict[str, Any]] = []

    def __call__(self) -> float:
        seed = len(self.records) // len(self.tasks)
        now = [run(task, self.rows, seed) for task in self.tasks]
        self.records += now
        return table.summary(now)["error"]


def run(task: tasks.Task, rows: int, seed: int) -> dict[str, Any]:
    """One record, as `python -m bench.mi run` makes it."""
    sample = task.sample(rows, seed)
    truth = float(sample.pop("truth"))
    record = {"task": task.name, "rows": rows, "seed": seed, "method": METHOD, "truth": truth}
    return record | timed(estimate, sample, seed)


def build(side: str, setting: Setting) -> Work:
    return Work(Estimates(setting), warmups=0, returns_number=True)


def gate(setting: Setting) -> None:
    """Gaussians of one nat read about one nat."""
    one = tasks.Task("gate", 1.0, tasks.pairs(tasks.correlation(1.0), 1), tasks.GAUSS)
    record = run(one, QUICK_ROWS, 0)
    assert "value" in record, record.get("error")
    assert abs(record["value"] - 1.0) < 0.15, f"Gaussians of 1 nat: {record['value']:.3f}"


def details(setting: Setting, works: Mapping[str, Work], numbers: Mapping[str, list[float]]) -> dict[str, Any]:
    """The summary, and every task's truth, value, interval, flags and seconds."""
    records = works["engine"].run.records
    kept = ("seed", "truth", "value", "interval", "flags", "seconds", "error")
    tasks_found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        tasks_found.setdefault(record["task"], []).append({k: record[k] for k in kept if k in record})
    return {"summary": table.summary(records), "tasks": tasks_found}
