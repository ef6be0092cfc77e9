"""How the process's memory is had: what a training run has freed is kept, and what stays comes in large pages."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import numpy as np

# glibc's mallopt: blocks from this size on are mapped, and unmapped when freed; free memory kept at the heap's top
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
LARGEST = 2**30
MOST_KEPT = 2**31 - 1
SETTLED = 2**25  # glibc moves its own threshold up to here, and trims from twice of it
LARGE = 2**21  # bytes of a large page
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_memory() -> bool:
    """Let freed blocks of up to 1 GiB serve the next allocation instead of going back to the system.

    Every fresh block costs a page fault a 4 KiB, which is more than copying it: a step's tensors would pay that in
    every step. Applies to the whole process, on Linux with glibc; elsewhere, and where the user has set
    one of glibc's own variables (`VARIABLES`), nothing happens.

    Returns:
        whether the setting was taken.
    """
    global _kept
    _kept = _set(LARGEST, MOST_KEPT)
    return _kept


def settle() -> None:
    """Take at once the thresholds that glibc itself arrives at when a program has freed a block of 32 MiB.

    Until then, what a call of a kernel frees at the end goes back to the system, and the next call pays for it again.
    Does nothing after `keep_memory`, and where that does nothing.
    """
    if not _kept:
        _set(SETTLED, 2 * SETTLED)


_kept = False


def _set(mapped_from: int, trimmed_from: int) -> bool:
    if not sys.platform.startswith("linux") or any(name in os.environ for name in VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(MMAP_THRESHOLD, mapped_from) and mallopt(TRIM_THRESHOLD, trimmed_from))


def large_pages(shape: tuple[int, ...], dtype: type | np.dtype) -> np.ndarray:
    """An array as `np.empty` gives it, on Linux in pages of 2 MiB where the system has them to give.

    For what stays and is read in another order each time: with pages of 4 KiB every jump looks up addresses that are no
    longer in the caches, which takes a fifth of a loader's epoch.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size < 8 * LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(shape, dtype)
    block = mmap.mmap(-1, size + LARGE)
    try:
        block.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return np.empty(shape, dtype)
    whole = np.frombuffer(block, np.uint8)
    start = -whole.ctypes.data % LARGE
    return whole[start : start + size].view(dtype).reshape(shape)
