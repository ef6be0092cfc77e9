"""python -m tests.gpu [PYTEST ARGUMENTS]: what a GPU decides, on the GPU; without one it says so and ends with 0.

The cases of tests/interpret with CUDA tensors, and the step's in tests/gpu.
"""

import importlib.util
import os
import sys

from bench.gpu import missing

WORKERS = 8


def main(arguments: list[str]) -> int:
    if (reason := missing()) is not None:
        print(f"tests on a GPU: skipped: {reason}")
        return 0
    import pytest

    os.environ.pop("TRITON_INTERPRET", None)
    parallel = ["-n", str(min(WORKERS, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    return pytest.main(["--device", "cuda", *parallel, *(arguments or ["tests/interpret", "tests/gpu"])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
