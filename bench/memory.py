"""Extra peak memory of one side of a suite, in a fresh process.

The process builds the side, runs a quick-sized one so that libraries are loaded and thread pools exist, resets the
kernel's high-water mark of its resident memory, runs the side once, and reads the mark: extra = mark - resident before.
On a GPU the allocator's own peak is read instead. glibc's threshold for giving memory back is held fixed, so that the
warm-up does not leave pages behind for the measured run to reuse.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

from bench import machine
from bench.runner import MORE_NAMES, NAMES, Setting, load_suite

# Bytes: less is noise. Linux counts resident pages on every core, and adds them up when a core has 32: two cores hide
# 256 KiB.
LEAST = 1 << 18


def extra_peak(name: str, side: str, setting: Setting, threads: int, repeats: int | None = None) -> int | None:
    """Bytes that one call of `side` needs beyond what it keeps: median over `repeats` processes.

    None where the system has no resettable high-water mark (not Linux) and the device is a CPU.
    """
    if not setting.device.startswith("cuda") and not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "bench.memory", name, side, "--device", setting.device, "--threads", str(threads)]
    command += ["--quick"] if setting.quick else []
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    peaks = []
    for _ in range(repeats or (1 if setting.quick else 3)):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=machine.ROOT)
        if done.returncode != 0:
            raise RuntimeError(f"memory of {name}/{side}: {done.stderr.strip()[-1000:]}")
        peaks.append(int(done.stdout.split()[-1]))
    return max(LEAST, int(statistics.median(peaks)))


def resident() -> tuple[int, int]:
    """Resident bytes now, and their peak since the mark was last reset."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return tuple(int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))


def peak_of_call(run, device: str) -> int:
    """Bytes by which memory rises above its present level during one call."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, _ = resident()
    run()
    _, most = resident()
    return most - before


def warm_side(side: str) -> str:
    """The side whose quick run warms up for `side`; it leaves out the size of a point of a curve."""
    if "@" in side:
        return side.split("@")[0]
    return re.sub(r"^([nb])\d+$", r"\g<1>64", side)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description="extra peak memory of one side, bytes")
    parser.add_argument("name", choices=[*NAMES, *MORE_NAMES])
    parser.add_argument("side")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=machine.cores())
    a = parser.parse_args(arguments)
    machine.pin_environment(a.threads)
    machine.pin_threads(a.threads)
    suite = load_suite(a.name)
    work = suite.build(a.side, Setting(a.quick, a.device))
    small = suite.build(warm_side(a.side), Setting(True, a.device))
    small.run()
    small.close()
    del small
    print(peak_of_call(work.run, a.device))
    work.close()


if __name__ == "__main__":
    main()
