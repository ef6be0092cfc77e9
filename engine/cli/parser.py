"""The parser of the command line, made of the commands that the engine and its tasks declare."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from typing import NoReturn

from engine import __version__
from engine.cli import data, runs, sweeps, training
from engine.cli.command import Command
from engine.errors import ConfigError, printable
from engine.task import find_task, task_names

DESCRIPTION = "Train multimodal models with mutual information objectives, and see what the information terms do."

EXAMPLES = """\
examples:
  engine demo                                                    generated data, a trained model and a report in minutes
  engine inspect mosi_data_noalign.pkl                           what is in a file, and what is wrong with it
  engine make-data data/try --shape mosi --format mmsa           synthetic files in that layout
  engine train --preset mosi --data data/mosi --out runs/mosi    train on your own files
  engine train --preset mosi --data data/mosi --out runs/paper mode=faithful seeds=0-2
  engine train --task my_model:TASK --data data/mosi --out runs/mine    train a model of your own
  engine sweep --preset mosi --data data/mosi --out runs/sweep seeds=0-4 train.lr=1e-3,5e-4
  engine tune --preset mosi --data data/mosi --out runs/tune train.lr=1e-4..1e-2:log batch_size=16,32
  engine evaluate --run runs/mosi --data data/mosi               metrics of the best model
  engine import-command 'python Main.py --task_name x --dataset mosi_Dec'    a published command line as YAML

`engine COMMAND --help` tells more. Errors are one line on stderr with exit code 2; --debug shows the traceback."""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line like every other problem: one line, exit code 2."""

    make_epilog: Callable[[], str] | None = None

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += ", or --option=VALUE for a value that begins with -,"
        self.exit(2, printable(f"error: {' '.join(message.split())} (`{self.prog} --help` shows how)\n"))

    def format_help(self) -> str:
        if self.make_epilog is not None:  # made only now: it reads presets and settings
            self.epilog = self.make_epilog()
        return super().format_help()


def all_commands() -> list[Command]:
    """The engine's commands, then those of the known tasks."""
    of_tasks = [command for name in task_names() for command in find_task(name).commands()]
    return [*training.COMMANDS, *sweeps.COMMANDS, *runs.COMMANDS, *data.COMMANDS, *of_tasks]


def build_parser() -> argparse.ArgumentParser:
    """The parser of `engine COMMAND ...`."""
    parser = _Parser("engine", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=_help_format)
    parser.add_argument("--version", action="version", version=f"engine {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in all_commands():
        p = commands.add_parser(
            command.name,
            help=command.help,
            description=textwrap.dedent(command.text) or f"{command.help[0].upper()}{command.help[1:]}.",
            formatter_class=_help_format,
            allow_abbrev=False,
        )
        p.make_epilog = command.epilog
        p.add_argument("--debug", action="store_true", help="show the traceback of an error")
        p.set_defaults(run=command.run, parser=p, takes_settings=command.takes_settings)
        command.arguments(p)
    return parser


def split_settings(arguments: argparse.Namespace, rest: list[str]) -> list[str] | None:
    """The `key=value` words of a command that takes settings, else None. Any other leftover word is an error."""
    takes = arguments.takes_settings
    for word in rest:
        if not takes or word.startswith("-") or "=" not in word:
            setting = _setting_of(word) if takes else None
            options = [option for action in arguments.parser._actions for option in action.option_strings]
            raise ConfigError(
                f"engine {arguments.command}",
                f"the argument {word!r}",
                f"the options {', '.join(options)}" + (", or settings such as train.lr=5e-4" if takes else ""),
                f"Write {setting}=VALUE." if setting else f"See engine {arguments.command} --help.",
            )
    return rest if takes else None


def _setting_of(word: str) -> str | None:
    """The setting that somebody meant who wrote an option, as in `--epochs 3`, or a word without a value."""
    from engine.config import keys

    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    if name == "seeds":  # a setting of train and sweep, an option of tune, and no key of a single run
        return name
    meant = [key.name for key in keys() if name in (key.name, key.name.rpartition(".")[2])]
    return meant[0] if len(meant) == 1 else None


def _help_format(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=118)
