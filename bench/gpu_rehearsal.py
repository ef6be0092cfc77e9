"""What `python -m bench.gpu --rehearse` puts in the place of a GPU, so that its code runs where there is none.

Tensors lie on the CPU. Events, streams, graphs, memory and traces answer as a GPU's would: events tell the host's time,
a graph runs its work when it is captured and does nothing when it is replayed, and a trace holds two kernels.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch


class _Event:
    def __init__(self, *args: Any, **kwargs: Any):
        self.time = 0.0

    def record(self, *args: Any) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.time - self.time)

    def synchronize(self) -> None:
        pass


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def wait_stream(self, other: _Stream) -> None:
        pass


class _Graph:
    def replay(self) -> None:
        time.sleep(1e-5)


class _Kernel:
    """An event of torch's tracer."""

    def __init__(self, start: int):
        self.start = start

    def start_ns(self) -> int:
        return self.start

    def duration_ns(self) -> int:
        return 1000

    def name(self) -> str:
        return "kernel"

    def device_type(self) -> torch.autograd.DeviceType:
        return torch.autograd.DeviceType.CUDA


class _Profile:
    def __init__(self, *args: Any, **kwargs: Any):
        self.profiler = self.kineto_results = self

    def __enter__(self) -> _Profile:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def events(self) -> list[_Kernel]:
        return [_Kernel(0), _Kernel(2000)]


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """A context in which what `bench.gpu` asks of a GPU is answered, for tensors that lie on the CPU."""
    answers = {
        "Event": _Event,
        "Stream": _Stream,
        "CUDAGraph": _Graph,
        "graph": lambda *a, **k: contextlib.nullcontext(),
        "stream": lambda *a, **k: contextlib.nullcontext(),
        "current_stream": _Stream,
        "synchronize": lambda *a: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *a: None,
        "memory_allocated": lambda *a: 0,
        "max_memory_allocated": lambda *a: 3 << 20,
        "get_device_name": lambda *a: "no GPU: a rehearsal",
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch("torch.profiler.profile", _Profile))
        yield
