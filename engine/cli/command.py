"""What a command is, and the options that several commands have."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.files import user_path
from engine.task import DEFAULT
from engine.vocabulary import SPLITS


@dataclass(frozen=True)
class Command:
    """One command of the command line, `engine NAME ...`.

    Attributes:
        run: called with the parsed arguments, and with the `key=value` words where it takes settings.
        help: one line for the list of commands.
        arguments: adds the command's own arguments.
        text: several lines for the command's own help; by default `help`.
        epilog: what follows the options in the command's own help, made when it is shown.
        takes_settings: whether `key=value` words may follow.
    """

    name: str
    run: Callable[..., None]
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    text: str = ""
    epilog: Callable[[], str] | None = None
    takes_settings: bool = False


def given_path(text: str) -> Path:
    """A path from the command line, with ~ expanded. An empty one would be the current folder.

    Raises:
        ArgumentTypeError: it is empty, as of a variable of the shell that is not set.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path; is a variable of the shell not set?")
    return user_path(text)


def task_argument(p: argparse.ArgumentParser) -> None:
    """Add --task."""
    p.add_argument(
        "--task", metavar="NAME", help=f"what is trained: a name, or a task of your own as module:attribute ({DEFAULT})"
    )


def config_arguments(p: argparse.ArgumentParser) -> None:
    """Add the options that choose settings: --task, --preset, --config."""
    task_argument(p)
    group = p.add_mutually_exclusive_group()
    group.add_argument("--preset", metavar="NAME", help="a packaged recipe, see `engine train --help`")
    group.add_argument("--config", metavar="FILE", help="a YAML file; `preset: NAME` in it starts from that preset")


def run_folder_argument(p: argparse.ArgumentParser) -> None:
    """Add --run, and --run-folder for torchrun, which has a --run of its own."""
    p.add_argument(
        "--run", "--run-folder", metavar="DIR", type=given_path, required=True, dest="run_folder",
        help="a run folder; under torchrun, which has a --run of its own, write --run-folder",
    )  # fmt: skip


def run_arguments(p: argparse.ArgumentParser) -> None:
    """Add the options of a command that applies a run's best model to data."""
    p.add_argument("--task", metavar="MODULE:ATTRIBUTE", help="where the run's task is, if it is one of your own")
    run_folder_argument(p)
    p.add_argument("--data", metavar="PATH", type=given_path, required=True, help="feature file or folder, or a store")
    p.add_argument("--split", choices=SPLITS, help="which split (test, or the only one that the data has)")
    p.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:1 or mps (auto)")


def named_task(a: argparse.Namespace) -> str | None:
    """The name of the task that --task gives. The module of one's own may lie in the current folder.

    Raises:
        ConfigError: there is no such task.
    """
    if a.task is None:
        return None
    from engine.task import load_task

    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return load_task(a.task).name


def chosen_config(a: argparse.Namespace, settings: list[str], resumed: object = None) -> object:
    """The configuration that --preset, --config, --task and the `key=value` words choose.

    Args:
        resumed: settings file of a run that is resumed, for when no option names another.
    """
    from engine.config import load_config, presets

    task = named_task(a)
    source = a.preset or (user_path(a.config) if a.config is not None else resumed)
    if source is None and task is None:
        names = ", ".join(preset.name for preset in presets())
        raise ConfigError(
            f"engine {a.command}",
            "none of --preset, --config and --task",
            f"a preset ({names}), a YAML file or a task",
            "Add --preset NAME or --config FILE.",
        )
    config = load_config(source, settings, task)
    if task not in (None, config.task):
        raise ConfigError(f"--task {a.task}", f"settings of the task {config.task}", "one task", "Drop one of them.")
    return config


def set_data(config: Any, data: str | None, settings: list[str]) -> None:
    """Put the path of --data into the configuration.

    Raises:
        ConfigError: the `key=value` words name a path, too.
    """
    if data and any(setting.partition("=")[0].strip() == "data.path" for setting in settings):
        raise ConfigError("--data", "data.path= beside it", "one of the two", "Drop one.")
    if data:
        config.data.path = data
