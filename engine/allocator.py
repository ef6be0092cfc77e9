"""Memory of the process: freed blocks are kept for the next allocation, and lasting arrays lie in large pages."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import numpy as np

# Parameters of glibc's mallopt: the size from which blocks are mapped, and the free memory kept on top of the heap.
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
LARGEST = 2**30
MOST_KEPT = 2**31 - 1
SETTLED = 2**25  # glibc itself raises the first to this, and the second to twice this
LARGE = 2**21  # bytes of a large page
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_memory() -> bool:
    """Keep freed blocks of up to 1 GiB for the next allocation instead of returning them to the system.

    A fresh block costs one page fault per 4 KiB, which takes longer than copying it. Without this call the tensors of
    a step pay for that in every step. It applies to the whole process, on Linux with glibc. It does nothing elsewhere,
    or where the user has set one of glibc's own variables (`VARIABLES`).

    Returns:
        whether the setting was taken.

    Example:
        >>> kept = keep_memory()
    """
    global _kept
    _kept = _set(LARGEST, MOST_KEPT)
    return _kept


def settle() -> None:
    """Set the thresholds that glibc itself sets once a program has freed a block of 32 MiB.

    Before that, the buffers that a kernel frees go back to the system, and its next call pays for them again. This does
    nothing after `keep_memory`, or where `keep_memory` does nothing.
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
    """An array as `np.empty` makes it; on Linux in pages of 2 MiB if the system has any.

    It suits arrays that last and are read in random order. With pages of 4 KiB nearly every jump misses the cache of
    page addresses, which takes a fifth of a loader's epoch.

    >>> large_pages((3, 2), np.float32).shape
    (3, 2)
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size < 8 * LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(shape, dtype)
    block = mmap.mmap(-1, size + LARGE)
    try:
        block.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without large pages
        return np.empty(shape, dtype)
    whole = np.frombuffer(block, np.uint8)
    start = -whole.ctypes.data % LARGE
    return whole[start : start + size].view(dtype).reshape(shape)
