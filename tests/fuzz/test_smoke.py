"""A short, blind fuzz of every reader; the long, guided one is `python -m tests.fuzz READER --runs N`."""

import numpy as np
import pytest

from tests.fuzz.__main__ import mutated
from tests.fuzz.folders import TARGETS as FOLDERS
from tests.fuzz.targets import TARGETS as READERS
from tests.fuzz.targets import execute

TARGETS = READERS | FOLDERS

RUNS = {"csd": 60, "run": 100, "report": 150}


@pytest.mark.parametrize("reader", TARGETS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_only_our_errors_escape(reader):
    if reader == "csd":
        pytest.importorskip("h5py", reason="needs the extra csd")
    target = TARGETS[reader]()
    seeds, rng = target.seeds(), np.random.default_rng(0)
    for seed in seeds:
        assert execute(target, seed) is None
    for _ in range(RUNS.get(reader, 300)):
        data = mutated(seeds[rng.integers(len(seeds))], rng, seeds)
        assert execute(target, data) is None, data
