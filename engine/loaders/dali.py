"""The DALI loader: an NVIDIA DALI pipeline reads the store through an external source, normalises, pads and prefetches.

For sets that do not fit on the device. Without a GPU DALI's CPU pipeline runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.loaders.batch import Batch
from engine.loaders.loader import Loader, pad_text, widths
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
        text = self.split.text_rows(self._draw())
        order = torch.cat(pieces).numpy() if pieces else np.zeros(0, np.int64)
        sizes = [len(piece) for piece in pieces]
        text_widths = widths(text, order, sizes, self.padding.time_len, self.padding.text_width)
        for piece, width in zip(pieces, text_widths, strict=True):
            self._finished = False
            frames = [self._tensor(found) for found in self._pipeline.run()]
            rows = piece.to(self.device)
            own = text.take(piece.numpy())
            values, offsets = (torch.from_numpy(a).to(self.device) for a in (own.values, own.offsets))
            tokens, features = (values, None) if self.split.tokens is not None else (None, values)
            every = torch.arange(len(piece), device=self.device)
            lengths = [torch.from_numpy(self.split.lengths(k)[piece.numpy()]).to(self.device) for k in KEYS]
            padded = pad_text(tokens, features, offsets, every, width, self.padding)
            yield self._batch(piece, rows, padded, (frames[0], lengths[0]), (frames[1], lengths[1]))

    def _tensor(self, found: Any) -> Tensor:
        """A tensor of its own: DALI writes the next batches over this one."""
        return torch.from_dlpack(found.as_tensor()).clone()

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
        return tuple(self._rows(key, rows) for key in KEYS)

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
        with Pipeline(
            batch_size=most,
            num_threads=self._threads,
            device_id=(self.device.index or torch.cuda.current_device()) if gpu else None,
            prefetch_queue_depth=AHEAD,
        ) as pipeline:
            frames = fn.external_source(
                source=self._read, num_outputs=len(KEYS), batch=True, dtype=types.FLOAT, ndim=2,
            )  # fmt: skip
            if gpu:
                frames = [node.gpu() for node in frames]
            outputs = []
            for key, node in zip(KEYS, frames, strict=True):
                column = self.split.normalizer(key)
                if not _in_numpy(column):
                    node = _normalised(node, column)
                if self.split.precision == "float16":
                    node = fn.cast(fn.cast(node, dtype=types.FLOAT16), dtype=types.FLOAT)
                outputs.append(fn.pad(node, axes=[0], fill_value=0))
            pipeline.set_outputs(*outputs)
        pipeline.build()
        return pipeline


KEYS = ("audio", "vision")


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
