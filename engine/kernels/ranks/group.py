"""Which ranks take part in an operation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from engine.errors import ConfigError, EstimatorError
from engine.kernels.gradients import transformed

GATHERS = (False, True, "ring")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a process group.

    Attributes:
        group: the process group.
        rank: this process's number in it.
        size: the number of ranks, at least 2.
        ring: whether keys travel around instead of being gathered.
    """

    group: Any
    rank: int
    size: int
    ring: bool = False

    def peer(self, step: int) -> int:
        """The global rank of the process `step` places after this one."""
        return dist.get_global_rank(self.group, (self.rank + step) % self.size)


def find_ranks(where: str, gather: bool | str, group: Any = None) -> Ranks | None:
    """The ranks that `gather` and `group` name; None if this process computes alone.

    Args:
        where: the operation, for errors.
        gather: False, True or "ring".
        group: a process group; None for the default one.

    Raises:
        ConfigError: another `gather`; a group without `gather`, or one that this process is no member of; WORLD_SIZE
            above 1 without a process group.
    """
    if gather is False:
        if group is not None:
            raise ConfigError(where, "a group and gather=False", "gather=True with a group", "Set gather=True.")
        return None
    if gather not in GATHERS:
        raise ConfigError(where, f"gather = {gather!r}", "False, True or 'ring'", "Choose one of these.")
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None or (not torch.compiler.is_compiling() and _world_size() != 1):
            raise ConfigError(
                f"{where} with gather={gather!r}", f"WORLD_SIZE={os.environ.get('WORLD_SIZE', '1')}, no process group",
                "a process group", "Call torch.distributed.init_process_group first, or set gather=False.",
            )  # fmt: skip
        return None
    group = dist.group.WORLD if group is None else group
    rank = dist.get_rank(group)
    if rank < 0:
        raise ConfigError(where, "a group without this process", "one that it is in", "Call it in members alone.")
    size = dist.get_world_size(group)
    if size > 1 and transformed():
        raise ConfigError(
            where, "a transform of torch.func, or forward-mode AD", "a plain call", "Set gather=False within it."
        )
    return Ranks(group, rank, size, gather == "ring") if size > 1 else None


def _world_size() -> int:
    """WORLD_SIZE as torchrun sets it; 0 where it is no number, so that nobody takes it for one process."""
    text = os.environ.get("WORLD_SIZE", "1").strip() or "1"
    return int(text) if text.isdecimal() else 0


def ranks_of_loss(where: str, gather: bool | str, group: Any, local_loss: bool) -> Ranks | None:
    """`find_ranks` of a loss that knows `local_loss`.

    Raises:
        EstimatorError: `local_loss` without `gather`.
        ConfigError: as for `find_ranks`.
    """
    if local_loss and gather is False:
        raise EstimatorError(f"{where}(local_loss=True)", "gather=False", "gather=True or 'ring'", "Set gather.")
    return find_ranks(where, gather, group)
