"""Files of samples: `TASK__ROWS__SEED.npz` with x, y (and z) of a row each and the true value in nats."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

Sampler = Callable[[int, int], dict[str, np.ndarray]]


def path(folder: Path, task: str, rows: int, seed: int) -> Path:
    return folder / f"{task}__{rows}__{seed}.npz"


def export(
    samplers: Mapping[str, Sampler],
    folder: Path,
    sizes: Iterable[int],
    seeds: Iterable[int],
    say: Callable[[str], None] = print,
) -> int:
    """Write the files that `folder` lacks; how many were written."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes, written = tuple(sizes), 0
    for seed in seeds:
        for rows in sizes:
            for task, sampler in samplers.items():
                target = path(folder, task, rows, seed)
                if target.exists():
                    continue
                # whoever reads the folder meanwhile sees whole files only
                draft = target.with_suffix(f".{os.getpid()}.part")
                with draft.open("wb") as file:
                    np.savez(file, **sampler(rows, seed))
                draft.replace(target)
                written += 1
            say(f"{rows} rows, seed {seed}: {len(samplers)} tasks")
    return written
