"""MIMRL's own commands: import a checkpoint or a command line of the published code."""

from __future__ import annotations

import argparse

from engine.cli.command import Command, given_path
from engine.cli.folders import check_out
from engine.cli.printing import print_notes, say
from engine.files import require_made_here
from engine.run_folder import require_no_run_file


def _import(a: argparse.Namespace) -> None:
    from engine.mimrl.checkpoints import import_checkpoint

    check_out(a.out, resume=False)
    notes = import_checkpoint(
        a.checkpoint, a.out, command=a.reference_command, config=a.config, text_encoder=a.text_encoder
    )
    print_notes(notes)
    say(f"run: {a.out}\nnext: engine evaluate --run {a.out} --data PATH")


def _import_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("checkpoint", metavar="REF.pth.tar", type=given_path, help="the published code's checkpoint")
    group = p.add_mutually_exclusive_group()
    group.add_argument("--command", metavar="TEXT", dest="reference_command", help="'python Main.py --task_name ...'")
    group.add_argument("--config", metavar="FILE", help="a YAML file instead of --command")
    p.add_argument("--text-encoder", metavar="NAME", help="the text encoder it was trained with: a path or a name")
    p.add_argument("--out", metavar="DIR", type=given_path, required=True, help="the run folder to write")


def _import_command(a: argparse.Namespace) -> None:
    from engine.mimrl.commands import import_command

    if a.out is not None:
        require_no_run_file(a.out)
        require_made_here(a.out, b"preset:", "settings")
    config, notes = import_command(a.text)
    print_notes(notes)
    if a.out is None:
        print(config.to_yaml(), end="")  # YAML escapes what does not print
    else:
        config.save(a.out)
        say(f"configuration: {a.out}\nnext: engine train --config {a.out} --data PATH --out DIR")


def _import_command_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("text", metavar="'python Main.py ...'", help="the command line, in quotes")
    p.add_argument("--out", metavar="FILE", type=given_path, help="write the YAML to a file instead of printing it")


COMMANDS = (
    Command(
        "import",
        _import,
        "turn a checkpoint of the published MIMRL code into a run folder",
        _import_arguments,
        """\
        Load a REF.pth.tar of the published MIMRL code and write a run folder that evaluate and predict accept.
        The checkpoint does not say everything about how its model was built: give the command line it was trained
        with, or a YAML file (engine import-command makes one). Without them, sizes come from the checkpoint and the
        rest from the published defaults. Notes on stderr say what was assumed.""",
    ),
    Command(
        "import-command",
        _import_command,
        "turn a command line of the published MIMRL code into YAML",
        _import_command_arguments,
        """\
        Map every flag of a command line of the published MIMRL code to a setting, or name it as unsupported, and
        print the YAML. Notes go to stderr. Then: engine train --config FILE --data PATH --out DIR""",
    ),
)
