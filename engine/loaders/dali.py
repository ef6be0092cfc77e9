"""The DALI loader: an NVIDIA DALI pipeline reads the store through an external source, normalises, pads and prefetches.

For sets that do not fit on the device. Without a GPU DALI's CPU pipeline runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.loaders.batch import Batch
from engine.loaders.loader import FRAMES, Loader, checked
from engine.loaders.normalize import ColumnNormalizer

AHEAD = 2  # batches that the pipeline prepares ahead


class DaliLoader(Loader):
    """See `Loader`. The pipeline is built at the first iteration and kept.

    Args:
        workers: DALI's threads; default: 2.
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
        # Tokens are small. Precomputed features may not fit on the device either: they are padded in this process.
        small = self.device.type == "cuda" and self.split.tokens is not None
        held = partial(self.split.tensors, device=self.device) if small else self.split.mapped
        return checked(self._gathered(pieces, self._frames(len(pieces)), held), self.split.check)

    def _frames(self, batches: int) -> Iterator[list[Tensor]]:
        for _ in range(batches):
            self._finished = False
            found = [torch.from_dlpack(part.as_tensor()) for part in self._pipeline.run()]
            # On a GPU DALI does not wait for torch's stream before it uses a batch's memory again.
            yield [part.clone() for part in found] if self.device.type == "cuda" else found

    # -- the pipeline --

    def _rewind(self) -> None:
        """Ready for an epoch: what an iteration that was not finished had ordered is thrown away."""
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
        """Frames of the next batch, a list of arrays for each modality."""
        if not self._waiting:
            raise StopIteration
        rows = self._waiting.popleft()
        return tuple(self._rows(key, rows) for key in FRAMES)

    def _rows(self, key: str, rows: np.ndarray) -> list[np.ndarray]:
        if not _in_numpy(self.split.normalizer(key)):
            return self.split.views(key, rows)  # DALI copies them
        raw = self.split.gather(key, rows)
        return np.split(raw.values.astype(np.float32, copy=False), raw.offsets[1:-1])

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
            exec_dynamic=True,  # a batch keeps its memory as long as somebody has it
        ) as pipeline:
            frames = fn.external_source(
                source=self._read, num_outputs=len(FRAMES), batch=True, dtype=types.FLOAT, ndim=2,
            )  # fmt: skip
            if gpu:
                frames = [node.gpu() for node in frames]
            outputs = []
            for key, node in zip(FRAMES, frames, strict=True):
                column = self.split.normalizer(key)
                if not _in_numpy(column):
                    node = _normalised(node, column)
                if self.split.precision == "float16":
                    node = fn.cast(fn.cast(node, dtype=types.FLOAT16), dtype=types.FLOAT)
                outputs.append(fn.pad(node, axes=[0], fill_value=0))
            pipeline.set_outputs(*outputs)
        pipeline.build()
        return pipeline


def _in_numpy(column: ColumnNormalizer) -> bool:
    """Logarithms are numpy's: DALI's may differ in the last bit."""
    return column.log


def _normalised(node: Any, column: ColumnNormalizer) -> Any:
    """`ColumnNormalizer.apply` as DALI operations, in float64 as there."""
    from nvidia.dali import fn, math, types

    if column.kind == "none":
        return node
    # DALI would round a float64 constant to float32: the bits go in as integers
    bits = (np.ascontiguousarray(a[None], np.float64).view(np.int32) for a in (column.shift, column.scale))
    shift, scale = (fn.reinterpret(types.Constant(b), dtype=types.FLOAT64) for b in bits)
    scaled = (fn.cast(node, dtype=types.FLOAT64) - shift) * scale
    if column.kind == "zscore" and column.clip is not None:
        scaled = math.clamp(scaled, types.Constant(-float(column.clip), dtype=types.FLOAT64),
                            types.Constant(float(column.clip), dtype=types.FLOAT64))  # fmt: skip
    present = fn.reductions.max(math.abs(node), axes=[1], keep_dims=True) > 0
    return fn.cast(scaled * present, dtype=types.FLOAT)
