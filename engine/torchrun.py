"""What torchrun tells the processes that it starts. It needs no process group, and no torch."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from engine.errors import ConfigError

JOB = ".job"
"""In the run folder of a job of torchrun that has not ended."""
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def torchrun_shard() -> tuple[int, int]:
    """(rank, world size) as torchrun sets them in the environment; (0, 1) outside of torchrun.

    Raises:
        ConfigError: RANK or WORLD_SIZE is not a number, or RANK is not below WORLD_SIZE.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        raise ConfigError(
            "environment", f"RANK={rank} and WORLD_SIZE={world}", "numbers with RANK < WORLD_SIZE",
            "Start with torchrun.",
        )  # fmt: skip
    return int(rank), int(world)


def require_one_process(what: str) -> None:
    """Refuse to do on every rank what starts processes of its own.

    Raises:
        ConfigError: torchrun has started several processes.
    """
    size = torchrun_shard()[1]
    if size > 1:
        raise ConfigError(
            what, f"WORLD_SIZE={size}: it would run on every rank", "one process: it starts its own",
            "Start it without torchrun.",
        )  # fmt: skip


@contextlib.contextmanager
def restartable(folder: Path) -> Iterator[None]:
    """Mark a folder as written by this job of torchrun while the block runs. The mark stays if it fails."""
    mark = folder / JOB
    if "TORCHELASTIC_RUN_ID" in os.environ:
        mark.write_text(_job(), encoding="utf-8")
    yield
    mark.unlink(missing_ok=True)


def restarted(folder: Path) -> bool:
    """Whether torchrun has restarted the job that was writing into a folder (`--max-restarts`)."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        return count.isdigit() and int(count) > 0 and (folder / JOB).read_text(encoding="utf-8") == _job()
    except (OSError, UnicodeDecodeError):
        return False


def _job() -> str:
    """What names a job of torchrun over its restarts: its id, and the process of torchrun that started this one."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {socket.gethostname()} {os.getppid()}"
