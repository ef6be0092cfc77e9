"""Blocks that are freed serve the next allocation; what stays lies in large pages."""

import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.allocator import LARGE, VARIABLES, keep_memory, large_pages

SCRIPT = """
import resource, sys, torch
from engine.allocator import keep_memory
if sys.argv[1] == "kept":
    assert keep_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    blocks = [torch.empty(12 << 20).fill_(1.0) for _ in range(4)]
for _ in range(10):
    step()
before = faults()
for _ in range(5):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_fresh_tensors_cost_no_page_faults():
    def faults(what):
        done = subprocess.run([sys.executable, "-c", SCRIPT, what], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert 10 * faults("kept") < faults("given back")


@pytest.mark.parametrize("name", VARIABLES)
def test_the_users_own_setting_holds(monkeypatch, name):
    monkeypatch.setenv(name, "65536")
    assert keep_memory() is False


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(0, 5), (7, 3), (2_500_001, 7)])
def test_large_pages_give_an_array_like_any_other(shape, dtype):
    result = large_pages(shape, dtype)
    assert result.shape == shape and result.dtype == dtype and result.flags.writeable and result.flags.c_contiguous
    result[...] = 3
    assert (result == 3).all()
    if result.nbytes > 8 * LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        assert result.ctypes.data % LARGE == 0


THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="the system gives no large pages")
def test_large_pages_are_asked_for():
    def advised():
        """KiB in mappings that are."""
        total = size = 0
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if line.startswith("Size:"):
                size = int(line.split()[1])
            elif line.startswith("VmFlags:") and "hg" in line.split():
                total += size
        return total

    before = advised()
    result = large_pages((16 * LARGE,), np.uint8)
    assert advised() - before >= result.nbytes >> 10
