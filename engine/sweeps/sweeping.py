"""`engine.sweep`: every setting with every seed, several runs at a time, in one folder and one report."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import Config, require_config
from engine.config.seeds import different_seeds
from engine.errors import ConfigError, EngineError, printable
from engine.files import parse_json, read_text, user_path
from engine.metrics import summary
from engine.run_folder import LARGEST, METRICS, owned
from engine.sweeps import plan as plans
from engine.sweeps.pool import Event, Job, Pool, resources
from engine.sweeps.settings import MOST_RUNS, Setting, grid_of
from engine.task import find_task
from engine.torchrun import require_one_process

RUNS, LOGS = "runs", "logs"


@dataclass
class Cell:
    """A setting with its runs.

    Attributes:
        valid: {seed: the valid metrics at the run's best epoch}.
        failed: {seed: the error in one line}.
        test: as `valid`, of the chosen setting only.
    """

    setting: Setting
    valid: dict[int, dict[str, Any]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    best_epochs: dict[int, int] = field(default_factory=dict)
    test: dict[int, dict[str, Any]] = field(default_factory=dict)

    def mean(self, metric: str) -> float:
        """Mean over the seeds on valid; NaN if there is none."""
        values = [one[metric] for one in self.valid.values() if one.get(metric) is not None]
        return sum(values) / len(values) if values and len(values) == len(self.valid) else math.nan


@dataclass
class SweepResult:
    """A sweep as far as it came.

    Attributes:
        metric, higher_is_better: what ranks the settings, on valid.
        cells: the settings, best first. Those with a failed or missing run come after those with all.
        chosen: the first of `cells` if it has a run for every seed, else None.
    """

    out: Path
    metric: str
    higher_is_better: bool
    seeds: list[int]
    cells: list[Cell]

    @property
    def chosen(self) -> Cell | None:
        first = self.cells[0]
        complete = len(first.valid) == len(self.seeds) and not math.isnan(first.mean(self.metric))
        return first if complete else None

    @property
    def failures(self) -> list[tuple[str, int, str]]:
        """(setting, seed, error) of the runs that failed."""
        return [(c.setting.name, seed, error) for c in self.cells for seed, error in c.failed.items()]

    @property
    def best(self) -> dict[str, Any]:
        """The chosen setting's values, {} where none is chosen."""
        return dict(self.chosen.setting.values) if self.chosen else {}

    def rank(self) -> None:
        """Sort the cells, and read the test metrics of the chosen one."""
        sign = -1 if self.higher_is_better else 1

        def place(cell: Cell) -> tuple[int, bool, float]:
            mean = cell.mean(self.metric)
            return len(self.seeds) - len(cell.valid), math.isnan(mean), sign * mean if mean == mean else 0.0

        self.cells.sort(key=place)
        for cell in self.cells:
            cell.test = {}
        if self.chosen is not None:
            for seed in self.seeds:
                path = run_folder(self.out, self.chosen.setting.name, seed) / METRICS
                try:
                    self.chosen.test[seed] = dict(parse_json(read_text(path, LARGEST))["test"])
                except (OSError, ValueError, TypeError, KeyError):
                    self.chosen.test[seed] = {}

    def as_json(self) -> dict[str, Any]:
        """The content of sweep.json."""
        rows = []
        for rank, cell in enumerate(self.cells, 1):
            runs = {
                str(seed): {"valid": cell.valid[seed], "best_epoch": cell.best_epochs[seed]}
                for seed in sorted(cell.valid)
            }
            rows.append(
                {
                    "rank": rank,
                    "name": cell.setting.name,
                    "settings": cell.setting.values,
                    "valid": summary([cell.valid[seed] for seed in sorted(cell.valid)]) if cell.valid else {},
                    "runs": runs,
                    "failed": {str(seed): error for seed, error in sorted(cell.failed.items())},
                }
            )
        chosen = self.chosen
        test = [chosen.test[seed] for seed in self.seeds] if chosen else []
        return {
            "ranked_by": {"split": "valid", "metric": self.metric, "higher_is_better": self.higher_is_better},
            "seeds": self.seeds,
            "settings": rows,
            "chosen": None
            if chosen is None
            else {"name": chosen.setting.name, "test": summary(test) if all(test) else {}},
        }


def run_folder(out: Path, name: str, seed: int) -> Path:
    """The run folder of a setting and a seed."""
    return out / RUNS / name / f"seed{seed}"


def sweep(
    config: Config,
    out: str | Path,
    space: Mapping[str, Sequence[Any]] | None = None,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    named: Mapping[str, Mapping[str, Any]] | None = None,
    task: str | None = None,
    say: Callable[[str], None] | None = None,
) -> SweepResult:
    """Train every combination of settings with every seed, and write one report.

    Runs are separate processes, side by side. The same call goes on with an interrupted sweep: finished runs stay,
    stopped ones are resumed, failed and missing ones begin.

    Args:
        config: the settings that all runs share; `config.data.path` names the data.
        out: folder to write: `runs`, `logs`, report.html, sweep.csv, sweep.json.
        space: {key: values}, such as {"train.lr": [1e-3, 5e-4]}: all combinations are trained.
        seeds: default: the seed of `config`.
        jobs: runs at a time; default: one for each GPU, or as many as the cores allow.
        named: {name: {key: value}}, whole sets of settings; each is combined with all of `space`.
        task: "module:attribute" of a task of your own, which every process imports.
        say: is given a line for each run that ends; default: print to standard error.

    Returns:
        The settings, ranked on valid. A run that failed is named there, and the others are trained all the same.

    Raises:
        EngineError: a problem with settings, data or the folder, or another sweep is in it.

    Example:
        >>> from engine import load_config
        >>> from engine.loaders.make_data import make_data
        >>> quick = ["data.modalities=audio-vision", "objective.enabled=false", "epochs=1"]
        >>> config = load_config("mosi", [*quick, f"data.path={make_data('data', 'mosi', 40, 'declarelab')}"])
        >>> result = sweep(config, "out", {"train.lr": [1e-3, 1e-2]}, seeds=[0], say=lambda line: None)
        >>> sorted(cell.setting.name for cell in result.cells)
        ['train.lr=0.001', 'train.lr=0.01']
    """
    require_config(config)
    require_one_process("engine.sweep")
    out = user_path(out)
    seeds = sorted(different_seeds([config.seed] if seeds is None else seeds))
    name = known_task(config, task)
    saved = plans.saved_plan(out)
    jobs, threads, gpus = resources(config, jobs)
    base = plans.checked_base(config, threads, saved)
    settings = grid_of(base, space or {}, named)
    if len(settings) * len(seeds) > MOST_RUNS:
        raise ConfigError("grid", f"{len(settings) * len(seeds)} runs", f"at most {MOST_RUNS}", "Use fewer values.")
    plan = {
        "kind": "sweep",
        "settings": plans.comparable(base),
        "grid": {setting.name: setting.values for setting in settings},
        "seeds": seeds,
    }
    if saved is not None:
        plans.require_same(str(out), saved, plan)
    metric, higher = find_task(name).selection(base.resolve())
    result = SweepResult(out, metric, higher, seeds, [Cell(setting) for setting in settings])
    plans.open_data_once(settings[0].config)
    with owned(out):
        plans.begin(out, plan)
        train_all(result, jobs, gpus, task, say or to_stderr, lambda: write_results(result, base))
    return result


def train_all(
    result: SweepResult,
    jobs: int,
    gpus: Sequence[str],
    task: str | None,
    say: Callable[[str], None],
    write: Callable[[], Any],
) -> None:
    """Train the runs of a sweep. `write` is called now and then, and at the end."""
    out = result.out
    todo: list[tuple[Job, Cell, int]] = []
    for cell in result.cells:
        for seed in result.seeds:
            one = cell.setting.config.model_copy(deep=True, update={"seed": seed})
            label = f"{cell.setting.name} seed {seed}"
            log = out / LOGS / f"{cell.setting.name},seed{seed}.txt"
            todo.append((Job(label, run_folder(out, cell.setting.name, seed), one, log), cell, seed))
    of = {job.name: (cell, seed) for job, cell, seed in todo}
    progress = Progress(len(todo), jobs, say)
    waiting, written, cost = iter(todo), -math.inf, 0.0
    with Pool(min(jobs, len(todo)), task, gpus) as pool:
        while True:
            while pool.free and (following := next(waiting, None)) is not None:
                pool.start(following[0])
            if not pool.busy:
                break
            for event in pool.events():
                if event.kind == "epoch":
                    pool.answer(event.job, True)
                    continue
                _note(*of[event.job.name], event)
                progress.ended(event, result.metric)
                if (began := time.monotonic()) > written + 20 * cost:  # the tables of a large sweep cost seconds
                    result.rank()
                    write()
                    written = time.monotonic()
                    cost = written - began
    result.rank()
    write()


def _note(cell: Cell, seed: int, event: Event) -> None:
    if event.kind == "failed":
        cell.failed[seed] = event.content["error"]
    else:
        cell.valid[seed], cell.best_epochs[seed] = event.content["valid"], event.content["best_epoch"]


class Progress:
    """A line for each run that ends, with the time that is left. Runs that were finished before cost no time."""

    def __init__(self, runs: int, jobs: int, say: Callable[[str], None]):
        self.runs, self.jobs, self.say = runs, jobs, say
        self.done, self.trained, self.began = 0, 0, time.monotonic()

    def ended(self, event: Event, metric: str) -> None:
        self.done += 1
        head = f"[{self.done}/{self.runs}] {event.job.name}: "
        if event.kind == "failed":
            self.trained += 1
            self.say(f"{head}failed: {event.content['error']}{self._left()}")
            return
        if event.content.get("before"):
            self.say(f"{head}finished before")
            return
        self.trained += 1
        if event.content["pruned"]:
            self.say(f"{head}pruned{self._left()}")
            return
        value, wall = event.content["valid"].get(metric), event.content["wall_s"]
        shown = "none" if value is None else f"{value:.4f}"
        self.say(f"{head}valid {metric} {shown} at epoch {event.content['best_epoch']}, {wall:.0f} s{self._left()}")

    def _left(self) -> str:
        left = (time.monotonic() - self.began) / max(self.trained, 1) * (self.runs - self.done)
        if self.done == self.runs:
            return ""
        return f"; about {left:.0f} s left" if left < 100 else f"; about {left / 60:.0f} min left"


def to_stderr(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


def known_task(config: Config, task: str | None) -> str:
    """The name of the task, which has to be that of the settings.

    Raises:
        ConfigError: it is not, or a task of one's own is only known to this process.
    """
    from engine.task import TASKS, load_task

    if task is None:
        if config.task not in TASKS:
            raise ConfigError(
                "task", f"{config.task!r}, which only this process knows", "module:attribute",
                "Give task=\"module:attribute\", so that every process can import it.",
            )  # fmt: skip
        return config.task
    name = load_task(task).name
    if name != config.task:
        raise ConfigError("task", f"settings of the task {config.task}", name, "Load the settings for that task.")
    return name


def write_results(result: SweepResult, base: Config) -> None:
    """Write sweep.json, sweep.csv and report.html."""
    from engine.sweeps.files import write_sweep

    write_sweep(result, base)


def require_all(result: SweepResult) -> None:
    """Raise the error of the failed runs, if there are any."""
    if failures := result.failures:
        name, seed, error = failures[0]
        raise EngineError(
            str(result.out), f"{len(failures)} of {len(result.cells) * len(result.seeds)} runs failed; {name} seed "
            f"{seed}: {error}", "no failed run", "Remove the cause and give the same command again.",
        )  # fmt: skip
