"""Independent pieces of work side by side on CUDA streams.

A small batch leaves most of a GPU idle: work that does not depend on each other then costs the time of its longest
piece. What a stream saves is little beside what queueing costs the host, so that pieces run side by side only while a
CUDA graph is captured: the graph keeps them so at every replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# True and False: always and never, on CUDA; None: while a CUDA graph is captured.
ENABLED: bool | None = None

_streams: dict[tuple[int, int, int], torch.cuda.Stream] = {}


def run_parallel(calls: Sequence[tuple[Callable[..., Any], tuple]]) -> list[Any]:
    """The results of `[(function, arguments), …]`, which must not depend on each other.

    Functions are called in their order, so that random numbers do not depend on the streams. The first runs on the
    current stream, each other one on a stream of its own that is forked from the current one and joined to it again; on
    other devices than CUDA all run where they are. Backward passes run on the streams of their forward passes: autograd
    sees to that. May be nested.

    Args:
        calls: the arguments hold all tensors that a function reads, in lists and tuples or by themselves, but for
            parameters and for the first function's: memory that is freed must not be used anew before the function's
            stream is done with it. Results are tensors, or lists and tuples of them.
    """
    device = next((t.device for _, arguments in calls for t in _tensors(arguments)), None)
    if device is None or device.type != "cuda" or torch.compiler.is_compiling() or not _wanted():
        return [function(*arguments) for function, arguments in calls]
    current = torch.cuda.current_stream(device)
    start = current.record_event()
    results = []
    for number, (function, arguments) in enumerate(calls):
        if number == 0:
            results.append(function(*arguments))
            continue
        side = _side_stream(current, number)
        side.wait_event(start)
        for tensor in _tensors(arguments):
            tensor.record_stream(side)
        with torch.cuda.stream(side):
            results.append(function(*arguments))
    for number, result in enumerate(results[1:], 1):
        current.wait_stream(_side_stream(current, number))
        for tensor in _tensors(result):
            tensor.record_stream(current)
    return results


def _wanted() -> bool:
    if ENABLED is None:
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return ENABLED


def _side_stream(current: torch.cuda.Stream, number: int) -> torch.cuda.Stream:
    """The `number`-th stream beside `current`, the same at every call."""
    key = current.device_index, current.cuda_stream, number
    if key not in _streams:
        _streams[key] = torch.cuda.Stream(current.device)
    return _streams[key]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
