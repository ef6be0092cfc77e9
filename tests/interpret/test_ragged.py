"""The padding kernel in Triton's interpreter: the formula's numbers, within the memory that is theirs."""

import pytest
import torch

from tests.interpret.guards import Guards, require_interpreter

require_interpreter()

from engine.kernels.ragged import pad, reference
from engine.kernels.ragged import triton as kernels
from tests.kernels.test_ragged_op import DTYPES, ragged


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d, width", [(None, 5), (None, 40), (3, 7), (74, 33), (200, 20)])
@pytest.mark.parametrize("closing", [-1, 102])
def test_pad(dtype, d, width, closing):
    if closing >= 0 and d is not None:
        d, width = None, width + 1
    values, offsets = ragged([3, 1, 0, 7, 35, 5], d, dtype)
    rows = torch.tensor([4, 0, 2, 2, 5, 3, 1])
    fill = 0 if dtype != torch.int32 else 9
    expected = reference.pad(values, offsets, rows, width, fill, closing)
    with Guards() as guards:
        values, offsets, rows = guards.input(values), guards.input(offsets), guards.input(rows)
        found = kernels.pad(values, offsets, rows, width, fill, closing)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_through_the_operation():
    values, offsets = ragged([3, 1, 4], 3)
    rows = torch.tensor([2, 0])
    for a, b in zip(pad(values, offsets, rows, 4), reference.pad(values, offsets, rows, 4, 0, -1), strict=True):
        assert torch.equal(a, b)
