"""The torch loader: a DataLoader whose workers read the store, normalise and pad. It runs everywhere."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine.errors import DataError
from engine.kernels.ragged import pad
from engine.loaders.batch import Batch
from engine.loaders.loader import Loader, Padding, Text, pad_text, widths
from engine.loaders.ragged import Ragged

if TYPE_CHECKING:
    from engine.loaders.dataset import Split

Asked = tuple[tuple[int, int] | None, list[int]]


def default_workers() -> int:
    """Half the cores, 1 to 4: the other half trains."""
    return max(1, min(4, (os.cpu_count() or 2) // 2))


class TorchLoader(Loader):
    """See `Loader`. Workers are started at the first iteration and kept.

    Args:
        workers: processes; 0 reads in this one.
    """

    kind = "torch"

    def __init__(self, *args: Any, workers: int | None = None, **options: Any):
        super().__init__(*args, **options)
        workers = default_workers() if workers is None else workers
        self._order, self._forked = _Order(), False
        self._loader = DataLoader(
            _Rows(self.split, self.padding),
            batch_size=None,
            sampler=self._order,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
            generator=torch.Generator(),  # the workers' seeds would be drawn from torch's own, which training uses
        )

    def _batches(self, pieces: list[Tensor]) -> Iterator[Batch]:
        self._order.batches = [(self._draw(), piece.tolist()) for piece in pieces]
        with contextlib.nullcontext() if self._forked else _nothing_collected():
            batches = iter(self._loader)
        self._forked = True
        for piece, found in zip(pieces, batches, strict=True):
            if isinstance(found, _Problem):
                raise DataError(*found.parts)
            tensors = [None if t is None else t.to(self.device, non_blocking=True) for t in found]
            token_ids, mask, features, *frames = tensors
            rows = piece.to(self.device, non_blocking=True)
            yield self._batch(piece, rows, Text(token_ids, mask, features), tuple(frames[:2]), tuple(frames[2:]))


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


class _Order:
    """What the workers are asked for: the draw of words and the rows of every batch.

    It knows no loader: a cycle of references would leave the workers' end to the garbage collector, which breaks their
    queues first and then waits for them.
    """

    def __init__(self) -> None:
        self.batches: list[Asked] = []

    def __iter__(self) -> Iterator[Asked]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Problem:
    """A DataError on its way to the main process: torch could not build it there from its text alone."""

    def __init__(self, problem: DataError):
        self.parts = (problem.where, problem.found, problem.expected, problem.do)


class _Rows(Dataset):
    """Batches by their draw of words and their rows, as tensors on the CPU."""

    def __init__(self, split: Split, padding: Padding):
        self._split, self._padding = split, padding

    def __getitem__(self, asked: Asked) -> tuple[Tensor | None, ...] | _Problem:
        draw, rows = asked[0], np.array(asked[1])
        try:
            frames = [pad_here(self._split.gather(key, rows)) for key in ("audio", "vision")]
            text = self._split.text_rows(draw).take(rows)
        except DataError as problem:
            return _Problem(problem)
        every = torch.arange(len(rows))
        width = widths(text, [every], self._padding.time_len, self._padding.text_width)[0]
        values, offsets = torch.from_numpy(text.values), torch.from_numpy(text.offsets)
        tokens, features = (values, None) if self._split.tokens is not None else (None, values)
        found = pad_text(tokens, features, offsets, every, width, self._padding)
        return found.token_ids, found.mask, found.features, *frames[0], *frames[1]


def pad_here(ragged: Ragged) -> tuple[Tensor, Tensor]:
    """All sequences as a batch."""
    every = torch.arange(len(ragged))
    return pad(torch.from_numpy(ragged.values), torch.from_numpy(ragged.offsets), every, widths(ragged, [every])[0])
