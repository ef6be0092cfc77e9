"""The torch loader: a DataLoader whose workers read the store and normalise; the device pads the batches.

It runs everywhere. On a CPU without workers, the padding kernel reads the mapped store itself, and normalises.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from engine.errors import DataError
from engine.kernels.ragged import Source
from engine.limits import cores
from engine.loaders.batch import Batch
from engine.loaders.loader import FRAMES, Loader, checked

if TYPE_CHECKING:
    from engine.loaders.split import Draw, Split

Asked = tuple["Draw | None", np.ndarray]  # what words are drawn with, and rows of some batches
Place = tuple[
    int, torch.dtype, tuple[int, ...], np.ndarray
]  # start, dtype and shape of an array in the tensor of bytes, and its offsets
TOGETHER = 4  # batches that travel together
ALIGNED = 64  # bytes


def default_workers(device: torch.device) -> int:
    """Half the cores, from 1 to 4, if a GPU trains. None if a CPU trains.

    There, workers would take the cores away from training, and sending a batch costs more than reading it.
    """
    return 0 if device.type == "cpu" else max(1, min(4, cores() // 2))


class TorchLoader(Loader):
    """See `Loader`. Workers are started at the first iteration and kept.

    Args:
        workers: processes; 0 reads in this one; None: see `default_workers`.
    """

    kind = "torch"

    def __init__(self, *args: Any, workers: int | None = None, **options: Any):
        super().__init__(*args, **options)
        workers = default_workers(self.device) if workers is None else workers
        self._order, self._forked = _Order(), False
        self._loader = DataLoader(
            _Rows(self.split),
            batch_size=None,
            collate_fn=_as_it_is,
            sampler=self._order,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            prefetch_factor=2 if workers else None,
            generator=torch.Generator(),  # else torch's own generator, which training uses, gives the seeds
        )

    def _batches(self, pieces: list[Tensor]) -> Iterator[Batch]:
        if self._loader.num_workers or self.device.type != "cpu" or not self.split.normalises_in_place:
            return self._read_by_workers(pieces)
        frames = [self.split.source(key) for key in FRAMES]
        return checked(self._padded(pieces, frames, self.split.source("text", draw=self._draw())), self.split.check)

    def _read_by_workers(self, pieces: list[Tensor]) -> Iterator[Batch]:
        groups = [pieces[i : i + TOGETHER] for i in range(0, len(pieces), TOGETHER)]
        self._order.groups = [(self._draw(), torch.cat(group).numpy()) for group in groups]
        with contextlib.nullcontext() if self._forked else _nothing_collected():
            answers = iter(self._loader)
        self._forked = True
        for group, answer in zip(groups, answers, strict=True):
            if isinstance(answer, _Problem):
                raise DataError(*answer.parts)
            packed, places = answer
            *frames, text = (self._unpacked(packed, *place) for place in places)
            yield from self._padded(group, frames, text, np.diff(places[-1][-1]))

    def _unpacked(self, packed: Tensor, *place: Any) -> Source:
        parts = _part(packed, *place[:3]), torch.from_numpy(place[3])
        return Source(*(part.to(self.device, non_blocking=True) for part in parts))


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """A worker that is forked within the context never garbage-collects what it inherited.

    A DALI pipeline, for example, would wait for threads that the worker does not have.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _as_it_is(group: Any) -> Any:
    return group


class _Order:
    """What the workers are asked for.

    It holds no reference to the loader. In a cycle of references the garbage collector would end the workers: it breaks
    their queues first, and then waits for them.
    """

    def __init__(self) -> None:
        self.groups: list[Asked] = []

    def __iter__(self) -> Iterator[Asked]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)


class _Problem:
    """A DataError on its way to the main process. torch could not rebuild it there from its text alone."""

    def __init__(self, problem: DataError):
        self.parts = (problem.where, problem.found, problem.expected, problem.do)


class _Rows(Dataset):
    """Rows of some batches, ragged. The main process pads them on its device, so that no padding travels."""

    def __init__(self, split: Split):
        self._split = split

    def __getitem__(self, asked: Asked) -> tuple[Tensor, list[Place]] | _Problem:
        draw, rows = asked
        try:
            packed = _pack([self._split.rows(key, rows, draw) for key in (*FRAMES, "text")])
            self._split.check()
            return packed
        except DataError as problem:
            return _Problem(problem)


def _pack(parts: list[list[np.ndarray]]) -> tuple[Tensor, list[Place]]:
    """All values in one tensor of bytes in shared memory, because every tensor that travels costs a file."""
    places: list[Place] = []
    at = 0
    for pieces in parts:
        offsets = np.cumsum([0, *map(len, pieces)])
        places.append((at, torch.from_numpy(pieces[0][:0]).dtype, (int(offsets[-1]), *pieces[0].shape[1:]), offsets))
        at += -(-sum(piece.nbytes for piece in pieces) // ALIGNED) * ALIGNED
    if get_worker_info() is None:
        packed = torch.empty(at, dtype=torch.uint8)
    else:  # torch's own collate would copy the tensor there on its way
        packed = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(at))
    for pieces, place in zip(parts, places, strict=True):
        np.concatenate(pieces, out=_part(packed, *place[:3]).numpy())
    return packed, places


def _part(packed: Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return packed[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
