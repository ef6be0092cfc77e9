"""Blocks that are freed serve the next allocation."""

import subprocess
import sys

import pytest

from engine.allocator import VARIABLES, keep_memory

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
