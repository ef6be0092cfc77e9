"""Several processes that train one model: who they are, how they exchange tensors, and how they end together.

torchrun starts the processes ("ranks"). Rank 0 is the writer: it alone writes the run folder, shows progress and warns.
docs/ranks.md tells how to start them.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.errors import EngineError
from engine.kernels.ranks.agreement import ANOTHER, OtherRankFailed, lost_rank, message_of
from engine.kernels.ranks.collectives import as_bytes, gather_rows
from engine.kernels.ranks.group import Ranks as Group
from engine.process_group import form, leave, rank_device
from engine.sharded import is_sharded
from engine.torchrun import torchrun_shard

TIMEOUT_S = 1800.0
"""Seconds that a rank waits for the others, unless `train.timeout` says otherwise."""
BUCKET = 1 << 25
"""Bytes of gradients that travel together."""
_RUNS = itertools.count()


class Ranks:
    """The ranks of one run. A process on its own is rank 0 of 1, and every method is then trivial.

    Attributes:
        rank, size: this process and how many there are.
        device: where this rank computes.
        writes: whether this is rank 0, which alone writes files and shows progress.

    >>> ranks = Ranks()
    >>> ranks.size, ranks.writes, ranks.gather({"a": 1})
    (1, True, [{'a': 1}])
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu", timeout_s: float = TIMEOUT_S):
        self.rank, self.size, self.device, self.timeout_s = rank, size, torch.device(device), timeout_s
        self._alone, self._turns = False, 0
        self._run = (
            f"engine/run {next(_RUNS)}" if size > 1 else ""
        )  # the same on all ranks, which call train equally often

    @property
    def writes(self) -> bool:
        return self.rank == 0

    @property
    def together(self) -> bool:
        """Whether there are several ranks, which compute together at the moment."""
        return self.size > 1 and not self._alone

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within the context this rank computes as if there were no others, which need not enter it."""
        before, self._alone = self._alone, True
        try:
            yield
        finally:
            self._alone = before

    # -- exchange ----------------------------------------------------------------------------------

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers, on all ranks."""
        if self.size == 1:
            return number
        value = torch.tensor([number], device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.largest(0)  # whose value the host reads: on a GPU an exchange alone does not make it wait

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on all ranks: numbers, strings, tensors, and tuples, lists and dicts of them.

        Tensors of a GPU come to this rank's own.
        """
        if self.size == 1:
            return [value]
        buffer = io.BytesIO()
        torch.save(value, buffer)
        content = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8).to(self.device)
        sizes = [int(n) for n in self._all_gathered(torch.tensor([len(content)], device=self.device))]
        padded = content.new_zeros(max(sizes))
        padded[: len(content)] = content
        parts = self._all_gathered(padded)
        contents = [part[:size].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]
        return [torch.load(io.BytesIO(c), map_location=self._place, weights_only=True) for c in contents]

    def _place(self, storage: Any, location: str) -> Any:
        """Where a tensor of another rank goes: to this rank's GPU, whichever the other's was."""
        return storage if location == "cpu" else torch.serialization.default_restore_location(storage, str(self.device))

    def from_writer(self, value: Any) -> Any:
        """The writer's value, on all ranks; of the kinds that `gather` takes."""
        return self.gather(value if self.writes else None)[0]

    def join_rows(self, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        """The ranks' rows put one after another, [sum of counts, ...], without gradients.

        Args:
            tensor: this rank's rows, [counts[rank], ...].
            counts: how many rows each rank has.
        """
        if self.size == 1:
            return tensor
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor.detach()
        return torch.cat([part[:n] for part, n in zip(self._all_gathered(padded), counts, strict=True)])

    def join(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Every tensor with the rows of all ranks, with gradients. Each rank has equally many rows.

        The gradients are those of the mean of the ranks' losses, times the number of ranks. So gradients of parameters
        that are averaged over the ranks, as `average_gradients` does, are those of one process on all rows.

        Args:
            tensors: floats [B, ...] each; they travel together where their types agree.
        """
        joined, group = list(tensors), Group(dist.group.WORLD, self.rank, self.size)
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            flat = [tensors[i].reshape(len(tensors[i]), -1) for i in places]
            rows = gather_rows(torch.cat(flat, 1), group, [len(flat[0])] * self.size)
            columns = rows.split([f.shape[1] for f in flat], 1)
            for i, column in zip(places, columns, strict=True):
                joined[i] = column.reshape(-1, *tensors[i].shape[1:])
        return joined

    def _all_gathered(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        # bytes: not every backend knows every dtype
        dist.all_gather([as_bytes(part) for part in parts], as_bytes(tensor.contiguous()))
        return parts

    def tell(self, value: Any) -> Any:
        """The writer's value (of JSON), on all ranks. Others also learn by it that a rank has failed."""
        if self.size == 1:
            return value
        with self._turn() as key:
            if self.writes:
                _store().set(key, json.dumps(value))
            return json.loads(_store().get(key))

    def mark(self, name: str) -> None:
        """Set a mark that the other ranks see. It waits for none of them."""
        if self.size > 1:
            with contextlib.suppress(Exception):  # the store goes with the rank that holds it
                _store().set(f"{self._run}/{name}", "1")

    def marked(self, name: str) -> bool:
        """Whether a rank has set a mark."""
        with contextlib.suppress(Exception):
            return self.size > 1 and _store().check([f"{self._run}/{name}"])
        return False

    # -- weights -----------------------------------------------------------------------------------

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the ranks.

        A parameter that has a gradient on some ranks only counts as zero on the others. One that has none anywhere
        keeps none.
        """
        if not self.together:
            return
        of_kind: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
        for p in parameters:
            if p.requires_grad and not is_sharded(p):
                of_kind.setdefault((p.device, p.dtype), []).append(p)
        for kind in of_kind.values():
            for bucket in _buckets(kind):
                self._average_bucket(bucket)

    @torch.no_grad()
    def _average_bucket(self, parameters: list[nn.Parameter]) -> None:
        given = parameters[0].new_tensor([p.grad is not None for p in parameters])
        flat = torch.cat([given, *((p.grad if p.grad is not None else p).reshape(-1) for p in parameters)])
        start = len(parameters)
        for p in parameters:  # a parameter without a gradient had only a place among the values
            if p.grad is None:
                flat[start : start + p.numel()] = 0
            start += p.numel()
        dist.all_reduce(flat)
        flat /= self.size
        values = flat[len(parameters) :].split([p.numel() for p in parameters])
        for p, value, somewhere in zip(parameters, values, flat[: len(parameters)], strict=True):
            if p.grad is not None:
                p.grad.copy_(value.view_as(p))
            elif somewhere > 0:
                p.grad = value.view_as(p).clone()

    @torch.no_grad()
    def same_weights(self, *modules: nn.Module) -> None:
        """Give every rank the writer's parameters and buffers."""
        if self.size == 1:
            return
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                if not is_sharded(tensor):
                    value = tensor.detach().to(self.device).contiguous()  # NCCL knows no tensors on the CPU
                    dist.broadcast(value, 0)
                    tensor.copy_(value)

    def check_weights(self, where: str, *modules: nn.Module) -> None:
        """Raise an error if the ranks' parameters have drifted apart. Averaged gradients keep them equal."""
        if not self.together:
            return
        own = [p.detach().double().abs().sum() for m in modules for p in m.parameters() if not is_sharded(p)]
        sums = torch.stack(self._all_gathered(torch.stack(own))) if own else torch.zeros(1, 1)
        if not torch.allclose(sums, sums[:1], rtol=1e-5, atol=0, equal_nan=True):
            raise EngineError(
                where, "weights that differ between the ranks", "the same weights on all of them",
                "Let the model compute the same on every rank, and change no weights outside of the optimisers.",
            )  # fmt: skip

    # -- one after another, and failing together ---------------------------------------------------

    @contextlib.contextmanager
    def writer_first(self) -> Iterator[None]:
        """The writer runs the block, then all others do. The block may not exchange anything."""
        if self.size == 1:
            yield
            return
        with self._turn() as key:
            yield
            if self.writes:
                _store().set(key, "done")

    @contextlib.contextmanager
    def _turn(self) -> Iterator[str]:
        """A key of its own, for which all but the writer wait first."""
        self._turns += 1
        key = f"{self._run}/turn {self._turns}"
        if not self.writes:
            self._await(key)
        yield key

    def _await(self, key: str) -> None:
        """Wait for the writer to set `key`, or for a rank to fail."""
        end = time.monotonic() + self.timeout_s
        while time.monotonic() < end:
            if _store().check([key]):
                return
            self._raise_failure(None)
            time.sleep(0.05)
        raise OtherRankFailed(
            f"rank {self.rank}", f"no sign of rank 0 for {self.timeout_s:g} s", "rank 0 to go on",
            "See its messages, or raise train.timeout.",
        )  # fmt: skip

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Within the context the error of one rank becomes the error of all.

        Raises:
            OtherRankFailed: another rank failed first; the message is that rank's.
        """
        if self.size == 1:
            yield
            return
        try:
            with self._watched() if self.device.type == "cuda" else contextlib.nullcontext():
                yield
        except OtherRankFailed:
            raise
        except BaseException as cause:
            # A peer that has gone breaks a collective: what it said is the cause.
            lost = lost_rank(cause)
            if lost or (isinstance(cause, RuntimeError) and not isinstance(cause, EngineError)):
                self._raise_failure(cause, wait_s=2.0)
            with contextlib.suppress(Exception):
                if not lost and _store().add(f"{self._run}/failures", 1) == 1:
                    _store().set(f"{self._run}/failure", f"{self.rank} {message_of(cause)}")
            if lost:
                what = "it has ended without a message. See the log of what started the ranks"
                raise OtherRankFailed(ANOTHER, what, "all ranks to go on", "") from cause
            raise

    @contextlib.contextmanager
    def _watched(
        self, every_s: float = 2.0, grace_s: float = 10.0, end: Callable[[int], Any] = os._exit
    ) -> Iterator[None]:
        """Within the context the process ends if another rank has failed, and this one does not end by itself.

        On a GPU a rank may wait for an exchange that never ends, where no exception reaches it.

        Args:
            every_s: seconds between two looks.
            grace_s: seconds that the rank has to end by itself.
            end: ends the process, with an exit code.
        """
        done = threading.Event()

        def watch() -> None:
            while not done.wait(every_s):
                try:
                    self._raise_failure(None)
                except OtherRankFailed as failure:
                    if not done.wait(grace_s):
                        if self.writes:
                            print(f"error: {failure}", file=sys.stderr, flush=True)
                        end(2)
                    return

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            yield
        finally:
            done.set()

    def _raise_failure(self, cause: Exception | None, wait_s: float = 0.0) -> None:
        """Raise what another rank left as its error, if one did."""
        end, key = time.monotonic() + wait_s, f"{self._run}/failure"
        while True:
            try:
                left = _store().get(key).decode() if _store().check([key]) else None
            except Exception:  # the store has gone with the rank that held it
                return
            if left is not None:
                rank, _, message = left.partition(" ")
                if int(rank) == self.rank:
                    return
                raise OtherRankFailed(f"rank {rank}", message, "no error on any rank", "") from cause
            if time.monotonic() >= end:
                return
            time.sleep(0.05)


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in groups of about `BUCKET` bytes."""
    group: list[nn.Parameter] = []
    size = 0
    for p in parameters:
        group.append(p)
        size += p.numel() * p.element_size()
        if size >= BUCKET:
            yield group
            group, size = [], 0
    if group:
        yield group


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


# -- the process group -----------------------------------------------------------------------------


@contextlib.contextmanager
def joined(device: str = "auto", timeout_s: float = TIMEOUT_S) -> Iterator[Ranks]:
    """The ranks of this run, within the context.

    A process group that exists is used. Else one is formed from torchrun's environment. It stays for the next run,
    until the process ends or the block fails. Outside of torchrun there is one rank.

    Args:
        device: a run's setting `device`. "auto" and "cuda" are the GPU number LOCAL_RANK.
        timeout_s: how long a rank waits for the others.

    Raises:
        ConfigError: WORLD_SIZE is above 1 and no group can be formed, or the device cannot be used by several ranks.

    >>> with joined("cpu") as ranks:
    ...     ranks.size
    1
    """
    from engine.training.parts import choose_device

    if dist.is_available() and dist.is_initialized():
        size = dist.get_world_size()
        own = rank_device(device) if size > 1 else choose_device(device)
        if size > 1 and own.type == "cuda":
            torch.cuda.set_device(own)  # as `form` does: kernels run on the present device
        yield Ranks(dist.get_rank(), size, own, timeout_s)
        return
    rank, size = torchrun_shard()
    if size == 1:
        yield Ranks(device=choose_device(device))
        return
    own = rank_device(device)
    form(rank, size, own, timeout_s)
    atexit.register(leave)
    try:
        yield Ranks(rank, size, own, timeout_s)
    except BaseException:
        leave(failed=True)  # which breaks the exchange that others wait in
        raise


# -- random numbers ------------------------------------------------------------------


def seed_of(*numbers: int) -> int:
    """A seed below 2**32 that depends on all numbers and their order.

    >>> seed_of(0, 1) == seed_of(0, 1), seed_of(0, 1) == seed_of(1, 0)
    (True, False)
    """
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")
