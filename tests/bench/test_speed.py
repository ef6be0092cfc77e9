"""pytest-benchmark over the suites' own callables: `pytest --slow tests/bench/test_speed.py`."""

import pytest

from bench.runner import NAMES, Setting, load_suite

pytest.importorskip("pytest_benchmark", reason="needs the extra dev")
# Epochs and the suites that measure another thing than the time of a call are run by `python -m bench` alone.
SUITES = [n for n in NAMES if not hasattr(load_suite(n), "VALUE")]
CASES = [(name, side) for name in SUITES for side in load_suite(name).SIDES if side != "compile"]


@pytest.mark.slow
@pytest.mark.parametrize("name, side", CASES, ids=[f"{n}-{s}" for n, s in CASES])
def test_speed(benchmark, name, side):
    setting = Setting(quick=True)
    load_suite(name).gate(setting)
    work = load_suite(name).build(side, setting)
    try:
        benchmark.group = name
        benchmark.pedantic(work.run, rounds=3, warmup_rounds=work.warmups)
    finally:
        work.close()
