"""Shared arithmetic of the Triton kernels, in triton's interpreter."""

import math

import numpy as np
import pytest
import torch

from tests.interpret import device
from tests.interpret.guards import Guards, require_interpreter

require_interpreter()

import triton
import triton.language as tl

from engine.kernels.triton_math import at_most, round_tf32


@triton.jit
def round_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, round_tf32(tl.load(x + i, mask=i < n, other=0.0)), mask=i < n)


def rounded(x: torch.Tensor) -> torch.Tensor:
    with Guards() as guards:
        y = torch.empty_like(x)
        round_kernel[(triton.cdiv(len(x), 64),)](guards.input(x), y, len(x), BLOCK=64)
    return y


def bits(*patterns: int) -> torch.Tensor:
    return torch.from_numpy(np.array(patterns, dtype=np.uint32).view(np.float32)).to(device.device())


def test_nearest_of_all_exponents():
    """Ten bits of mantissa, no more than half a unit away, and on average not away at all."""
    x = torch.randn(4001, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.linspace(-100, 100, 4001)
    y = rounded(x)
    assert not (y.view(torch.int32) & 0x1FFF).any()
    relative = (y.double() - x) / x.double()
    assert relative.abs().max() <= 2**-11
    assert relative.mean().abs() < 3e-5  # by truncation -2.4e-4 at least


@pytest.mark.parametrize("sign", [0, 0x80000000])
def test_ties_go_away_from_zero(sign):
    x = bits(*(sign | p for p in (0x3F801000, 0x3F803000, 0x3F800FFF, 0x3F801001)))
    expected = bits(*(sign | p for p in (0x3F802000, 0x3F804000, 0x3F800000, 0x3F802000)))
    assert torch.equal(rounded(x), expected)


def test_what_is_not_a_number_stays_so():
    """Also the pattern of all ones, which is what a GPU's arithmetic makes, and which plain rounding turns into 0."""
    x = bits(0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x00000000, 0x80000000, 0x7F7FFFFF)
    y = rounded(x)
    assert y[:3].isnan().all()
    assert torch.equal(y[3:], torch.tensor([float("inf"), float("-inf"), 0.0, -0.0, float("inf")]))


@triton.jit
def at_most_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, at_most(tl.load(x + i, mask=i < n), 2.0), mask=i < n)


def test_a_limit_lets_nan_pass():
    x = torch.tensor([math.nan, math.inf, 2.5, 2.0, -3.0, -math.inf])
    with Guards() as guards:
        y = torch.empty_like(x)
        at_most_kernel[(1,)](guards.input(x), y, len(x), BLOCK=16)
    torch.testing.assert_close(y, torch.tensor([math.nan, 2.0, 2.0, 2.0, -3.0, -math.inf]), equal_nan=True)
