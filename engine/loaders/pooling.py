"""Means of successive frames, which make recordings of minutes short enough for a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from engine.loaders.formats import RawDataset
from engine.loaders.progress import with_progress
from engine.loaders.ragged import Ragged, Sequences
from engine.loaders.spool import Joiner, release


def pool(raw: RawDataset, frames: Mapping[str, int]) -> None:
    """Replace every so many successive frames of a modality by their mean, in place, and add a note.

    Args:
        frames: modality -> number of frames per step; 1 keeps them as they are.
    """
    for modality, count in frames.items():
        if count == 1:
            continue
        for name, split in raw.splits.items():
            setattr(split, modality, pooled(getattr(split, modality), count, f"averaging {modality} of {name}"))
        raw.notes.append(f"{modality}: the mean of every {count} frames is one step (data.pool_{modality})")


def pooled(part: Sequences, count: int, doing: str = "averaging") -> Sequences:
    """The sequences with every `count` successive frames averaged. The last mean of a sequence may be of fewer frames.

    >>> part = Sequences(Ragged(np.array([[1.0], [3.0], [5.0]], np.float32), np.array([0, 3])))
    >>> pooled(part, 2).ragged[0].tolist()
    [[2.0], [5.0]]
    """
    joined = Joiner(part.ragged.dim)
    for frames in with_progress(part.ragged.pieces(), doing, "sequences"):
        starts = np.arange(0, len(frames), count)
        sizes = np.diff([*starts, len(frames)])
        sums = np.add.reduceat(frames, starts, axis=0, dtype=np.float64)
        joined.add((sums / sizes[:, None]).astype(np.float32))
        release(frames)
    return replace(part, ragged=Ragged(*joined.arrays()))
