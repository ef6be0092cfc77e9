"""The Optuna study behind a tuning: its storage, its trials, and which of them this folder has to go on with.

A trial's sampler is seeded by the study's seed and the trial's number alone. So a tuning of one job that was
interrupted draws what one that was not would have drawn.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, DataError, EngineError
from engine.sweeps.plan import require_same
from engine.sweeps.space import Choice, Range, Space

DATABASE = "study.db"
OWNER, PLAN, PROBLEM, EPOCHS, BEST_EPOCH = "owner", "plan", "problem", "epochs", "best_epoch"
PRUNERS = ("median", "none")
HEARTBEAT_S, GRACE_S = 60, 1800
"""In a storage that several machines use: a trial without a sign of life for so long is given up."""


@dataclass
class Trial:
    """A trial of a study, as tables show it.

    Attributes:
        state: "finished", "pruned", "failed", "running", or "lost" (its machine gave no sign of life).
        value: the valid metric at the best epoch, of a finished trial.
        epochs: {epoch: valid metric}.
        here: whether its run folder is in this tuning's folder.
    """

    number: int
    state: str
    value: float | None
    values: dict[str, Any]
    epochs: dict[int, float] = field(default_factory=dict)
    problem: str = ""
    here: bool = True


def require_optuna() -> None:
    """Raise a one-line error where Optuna is not installed."""
    try:
        import optuna  # noqa: F401  (whether it can be)
    except ImportError:
        raise EngineError(
            "engine tune", "no optuna", "the package optuna", 'Install it: pip install "engine[tune]".'
        ) from None


@contextlib.contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """One-line errors for what a storage may do: a wrong URL, a lost connection, a foreign or damaged database.

    Within it Optuna does not warn of features that it calls experimental, nor of an epoch that was reported before the
    tuning was killed.
    """
    import optuna
    import sqlalchemy

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", message="The reported value is ignored")
            yield
    except (
        optuna.exceptions.OptunaError,
        sqlalchemy.exc.SQLAlchemyError,
        ImportError,
        ValueError,
        KeyError,
        TypeError,
    ) as cause:
        text = " ".join(str(cause).split())[:200]
        raise DataError(
            where, f"{type(cause).__name__}: {text}", "a storage of Optuna that can be used", "Check --storage."
        ) from cause


class Study:
    """A study of Optuna, as this folder's tuning uses it.

    Args:
        folder: of the tuning.
        space: what is searched.
        plan: what the study is: another plan in the same study is refused.
        owner: marks the trials of this folder; other machines may have trials in the same storage.
        storage: URL of a database, or the path of a journal file (.log); None: a SQLite file in `folder`.
    """

    def __init__(
        self,
        folder: Path,
        space: Space,
        plan: Mapping[str, Any],
        owner: str,
        seed: int,
        higher_is_better: bool,
        pruner: str,
        jobs: int,
        storage: str | None = None,
        name: str = "engine",
    ):
        import optuna

        self.space, self.owner, self.seed, self.jobs = space, owner, seed, jobs
        self.shared, self.beat = storage is not None, time.monotonic()
        # The URL may hold a password.
        self.where = "--storage" if self.shared else str(folder / DATABASE)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        pruners = {"median": optuna.pruners.MedianPruner(n_warmup_steps=1), "none": optuna.pruners.NopPruner()}
        with storage_errors(self.where):
            self.study = optuna.create_study(
                storage=_storage(folder, storage),
                study_name=name,
                direction="maximize" if higher_is_better else "minimize",
                pruner=pruners[pruner],
                load_if_exists=True,
            )
            self.storage = self.study._storage
            self.id = self.storage.get_study_id_from_name(name)
            if PLAN not in self.study.user_attrs:
                if self.study.get_trials(deepcopy=False):
                    raise ConfigError(
                        self.where, f"a study {name!r} of another program", "a new study, or one of engine tune",
                        "Choose another --study or --storage.",
                    )  # fmt: skip
                self.study.set_user_attr(PLAN, json.dumps(plan))
            kept = json.loads(self.study.user_attrs[PLAN])
        require_same(f"the study in {self.where}", kept, plan)

    # -- trials ------------------------------------------------------------------------------------

    def stopped(self) -> list[Any]:
        """The trials of this folder that were running when it was stopped, to go on with."""
        from optuna.trial import Trial, TrialState

        with storage_errors(self.where):
            running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            own = [Trial(self.study, t._trial_id) for t in running if t.user_attrs.get(OWNER) == self.owner]
            for trial in own:
                self._beat(trial)
            return own

    def new(self, total: int) -> Any:
        """A new trial, or None where `total` trials have ended or are running."""
        from optuna.trial import Trial, TrialState, create_trial

        with storage_errors(self.where):
            self._give_up_lost()
            if sum(trial.state != "lost" for trial in self.trials()) >= total:
                return None
            # The owner is part of the new row: a process killed here leaves no trial that nobody goes on with.
            began = create_trial(state=TrialState.RUNNING, user_attrs={OWNER: self.owner})
            trial = Trial(self.study, self.storage.create_new_trial(self.id, template_trial=began))
            self._beat(trial)
            return trial

    def values(self, trial: Any) -> dict[str, Any]:
        """{dotted key: value} for a trial. What it was given before stays."""
        from optuna.samplers import TPESampler

        with storage_errors(self.where):
            seed = (self.seed * 1_000_003 + trial.number) % 2**32
            self.study.sampler = TPESampler(seed=seed, constant_liar=self.jobs > 1)
            return {name: self._suggest(trial, name) for name in self.space}

    def _suggest(self, trial: Any, name: str) -> Any:
        one = self.space[name]
        if not isinstance(one, Range):
            return one.values[one.labels.index(trial.suggest_categorical(name, one.labels))]
        if one.whole:
            step = 1 if one.step is None else int(one.step)
            return trial.suggest_int(name, int(one.low), int(one.high), step=step, log=one.log)
        return trial.suggest_float(name, one.low, one.high, step=one.step, log=one.log)

    def report(self, trial: Any, epoch: int, value: float, last: bool) -> bool:
        """Note an epoch's valid metric. Whether the run goes on: a trial that is worse than the median is pruned."""
        with storage_errors(self.where):
            trial.report(value, epoch)
            return last or not trial.should_prune()

    def finish(self, trial: Any, value: float, best_epoch: int) -> None:
        from optuna.trial import TrialState

        if value != value:
            return self.fail(trial, "the valid metric is NaN")
        with storage_errors(self.where):
            trial.set_user_attr(BEST_EPOCH, best_epoch)
            self.study.tell(trial, value, state=TrialState.COMPLETE)
        return None

    def prune(self, trial: Any) -> None:
        from optuna.trial import TrialState

        with storage_errors(self.where):
            self.study.tell(trial, state=TrialState.PRUNED)

    def fail(self, trial: Any, problem: str) -> None:
        from optuna.trial import TrialState

        with storage_errors(self.where):
            trial.set_user_attr(PROBLEM, problem[:2000])
            self.study.tell(trial, state=TrialState.FAIL)

    def trials(self) -> list[Trial]:
        """All trials of the study, in order."""
        with storage_errors(self.where):
            return [self._shown(trial) for trial in self.study.get_trials(deepcopy=False)]

    def best(self) -> Trial | None:
        """The finished trial with the best valid metric; of equal ones the first."""
        finished = [t for t in self.trials() if t.state == "finished" and t.value is not None]
        sign = -1 if self.study.direction.name == "MAXIMIZE" else 1
        return min(finished, key=lambda t: (sign * (t.value or 0.0), t.number), default=None)

    def _shown(self, trial: Any) -> Trial:
        state = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}.get(trial.state.name, "running")
        problem = str(trial.user_attrs.get(PROBLEM, ""))
        if state == "failed" and not problem:
            state = "lost"
        values = {}
        for name, one in self.space.items():
            value = trial.params.get(name)
            if isinstance(one, Range) and type(value) in (int, float):
                values[name] = value
            elif isinstance(one, Choice) and value in one.labels:
                values[name] = one.values[one.labels.index(value)]
        if state == "finished" and len(values) < len(self.space):
            state, problem = "failed", "values that are not of the search space"
        value = trial.value if state == "finished" else None
        here = trial.user_attrs.get(OWNER) == self.owner
        return Trial(trial.number, state, value, values, dict(trial.intermediate_values), problem, here)

    # -- several machines --------------------------------------------------------------------------

    def tick(self, running: list[Any]) -> None:
        """Give a sign of life for the running trials, once a minute."""
        if self.shared and time.monotonic() - self.beat > HEARTBEAT_S:
            self.beat = time.monotonic()
            with storage_errors(self.where):
                for trial in running:
                    self._beat(trial)

    def others(self) -> bool:
        """Whether other machines still have trials."""
        if not self.shared:
            return False
        with storage_errors(self.where):
            self._give_up_lost()
        return any(trial.state == "running" and not trial.here for trial in self.trials())

    def _beat(self, trial: Any) -> None:
        if hasattr(self.storage, "record_heartbeat"):
            self.storage.record_heartbeat(trial._trial_id)

    def _give_up_lost(self) -> None:
        """Mark the trials of machines that have not given a sign of life for long."""
        if self.shared and hasattr(self.storage, "record_heartbeat"):
            import optuna

            optuna.storages.fail_stale_trials(self.study)


def _storage(folder: Path, storage: str | None) -> Any:
    import optuna

    if storage is None:
        if "?" in str(folder.resolve()):  # which ends the path in a URL
            raise ConfigError("--out", str(folder), "a path without ?", "Choose another --out.")
        return optuna.storages.RDBStorage(f"sqlite:///{(folder / DATABASE).resolve()}")
    if storage.endswith(".log"):
        from optuna.storages.journal import JournalFileBackend

        return optuna.storages.JournalStorage(JournalFileBackend(storage))
    from sqlalchemy.engine import make_url

    url = make_url(storage)
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise ConfigError(
            "--storage", "SQLite in memory, which ends with the command", "a database that stays",
            "Write sqlite:///PATH, or leave --storage out.",
        )  # fmt: skip
    return optuna.storages.RDBStorage(storage, heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S)


def new_owner() -> str:
    """A mark that no other folder has."""
    return secrets.token_hex(8)
