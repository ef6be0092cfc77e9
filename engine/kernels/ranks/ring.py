"""Keys that travel around the ranks, so that no rank ever holds all of them.

Every rank passes what it holds to the next one and takes what the one before passes: after as many steps as there are
ranks each has seen all keys. Their gradients travel with them and come home in the last step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor

from engine.kernels.ranks.collectives import as_bytes
from engine.kernels.ranks.group import Ranks


def travel(own: Tensor, ranks: Ranks, counts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """(rank, its keys) of all ranks, this rank first. The next keys arrive while these are used.

    Args:
        own: this rank's keys, [..., counts[rank], d].
        ranks: the ranks.
        counts: the number of keys of every rank.
    """
    keys = own.detach().contiguous()
    for step in range(ranks.size):
        source = (ranks.rank - step) % ranks.size
        arriving = _pass_on(keys, ranks, counts[source - 1]) if step < ranks.size - 1 else None
        yield source, keys
        if arriving is not None:
            keys = _arrived(*arriving)
            arriving = None  # it holds the keys that were sent


def travel_with_gradient(
    own: Tensor, ranks: Ranks, counts: Sequence[int], gradient: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`travel` with a gradient for each rank's keys, to which the caller adds in place.

    Args:
        own, ranks, counts: as for `travel`.
        gradient: of this rank's own keys, zeros. It holds the sum over all ranks when the last step is done.
    """
    passed = gradient
    for source, keys in travel(own, ranks, counts):
        yield source, keys, passed
        last = source == (ranks.rank + 1) % ranks.size
        passed = _arrived(*_pass_on(passed, ranks, counts[source - 1]))
        if last:
            gradient.copy_(passed)


def _pass_on(tensor: Tensor, ranks: Ranks, rows: int) -> tuple[list, Tensor, Tensor]:
    """Begin to send a tensor to the next rank and to receive one with `rows` rows from the one before."""
    received = tensor.new_empty(*tensor.shape[:-2], rows, tensor.shape[-1])
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, as_bytes(tensor), ranks.peer(1), ranks.group),
            dist.P2POp(dist.irecv, as_bytes(received), ranks.peer(-1), ranks.group),
        ]
    )
    return works, received, tensor


def _arrived(works: list, received: Tensor, sent: Tensor) -> Tensor:
    """The received tensor. `sent` is held until it is sent."""
    for work in works:
        work.wait()
    return received
