"""Compiling Triton kernels side by side, before a run needs them one after another.

Triton compiles a kernel at its first launch, once for every set of types and sizes that it tells apart, and keeps it in
its cache on disk. On a fresh machine that takes half a minute. To learn which kernels a step needs, the step runs once
without launching any; the results of its operations are zeros then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from engine.errors import ConfigError
from engine.kernels import registry
from engine.kernels.registry import has_triton, interpreting

log = logging.getLogger("engine")

# The name of a kernel and what compiles it.
Job = tuple[str, Callable[[], Any]]


def warm_up(run: Callable[[], Any], *, workers: int | None = None) -> int:
    """Compile the Triton kernels that a function needs, on several threads, into Triton's cache and this process.

    What cannot be compiled is named in one warning, and left to the launch that needs it.

    Args:
        run: called once to learn which kernels it launches. No kernel runs, and the results of their operations are
            zeros. Everything else that it changes stays changed. Needs a GPU.
        workers: number of threads. Default: one per core.

    Returns:
        The number of kernels compiled or found in the cache.

    Raises:
        ConfigError: triton is missing, or its interpreter replaces the compiler.

    Example:
        >>> warm_up(lambda: step(batch))  # doctest: +SKIP
        31
    """
    require_compiler()
    with recording() as jobs:
        run()
    return compile_all(jobs, workers)


def require_compiler() -> None:
    """Raise ConfigError if triton is missing, or if its interpreter replaces the compiler."""
    if not has_triton() or interpreting():
        raise ConfigError(
            "compiling Triton kernels",
            "TRITON_INTERPRET=1" if has_triton() else "no triton",
            "triton's compiler",
            "Unset TRITON_INTERPRET." if has_triton() else "Install engine[triton].",
        )


@contextlib.contextmanager
def recording() -> Iterator[list[Job]]:
    """A context in which the engine's kernels are recorded instead of compiled and launched.

    Every kernel that this process has not compiled yet is added to the list once, for `compile_all`. Operations on CUDA
    tensors return zeros.
    """
    from triton import knobs

    jobs: list[Job] = []
    known: set[tuple[Any, str]] = set()

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        kernel, data = fn.jit_function, compile["specialization_data"]
        if not kernel.fn.__module__.startswith("engine."):
            return False
        if (kernel, data) not in known:
            known.add((kernel, data))
            jobs.append((fn.name, lambda: kernel.preload(data)))
        return True  # triton goes on without compiling or launching

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        with registry.blank_results():
            yield jobs
    finally:
        knobs.runtime.jit_cache_hook = before


def compile_all(jobs: Sequence[Job], workers: int | None = None) -> int:
    """Run all jobs on threads, and warn once about those that fail. Most of a compilation runs outside Python.

    Returns:
        The number of jobs that succeeded.
    """
    if not jobs:
        return 0
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    start = time.perf_counter()
    with ThreadPoolExecutor(workers, initializer=_begin, initargs=(device,)) as pool:
        reasons = list(pool.map(_attempt, jobs))
    # Python 3.11's parser counts its depth over all threads, and may fail for that. Alone a job does not.
    again = [job for job, reason in zip(jobs, reasons, strict=True) if reason is not None]
    failed = [reason for job in again if (reason := _attempt(job)) is not None]
    log.info(
        "kernels: %d compiled in %.1f s on %d threads", len(jobs) - len(failed), time.perf_counter() - start, workers
    )
    if failed:
        warnings.warn(
            f"{len(failed)} of {len(jobs)} Triton kernels could not be compiled beforehand, first {failed[0]}",
            stacklevel=2,
        )
    return len(jobs) - len(failed)


def _begin(device: int | None) -> None:
    """Choose the device for a thread, which would begin on device 0."""
    if device is not None:
        torch.cuda.set_device(device)


def _attempt(job: Job) -> str | None:
    """Why a job failed, in one line; None if it succeeded."""
    name, compile = job
    try:
        compile()
    except Exception as cause:  # the compiler's own errors have no common type
        return f"{name}: {' '.join(str(cause).split())[:200] or type(cause).__name__}"
    return None
