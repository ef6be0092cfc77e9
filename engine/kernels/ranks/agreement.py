"""What the ranks tell each other before an operation: their sizes, or that one of them has failed.

Every exchange has one length, whatever the operation. So a rank whose own arguments are wrong can take part in the
exchange that the others wait in, and say so. They then raise its message, and none waits for the timeout.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import ConfigError, EngineError, EstimatorError
from engine.kernels.ranks.group import Ranks

LENGTH = 64
"""Numbers of one exchange."""
HEAD = 3
"""Of these the first: a state, the operation, and how many numbers follow; of a failure, the bytes of its message."""
READY, FAILED = 0, 1
MESSAGE_BYTES = 4000
ANOTHER = "another rank"
"""Where an error was of a rank that cannot be named, because it has gone."""


class OtherRankFailed(EngineError):
    """Another rank has ended, with its own error: `where` names the rank, and `found` is what it said."""

    def __str__(self) -> str:
        return f"{self.where}: {self.found}"


def message_of(problem: BaseException) -> str:
    """What a rank says of its failure, in one line; of an error that is not the engine's, with its type."""
    text = " ".join(str(problem).split())
    return text if isinstance(problem, EngineError) else f"{type(problem).__name__}: {text}"


def lost_rank(cause: BaseException) -> bool:
    """Whether an exchange broke because a rank has gone. gloo says so by a RuntimeError alone."""
    if isinstance(cause, getattr(dist, "DistError", ())):
        return True
    signs = "gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL error", "NCCL communicator"
    return isinstance(cause, RuntimeError) and any(sign in str(cause) for sign in signs)


@contextlib.contextmanager
def checked(ranks: Ranks | None, *tensors: object) -> Iterator[None]:
    """A context for what a rank does on its own right before `agree` or `true_on_all`, such as checks of its arguments.

    An exception in it is told to the other ranks, which raise `OtherRankFailed` in their `agree`. There may be no other
    exchange between the context and `agree`.

    Args:
        ranks: the ranks; None: this process is alone.
        tensors: of the operation. The first that is one says on which GPU the ranks exchange.
    """
    try:
        yield
    except OtherRankFailed:
        raise
    except Exception as problem:
        if ranks is not None:
            message = message_of(problem).encode()[:MESSAGE_BYTES]
            device = next((t.device for t in tensors if isinstance(t, Tensor)), None)
            table = _exchanged(ranks, device, [FAILED, 0, len(message)])
            _messages(ranks, device, table, message)
        raise


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
        EstimatorError: a rank without rows, ranks that differ, or ranks in different operations.
        OtherRankFailed: another rank failed in its `checked` block.
        ConfigError: a CUDA graph is being captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            where, "a CUDA graph being captured", "a plain call: the host reads the ranks' numbers of rows",
            "Set train.graphs=off, or gather=False.",
        )  # fmt: skip
    names = (*rows, *same)
    table = _told(where, ranks, device, [*rows.values(), *same.values()], names)
    for place, name in enumerate(names):
        values = [row[place] for row in table]
        if name in rows and 0 in values and not empty:
            raise EstimatorError(
                where, f"{name} on ranks {values}", "at least 1 on every rank", "Leave out what is left over."
            )
        if name in same and len(set(values)) > 1:
            raise EstimatorError(where, f"{name} on ranks {values}", "the same on all ranks", "Check the ranks.")
    return {name: [row[place] for row in table] for place, name in enumerate(rows)}


def true_on_all(ranks: Ranks, value: bool, device: torch.device) -> bool:
    """Whether `value` is true on every rank; the same answer on all.

    Raises:
        EstimatorError, OtherRankFailed: as for `agree`.
    """
    table = _told("gather", ranks, device, [int(value)], ("true on all",))
    return all(row[0] for row in table)


def like(tensor: Tensor | None) -> int:
    """Whether a tensor requires a gradient, as a number for `agree`."""
    return int(tensor is not None and tensor.requires_grad and torch.is_grad_enabled())


def _told(
    where: str, ranks: Ranks, device: torch.device, numbers: Sequence[int], names: Sequence[str]
) -> list[list[int]]:
    """The numbers of every rank, by rank. `names` say what they are."""
    operation = zlib.crc32("\n".join((where, "ring" if ranks.ring else "", *names)).encode())
    room, table = LENGTH - HEAD, [[] for _ in range(ranks.size)]
    for begin in range(0, max(1, len(numbers)), room):
        part = _exchanged(ranks, device, [READY, operation, len(numbers), *numbers[begin : begin + room]])
        if any(row[0] == FAILED for row in part):
            raise _other_failure(_messages(ranks, device, part, b""))
        others = [rank for rank, row in enumerate(part) if row[1:HEAD] != part[0][1:HEAD]]
        if others:
            raise EstimatorError(
                where, f"ranks {others} in another operation than rank 0, or with other options",
                "the same calls in the same order on all ranks", "Let all ranks run the same code.",
            )  # fmt: skip
        for row, more in zip(table, part, strict=True):
            row += more[HEAD:]
    return [row[: len(numbers)] for row in table]


def _exchanged(ranks: Ranks, device: torch.device | None, numbers: Sequence[int]) -> list[list[int]]:
    """At most `LENGTH` numbers of every rank."""
    padded = [*numbers, *[0] * (LENGTH - len(numbers))]
    own = torch.tensor(padded, dtype=torch.int64, device=_exchange_device(ranks, device))
    return _gathered(ranks, own).tolist()


def _gathered(ranks: Ranks, own: Tensor) -> Tensor:
    """[ranks, ...]"""
    parts = [torch.empty_like(own) for _ in range(ranks.size)]
    try:
        dist.all_gather(parts, own, group=ranks.group)
    except RuntimeError as cause:
        if not lost_rank(cause):
            raise
        what = "it has ended or left the process group. Give all ranks equally many batches, and see its messages"
        raise OtherRankFailed(ANOTHER, what, "all ranks in the same calls", "") from cause
    return torch.stack(parts)


def _exchange_device(ranks: Ranks, device: torch.device | None) -> torch.device:
    """Where the numbers of an exchange are. It depends on the process group alone, so that all ranks take the same.

    The CPU where the group can: the host reads the numbers, and need not wait for the GPU.
    """
    known = [entry.split(":")[0] for entry in str(dist.get_backend_config(ranks.group)).split(",")]
    if "cpu" in known:
        return torch.device("cpu")
    if device is not None and device.type in known:
        return device
    # this rank's tensors are where the group cannot exchange: its own mistake, which the others are to hear of
    return torch.device(known[0], torch.cuda.current_device() if known[0] == "cuda" else 0)


def _messages(ranks: Ranks, device: torch.device | None, table: list[list[int]], own: bytes) -> dict[int, str]:
    """The messages of the ranks that failed. All ranks take part, as the table tells them."""
    lengths = {rank: row[2] for rank, row in enumerate(table) if row[0] == FAILED}
    padded = torch.tensor(list(own.ljust(max(1, *lengths.values()), b" ")), dtype=torch.uint8)
    parts = _gathered(ranks, padded.to(_exchange_device(ranks, device))).cpu()
    return {rank: bytes(parts[rank, :length].tolist()).decode(errors="replace") for rank, length in lengths.items()}


def _other_failure(messages: Mapping[int, str]) -> OtherRankFailed:
    rank, message = next(iter(messages.items()))
    more = f" (and ranks {sorted(messages)[1:]})" if len(messages) > 1 else ""
    return OtherRankFailed(f"rank {rank}{more}", message, "no error on any rank", "")
