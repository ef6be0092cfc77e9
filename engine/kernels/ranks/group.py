"""Which ranks take part in an operation, and what they must agree on before it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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


def agree(
    where: str,
    ranks: Ranks,
    device: torch.device,
    rows: Mapping[str, int],
    same: Mapping[str, int],
    empty: bool = False,
) -> dict[str, list[int]]:
    """Exchange numbers, one collective. All ranks raise the same error, so that none waits for another.

    Args:
        where: the operation, for errors.
        ranks: the ranks.
        device: where the tensors of the operation are.
        rows: numbers that may differ between ranks, by name.
        same: numbers that may not.
        empty: whether `rows` may be 0.

    Returns:
        The `rows` of all ranks, rank 0 first, by name.

    Raises:
        EstimatorError: a rank without rows, or ranks that differ.
        ConfigError: a CUDA graph is being captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            where, "a CUDA graph being captured", "a plain call: the host reads the ranks' numbers of rows",
            "Set train.graphs=off, or gather=False.",
        )  # fmt: skip
    own = torch.tensor([*rows.values(), *same.values()], device=device)
    gathered = [torch.empty_like(own) for _ in range(ranks.size)]
    dist.all_gather(gathered, own, group=ranks.group)
    table = torch.stack(gathered).tolist()
    for place, name in enumerate((*rows, *same)):
        values = [row[place] for row in table]
        if name in rows and 0 in values and not empty:
            raise EstimatorError(
                where, f"{name} on ranks {values}", "at least 1 on every rank", "Leave out what is left over."
            )
        if name in same and len(set(values)) > 1:
            raise EstimatorError(where, f"{name} on ranks {values}", "the same on all ranks", "Check the ranks.")
    return {name: [row[place] for row in table] for place, name in enumerate(rows)}


def true_on_all(ranks: Ranks, value: bool, device: torch.device) -> bool:
    """Whether `value` is true on every rank; the same answer on all."""
    own = torch.tensor(int(value), device=device)
    dist.all_reduce(own, dist.ReduceOp.MIN, group=ranks.group)
    return bool(own.item())


def like(tensor: Tensor | None) -> int:
    """Whether a tensor requires a gradient, as a number for `agree`."""
    return int(tensor is not None and tensor.requires_grad and torch.is_grad_enabled())
