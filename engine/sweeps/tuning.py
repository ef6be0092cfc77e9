"""`engine.tune`: a search for the best settings on Optuna, then the best ones with several seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import Config, changed, require_config
from engine.config.seeds import different_seeds
from engine.errors import ConfigError, DataError, EngineError
from engine.files import user_path
from engine.run_folder import BEST, LAST, PREVIOUS, owned
from engine.sweeps import plan as plans
from engine.sweeps.pool import Event, Job, Pool, resources
from engine.sweeps.settings import Setting
from engine.sweeps.space import Space, read_space
from engine.sweeps.study import PRUNERS, Study, Trial, new_owner, require_optuna
from engine.sweeps.sweeping import (
    LOGS,
    Cell,
    Progress,
    SweepResult,
    known_task,
    to_stderr,
    train_all,
)
from engine.task import find_task
from engine.torchrun import require_one_process

TRIALS, BEST_YAML = "trials", "best.yaml"
MOST_TRIALS = 100_000
HOPELESS = 3  # so many trials that fail, and none that does not, end a tuning


@dataclass
class TuneResult:
    """A tuning as far as it came.

    Attributes:
        metric, higher_is_better: what ranks the trials, on valid.
        trials: all of the study, in order.
        best: the finished trial with the best valid metric, None before one has finished.
        config: the settings of the best trial, as best.yaml has them.
        seeds: the best settings with several seeds, None where none were asked for.
    """

    out: Path
    metric: str
    higher_is_better: bool
    space: Space
    trials: list[Trial]
    best: Trial | None = None
    config: Config | None = None
    seeds: SweepResult | None = None

    @property
    def ended(self) -> list[Trial]:
        """The trials that finished, were pruned or failed."""
        return [trial for trial in self.trials if trial.state in ("finished", "pruned", "failed")]


def tune(
    config: Config,
    out: str | Path,
    space: Mapping[str, Any],
    trials: int = 30,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    storage: str | None = None,
    study: str = "engine",
    pruner: str = "median",
    task: str | None = None,
    say: Callable[[str], None] | None = None,
) -> TuneResult:
    """Search for the best settings with Optuna's TPE sampler, and write one report.

    Trials are ranked on valid alone; no test metric is read before the best settings are chosen. The same call goes on
    with an interrupted tuning: trials that were stopped are resumed. With one job on a CPU, it ends as an
    uninterrupted one.

    Args:
        config: the settings that all trials share; `config.data.path` names the data, `config.seed` seeds the sampler.
        out: folder to write: `trials`, `logs`, study.db, best.yaml, report.html, tune.csv, tune.json.
        space: {key: {"low": ..., "high": ..., "log": True or "step": ...} or [choices]}; keys may stand in groups.
        trials: how many in all, those of earlier starts and of other machines included.
        seeds: train the best settings with these seeds afterwards.
        jobs: trials at a time; default: one for each GPU, or as many as the cores allow.
        storage: URL of a database that several machines share, or path of a journal file (.log); default: SQLite in
            `out`. Every machine has an `out` of its own.
        study: name of the study in the storage.
        pruner: "median": a trial is stopped whose best valid metric is worse than the median of earlier trials at that
            epoch; "none".
        task: "module:attribute" of a task of your own, which every process imports.
        say: is given a line for each trial that ends; default: print to standard error.

    Returns:
        The trials; `best` is the one with the best valid metric, and `config` its settings. With `seeds`, the result
        also holds their runs, as `sweep` returns them, under `seeds`.

    Raises:
        EngineError: Optuna is missing, a problem with settings, space, data or storage, or another tuning in `out`.

    Example:
        >>> from engine import load_config
        >>> from engine.loaders.make_data import make_data
        >>> quick = ["data.modalities=audio-vision", "objective.enabled=false", "epochs=1"]
        >>> config = load_config("mosi", [*quick, f"data.path={make_data('data', 'mosi', 40, 'declarelab')}"])
        >>> result = tune(config, "out", {"batch_size": [16, 32]}, trials=2, say=lambda line: None)
        >>> len(result.ended)
        2
    """
    require_one_process("engine.tune")
    require_optuna()
    require_config(config)
    out = user_path(out)
    if type(trials) is not int or not 1 <= trials <= MOST_TRIALS:
        raise ConfigError("trials", str(trials), f"a number from 1 to {MOST_TRIALS}", "Change the number.")
    if pruner not in PRUNERS:
        raise ConfigError("pruner", str(pruner), f"one of {', '.join(PRUNERS)}", "Choose one of these.")
    seeds = None if seeds is None else sorted(different_seeds(seeds))
    name = known_task(config, task)
    saved = plans.saved_plan(out)
    jobs, threads, gpus = resources(config, jobs)
    base = plans.checked_base(config, threads, saved)
    searched = read_space(space, base)
    metric, higher = find_task(name).selection(base.resolve())
    plan: dict[str, Any] = {
        "kind": "tuning",
        "settings": plans.comparable(base),
        "space": {key: one.plain() for key, one in searched.items()},
        "pruner": pruner,
        "metric": metric,
    }
    owner = str(saved["owner"]) if saved is not None and "owner" in saved else new_owner()
    own = {"owner": owner, "storage": "given" if storage is not None else "in this folder", "study": study}
    if saved is not None:
        plans.require_same(str(out), {"study": "engine"} | saved, plan | own)
    plans.open_data_once(base)
    with owned(out):
        shared = plan | {"settings": {k: v for k, v in plan["settings"].items() if k != "threads"}}
        kept = Study(out, searched, shared, owner, base.seed, higher, pruner, jobs, storage, study)
        # After the study: where its storage is refused, the folder is not yet this tuning's.
        plans.begin(out, plan | own)
        search = Search(kept, out, base, TuneResult(out, metric, higher, searched, []), config, say or to_stderr)
        search.run(trials, jobs, gpus, task, wait=seeds is not None)
        if seeds is not None and search.result.config is not None:
            search.train_seeds(seeds, jobs, gpus, task)
    return search.result


def trial_name(number: int) -> str:
    """The folder of a trial.

    >>> trial_name(7)
    'trial-0007'
    """
    return f"trial-{number:04d}"


class Search:
    """The trials of a tuning, one after the other or beside each other."""

    def __init__(
        self, study: Study, out: Path, base: Config, result: TuneResult, given: Config, say: Callable[[str], None]
    ):
        self.study, self.out, self.base, self.result, self.given, self.say = study, out, base, result, given, say
        self.running: dict[str, Any] = {}

    def run(self, total: int, jobs: int, gpus: Sequence[str], task: str | None, wait: bool) -> None:
        """Train until `total` trials have ended. `wait`: for those of other machines, too."""
        stopped = self.study.stopped()
        self._write()
        progress = Progress(total, jobs, self.say)
        progress.done = len(self.result.ended)
        if progress.done or stopped:
            self.say(f"{progress.done} trials ended before, {len(stopped)} to go on with")
        with Pool(jobs, task, gpus) as pool:
            while True:
                while pool.free and (trial := stopped.pop(0) if stopped else self.study.new(total)) is not None:
                    self._start(pool, trial, progress)
                if not pool.busy:
                    if wait and self.study.others():
                        time.sleep(5.0)
                        continue
                    break
                for event in pool.events(timeout=10.0):
                    self._handle(pool, event, progress)
                self.study.tick(list(self.running.values()))
        self._write()

    def _start(self, pool: Pool, trial: Any, progress: Progress) -> None:
        values, name = self.study.values(trial), trial_name(trial.number)
        folder, log = self.out / TRIALS / name, self.out / LOGS / f"{name}.txt"
        self.running[name] = trial
        try:
            job = Job(name, folder, changed(self.base, values), log)
        except ConfigError as problem:  # settings that contradict each other
            job = Job(name, folder, self.base, log)
            self._ended(Event(job, "failed", {"error": str(problem)}), progress)
            return
        pool.start(job)

    def _handle(self, pool: Pool, event: Event, progress: Progress) -> None:
        if event.kind != "epoch":
            self._ended(event, progress)
            return
        content = event.content
        trial = self.running[event.job.name]
        pool.answer(event.job, self.study.report(trial, content["epoch"], content["value"], content["last"]))

    def _ended(self, event: Event, progress: Progress) -> None:
        trial, content = self.running.pop(event.job.name), event.content
        if event.kind == "failed":
            self.study.fail(trial, content["error"])
        elif content["pruned"]:
            self.study.prune(trial)
        else:
            value = content["valid"][self.result.metric]
            self.study.finish(trial, float("nan") if value is None else value, content["best_epoch"])
        progress.ended(event, self.result.metric)
        self._write()
        self._drop_weights()
        ended = self.result.ended
        if len(ended) >= HOPELESS and all(one.state == "failed" for one in ended):
            raise EngineError(
                str(self.out), f"{len(ended)} trials that failed, and none that did not: {ended[-1].problem}",
                "trials that finish", "Remove the cause, and begin in another folder.",
            )  # fmt: skip

    def _write(self) -> None:
        """Read the study, and write best.yaml, tables and report."""
        from engine.sweeps.files import write_tuning

        result = self.result
        result.trials, result.best = self.study.trials(), self.study.best()
        if result.best is not None:
            try:
                result.config = changed(self.given, result.best.values)
            except ConfigError as problem:
                raise DataError(
                    self.study.where, str(problem), "settings that fit each other", "Change the space."
                ) from None
            result.config.data.path = self.base.data.path
            result.config.save(self.out / BEST_YAML)
        write_tuning(result, self.base)

    def _drop_weights(self) -> None:
        """Remove the checkpoints that nothing needs any more: a trial of MiniLM has 600 MB of them.

        The best trial keeps its best model. Settings, history, metrics and predictions stay.
        """
        for trial in self.result.ended:
            if not trial.here:
                continue
            best = self.result.best is not None and trial.number == self.result.best.number
            for name in (PREVIOUS, LAST) if best else (BEST, PREVIOUS, LAST):
                (self.out / TRIALS / trial_name(trial.number) / name).unlink(missing_ok=True)

    def train_seeds(self, seeds: list[int], jobs: int, gpus: Sequence[str], task: str | None) -> None:
        """Train the best settings with several seeds."""
        best, result = self.result.best, self.result
        assert best is not None
        setting = Setting(f"best-{trial_name(best.number)}", best.values, changed(self.base, best.values))
        result.seeds = SweepResult(self.out, result.metric, result.higher_is_better, seeds, [Cell(setting)])
        self.say(f"the best settings ({trial_name(best.number)}) with {len(seeds)} seeds")
        train_all(result.seeds, jobs, gpus, task, self.say, self._write)
