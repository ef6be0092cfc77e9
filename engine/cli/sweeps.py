"""Commands that train many runs: sweep, tune."""

from __future__ import annotations

import argparse
from typing import Any

from engine.cli.command import Command, chosen_config, config_arguments, given_path, set_data
from engine.cli.printing import console, say
from engine.cli.training import split_seeds
from engine.errors import ConfigError


def _common(a: argparse.Namespace, fixed: list[str]) -> Any:
    config: Any = chosen_config(a, fixed)
    set_data(config, a.data, fixed)
    return config


def _seeds_of(text: Any, where: str) -> list[int]:
    """The seeds of `0-4`, `0,3` or a list of integers."""
    if isinstance(text, list) and all(type(seed) is int for seed in text):
        return text
    if isinstance(text, (str, int)) and not isinstance(text, bool):
        seeds, _ = split_seeds([f"seeds={text}"])
        return seeds or []
    raise ConfigError(where, f"{text!r}"[:60], "a range or a list such as 0-4 or [0, 3]", "Write it that way.")


def _sweep(a: argparse.Namespace, words: list[str]) -> None:
    from engine.sweeps.settings import read_file, read_words, split_list
    from engine.sweeps.sweeping import require_all, sweep

    seeds, words = split_seeds(words)
    several = [word for word in words if len(split_list(word.partition("=")[2])) > 1]
    config = _common(a, [word for word in words if word not in several])
    content = read_file(a.space) if a.space else {}
    if unknown := [str(key) for key in content if key not in ("seeds", "grid", "settings")]:
        raise ConfigError(str(a.space), f"the key {unknown[0]!r}", "seeds, grid or settings", "Remove or rename it.")
    for key in ("grid", "settings"):
        if not isinstance(content.get(key, {}), dict):
            raise ConfigError(f"{a.space}, {key}", f"{content[key]!r}"[:60], "a mapping", "See engine sweep --help.")
    if "seeds" in content and seeds is not None:
        raise ConfigError("seeds", f"seeds in {a.space}, too", "one of the two", "Leave one out.")
    if "seeds" in content:
        seeds = _seeds_of(content["seeds"], f"{a.space}, seeds")
    grid = content.get("grid", {})
    given = read_words(several, config.task)
    if twice := grid.keys() & given.keys():
        raise ConfigError(min(twice), f"values in {a.space}, too", "one of the two", "Drop one.")
    result = sweep(config, a.out, grid | given, seeds, a.jobs, content.get("settings"), a.task)
    _print_sweep(result)
    say(f"report: {result.out / 'report.html'}")
    require_all(result)


def _print_sweep(result: Any) -> None:
    """Mean ± std over the seeds on valid, one row per setting, and what was chosen."""
    from rich.markup import escape
    from rich.table import Table

    from engine.sweeps.files import mean_std

    metric = result.metric
    table = Table("setting", "runs", f"valid {metric}")
    table.columns[2].justify = "right"
    for cell in result.cells:
        runs = f"{len(cell.valid)}" + (f", {len(cell.failed)} failed" if cell.failed else "")
        table.add_row(escape(cell.setting.name), runs, mean_std([one.get(metric) for one in cell.valid.values()]))
    console().print(table)
    if result.chosen is not None:
        test = mean_std([result.chosen.test[seed].get(metric) for seed in result.seeds])
        say(f"chosen on valid: {result.chosen.setting.name}, test {metric} {test}")


def _sweep_arguments(p: argparse.ArgumentParser) -> None:
    config_arguments(p)
    p.add_argument("--data", metavar="PATH", help="feature file or folder, or a store made by engine convert")
    p.add_argument("--out", metavar="DIR", type=given_path, required=True, help="folder of the sweep")
    p.add_argument("--space", metavar="FILE", type=given_path, help="YAML with seeds, grid and named settings")
    p.add_argument("--jobs", metavar="N", type=int, help="runs at a time (one per GPU, or as many as the cores allow)")


def _tune(a: argparse.Namespace, words: list[str]) -> None:
    from engine.sweeps.settings import read_file
    from engine.sweeps.space import is_searched, read_space, read_space_words
    from engine.sweeps.study import require_optuna
    from engine.sweeps.sweeping import require_all
    from engine.sweeps.tuning import tune

    require_optuna()
    searched = [word for word in words if is_searched(word)]
    config = _common(a, [word for word in words if word not in searched])
    space = read_space(read_file(a.space), config, str(a.space)) if a.space else {}
    given = read_space_words(searched, config)
    if twice := space.keys() & given.keys():
        raise ConfigError(min(twice), f"values in {a.space}, too", "one of the two", "Drop one.")
    if not space | given:
        raise ConfigError(
            "engine tune", "nothing to search", "--space FILE, or ranges such as train.lr=1e-4..1e-2:log", "Add one."
        )
    plain = {key: one.plain() for key, one in (space | given).items()}
    seeds = None if a.seeds is None else _seeds_of(a.seeds, "--seeds")
    result = tune(config, a.out, plain, a.trials, seeds, a.jobs, a.storage, a.study, a.pruner, a.task)
    counts = ", ".join(
        f"{sum(trial.state == state for trial in result.trials)} {state}" for state in ("finished", "pruned", "failed")
    )
    say(f"{len(result.trials)} trials: {counts}")
    if result.best is not None:
        from engine.sweeps.settings import value_text

        values = " ".join(f"{key}={value_text(value)}" for key, value in result.best.values.items())
        say(f"best on valid: trial {result.best.number}, {result.metric} {result.best.value:.4f}: {values}")
        say(f"settings: {result.out / 'best.yaml'}")
    if result.seeds is not None:
        _print_sweep(result.seeds)
    say(f"report: {result.out / 'report.html'}")
    if result.seeds is not None:
        require_all(result.seeds)


def _tune_arguments(p: argparse.ArgumentParser) -> None:
    config_arguments(p)
    p.add_argument("--data", metavar="PATH", help="feature file or folder, or a store made by engine convert")
    p.add_argument("--out", metavar="DIR", type=given_path, required=True, help="folder of the tuning")
    p.add_argument(
        "--space", metavar="FILE", type=given_path, help="YAML: {train.lr: {low: 1e-4, high: 1e-2, log: true}}"
    )
    p.add_argument("--trials", metavar="N", type=int, default=30, help="in all, earlier starts included (30)")
    p.add_argument(
        "--jobs", metavar="N", type=int, help="trials at a time (one per GPU, or as many as the cores allow)"
    )
    p.add_argument("--seeds", metavar="0-4", help="then train the best settings with these seeds")
    p.add_argument("--pruner", choices=("median", "none"), default="median", help="which trials stop early (median)")
    p.add_argument(
        "--storage", metavar="URL", help="database that several machines share, or a journal file.log (SQLite in DIR)"
    )
    p.add_argument("--study", metavar="NAME", default="engine", help="name of the study in the storage (engine)")


COMMANDS = (
    Command(
        "sweep",
        _sweep,
        "train every combination of settings with every seed, and compare them in one report",
        _sweep_arguments,
        """\
        Train settings x seeds, several runs at a time, and rank the settings on valid. A setting with several values,
        key=1,2,3, is part of the grid; lists as values stand in brackets. seeds=0-4 (or 0,3) gives the seeds.
        The same command goes on with an interrupted sweep: finished runs stay. A run that fails is named in the table,
        the others go on, and the exit code is 2. DIR gets runs/, logs/, report.html, sweep.csv and sweep.json.""",
        takes_settings=True,
    ),
    Command(
        "tune",
        _tune,
        "search for the best settings with Optuna, on valid alone",
        _tune_arguments,
        """\
        Search for the settings with the best valid metric: ranges key=low..high, key=low..high:log and
        key=low..high:step=S, and choices key=a,b,c, on the command line or in a YAML file (--space). The same command
        goes on with an interrupted tuning. DIR gets trials/, logs/, study.db, best.yaml, report.html, tune.csv and
        tune.json. Needs Optuna: pip install "engine[tune]".""",
        takes_settings=True,
    ),
)
