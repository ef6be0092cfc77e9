"""Time from the start of a process to the end of its first training step."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.runner import Setting, Work
from engine.demo.generator import write_demo_files

TITLE = "process start to the end of the first training step, demo preset, warm caches"
GOALS = {"value": (15.0, 6.0)}
VALUE = "s"
SIDES = ("engine",)
ROUNDS = 5

PROBE = """
import os, sys
import engine

class FirstStep:
    def on_start(self, first_epoch, epochs, batches): pass
    def on_batch(self, stage, number):
        print("stepped", flush=True)
        os._exit(0)
    def on_epoch(self, record, improved): pass
    def on_end(self): pass

data, out, device = sys.argv[1:]
config = engine.load_config("demo", [f"data.path={data}", f"device={device}", "output.progress=false"])
engine.train(config, out, callbacks=[FirstStep()])
"""


def first_step(data: Path, out: Path, setting: Setting) -> float:
    """Seconds; the process ends itself after the step."""
    start = time.perf_counter()
    command = [sys.executable, "-c", PROBE, str(data), str(out), setting.device]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    seconds = time.perf_counter() - start
    _, problem = process.communicate()
    if line.strip() != "stepped":
        raise RuntimeError(f"no training step: {problem.strip()[-500:]}")
    return seconds


def build(side: str, setting: Setting) -> Work:
    folder = Path(tempfile.mkdtemp(prefix="bench-startup-"))
    data = write_demo_files(folder / "data")["data"]
    runs = iter(range(10**6))
    return Work(
        lambda: first_step(data, folder / f"run{next(runs)}", setting),
        returns_number=True,
        close=lambda: shutil.rmtree(folder, ignore_errors=True),
    )


def gate(setting: Setting) -> None:
    """`first_step` raises an error if the process takes no step."""
