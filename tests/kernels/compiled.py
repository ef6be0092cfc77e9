"""When tests of the compiled kernels are skipped: only without a compiler. A kernel that one refuses is a failure."""

import pytest

from engine.kernels.compilers import compilers

needs_compiler = pytest.mark.skipif(not compilers(), reason="no C++ compiler: the kernel cannot be built here")
