"""Where a training step's time goes: named parts, their shares per stage, and a trace that Perfetto opens.

Parts cost nothing unless a profile is being taken. They are names for stretches of a step, not for operations: what the
profiler measures within them is in the trace.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine.files import atomic_path, write_text

PREFIX = "engine."
STAGES = ("collect", "stage1", "stage2")
_taking = False


def part(name: str) -> contextlib.AbstractContextManager[Any]:
    """A context whose time is reported under `name` while a profile is taken."""
    if _taking and not torch.compiler.is_compiling():
        return torch.profiler.record_function(PREFIX + name)
    return contextlib.nullcontext()


@contextlib.contextmanager
def taken(device: torch.device) -> Iterator[torch.profiler.profile]:
    """Take a profile within the context, of the host and of the GPU where `device` is one."""
    global _taking
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    _taking = True
    try:
        with torch.profiler.profile(activities=activities) as profile:
            yield profile
    finally:
        _taking = False


def shares(profile: torch.profiler.profile) -> dict[str, dict[str, float]]:
    """{stage: {part: seconds}} of a profile; "other" is what of a stage lies in no part.

    Parts are told from operations by their names, and a part belongs to the stage in whose time it begins. On a GPU
    these are the host's seconds, which it spends queueing work: read the kernels' own in the trace.
    """
    events = [e for e in profile.events() if e.name.startswith(PREFIX)]
    named = {s: [e for e in events if e.name == PREFIX + s] for s in STAGES}
    found: dict[str, dict[str, float]] = {}
    for stage, spans in named.items():
        if not spans:
            continue
        ranges = [(e.time_range.start, e.time_range.end) for e in spans]
        whole = sum(end - start for start, end in ranges) / 1e6
        parts: dict[str, float] = {}
        for e in events:
            name = e.name.removeprefix(PREFIX)
            if name in STAGES or not any(start <= e.time_range.start < end for start, end in ranges):
                continue
            parts[name] = parts.get(name, 0.0) + (e.time_range.end - e.time_range.start) / 1e6
        parts = dict(sorted(parts.items(), key=lambda item: -item[1]))
        found[stage] = parts | {"other": max(whole - sum(parts.values()), 0.0)}
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """The shares as text, a line a part."""
    whole = sum(sum(parts.values()) for parts in found.values()) or 1.0
    lines = [f"{'stage':10}{'part':14}{'seconds':>10}{'share':>9}"]
    for stage, parts in found.items():
        lines.append(f"{stage:10}{'':14}{sum(parts.values()):10.3f}{sum(parts.values()) / whole:9.1%}")
        lines += [f"{'':10}{name:14}{s:10.3f}{s / whole:9.1%}" for name, s in parts.items()]
    return "\n".join(lines)


def save(profile: torch.profiler.profile, folder: Path) -> str:
    """Write shares.txt, shares.json and trace.json (open it at https://ui.perfetto.dev) into `folder`.

    Returns:
        the shares as text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = shares(profile)
    text = table(found)
    write_text(folder / "shares.txt", text + "\n")
    write_text(folder / "shares.json", json.dumps(found, indent=1) + "\n")
    with atomic_path(folder / "trace.json") as temporary:
        profile.export_chrome_trace(str(temporary))
    return text
