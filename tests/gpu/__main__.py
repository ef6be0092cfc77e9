"""python -m tests.gpu [PYTEST ARGUMENTS]: what a GPU decides, on the GPU; without one it says so and ends with 0.

The cases of tests/interpret with CUDA tensors, and the step's in tests/gpu. `python -m tests.gpu --quick` takes two
minutes: the newest kernels first, each folder in a process of its own, one line for each failure.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from bench.gpu import missing

WORKERS = 8


def main(arguments: list[str]) -> int:
    if "--quick" in arguments:
        return quick(arguments)
    if (reason := missing()) is not None:
        print(f"tests on a GPU: skipped: {reason}")
        return 0
    import pytest

    os.environ.pop("TRITON_INTERPRET", None)
    parallel = ["-n", str(min(WORKERS, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    return pytest.main(["--device", "cuda", *parallel, *(arguments or ["tests/interpret", "tests/gpu"])])


def quick(arguments: list[str]) -> int:
    from tests.gpu import quick

    parser = argparse.ArgumentParser(prog="python -m tests.gpu --quick")
    parser.add_argument("--quick", action="store_true", help="two minutes, one line for each failure")
    parser.add_argument("--seconds", type=float, default=quick.SECONDS, help="for all of it")
    parser.add_argument("--out", type=Path, help="JSON of what was found")
    parser.add_argument("--only", nargs="+", choices=tuple(quick.parts()), metavar="NAME", help="the step, or folders")
    parser.add_argument("--rehearse", action="store_true", help="one folder in triton's interpreter, without a GPU")
    a = parser.parse_args(arguments)
    if a.rehearse:
        return quick.main(a.seconds, a.out, "cpu", a.only or ["stacked"])
    if (reason := missing()) is not None:
        print(f"tests on a GPU: skipped: {reason}")
        return 0
    return quick.main(a.seconds, a.out, "cuda", a.only)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
