"""Which of an operation's algorithms runs on a GPU, by a table of measurements: engine/kernels/dispatch.json.

    choose("infonce", dtype=q.dtype, device=q.device, sizes={"rows": 4096, ...})  -> "chunked"
    with use(infonce="fused"):  ...      for a block; or ENGINE_DISPATCH="infonce=fused,mi_bound=chunked"
    write(TABLE, measure("infonce", "cuda"))     measure this machine's GPU and keep the result

An operation registers its algorithms; "eager" (plain torch) is always one of them. An entry of the table gives the
fastest one for an operation, a precision ("fp32", "tf32", "bf16", "fp16"), an architecture ("sm90") and a size class.
It also holds the milliseconds of all candidates and their source: measured (with date, chip and versions) or modelled.

How an entry is found:
1. Take the entries of the operation and the precision. Without entries for fp16, take those for bf16.
2. Of these, take the architecture whose number is nearest to the device's; of two equally near ones the older one.
3. Take the nearest size class by ratio, one size after the other in the operation's order (width before rows, say).
4. If there is no entry, if the device is no GPU, or if the entry's algorithm cannot take these sizes, the operation's
   own rule of thumb decides.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import json
import os
import pkgutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import engine.kernels
from engine.errors import ConfigError
from engine.files import write_text
from engine.streams import mend_generator

TABLE = Path(__file__).with_suffix(".json")
VARIABLE = "ENGINE_DISPATCH"
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The most programs that a GPU takes along the second and third axis of a grid.
MOST_PROGRAMS = 65_535
KEYS = ("operation", "precision", "architecture", "sizes")

Sizes = Mapping[str, int]
# Runs an operation once, forward and backward.
Run = Callable[[], Any]


@dataclass(frozen=True)
class Operation:
    """The arguments of `register`."""

    order: tuple[str, ...]
    candidates: Mapping[str, Callable[[Sizes], bool]]
    rule: Callable[[str, Sizes], str]
    work: Callable[[torch.device, torch.dtype, Sizes], Run] | None = None
    classes: Sequence[Sizes] = field(default=())


_operations: dict[str, Operation] = {}
_chosen: dict[tuple, str] = {}
_override: dict[str, str] = {}
_from_environment: str | None = None


def register(
    operation: str,
    order: Sequence[str],
    candidates: Mapping[str, Callable[[Sizes], bool]],
    rule: Callable[[str, Sizes], str],
    *,
    work: Callable[[torch.device, torch.dtype, Sizes], Run] | None = None,
    classes: Sequence[Sizes] = (),
) -> None:
    """Register an operation and its algorithms.

    Args:
        order: names of the sizes that the table is searched by, the most important one first.
        candidates: algorithm -> whether it can take these sizes; "eager" must be one.
        rule: (precision, sizes) -> algorithm, used if the table has no answer.
        work: (device, dtype, sizes) -> function that runs the operation once, forward and backward, for `measure`.
        classes: the sizes that `measure` takes.
    """
    if "eager" not in candidates:
        raise ValueError(f"{operation}: eager torch must be a candidate")
    _operations[operation] = Operation(tuple(order), dict(candidates), rule, work, tuple(classes))


def choose(operation: str, *, dtype: torch.dtype, device: torch.device, sizes: Sizes) -> str:
    """The algorithm to run. Pure Python without device work; torch.compile can trace it, also with dynamic sizes.

    Args:
        operation: a registered operation.
        dtype: of the operation's inputs; fp32 counts as tf32 where `torch.backends.cuda.matmul.allow_tf32` is set.
        device: of its inputs.
        sizes: the operation's sizes by name. All sizes of its order must be given.

    Raises:
        ConfigError: an override that names an unknown operation or algorithm, or one that cannot take these sizes.
    """
    if torch.compiler.is_compiling():
        return _choose(operation, *_table_of(dtype, device), sizes)
    _read_environment()
    precision = precision_of(dtype)
    key = (operation, precision, device, *sizes.items(), _override.get(operation))
    if key not in _chosen:
        _chosen[key] = _choose(operation, precision, architecture(device), sizes)
    return _chosen[key]


class use:
    """Choose an operation's algorithm: `with use(infonce="chunked"):`. None leaves the choice to the table.

    All threads share the choice, because torch runs backward passes in threads of its own.

    Raises:
        ConfigError: an unknown operation or algorithm.
    """

    def __init__(self, **algorithms: str | None):
        _read_environment()
        _check(algorithms, "dispatch.use")
        self.previous = dict(_override)
        for operation, algorithm in algorithms.items():
            _override.pop(operation, None)
            if algorithm is not None:
                _override[operation] = algorithm

    def __enter__(self) -> use:
        return self

    def __exit__(self, *exception: object) -> None:
        _override.clear()
        _override.update(self.previous)


def precision_of(dtype: torch.dtype) -> str:
    """The table's name for how inputs of a dtype are multiplied on a GPU."""
    if dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")


def architecture(device: torch.device) -> int | None:
    """Compute capability as one number, 90 for 9.0; None without such a GPU."""
    return _capability(device.index) if device.type == "cuda" else None


def _table_of(dtype: torch.dtype, device: torch.device) -> tuple[str, int | None]:
    return precision_of(dtype), architecture(device)


# What torch.compiler.assume_constant_result sets; that imports the compiler, which takes a second.
_table_of._dynamo_marked_constant = True


@functools.cache
def _capability(index: int | None) -> int | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _choose(operation: str, precision: str, arch: int | None, sizes: Sizes) -> str:
    known = _operations[operation]
    if operation in _override:
        algorithm = _override[operation]
        if not known.candidates[algorithm](sizes):
            what = f"{algorithm} for {', '.join(f'{k} {v}' for k, v in sizes.items())}"
            raise ConfigError(f"dispatch of {operation}", what, "sizes that it takes", "Choose another algorithm.")
        return algorithm
    algorithm = None if arch is None else _look_up(known, operation, precision, arch, sizes)
    if algorithm is None or algorithm not in known.candidates or not known.candidates[algorithm](sizes):
        algorithm = known.rule(precision, sizes)
    return algorithm


def _look_up(known: Operation, operation: str, precision: str, arch: int, sizes: Sizes) -> str | None:
    entries = _TABLE.get((operation, precision)) or (_TABLE.get((operation, "bf16")) if precision == "fp16" else None)
    if not entries:
        return None
    nearest = min({a for a, _, _ in entries}, key=lambda a: (abs(a - arch), a))
    left = [(s, algorithm) for a, s, algorithm in entries if a == nearest]
    for name in known.order:
        kept = _nearest(sorted({s[name] for s, _ in left}), sizes[name])
        left = [(s, algorithm) for s, algorithm in left if s[name] == kept]
    return left[0][1]


def _nearest(classes: list[int], size: int) -> int:
    """The class nearest by ratio. Comparisons only, so that a dynamic size stays one."""
    for low, high in pairwise(classes):
        if size * size <= low * high:
            return low
    return classes[-1]


def read(path: str | Path = TABLE) -> list[dict[str, Any]]:
    """The entries of a table.

    Raises:
        ConfigError: a file that is no table.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["entries"]
        for entry in entries:
            {key: entry[key] for key in (*KEYS, "algorithm", "milliseconds", "source")}
            int(entry["architecture"].removeprefix("sm"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(str(path), repr(error), "a dispatch table", "Write it with dispatch.write.") from None
    return entries


def write(path: str | Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Add entries to a table. They replace those for the same operation, precision, architecture and sizes.

    The file has one entry per line, sorted. If it is the package's own table, the running process uses it from now on.
    """
    path = Path(path)
    kept = {_key(entry): entry for entry in (read(path) if path.exists() else [])}
    kept.update((_key(entry), entry) for entry in entries)
    lines = ",\n".join("  " + json.dumps(kept[key]) for key in sorted(kept))
    write_text(path, f'{{"entries": [\n{lines}\n]}}\n')
    if path == TABLE:
        _load()


def _key(entry: Mapping[str, Any]) -> tuple:
    return entry["operation"], entry["precision"], entry["architecture"], tuple(entry["sizes"].items())


def measure(
    operation: str,
    device: str | torch.device = "cuda",
    *,
    precisions: Sequence[str] = PRECISIONS,
    classes: Sequence[Sizes] | None = None,
    milliseconds: float = 100.0,
) -> list[dict[str, Any]]:
    """Time every candidate of an operation, forward and backward, as a replayed CUDA graph: entries for `write`.

    Training replays graphs, in which a launch costs the host nothing. Work that cannot be captured is timed uncaptured.

    Args:
        device: a CUDA device.
        precisions: which of `PRECISIONS`.
        classes: sizes to measure at; those of the operation if None.
        milliseconds: about how long to time each candidate.

    Returns:
        One entry for each precision and class, with the median time of every candidate that can take it. Candidates
        that run out of memory are left out.
    """
    known, device = _operations[operation], torch.device(device)
    entries = []
    for precision in precisions:
        for sizes in known.classes if classes is None else classes:
            times = {}
            for algorithm, takes in known.candidates.items():
                if takes(sizes):
                    with use(**{operation: algorithm}), _tf32(precision == "tf32"):
                        time = _time(known.work(device, DTYPES[precision], sizes), milliseconds)
                    if time is not None:
                        times[algorithm] = round(time, 4)
            if times:
                entries.append(
                    {
                        "operation": operation, "precision": precision, "architecture": f"sm{architecture(device)}",
                        "sizes": dict(sizes), "algorithm": min(times, key=times.get), "milliseconds": times,
                        "source": _source(device),
                    }
                )  # fmt: skip
    return entries


def _time(run: Run, milliseconds: float) -> float | None:
    """Median milliseconds of a run; None if it does not fit into memory."""
    try:
        for _ in range(3):  # compiles kernels, fills torch's memory pool
            run()
        run = _replay_of(run)
        first = _events(run)
        return statistics.median(_events(run) for _ in range(max(5, min(100, int(milliseconds / max(first, 1e-3))))))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def _replay_of(run: Run) -> Run:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what a first call on a stream prepares must not be captured
        run()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        mend_generator(torch.device("cuda"))
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return run
    return graph.replay


def _events(run: Run) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@contextmanager
def _tf32(allowed: bool):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _source(device: torch.device) -> str:
    import triton

    name, day = torch.cuda.get_device_name(device), datetime.date.today().isoformat()
    return f"measured {day} {name}, torch {torch.__version__}, triton {triton.__version__}"


def _check(algorithms: Mapping[str, str | None], where: str) -> None:
    for operation, algorithm in algorithms.items():
        if operation not in _operations:
            _import_operations()
        if operation not in _operations:
            expected = f"one of {', '.join(sorted(_operations))}"
            raise ConfigError(where, f"operation {operation!r}", expected, "Name an operation with several algorithms.")
        if algorithm is not None and algorithm not in _operations[operation].candidates:
            expected = f"one of {', '.join(_operations[operation].candidates)}"
            raise ConfigError(where, f"{operation}={algorithm}", expected, "Choose one of these.")


def _import_operations() -> None:
    """Every operation registers its algorithms when it is imported."""
    for info in pkgutil.iter_modules(engine.kernels.__path__):
        if info.ispkg and importlib.util.find_spec(f"engine.kernels.{info.name}.op"):
            importlib.import_module(f"engine.kernels.{info.name}.op")


def _read_environment() -> None:
    """Apply ENGINE_DISPATCH if it has changed."""
    global _from_environment
    text = os.environ.get(VARIABLE, "")
    if text == (_from_environment or ""):
        return
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    if any(not separator for _, separator, _ in pairs):
        raise ConfigError(VARIABLE, repr(text), "operation=algorithm, separated by commas", "Correct or unset it.")
    algorithms = {name.strip(): algorithm.strip() for name, _, algorithm in pairs}
    _check(algorithms, VARIABLE)
    _override.clear()
    _override.update(algorithms)
    _from_environment = text


def _load() -> None:
    """Read the table into what `choose` searches: (operation, precision) -> (architecture, sizes, algorithm)."""
    _TABLE.clear()
    _chosen.clear()
    for entry in read():
        place = _TABLE.setdefault((entry["operation"], entry["precision"]), [])
        place.append((int(entry["architecture"].removeprefix("sm")), entry["sizes"], entry["algorithm"]))


_TABLE: dict[tuple[str, str], list[tuple[int, Sizes, str]]] = {}
_load()
