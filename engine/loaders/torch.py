"""The torch loader: a DataLoader whose workers read the store and normalise; the device pads the batches.

It runs everywhere. On a CPU without workers, the kernel that pads reads the store itself, and normalises.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from engine.errors import DataError
from engine.kernels.ragged import pad
from engine.loaders.batch import Batch
from engine.loaders.loader import FRAMES, Loader, checked, pad_text
from engine.loaders.ragged import Ragged

if TYPE_CHECKING:
    from engine.loaders.dataset import Split

Asked = tuple[tuple[int, int] | None, list[int]]  # the draw of words and the rows of a batch
Part = tuple[Tensor, np.ndarray]  # values and offsets
TOGETHER = 4  # batches that travel together
ALIGNED = 64  # bytes


def default_workers(device: torch.device) -> int:
    """Half the cores, 1 to 4, where a GPU trains; none where the cores do: workers would take them away, and sending a
    batch costs more than reading it."""
    return 0 if device.type == "cpu" else max(1, min(4, (os.cpu_count() or 2) // 2))


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
            generator=torch.Generator(),  # the workers' seeds would be drawn from torch's own, which training uses
        )

    def _batches(self, pieces: list[Tensor]) -> Iterator[Batch]:
        if self._loader.num_workers == 0 and self.device.type == "cpu":
            sources = [self.split.source(key) for key in FRAMES]
            if all(source is not None for source in sources):
                return checked(self._gathered(pieces, sources, self.split.mapped), self.split.check)
        return self._loaded(pieces)

    def _loaded(self, pieces: list[Tensor]) -> Iterator[Batch]:
        asked = [(self._draw(), piece.tolist()) for piece in pieces]
        self._order.groups = [asked[i : i + TOGETHER] for i in range(0, len(asked), TOGETHER)]
        with contextlib.nullcontext() if self._forked else _nothing_collected():
            groups = iter(self._loader)
        self._forked = True
        number = 0
        for found in groups:
            if isinstance(found, _Problem):
                raise DataError(*found.parts)
            packed, contents = found
            for parts in contents:
                yield self._padded(pieces[number], *(self._part(packed, *part) for part in parts))
                number += 1

    def _part(
        self, packed: Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...], offsets: np.ndarray
    ) -> Part:
        size = math.prod(shape) * dtype.itemsize
        values = packed[start : start + size].view(dtype).view(shape)
        return values.to(self.device, non_blocking=True), offsets

    def _moved(self, offsets: np.ndarray) -> Tensor:
        return torch.from_numpy(offsets).to(self.device, non_blocking=True)

    def _padded(self, piece: Tensor, audio: Part, vision: Part, text: Part) -> Batch:
        every = torch.arange(len(piece), device=self.device)
        width = _width(text[1], self.padding.time_len, self.padding.text_width)
        tokens, features = (text[0], None) if self.split.tokens is not None else (None, text[0])
        frames = [pad(values, self._moved(offsets), every, _width(offsets)) for values, offsets in (audio, vision)]
        return self._batch(
            piece,
            piece.to(self.device, non_blocking=True),
            pad_text(tokens, features, self._moved(text[1]), every, width, self.padding),
            *frames,
        )


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """A worker that is forked within the context never collects what it inherited as garbage.

    A DALI pipeline, say, would wait for threads that the worker does not have.
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

    It knows no loader: a cycle of references would leave the workers' end to the garbage collector, which breaks their
    queues first and then waits for them.
    """

    def __init__(self) -> None:
        self.groups: list[list[Asked]] = []

    def __iter__(self) -> Iterator[list[Asked]]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)


class _Problem:
    """A DataError on its way to the main process: torch could not build it there from its text alone."""

    def __init__(self, problem: DataError):
        self.parts = (problem.where, problem.found, problem.expected, problem.do)


class _Rows(Dataset):
    """Batches, ragged: the main process pads them on its device, so that no padding travels."""

    def __init__(self, split: Split):
        self._split = split

    def __getitem__(self, asked: list[Asked]) -> tuple[Tensor, list] | _Problem:
        try:
            return _pack([self._read(*batch) for batch in asked])
        except DataError as problem:
            return _Problem(problem)

    def _read(self, draw: tuple[int, int] | None, rows: list[int]) -> list[Ragged]:
        index = np.array(rows)
        frames = [self._split.gather(key, index) for key in FRAMES]
        return [*frames, self._split.text_rows(draw).take(index)]


def _pack(batches: list[list[Ragged]]) -> tuple[Tensor, list[list[tuple]]]:
    """All arrays in one tensor of bytes in shared memory, since each tensor that travels costs a file.

    Returns:
        The tensor, and for every batch each array's place in it, dtype, shape and offsets.
    """
    contents: list[list[tuple]] = []
    at = 0
    for batch in batches:
        contents.append([])
        for part in batch:
            dtype = torch.from_numpy(part.values[:0]).dtype
            contents[-1].append((at, dtype, part.values.shape, part.offsets))
            at += -(-part.values.nbytes // ALIGNED) * ALIGNED
    if get_worker_info() is None:
        packed = torch.empty(at, dtype=torch.uint8)
    else:  # where the tensor would be copied to on its way, as torch's own collate does
        packed = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(at))
    to = packed.numpy()
    for batch, places in zip(batches, contents, strict=True):
        for part, (start, *_) in zip(batch, places, strict=True):
            to[start : start + part.values.nbytes] = part.values.reshape(-1).view(np.uint8)
    return packed, contents


def _width(offsets: np.ndarray, cap: int | None = None, width: int | None = None) -> int:
    if width is not None:
        return width
    longest = int(np.diff(offsets).max())
    return max(1, longest if cap is None else min(longest, cap))
