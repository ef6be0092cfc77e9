"""What a container or a batch system leaves this process: processor cores and memory.

Docker, Kubernetes and Slurm set limits on control groups. The system still shows the whole machine then: whoever starts
a thread per core, or fills the free memory, is slowed down or killed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def cores() -> int:
    """Processor cores that this process may keep busy: those it may run on, and no more than its share of time.

    >>> 1 <= cores() <= os.cpu_count()
    True
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(share) for share in _shares())]))


def fit_threads() -> None:
    """Let torch start no more threads than this process has a share of time for, unless OMP_NUM_THREADS says how many.

    Threads that wait for their share hold up those that wait for them.
    """
    shares = list(_shares())
    if shares and not os.environ.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(min(torch.get_num_threads(), cores()))


def free_memory() -> int | None:
    """Bytes of memory that this process may still take; None if nothing tells."""
    limits = list(_rooms())
    if (available := _number_after(PROC / "meminfo", "MemAvailable:")) is not None:
        limits.append(available * 1024)
    elif not limits and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        limits.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(limits)) if limits else None


def _shares() -> Iterator[float]:
    """Processor time a second that the process's control groups may take."""
    for folder in _folders("cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")  # version 2, else version 1
        quota, period = quota or _text(folder / "cpu.cfs_quota_us"), period or _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):  # without a limit it is max or -1
            yield int(quota) / int(period)


def _rooms() -> Iterator[int]:
    """Bytes that the process's control groups may still take. Pages of files that nobody uses do not count as taken."""
    for folder in _folders("memory"):
        for limit, taken, unused in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, now = _text(folder / limit), _text(folder / taken)
            if most.isdigit() and now.isdigit():
                yield int(most) - int(now) + (_number_after(folder / "memory.stat", unused) or 0)


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
    """The number that follows a name at the begin of a line."""
    words = (line.split() for line in _text(path).splitlines())
    return next((int(w[1]) for w in words if len(w) > 1 and w[0] == name and w[1].isdigit()), None)
