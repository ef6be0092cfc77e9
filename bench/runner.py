"""Interleaved, gated measurement of the suites in bench/suites, and the JSON line it gives.

A suite is a module of bench/suites with

    TITLE                   what is compared, in one line
    GOALS                   {"ratio" | "memory_ratio" | "value": (floor, aim)}
    SIDES                   names of what is timed: "engine" first, then "baseline" (where there is one), then others
    build(side, setting)    -> Work: everything prepared, ready to be called
    gate(setting)           raises unless the engine's result is right; asked before anything is timed

and, where they apply,

    ROUNDS                  default number of rounds
    MEMORY                  sides whose extra peak memory is measured
    MEMORY_REPEATS          processes a side's memory is the median of (default: 3, in quick runs 1)
    VALUE                   unit of the number that `Work.run` returns, for suites that measure another thing
                            than the time of a call (less is better)
    SLOW_SIDES              sides left out of quick runs
    details(setting, works, numbers) -> dict of further entries of the JSON line
"""

from __future__ import annotations

import gc
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from bench import machine

NAMES = (
    "epoch_fast", "epoch_faithful", "gru", "knn", "critics", "streaming_infonce", "concat_critic", "cubemlp",
    "loader_wait", "loader_throughput", "growth", "startup",
)  # fmt: skip
# Measured on request.
MORE_NAMES = ("epoch_mosi", "epoch_mosei", "epoch_avec", "epoch_bert", "conversion", "mi_benchmark")

SHORTEST = 0.5  # seconds: shorter calls are repeated until one measurement lasts as long
LONG = 20.0  # seconds: a point of a curve that takes longer is measured once, without warming up
# The first calls after another side find caches and memory full of that side's data: both sides run past that.
MOST_CALLS = 2000


@dataclass(frozen=True)
class Setting:
    """Size and place of a run. Quick runs use smaller shapes and fewer rounds."""

    quick: bool = False
    device: str = "cpu"


@dataclass
class Work:
    """One side of a comparison, ready to run.

    Attributes:
        run: one call of what is measured.
        samples: number of samples that one call processes, or 0.
        warmups: calls before the first one that is measured.
        returns_number: measure the number that `run` returns instead of the time that it takes.
        close: called at the end.
    """

    run: Callable[[], Any]
    samples: int = 0
    warmups: int = 1
    returns_number: bool = False
    close: Callable[[], None] = lambda: None


class RedGateError(Exception):
    """The correctness check of a suite failed, so that its timings mean nothing."""


def load_suite(name: str) -> ModuleType:
    """The module of a suite; KeyError for an unknown name."""
    if name not in (*NAMES, *MORE_NAMES):
        raise KeyError(name)
    return importlib.import_module(f"bench.suites.{name}")


def check_gate(name: str, setting: Setting) -> None:
    """Raise RedGateError unless the suite's correctness check passes, with products and recurrences in float32."""
    from bench.timing import precision

    try:
        with precision("fp32", setting.device):
            load_suite(name).gate(setting)
    except Exception as cause:
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise RedGateError(f"{name}: {type(cause).__name__}: {reason[:500]}") from cause


def run(
    name: str,
    setting: Setting,
    rounds: int | None = None,
    threads: int = 1,
    memory: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure one suite.

    Args:
        rounds: how often every side is measured, in turn; default: the suite's, or 1 in a quick run of a slow suite.
        threads: for both sides alike (the caller has pinned them).
        memory: also measure extra peak memory, in processes of its own.
        say: told what is going on.

    Returns:
        The JSON line's content: name, ratio, memory_ratio, value, engine, baseline, further sides under `others`,
        rounds, machine, versions, commit. Times are seconds per call. Entries that do not apply are left out.

    Raises:
        RedGateError: the engine's result is wrong.
    """
    suite = load_suite(name)
    say(f"{name}: {suite.TITLE}")
    check_gate(name, setting)
    say(f"{name}: correctness gate passed")
    rounds = rounds or (min(3, suite_rounds(suite)) if setting.quick else suite_rounds(suite))
    sides = [s for s in suite.SIDES if not (setting.quick and s in getattr(suite, "SLOW_SIDES", ()))]
    works = {}
    try:
        for side in sides:
            say(f"{name}: preparing {side}")
            works[side] = suite.build(side, setting)
        numbers = interleave(works, rounds, setting, say=lambda text: say(f"{name}: {text}"))
        summaries = {side: summary(numbers[side], works[side].samples) for side in sides}
        details = suite.details(setting, works, numbers) if hasattr(suite, "details") else {}
    finally:
        for work in works.values():
            work.close()
    if memory:
        from bench.memory import extra_peak

        for side in getattr(suite, "MEMORY", ()):
            if side in summaries:
                say(f"{name}: extra peak memory of {side}")
                peak = extra_peak(name, side, setting, threads, getattr(suite, "MEMORY_REPEATS", None))
                if peak is not None:
                    summaries[side]["extra_peak_bytes"] = peak
    return assemble(name, suite, setting, summaries, rounds, threads) | details


def suite_rounds(suite: ModuleType) -> int:
    return getattr(suite, "ROUNDS", 7)


def over_batches(
    suite: ModuleType, name: str, batches: Mapping[str, tuple[int, ...]], setting: Setting
) -> dict[str, dict[str, dict[str, float | None]]]:
    """{side: {batch size: {"seconds", "extra_peak_bytes"}}} of sides that the suite builds as `SIDE@BATCH`."""
    import torch

    from bench.memory import extra_peak

    curve: dict[str, dict[str, dict[str, float | None]]] = {}
    for side, sizes in batches.items():
        curve[side] = {}
        for size in sizes:
            work = suite.build(f"{side}@{size}", setting)
            seconds = measure(work, 1, setting)
            if seconds < LONG:
                calls = warm(work, setting)
                seconds = statistics.median(measure(work, calls, setting) for _ in range(3))
            work.close()
            del work
            peak = extra_peak(name, f"{side}@{size}", setting, torch.get_num_threads(), repeats=1)
            curve[side][str(size)] = {"seconds": seconds, "extra_peak_bytes": peak}
    return curve


def products(baseline: Work, engine_seconds: float, setting: Setting) -> dict[str, float]:
    """FLOPs of the baseline's matrix products, and the engine's rate of them as `gemm_fraction` of a 2048³ product's.

    It suits suites whose baseline computes nothing superfluous.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        baseline.run()
    flops, square = counter.get_total_flops(), torch.randn(2048, 2048, device=setting.device)
    gemm = Work(lambda: square @ square)
    calls = warm(gemm, setting)
    rate = 2 * 2048**3 / statistics.median(measure(gemm, calls, setting) for _ in range(3))
    return {"product_flops": flops, "gemm_fraction": flops / engine_seconds / rate}


def assemble(
    name: str, suite: ModuleType, setting: Setting, summaries: Mapping[str, dict], rounds: int, threads: int
) -> dict[str, Any]:
    """The JSON line's content from the summaries of all sides."""
    engine, baseline = summaries["engine"], summaries.get("baseline")
    result: dict[str, Any] = {"name": name, "title": suite.TITLE}
    if baseline is not None:
        result["ratio"] = baseline["median"] / engine["median"]
        if "extra_peak_bytes" in engine and "extra_peak_bytes" in baseline:
            result["memory_ratio"] = baseline["extra_peak_bytes"] / engine["extra_peak_bytes"]
    if hasattr(suite, "VALUE"):
        result["value"], result["unit"] = engine["median"], suite.VALUE
    result["engine"] = engine
    if baseline is not None:
        result["baseline"] = baseline
    others = {s: v for s, v in summaries.items() if s not in ("engine", "baseline")}
    for other in others.values():
        other["ratio"] = other["median"] / engine["median"]
    if others:
        result["others"] = others
    result["goals"] = {key: {"floor": floor, "aim": aim} for key, (floor, aim) in suite.GOALS.items()}
    return result | {
        "rounds": rounds,
        "quick": setting.quick,
        "device": setting.device,
        "machine": machine.machine(threads, setting.device),
        "versions": machine.versions(),
        "commit": machine.commit(),
    }


def interleave(
    works: Mapping[str, Work], rounds: int, setting: Setting, say: Callable[[str], None] = lambda text: None
) -> dict[str, list[float]]:
    """Warm up every side, then measure all of them in turn `rounds` times. The order rotates from round to round."""
    calls = {}
    for side, work in works.items():
        say(f"warming {side}")
        calls[side] = warm(work, setting)
    numbers: dict[str, list[float]] = {side: [] for side in works}
    order = list(works)
    for number in range(rounds):
        first = number % len(order)
        for side in order[first:] + order[:first]:
            numbers[side].append(measure(works[side], calls[side], setting))
        say(f"round {number + 1}/{rounds}: " + ", ".join(f"{s} {n[-1]:.4g}" for s, n in numbers.items()))
    return numbers


def warm(work: Work, setting: Setting) -> int:
    """Run the warm-up calls. Returns the number of calls for one measurement."""
    for _ in range(work.warmups):
        work.run()
    if work.returns_number or not work.warmups:
        return 1
    seconds = measure(work, 1, setting)
    return max(1, min(MOST_CALLS, int(SHORTEST / max(seconds, 1e-7)) + 1)) if seconds < SHORTEST else 1


def measure(work: Work, calls: int, setting: Setting) -> float:
    """Seconds per call, or the number that the work returns."""
    with _quiet():
        if work.returns_number:
            return float(work.run())
        _synchronize(setting.device)
        start = time.perf_counter()
        for _ in range(calls):
            work.run()
        _synchronize(setting.device)
        return (time.perf_counter() - start) / calls


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the context there is no garbage collection."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def summary(numbers: list[float], samples: int = 0) -> dict[str, Any]:
    """Median, 20th and 80th percentile of the rounds, and the rounds themselves."""
    record: dict[str, Any] = {
        "median": statistics.median(numbers),
        "p20": quantile(numbers, 0.2),
        "p80": quantile(numbers, 0.8),
        "all": [float(f"{n:.6g}") for n in numbers],
    }
    if samples:
        record["samples_per_second"] = samples / record["median"]
    return record


def quantile(numbers: list[float], q: float) -> float:
    """The q-quantile, linear between neighbours."""
    ordered = sorted(numbers)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def assert_same_gradient(gradient: Any, expected: Any, what: str) -> None:
    """Norm of the difference at most 1e-3 of the expected norm + 1e-4; for the gates of suites."""
    difference, size = float((gradient - expected).norm()), float(expected.norm())
    # written so that a NaN anywhere fails
    assert difference <= 1e-3 * size + 1e-4, f"gradient of {what}: |difference| {difference:.2e} of {size:.2e}"


def as_line(result: Mapping[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(result, allow_nan=False)


def meets(value: float, goal: float, key: str) -> bool:
    """Whether a figure reaches a goal. For a "value" less is better, for all other keys more."""
    return value <= goal if key == "value" else value >= goal


def verdict(result: Mapping[str, Any]) -> list[str]:
    """One sentence for every goal of a result."""
    lines = []
    for key, goal in result["goals"].items():
        if key not in result:
            continue
        value = result[key]
        aim, floor = (meets(value, goal[k], key) for k in ("aim", "floor"))
        word = "aim met" if aim else "floor met" if floor else "BELOW FLOOR"
        lines.append(f"{key} {value:.4g} (floor {goal['floor']:.4g}, aim {goal['aim']:.4g}): {word}")
    return lines
