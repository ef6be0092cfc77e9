"""The ring's memory does not depend on the number of ranks; that of gathered keys does."""

import sys

import pytest

from bench.ranks import measure


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_peak_memory_of_a_rank():
    rows, width = 256, 40960  # larger tensors than malloc keeps after use
    own = rows * width * 4 / 2**20  # MiB of a rank's keys
    ring = [measure("dv", "ring", size, rows, width) for size in (3, 5)]
    gathered = [measure("dv", True, size, rows, width) for size in (3, 5)]
    assert abs(ring[1] - ring[0]) < own / 2, ring
    # two ranks more: their keys and the gradients of these
    assert gathered[1] - gathered[0] > 3 * own, gathered
