"""When tests of the compiled kernels are skipped: only without a compiler. A kernel that one refuses is a failure."""

import pytest

from engine.kernels import build

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler: the kernel cannot be built here")
