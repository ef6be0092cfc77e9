"""Memory and time of converting a large foreign file into a store."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench import machine
from bench.runner import Setting, Work
from engine.loaders.convert import convert
from engine.loaders.make_data import make_data
from engine.loaders.store import open_store, verify_store

TITLE = "memory that converting an MMSA pickle of 16,000 MOSEI-shaped utterances takes, over its largest split's frames"
GOALS = {"value": (1.5, 1.0)}
VALUE = "factor"
SIDES = ("engine",)
ROUNDS = 1
UTTERANCES, QUICK_UTTERANCES = 16_000, 1_500  # 6 GB, padded

PROBE = """
import json, sys, time
from pathlib import Path
from bench.memory import resident
from engine.loaders.convert import convert

source, small, out = map(Path, sys.argv[1:])
convert(small, out / "small")  # libraries are loaded, the tokenizer is
Path("/proc/self/clear_refs").write_text("5")
before, _ = resident()
start = time.perf_counter()
store = convert(source, out / "store")
print(json.dumps({"seconds": time.perf_counter() - start, "peak": resident()[1] - before, "store": str(store)}))
"""


@dataclass
class Conversion(Work):
    """`measured`: figures of the last call."""

    measured: dict[str, float] = field(default_factory=dict)


def build(side: str, setting: Setting) -> Work:
    folder = Path(tempfile.mkdtemp(prefix="bench-conversion-"))
    source = make_data(folder / "data", "mosei", QUICK_UTTERANCES if setting.quick else UTTERANCES, "mmsa")
    small = make_data(folder / "small", "mosei", 30, "mmsa")
    measured: dict[str, float] = {"source_bytes": source.stat().st_size}

    def run() -> float:
        out = Path(tempfile.mkdtemp(dir=folder))
        command = [sys.executable, "-c", PROBE, str(source), str(small), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=machine.ROOT)
        if done.returncode != 0:
            raise RuntimeError(f"no store: {done.stderr.strip()[-500:]}")
        told = json.loads(done.stdout.splitlines()[-1])
        splits = open_store(told["store"]).splits.values()
        frames = max(split.audio.values.nbytes + split.vision.values.nbytes for split in splits)
        measured.update(seconds=told["seconds"], extra_peak_bytes=told["peak"], largest_split_bytes=frames)
        shutil.rmtree(out)
        return told["peak"] / frames

    close = partial(shutil.rmtree, folder, ignore_errors=True)
    return Conversion(run, warmups=0, returns_number=True, close=close, measured=measured)


def details(setting: Setting, works: dict[str, Work], numbers: dict[str, list[float]]) -> dict[str, Any]:
    """Seconds of the last round, and bytes of the file, of memory and of the largest split's frames."""
    measured = works["engine"].measured
    return {**measured, "bytes_per_second": measured["source_bytes"] / measured["seconds"]}


def gate(setting: Setting) -> None:
    """The store of a small file of the same kind passes its own check."""
    with tempfile.TemporaryDirectory(prefix="bench-conversion-") as folder:
        source = make_data(Path(folder) / "data", "mosei", 30, "mmsa")
        problems = verify_store(convert(source, Path(folder) / "store"))
        if problems:
            raise AssertionError(f"the store of a small file: {problems}")
