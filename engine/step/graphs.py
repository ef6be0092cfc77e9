"""CUDA graphs: functions that are captured once for every shape and then replayed, and what cannot be captured."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from engine.errors import ConfigError
from engine.kernels import registry
from engine.streams import mend_generator

LIMIT = 64  # graphs that a step keeps; further shapes run uncaptured
KERNELS = str(Path(registry.__file__).parent)

log = logging.getLogger("engine")


class NotCapturable(ConfigError):
    """An operation that a CUDA graph cannot hold."""

    def __init__(self, operation: str, where: str, why: str):
        super().__init__(
            "graphs", f"{operation} at {where}: {why}", "operations that a CUDA graph can replay",
            "Change the model there, or train with graphs off (train.graphs=off).",
        )  # fmt: skip


# -- what cannot be captured ---------------------------------------------------------------------------------------


_READS = {"_local_scalar_dense": "the host waits for its value"}
_SIZES = dict.fromkeys(
    ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"),
    "the size of its result depends on values",
)


class CaptureWatch(TorchDispatchMode):
    """Finds the first operation that a CUDA graph could not hold, on any device.

    Args:
        strict: raise an error there. Otherwise the error is kept as `problem`, and the code runs to its end.
    """

    def __init__(self, strict: bool = True):
        super().__init__()
        self.strict = strict
        self.problem: NotCapturable | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        why = _READS.get(name) or _SIZES.get(name)
        if name == "index" and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
            why = "the size of its result depends on values"
        if name in ("copy_", "_to_copy", "index") and why is None:
            devices = {t.device.type for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
            target = (kwargs or {}).get("device")
            if len(devices | ({torch.device(target).type} if target is not None else set())) > 1:
                why = "data move between host and device"
        if why is not None:
            where, ours = _caller()
            # A kernel for CPU tensors may read their values: on a GPU another kernel runs.
            if not (ours and all(t.device.type == "cpu" for t in tree_iter(args) if isinstance(t, Tensor))):
                self.problem = self.problem or NotCapturable(name.strip("_"), where, why)
                if self.strict:
                    raise self.problem
        return func(*args, **(kwargs or {}))


def _caller() -> tuple[str, bool]:
    """The place outside of torch that called an operation, and whether it is in the engine's kernels."""
    frame = sys._getframe(2)
    library = str(Path(torch.__file__).parent)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((library, "<")):
            return f"{Path(file).name}:{frame.f_lineno}", file.startswith(KERNELS)
        frame = frame.f_back
    return "an unknown place", False


# -- memory that a graph reads and did not allocate ----------------------------------------------------------------


_read: list[Any] | None = None


@contextlib.contextmanager
def noting_reads() -> Iterator[list[Any]]:
    """A context around a capture; gives what the graph must keep alive."""
    global _read
    before, _read = _read, []
    try:
        yield _read
    finally:
        _read = before


def keep_for_graph(thing: Any) -> None:
    """Have the graph that is being captured, if one is, keep alive what it reads by address."""
    if _read is not None:
        _read.append(thing)


# -- graphs ---------------------------------------------------------------------------------------------------------


class GraphRunner:
    """Runs functions without arguments, each under a key: captured once and then replayed, or uncaptured.

    Args:
        device: where the functions' buffers are.
        capture: False runs all functions uncaptured, which works on every device.
        strict: raise `NotCapturable` where a function cannot be captured. Otherwise one warning is logged, and from
            then on everything runs uncaptured.
        warm_ups: uncaptured runs before a capture. The first is watched. torch.compile compiles nothing while it is
            watched, and so needs a second.
        limit: most graphs kept at once.
    """

    def __init__(self, device: torch.device, capture: bool, strict: bool, warm_ups: int = 1, limit: int = LIMIT):
        self.device, self.capture, self.strict, self.warm_ups, self.limit = device, capture, strict, warm_ups, limit
        self._graphs: dict[Hashable, Any] = {}
        self._reads: dict[Hashable, list[Any]] = {}  # what each of them reads by address
        self._seen: Counter[Hashable] = Counter()
        self._uncaptured: set[Hashable] = set()
        self._watching = True
        if capture:
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()  # memory that all graphs share

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Forget all graphs: memory that they read has moved."""
        self._seen.clear()
        self._uncaptured.clear()
        self._drop_graphs()

    def _drop_graphs(self) -> None:
        self._graphs.clear()
        self._reads.clear()
        if self.capture:
            # torch refuses new graphs in a pool without graphs while a tensor in it is still alive.
            self._pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """A context that queues work on the stream on which graphs are captured and replayed."""
        if not self.capture:
            yield
            return
        outside = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outside.wait_stream(self._stream)

    def run(self, key: Hashable, function: Callable[[], None]) -> bool:
        """Run `function`: replay the graph of this key, or warm up, capture or run it uncaptured.

        Returns:
            whether a graph was replayed and no more: no Python of the function ran.
        """
        if key in self._graphs:
            self._graphs[key].replay()
            return True
        self._seen[key] += 1
        with registry.static():
            if self._seen[key] == 1 and self._watching:
                self._watched(function)
            elif not self.capture or key in self._uncaptured or self._seen[key] <= self.warm_ups:
                function()
            elif len(self._graphs) >= self.limit:
                log.warning("%d CUDA graphs are kept, no more are made: further shapes run uncaptured", self.limit)
                self._uncaptured.add(key)
                function()
            elif self._captured(key, function):
                self._graphs[key].replay()
            else:
                function()
        return False

    def _watched(self, function: Callable[[], None]) -> None:
        # Run it once even where it cannot be captured: running a step twice would train twice on its batch.
        with CaptureWatch(self.strict) as watch:
            function()
        if watch.problem is not None:
            self._give_up(watch.problem)

    def _captured(self, key: Hashable, function: Callable[[], None]) -> bool:
        """Whether the function could be captured under the key."""
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                noting_reads() as reads,
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                function()
        except ConfigError:
            raise
        except RuntimeError as error:
            cause = _first_error(error)
            if isinstance(cause, torch.OutOfMemoryError):
                if error is not cause:  # streams were not joined, and the capture could not end
                    mend_generator(self.device)
                    self._drop_graphs()  # they draw from the state that was replaced, and are captured again
                self._no_room_for(key, cause)
            else:
                mend_generator(self.device)  # only here: graphs that are kept draw from the state it replaces
                self._give_up(NotCapturable("an operation", _raised_at(cause), str(cause).splitlines()[0]))
            return False
        self._graphs[key], self._reads[key] = graph, reads
        return True

    def _no_room_for(self, key: Hashable, cause: torch.OutOfMemoryError) -> None:
        self._uncaptured.add(key)
        log.warning(
            "out of memory while a CUDA graph was captured for %s (%d are kept): this shape runs uncaptured. A smaller "
            "batch_size, or train.graphs=off, needs less. %s",
            key, len(self._graphs), str(cause).splitlines()[0],
        )  # fmt: skip
        torch.cuda.empty_cache()

    def _give_up(self, cause: NotCapturable) -> None:
        if self.strict:
            raise cause
        log.warning("steps run without CUDA graphs: %s", cause)
        self.capture = self._watching = False
        self._graphs.clear()
        self._reads.clear()


def _first_error(error: BaseException) -> BaseException:
    """The error that led to this one. Ending a capture that failed raises a second error."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _raised_at(error: BaseException) -> str:
    """The last place outside of torch in an error's traceback."""
    library, place, trace = str(Path(torch.__file__).parent), "an unknown place", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith((library, "<")):
            place = f"{Path(file).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
