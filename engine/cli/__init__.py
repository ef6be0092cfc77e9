"""The `engine` command: a thin layer over the Python API.

`parser` collects the commands, which `training`, `sweeps`, `runs`, `data` and the tasks declare. `process` deals with
signals, closed streams and errors of the system, and `printing` with tables.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence

from engine.cli.folders import what_is_kept
from engine.cli.parser import build_parser, split_settings
from engine.cli.printing import say
from engine.cli.process import Stopped, as_engine_error, standing_streams, stop_signals
from engine.errors import EngineError, printable
from engine.torchrun import VARIABLES, torchrun_shard

__all__ = ["main"]

SAYING_S = 1.0
"""Seconds that a rank leaves another one to say what happened to both: torchrun ends all ranks when one has ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a problem that the user can solve, 130 when interrupted.

    SIGTERM and SIGHUP end a command as Ctrl-C does, with exit code 143 and 129.

    >>> main(["config", "--preset", "no-such-preset"])
    2
    """
    began = time.perf_counter()
    arguments, rest = build_parser().parse_known_args(argv)
    arguments.began = began
    with standing_streams(survive_readers=arguments.command in ("train", "demo", "sweep", "tune")):
        return _run(arguments, rest)


def _run(arguments: argparse.Namespace, rest: list[str]) -> int:
    formatwarning = warnings.formatwarning
    try:
        if not arguments.debug:
            warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(' '.join(str(message).split()))}\n"
        _require_current_folder()
        settings = split_settings(arguments, rest)
        if not _has_work(arguments.command):
            return 0
        with stop_signals():
            arguments.run(arguments, settings) if settings is not None else arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        by = f" by {signal.Signals(number).name}" if isinstance(stop, Stopped) else ""
        with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal
            if os.environ.get("RANK", "0") == "0":  # of several processes one says it
                say(f"interrupted{by}{what_is_kept(arguments, rest)}", file=sys.stderr)
        return 128 + number
    except BrokenPipeError:
        # Whoever read our output has gone (`engine config | head`). Python would complain once more at exit.
        sys.stdout = None
        return 0
    except (EngineError, OSError, MemoryError, Warning) as cause:
        if arguments.debug:
            raise
        of_another = type(cause).__name__ == "OtherRankFailed" and getattr(cause, "where", "") != "another rank"
        if of_another and os.environ.get("RANK", "0") != "0":
            return 2  # that rank and rank 0 have said it
        if _said_by_another(cause):
            time.sleep(SAYING_S)
            return 2
        say(f"error: {as_engine_error(cause)}", file=sys.stderr)
        return 2
    except Exception as cause:
        if arguments.debug or not _said_by_another(cause):
            raise
        time.sleep(SAYING_S)
        return 1
    finally:
        warnings.formatwarning = formatwarning
    return 0


def _require_current_folder() -> None:
    """Check that the current folder exists. Where it was removed, torch's libraries end the process without a message.

    Raises:
        EngineError: it was removed, or this user may not read the folders above it.
    """
    try:
        os.getcwd()
    except OSError as cause:
        raise EngineError(
            "current folder", cause.strerror or str(cause), "a folder that exists", "Change to another folder with cd."
        ) from cause


def _said_by_another(cause: Exception) -> bool:
    """Whether another process that torchrun started has shown the same error, so that it is shown once."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or "MASTER_ADDR" not in os.environ:
        return False
    from engine.process_group import said_by_another

    return said_by_another(cause)


def _has_work(command: str) -> bool:
    """Whether this process runs a command. Under torchrun only `train` uses all ranks, others use rank 0 alone."""
    rank, size = torchrun_shard()
    if command == "train" or size == 1:
        return True
    if rank == 0:
        warnings.warn(
            f"engine {command} runs in one process: the other {size - 1} that torchrun started end", stacklevel=2
        )
        for name in VARIABLES:
            os.environ.pop(name, None)
    return rank == 0
