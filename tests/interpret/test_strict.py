"""What a GPU refuses, or leaves undefined, shows in the interpreter too."""

import pytest
import torch

from tests.interpret.guards import require_interpreter

require_interpreter()

import triton
import triton.language as tl

from tests.interpret import device
from tests.interpret.strict import poison, strict

pytestmark = pytest.mark.skipif(device.on_gpu(), reason="tests the help for the interpreter, which a GPU does not use")


@pytest.fixture(autouse=True)
def triton_backend():
    """None of the folder's own strictness around these."""


@triton.jit
def sums(x, out, n, N: tl.constexpr, OTHER: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i, mask=i < n, other=0) if OTHER else tl.load(x + i, mask=i < n)
    tl.store(out, tl.sum(value.to(tl.float32), 0))


@triton.jit
def multiplies(x, out, N: tl.constexpr, K: tl.constexpr):
    i, k = tl.arange(0, N), tl.arange(0, K)
    a = tl.load(x + i[:, None] * K + k[None, :])
    tl.store(out + i[:, None] * N + i[None, :], tl.dot(a, tl.trans(a)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64])
def test_elements_left_out_are_undefined(dtype):
    x, out = torch.ones(16, dtype=dtype), torch.zeros(1)
    with strict():
        sums[(1,)](x, out, 16, N=16, OTHER=False)
        assert out.item() == 16
        sums[(1,)](x, out, 10, N=16, OTHER=True)
        assert out.item() == 10
        sums[(1,)](x, out, 10, N=16, OTHER=False)
    assert not abs(out.item()) < 1e9


def test_booleans_left_out_are_true():
    assert bool(poison(bool))


@pytest.mark.parametrize("depth, fits", [(8, False), (16, True)])
def test_products_of_little_depth_are_refused(depth, fits):
    x, out = torch.ones(16, depth), torch.zeros(16, 16)
    with strict():
        if fits:
            multiplies[(1,)](x, out, N=16, K=depth)
            assert out.unique().tolist() == [depth]
        else:
            with pytest.raises(Exception, match="K >= 16"):
                multiplies[(1,)](x, out, N=16, K=depth)


def test_races_are_found_too():
    with pytest.raises(AssertionError, match="a race between programs"), strict():
        sums[(2,)](torch.ones(16), torch.zeros(1), 16, N=16, OTHER=True)
