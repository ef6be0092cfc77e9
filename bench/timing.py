"""Timing on a GPU, eagerly and as a replayed CUDA graph, with launches and busy time from a trace."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from engine.streams import mend_generator

Run = Callable[[], Any]
LEAST, MOST = 5, 50  # calls that one figure is the median of
BUDGET = 0.25  # seconds for the calls of one side
WARMUPS = 3  # the first calls compile kernels and fill torch's memory pool


@contextmanager
def precision(name: str, device: str) -> Iterator[None]:
    """Within the context products and recurrences of float32 tensors are computed in fp32, tf32 or bf16.

    bf16 is autocast, and float32 products of precision "medium": the critics are float32 under autocast too.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision({"fp32": "highest", "tf32": "high", "bf16": "medium"}[name])
    torch.backends.cudnn.allow_tf32 = name != "fp32"
    try:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=name == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class Clock:
    """Measures calls on a device. Figures that a CPU cannot give are left out.

    Args:
        cuda: whether events, graphs and traces are a GPU's; None: where the device is one.
    """

    def __init__(self, device: str, cuda: bool | None = None):
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda" if cuda is None else cuda

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def interleaved(
        self,
        sides: Mapping[str, Run],
        rounds: int = 3,
        budget: float = BUDGET,
        failed: Callable[[str, Exception], None] | None = None,
    ) -> dict[str, float]:
        """Median milliseconds per call of each side. The sides take turns, in a different order in each round.

        failed: is told of a side that fails, which then has no figure. None: the error is raised.
        """
        counts, times = {}, {side: [] for side in sides}

        def attempt(side: str, work: Callable[[], Any]) -> None:
            try:
                work()
            except Exception as cause:
                if failed is None:
                    raise
                failed(side, cause)
                times.pop(side)

        def begin(side: str, run: Run) -> None:
            for _ in range(WARMUPS if self.cuda else 1):
                run()
            first = self._calls(run, 1)[0]
            counts[side] = max(1, min(MOST, int(budget * 1e3 / max(first, 1e-3)) // rounds))

        for side, run in sides.items():
            attempt(side, lambda side=side, run=run: begin(side, run))
        order = list(times)
        for number in range(rounds if order else 0):
            first = number % len(order)
            for side in order[first:] + order[:first]:
                if side in times:
                    attempt(side, lambda side=side: times[side].extend(self._calls(sides[side], counts[side])))
        return {side: statistics.median(each) for side, each in times.items()}

    def _calls(self, run: Run, count: int) -> list[float]:
        """Milliseconds of each of several calls, without waiting between them."""
        if not self.cuda:
            milliseconds = []
            for _ in range(count):
                start = time.perf_counter()
                run()
                milliseconds.append(1e3 * (time.perf_counter() - start))
            return milliseconds
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        self.synchronize()
        for start, end in events:
            start.record()
            run()
            end.record()
        self.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def wall(self, run: Run, calls: int = 10) -> float:
        """Milliseconds per call on the host without waiting in between: the cost of a step that launches limit."""
        for _ in range(WARMUPS):
            run()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        self.synchronize()
        return 1e3 * (time.perf_counter() - start) / calls

    def graph(self, run: Run) -> Run:
        """A function that replays `run` as one CUDA graph; on a CPU `run` itself. Errors of the capture are raised."""
        if not self.cuda:
            return run
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except Exception:
            mend_generator(self.device)  # or the next random number of this process would fail
            raise
        return graph.replay

    def traced(self, run: Run, without: str = "Optimizer.") -> dict[str, float]:
        """`launches` (kernels, copies and fills) of one call, and `device_ms`, the time in which any of them ran.

        Events whose names begin with `without` are left out; the optimisers' are no launches, but spans of them.
        """
        if not self.cuda:
            return {}
        from torch.profiler import ProfilerActivity, profile

        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            run()
            self.synchronize()
        # the raw events: making torch's own of some hundred thousand takes minutes
        spans = sorted(
            (e.start_ns(), e.start_ns() + e.duration_ns())
            for e in profiled.profiler.kineto_results.events()
            if e.device_type() == torch.autograd.DeviceType.CUDA and not e.name().startswith(("Optimizer.", without))
        )
        return {"launches": len(spans), "device_ms": union(spans) / 1e6}

    def peak_mib(self, run: Run) -> float | None:
        """Memory that a call needs beyond the memory in use before it."""
        if not self.cuda:
            return None
        run()
        self.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self.synchronize()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


def union(spans: list[tuple[int, int]]) -> int:
    """Length of the union of sorted intervals, because kernels on several streams overlap."""
    total, reached = 0, None
    for start, end in spans:
        if reached is None or start >= reached:
            total, reached = total + end - start, end
        elif end > reached:
            total, reached = total + end - reached, end
    return total


def error_of(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the error over the norm of the exact result."""
    exact = exact.double()
    return float((result.double() - exact).norm() / exact.norm().clamp(min=1e-300))
