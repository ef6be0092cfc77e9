"""Memory that a training run has had once is kept: the C library would give large blocks back and fetch them again."""

from __future__ import annotations

import ctypes
import os
import sys

# glibc's mallopt: blocks from this size on are mapped, and unmapped when freed; free memory kept at the heap's top
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
LARGEST = 2**30
MOST_KEPT = 2**31 - 1
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_memory() -> bool:
    """Let freed blocks of up to 1 GiB serve the next allocation instead of going back to the system.

    Every fresh block costs a page fault a 4 KiB, which is more than copying it: a step's tensors would pay that in
    every step. Applies to the whole process, on Linux with glibc; elsewhere, and where the user has set
    one of glibc's own variables (`VARIABLES`), nothing happens.

    Returns:
        whether the setting was taken.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST) and mallopt(TRIM_THRESHOLD, MOST_KEPT))
