"""What the kernels of layers are made of, under triton's interpreter."""

import math

import torch

from tests.interpret.guards import require_interpreter

require_interpreter()

import triton
import triton.language as tl

from engine.kernels.mlp.triton import round_tf32


@triton.jit
def _round(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    tl.store(out_ptr + n, round_tf32(tl.load(x_ptr + n, mask=n < count, other=0.0)), mask=n < count)


def rounded(*values: float) -> torch.Tensor:
    x = torch.tensor(values)
    out = torch.empty_like(x)
    _round[(1,)](x, out, len(x), triton.next_power_of_2(len(x)))
    return out


def test_rounds_to_the_nearest_number_of_tf32():
    """Ten bits after the point; ties go away from zero."""
    unit = 2.0**-10
    values = 1 + 0.4 * unit, 1 + 0.5 * unit, 1 + 0.6 * unit, -1 - 0.5 * unit, 2 - 0.1 * unit, 3.0, 0.0
    assert rounded(*values).tolist() == [1, 1 + unit, 1 + unit, -1 - unit, 2, 3, 0]
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert ((rounded(*x.tolist()) - x).abs() <= 2.0**-11 * x.abs()).all()


def test_what_is_not_finite_stays():
    found = rounded(math.inf, -math.inf, math.nan, -math.nan)
    assert found[:2].tolist() == [math.inf, -math.inf] and found[2:].isnan().all()
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    out = torch.empty_like(bits)
    _round[(1,)](bits, out, 3, 4)
    assert out.isnan().all()
