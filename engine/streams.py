"""Independent pieces of work side by side on CUDA streams.

A small batch leaves most of a GPU idle. Independent pieces that run side by side take the time of the longest one. But
queueing on streams costs the host more than that saves. So pieces run side by side only while a CUDA graph is captured,
and the graph keeps them so at every replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# On CUDA. True: always. False: never. None: while a CUDA graph is captured.
ENABLED: bool | None = None

_streams: dict[tuple[int, int, int], torch.cuda.Stream] = {}


def run_parallel(calls: Sequence[tuple[Callable[..., Any], tuple]]) -> list[Any]:
    """The results of `[(function, arguments), …]`, which must not depend on each other.

    Functions are called in their order, so random numbers do not depend on the streams. On CUDA the first function runs
    on the current stream. Each of the others runs on a stream of its own, which starts from the current one and joins
    it again. autograd runs each backward pass on the stream of its forward pass. Calls may be nested.

    Args:
        calls: the arguments must hold all tensors that a function reads, parameters aside, on their own or in lists and
            tuples. Otherwise memory could be freed and used again while a stream still reads it. Results are tensors,
            or lists and tuples of them.

    Example:
        >>> run_parallel([(torch.neg, (torch.ones(1),)), (torch.exp, (torch.zeros(1),))])
        [tensor([-1.]), tensor([1.])]
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


def mend_generator(device: torch.device) -> None:
    """Give torch's generator a new state that draws the same numbers.

    After a capture that failed, torch's generator still believes that the capture goes on, and every draw fails.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    fresh = torch.Generator(device)
    fresh.set_state(generator.get_state())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())
