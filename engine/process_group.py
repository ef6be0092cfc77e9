"""The process group of a run: how the processes that torchrun started meet, and how one says why it did not come."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
import zlib
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.errors import ConfigError
from engine.kernels.ranks.agreement import ANOTHER, OtherRankFailed, message_of
from engine.torchrun import torchrun_shard

DO = "Start with torchrun, or unset RANK and WORLD_SIZE to train in one process."
_met = 0  # how many groups this process has formed, which it may have left


def form(rank: int, size: int, device: torch.device, timeout_s: float) -> None:
    """Form the default process group from torchrun's environment, NCCL for GPUs, else gloo.

    Raises:
        ConfigError: the environment is incomplete, or the ranks do not meet.
        OtherRankFailed: another rank has failed before it came.
    """
    global _met
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    found = f"RANK={rank} of WORLD_SIZE={size}, and no process group"
    if not dist.is_available():
        raise ConfigError("environment", f"{found}: this PyTorch has no torch.distributed", "one that has it", DO)
    if missing:
        raise ConfigError("environment", f"{found}: no {' and no '.join(missing)}", "torchrun's environment", DO)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        limit = timedelta(seconds=timeout_s)
        store = _meeting_place(rank, size, limit)
        if _met:  # what the ranks left in it for an earlier group, such as their addresses, is no longer true
            store = dist.PrefixStore(f"after {_met}", store)
        _meet(store, rank, size, timeout_s)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        _met += 1
    except (RuntimeError, ValueError, OSError) as cause:
        text = " ".join(str(cause).split())[:300]
        taken = "EADDRINUSE" in text or "address already in use" in text
        do = "Choose another MASTER_PORT (torchrun --master-port)." if taken else DO
        raise ConfigError("environment", f"{found}: {text}", "all ranks to meet at MASTER_ADDR", do) from cause


def leave(failed: bool = False) -> None:
    """Leave the group, if there is one. Of one that failed, exchanges on the GPU that never end are given up, too."""
    with contextlib.suppress(Exception):
        if failed and dist.get_backend() == "nccl":
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


def _meeting_place(rank: int, size: int, limit: timedelta) -> Any:
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=limit))
    # On one machine torchrun keeps its store over restarts, and with it the addresses of processes that ended.
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        store = dist.PrefixStore(f"engine/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


def _meet(store: Any, rank: int, size: int, timeout_s: float) -> None:
    """Wait for all ranks, or for what one of them says of its failure."""
    end, came = time.monotonic() + timeout_s, store.add("engine/came", 1)
    while came < size:
        if store.check(["engine/failure"]):
            who, _, message = store.get("engine/failure").decode().partition(" ")
            raise OtherRankFailed(f"rank {who}", message, "no error on any rank", "")
        if time.monotonic() > end:
            raise ConfigError(
                "environment", f"{came} of {size} ranks after {timeout_s:g} s", f"all of them at rank {rank}'s side",
                "See the messages of the other ranks, or raise train.timeout.",
            )  # fmt: skip
        time.sleep(0.02)
        came = store.add("engine/came", 0)


def said_by_another(problem: BaseException) -> bool:
    """Tell the ranks that are still to meet of an error of this one. Returns whether another one had the same error.

    An error that is not the engine's is the same if it was raised by the same line. Where the ranks cannot be asked
    within a few seconds, nothing is told, and the answer is False.
    """
    if isinstance(problem, OtherRankFailed) and problem.where != ANOTHER:
        return False
    answers: list[bool] = []
    asking = threading.Thread(target=_tell, args=(problem, answers), daemon=True)
    asking.start()
    asking.join(4.0)
    return any(answers)


def _tell(problem: BaseException, answers: list[bool]) -> None:
    with contextlib.suppress(Exception):
        rank, size = torchrun_shard()
        of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun keeps the store, not rank 0
        if size == 1 or not (of_agent or (rank and not _met)):
            return
        store = _meeting_place(rank, size, timedelta(seconds=2))
        text = message_of(problem)
        if not _met:
            store.set("engine/failure", f"{rank} {text}")
        where = traceback.extract_tb(problem.__traceback__)[-1]
        key = text if text == str(problem) else f"{type(problem).__name__} {where.filename} {where.lineno}"
        answers.append(store.add(f"engine/said {zlib.crc32(key.encode())}", 1) > 1)


def rank_device(name: str) -> torch.device:
    """The device of this rank: the CPU, or the GPU of its number on this machine.

    Raises:
        ConfigError: the setting names one device for all ranks, or the machine has fewer GPUs than ranks.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise ConfigError(
            "device", f"{name!r} for several ranks", "auto, cuda or cpu", "Let LOCAL_RANK choose each rank's GPU."
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if local >= count:
        raise ConfigError(
            "device", f"LOCAL_RANK={local} and {count} GPUs", "a GPU for every rank of this machine",
            f"Start at most {count} ranks on it, or set device=cpu.",
        )  # fmt: skip
    return torch.device("cuda", local)
