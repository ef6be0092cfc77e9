"""Where a training step's time goes: a few batches of each stage, by named parts, and a trace that Perfetto opens.

Parts cost nothing unless a profile is being taken. A part names a stretch of a step and not an operation; the trace
shows the operations in it. Only a few batches are profiled, because a profile of a whole epoch would be too large.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.files import atomic_path, write_text

PREFIX = "engine."
STAGES = ("collect", "stage1", "stage2")
BATCHES = 6  # profiled batches of each stage
WARM_UP = 2  # batches of a stage before those, where it has so many
# categories of a trace: work on a GPU, and calls that queue it
DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
LAUNCHES = {"cuda_runtime", "cuda_driver"}

Interval = tuple[float, float]

_profiler: Profiler | None = None


def part(name: str) -> contextlib.AbstractContextManager[Any]:
    """A context whose time is reported under `name` while a profile is taken. A name in STAGES is a whole stage."""
    if torch.compiler.is_compiling() or _profiler is None:
        return contextlib.nullcontext()
    if name in STAGES:
        return _profiler.stage(name)
    return torch.profiler.record_function(PREFIX + name) if _profiler.running else contextlib.nullcontext()


@dataclass(frozen=True)
class Share:
    """Time of one part in all profiled batches.

    Attributes:
        seconds: on the host.
        device_seconds: on a GPU, for the work that the part queued; None without a GPU.
        idle: share of the host's seconds in which the GPU did nothing; None without a GPU.
    """

    seconds: float
    device_seconds: float | None = None
    idle: float | None = None


@dataclass(frozen=True)
class StageShares:
    """Times of one stage.

    Attributes:
        batches: number of profiled batches.
        of: number of batches in an epoch.
        whole: time of the stage.
        parts: times of its parts, longest first; "other" is the rest of the stage.
    """

    batches: int
    of: int
    whole: Share
    parts: dict[str, Share]


class Profiler:
    """Profiles a few batches of each stage of one epoch, on the host and on the GPU if `device` is one.

    Args:
        of: number of batches of each stage in an epoch.
        batches: number of batches to profile.
    """

    def __init__(self, device: torch.device, of: Mapping[str, int], batches: int = BATCHES):
        self.device, self.of, self.batches = device, of, batches
        self.shares: dict[str, StageShares] = {}
        self.trace: dict[str, Any] = {"traceEvents": []}
        self._stage, self._seen, self._first = "", 0, 0
        self._profile: torch.profiler.profile | None = None
        self._span: torch.profiler.record_function | None = None

    @property
    def running(self) -> bool:
        return self._profile is not None

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Within the context an epoch is profiled."""
        global _profiler
        _profiler = self
        try:
            yield
        finally:
            _profiler = None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Within the context one stage runs; see `part`."""
        self._stage, self._seen = name, 0
        self._first = min(WARM_UP, max(self.of.get(name, 0) - self.batches, 0))
        try:
            self._start_or_end()
            yield
        finally:
            self._end()

    def batch_done(self) -> None:
        """Call this after every batch."""
        self._seen += 1
        self._start_or_end()

    def _start_or_end(self) -> None:
        if self._seen == self._first and self._stage not in self.shares:
            self._start()
        elif self._seen == self._first + self.batches:
            self._end()

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities, acc_events=True)
        self._profile.start()
        self._wait()
        self._span = torch.profiler.record_function(PREFIX + self._stage)
        self._span.__enter__()

    def _end(self) -> None:
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        self._wait()
        self._span.__exit__(None, None, None)
        profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            trace = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        events = trace["traceEvents"]
        done = self._seen - self._first
        if done:
            self.shares[self._stage] = stage_shares(events, self._stage, done, self.of.get(self._stage, done))
        self.trace = trace | {"traceEvents": self.trace["traceEvents"] + [_slim(e) for e in events]}

    def _wait(self) -> None:
        """Wait for the GPU, so that its work falls into the profile."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def save(self, folder: Path) -> str:
        """Write shares.txt, shares.json and trace.json (open it at https://ui.perfetto.dev) into `folder`.

        Returns:
            the shares as text.
        """
        folder.mkdir(parents=True, exist_ok=True)
        text = table(self.shares)
        write_text(folder / "shares.txt", text + "\n")
        records = {stage: asdict(shares) for stage, shares in self.shares.items()}
        write_text(folder / "shares.json", json.dumps(records, indent=1) + "\n")
        with atomic_path(folder / "trace.json") as temporary:
            temporary.write_text(json.dumps(self.trace, separators=(",", ":")), encoding="utf-8")
        return text


def stage_shares(events: Sequence[Mapping[str, Any]], stage: str, batches: int, of: int) -> StageShares:
    """Times of a stage's parts from the events of a trace (Chrome's format, in microseconds).

    Work on a GPU belongs to the part during which it was queued, or to the innermost of nested parts. The thread does
    not matter, because a backward pass queues from a thread of its own.
    """
    complete = [e for e in events if e.get("ph") == "X"]
    named = [(e["name"].removeprefix(PREFIX), _interval(e)) for e in complete if e["name"].startswith(PREFIX)]
    named = [(name, span) for name, span in named if (name == stage) or name not in STAGES]
    work = [e for e in complete if e.get("cat") in DEVICE]
    queued = {e["args"]["correlation"]: e["ts"] for e in complete if e.get("cat") in LAUNCHES and _correlates(e)}
    busy = _union([_interval(e) for e in work])
    whole = next(span for name, span in named if name == stage)
    spans = [(name, span) for name, span in named if name != stage and whole[0] <= span[0] < whole[1]]
    device = dict.fromkeys([stage, "other", *(name for name, _ in spans)], 0.0)
    for e in work:
        time = queued.get(e["args"].get("correlation")) if _correlates(e) else None
        holding = [(end - start, name) for name, (start, end) in spans if time is not None and start <= time < end]
        device[min(holding)[1] if holding else "other"] += e["dur"]
        device[stage] += e["dur"]
    host = dict.fromkeys(device, 0.0)
    covered = dict.fromkeys(device, 0.0)
    for name, span in [(stage, whole), *spans]:
        host[name] += span[1] - span[0]
        covered[name] += _overlap(busy, span)
    for seconds in (host, covered):
        seconds["other"] = max(seconds[stage] - sum(v for n, v in seconds.items() if n not in (stage, "other")), 0.0)

    def share(name: str) -> Share:
        on_host = Share(host[name] / 1e6)
        if not work:
            return on_host
        idle = 1 - covered[name] / host[name] if host[name] else 0.0
        return replace(on_host, device_seconds=device[name] / 1e6, idle=min(max(idle, 0.0), 1.0))

    names = sorted((n for n in host if n not in (stage, "other")), key=lambda n: -host[n])
    return StageShares(batches, of, share(stage), {n: share(n) for n in [*names, "other"]})


def table(stages: Mapping[str, StageShares]) -> str:
    """The times as text, one line per part: milliseconds per batch, and the share of the stage."""
    lines = [f"{'stage':10}{'part':14}{'ms per batch':>13}{'share':>9}{'GPU ms':>10}{'GPU idle':>10}"]

    def add(stage: str, name: str, share: Share, of: StageShares) -> None:
        line = f"{stage:10}{name:14}{1e3 * share.seconds / of.batches:13.3f}"
        line += f"{share.seconds / (of.whole.seconds or 1.0):9.1%}"
        if share.device_seconds is not None:
            line += f"{1e3 * share.device_seconds / of.batches:10.3f}{share.idle:10.1%}"
        lines.append(line)

    for stage, shares in stages.items():
        add(stage, "", shares.whole, shares)
        for name, share in shares.parts.items():
            add("", name, share, shares)
    counts = ", ".join(f"{shares.batches} of {shares.of} of {stage}" for stage, shares in stages.items())
    return "\n".join([*lines, f"batches: {counts}"])


def _interval(event: Mapping[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _correlates(event: Mapping[str, Any]) -> bool:
    return "correlation" in event.get("args", {})


def _union(intervals: Sequence[Interval]) -> list[Interval]:
    """The same times in order and without overlaps."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((start, end))
    return union


def _overlap(intervals: Sequence[Interval], span: Interval) -> float:
    return sum(max(min(end, span[1]) - max(start, span[0]), 0.0) for start, end in intervals)


def _slim(event: dict[str, Any]) -> dict[str, Any]:
    """The event without the arguments of host operations, which fill most of a trace and which no one reads."""
    return {k: v for k, v in event.items() if k != "args"} if event.get("cat") == "cpu_op" else event
