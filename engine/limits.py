"""What a container or a batch system leaves this process: processor cores and memory.

Docker, Kubernetes and Slurm set limits on control groups. The system still shows the whole machine. A process that
starts a thread for every core is then slowed down, and one that fills the memory shown as free is killed.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def cores() -> int:
    """Processor cores that this process may keep busy: those it may run on, limited by its share of processor time.

    >>> 1 <= cores() <= os.cpu_count()
    True
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(share) for share in _shares())]))


def fit_threads() -> None:
    """Limit torch's threads to this process's share of processor time, unless OMP_NUM_THREADS gives their number.

    Threads beyond the share are stopped for a while, and the others wait for them.
    """
    shares = list(_shares())
    if shares and not os.environ.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(min(torch.get_num_threads(), cores()))


def total_memory() -> int | None:
    """Bytes of memory that this process may take if nothing else takes any; None if nothing tells."""
    sizes = [most for most, _, _ in _memory_limits()]
    with contextlib.suppress(AttributeError, OSError, ValueError):  # a system that does not tell
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(sizes) if sizes else None


def free_memory() -> int | None:
    """Bytes of memory that this process may still take; None if nothing tells."""
    # Pages of files that nobody uses do not count as taken.
    limits = [most - taken + unused for most, taken, unused in _memory_limits()]
    if (available := _number_after(PROC / "meminfo", "MemAvailable:")) is not None:
        limits.append(available * 1024)
    elif not limits and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        limits.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(limits)) if limits else None


def _shares() -> Iterator[float]:
    """Seconds of processor time per second that the process's control groups may take."""
    for folder in _folders("cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")  # version 2, else version 1
        quota, period = quota or _text(folder / "cpu.cfs_quota_us"), period or _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):  # without a limit it is max or -1
            yield int(quota) / int(period)


def _memory_limits() -> Iterator[tuple[int, int, int]]:
    """Bytes that the process's control groups may take, have taken, and of these hold pages of unused files."""
    for folder in _folders("memory"):
        for limit, usage, unused in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, taken = _text(folder / limit), _text(folder / usage)
            if most.isdigit() and taken.isdigit():
                yield int(most), int(taken), _number_after(folder / "memory.stat", unused) or 0


def _folders(controller: str) -> Iterator[Path]:
    """The folders of the control groups of this process, the innermost first: each of them may set a limit."""
    for line in _text(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and controller not in controllers.split(","):
            continue
        root = GROUPS / controller if controllers else GROUPS
        inner = root.joinpath(*(part for part in path.split("/") if part not in ("", "..")))
        while inner != root:  # a container may show the path of its host, which it does not have
            yield inner
            inner = inner.parent
        yield root


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number_after(path: Path, name: str) -> int | None:
    """The number that follows a name at the beginning of a line."""
    words = (line.split() for line in _text(path).splitlines())
    return next((int(w[1]) for w in words if len(w) > 1 and w[0] == name and w[1].isdigit()), None)
