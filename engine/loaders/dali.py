"""The DALI loader: an NVIDIA DALI pipeline takes normalised frames from the split, pads them and prefetches.

It is for sets that do not fit on the device. Without a GPU, DALI's CPU pipeline runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.loaders.batch import Batch
from engine.loaders.loader import FRAMES, Loader, checked

AHEAD = 2  # batches that the pipeline prepares in advance


class DaliLoader(Loader):
    """See `Loader`. The pipeline is built at the first iteration and kept.

    Args:
        workers: DALI's threads; None is 2.
    """

    kind = "dali"

    def __init__(self, *args: Any, workers: int | None = None, **options: Any):
        super().__init__(*args, **options)
        self._threads = max(1, 2 if workers is None else workers)
        self._waiting: deque[np.ndarray] = deque()
        self._pipeline: Any = None
        self._finished = True

    def _batches(self, pieces: list[Tensor]) -> Iterator[Batch]:
        self._rewind()
        self._waiting.extend(piece.numpy() for piece in pieces)
        # Tokens are small. Precomputed features may not fit on the device: they are padded in this process.
        small = self.device.type == "cuda" and self.split.tokens is not None
        text = self.split.source("text", self.device if small else None, self._draw())
        return checked(self._padded(pieces, self._frames(len(pieces)), text), self.split.check)

    def _frames(self, batches: int) -> Iterator[list[Tensor]]:
        for _ in range(batches):
            self._finished = False
            padded = [torch.from_dlpack(part.as_tensor()) for part in self._pipeline.run()]
            # On a GPU, DALI reuses a batch's memory without waiting for torch's stream.
            yield [part.clone() for part in padded] if self.device.type == "cuda" else padded

    # -- the pipeline --

    def _rewind(self) -> None:
        """Make ready for an epoch. What an unfinished iteration had ordered is thrown away."""
        if self._pipeline is None:
            self._pipeline = self._build()
        elif not self._finished:
            self._waiting.clear()
            try:
                while True:
                    self._pipeline.run()
            except StopIteration:
                self._pipeline.reset()
        self._finished = True

    def _read(self) -> tuple[list[np.ndarray], ...]:
        """Frames of the next batch: one list of arrays per modality."""
        if not self._waiting:
            raise StopIteration
        rows = self._waiting.popleft()
        frames = (self.split.rows(key, rows) for key in FRAMES)  # DALI copies them
        return tuple([piece.astype(np.float32, copy=False) for piece in pieces] for pieces in frames)

    def _build(self) -> Any:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        gpu = self.device.type == "cuda"
        most = self.sampler.batch_size
        device = self.device.index if gpu else None
        if gpu and device is None:
            device = torch.cuda.current_device()
        with Pipeline(
            batch_size=most,
            num_threads=self._threads,
            device_id=device,
            prefetch_queue_depth=AHEAD,
            exec_dynamic=True,  # a batch keeps its memory while something refers to it
        ) as pipeline:
            frames = fn.external_source(
                source=self._read, num_outputs=len(FRAMES), batch=True, dtype=types.FLOAT, ndim=2,
            )  # fmt: skip
            if gpu:
                frames = [node.gpu() for node in frames]
            outputs = [fn.pad(node, axes=[0], fill_value=0) for node in frames]
            pipeline.set_outputs(*outputs)
        pipeline.build()
        return pipeline
