"""The machine, versions and commit of a measurement, and the pinning of threads."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "numpy", "numba", "scikit-learn")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pin_environment(threads: int) -> None:
    """Set the thread counts that libraries read when they are loaded. Call it before torch is imported."""
    for name in THREAD_VARIABLES:
        os.environ[name] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")


def pin_threads(threads: int) -> None:
    """Give torch and the BLAS libraries of numpy and scikit-learn the same number of threads."""
    import threadpoolctl
    import torch

    torch.set_num_threads(threads)
    threadpoolctl.threadpool_limits(threads)


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """The machine without its name: processor, cores, threads in use, memory, system, and the GPU if one is used."""
    record: dict[str, Any] = {
        "processor": _processor(),
        "instructions": instructions(),
        "cores": cores(),
        "threads": threads,
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.startswith("cuda"):
        import torch

        record["gpu"] = torch.cuda.get_device_name(device)
    return record


def instructions() -> str:
    """Torch's name for the widest vectors that it uses on this processor, such as AVX2 or AVX512.

    Ratios of CPU kernels depend on it more than on the processor's name.
    """
    import torch

    return torch.backends.cpu.get_cpu_capability()


def versions() -> dict[str, str]:
    """Python and the packages that decide a benchmark's speed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def commit() -> str:
    """The commit of the working tree, with "+" where tracked files differ from it; "" outside a repository."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return ""
    # results and the table made of them are what a run of all benchmarks itself changes
    paths = ["--", ".", ":(exclude)bench/results", ":(exclude)README.md", ":(exclude)docs/results.md"]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", *paths], capture_output=True).returncode != 0
    return head.stdout.strip() + ("+" if changed else "")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
