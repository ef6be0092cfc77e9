"""What a run folder holds, apart from times: equal for two runs that computed the same."""

from __future__ import annotations

import csv
import io
import json
import re
import zlib
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event

from engine import checkpoint

TIMES = {
    "seconds", "waiting_seconds", "wall_seconds", "wall_s", "samples_per_second", "peak_memory_mb", "data_wait_share",
    "environment", "timings",
}  # fmt: skip


def names(folder: Path) -> list[str]:
    """Every file below a folder; an event file's name without its time and process."""
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    return [re.sub(r"tfevents\.\d+\.\d+\.", "tfevents.", name) for name in found]


def content(out: Path) -> dict[str, Any]:
    """Every file below `out` and what it says; of a report only that it is there."""
    return {"names": names(out), **{str(p.relative_to(out)): found for p in out.rglob("*") if (found := _read(p))}}


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The files that differ, and the names that are in one folder only."""
    only = {*found["names"]} ^ {*expected["names"]}
    return sorted(only | {key for key in found.keys() & expected.keys() if found[key] != expected[key]} - {"names"})


def _read(path: Path) -> Any:
    match path.name:
        case "best.safetensors" | "last.safetensors" | "previous.safetensors":
            return _checkpoint(path)
        case "history.jsonl":
            return [_timeless(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        case "metrics.json" | "summary.json":
            return _timeless(json.loads(path.read_text(encoding="utf-8")))
        case "metrics.csv":
            return _timeless(list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))))
        case "config.yaml" | "normalizer.safetensors" | "summary.csv" | "tokenizer.json" | "tokenizer_config.json":
            return path.read_bytes()
    if path.name.startswith("predictions_"):
        return path.read_bytes()
    return None


def _checkpoint(path: Path) -> Any:
    """Everything in a checkpoint, its tensors bit by bit; the state's tree tells their types and places."""
    header, tensors = checkpoint._read(path)
    checkpoint.load(path)  # its checksum holds
    meta = {key: _timeless(value) for key, value in json.loads(header["meta"]).items() if key != "history"}
    return header["state"], meta, {name: zlib.crc32(checkpoint._bytes(tensor)) for name, tensor in tensors.items()}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def curves(run: Path) -> dict[tuple[str, int], list[float]]:
    """(tag, epoch) -> every value that TensorBoard's files of a run have for it."""
    found: dict[tuple[str, int], list[float]] = {}
    for path in (run / "tensorboard").glob("events.out.tfevents.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            for value in event.summary.value:
                found.setdefault((value.tag, event.step), []).append(value.simple_value)
    return found
