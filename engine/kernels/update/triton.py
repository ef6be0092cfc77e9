"""The update on a GPU: programs that move a block of one weight each, found by its address.

Before it one program counts the step and computes what every weight's update shares. The kernels are the same for all
numbers of weights and blocks, so that they are compiled once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.registry import interpreting
from engine.kernels.update.tables import BLOCK

WARPS = 8
MANY = 1024
"""Blocks that the one program of `combine` reads at once."""
LOW = {None: None, torch.bfloat16: "bf16", torch.float16: "fp16"}
"""What `move_kernel` calls the types of 16-bit copies."""
WEIGHTS = 128
"""Weights that the one program of `prepare` counts at once."""


def inspect(
    sizes: Tensor, blocks: Tensor, gradients: Tensor, aligned: bool, limit: float, inverse: Tensor | None
) -> Tensor:
    """As `reference.inspect`, of the gradients at these addresses."""
    count = blocks.shape[1]
    parts = torch.empty(2, count, dtype=torch.float32, device=sizes.device)
    stats = torch.empty(2, dtype=torch.float32, device=sizes.device)
    if count:
        inspect_kernel[(count,)](
            sizes, blocks, gradients, inverse, parts, count, limit, BLOCK=BLOCK, ALIGNED=aligned, num_warps=WARPS
        )
    combine_kernel[(1,)](parts, stats, count, MANY=MANY)
    return stats


def move(
    addresses: Tensor, sizes: Tensor, blocks: Tensor, group: Tensor, settings: Tensor, gradients: Tensor,
    aligned: bool, rates: Tensor, limit: float, norm: float, stats: Tensor | None, inverse: Tensor | None,
    skip: Tensor | None, average: Tensor | None, low: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """As `reference.move`, of what lies at these addresses."""
    n, count = len(sizes), blocks.shape[1]
    factors = torch.empty(2, n, dtype=torch.float32, device=sizes.device)
    shared = torch.empty(2, dtype=torch.float32, device=sizes.device)
    prepare_kernel[(1,)](
        addresses[3], group, settings, rates, stats, skip, factors, shared, norm, n, WEIGHTS=WEIGHTS,
        COLUMNS=settings.shape[1],
    )  # fmt: skip
    if count:
        move_kernel[(count,)](
            addresses, sizes, blocks, group, settings, rates, gradients, inverse, average, factors, shared, n, count,
            limit, BLOCK=BLOCK, COLUMNS=settings.shape[1], ALIGNED=aligned, LOW=LOW[low],
            INTERPRETED=interpreting(), num_warps=WARPS,
        )  # fmt: skip
    return shared


@triton.jit
def _at(table, i, ALIGNED: tl.constexpr, TYPE: tl.constexpr = tl.float32, MULTIPLE: tl.constexpr = 16):
    """The numbers at the address that is number i of a table."""
    pointer = tl.load(table + i).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, MULTIPLE) if ALIGNED else pointer


@triton.jit
def _clipped(g, inverse, limit):
    if inverse is not None:
        g = g * tl.load(inverse)
    # not tl.minimum, which would make a limit of NaN
    return tl.where(g > limit, limit, tl.where(g < -limit, -limit, g))


@triton.jit
def _load(pointer, within):
    return tl.load(pointer) if within is None else tl.load(pointer, mask=within, other=0.0)


@triton.jit
def _inspected(gradient, at, within, inverse, limit):
    g = _clipped(_load(gradient + at, within), inverse, limit)
    bad = tl.max(tl.where(tl.abs(g) < float("inf"), 0.0, 1.0), 0)
    return bad, tl.sum(g * g, 0)


@triton.jit(do_not_specialize=["count"])
def inspect_kernel(sizes, blocks, gradients, inverse, parts, count, limit, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    b = tl.program_id(0)
    i = tl.load(blocks + b)
    start = tl.load(blocks + count + b)
    size = tl.load(sizes + i)
    gradient = _at(gradients, i, ALIGNED)
    at = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
    # without a mask loads and stores take 16 bytes at once
    if start + BLOCK <= size:
        bad, squares = _inspected(gradient, at, None, inverse, limit)
    else:
        bad, squares = _inspected(gradient, at, at < size, inverse, limit)
    tl.store(parts + b, bad)
    tl.store(parts + count + b, squares)


@triton.jit(do_not_specialize=["count"])
def combine_kernel(parts, stats, count, MANY: tl.constexpr):
    bad = tl.zeros([MANY], tl.float32)
    squares = tl.zeros([MANY], tl.float32)
    for start in range(0, count, MANY):
        b = start + tl.arange(0, MANY)
        bad = tl.maximum(bad, tl.load(parts + b, mask=b < count, other=0.0))
        squares += tl.load(parts + count + b, mask=b < count, other=0.0)
    tl.store(stats, tl.max(bad, 0))
    tl.store(stats + 1, tl.sum(squares, 0))


@triton.jit(do_not_specialize=["n"])
def prepare_kernel(
    steps, group, settings, rates, stats, skip, factors, shared, norm, n, WEIGHTS: tl.constexpr, COLUMNS: tl.constexpr
):
    left_out = 0.0
    if skip is not None:
        left_out = tl.load(skip)
    factor = 1.0
    if stats is not None:
        factor = norm / (tl.sqrt(tl.load(stats + 1)) + 1e-6)
        factor = tl.where(factor > 1.0, 1.0, factor)
    tl.store(shared, left_out)
    tl.store(shared + 1, factor)
    for start in range(0, n, WEIGHTS):
        i = start + tl.arange(0, WEIGHTS)
        inside = i < n
        g = tl.load(group + i, mask=inside, other=0)
        counter = tl.load(steps + i, mask=inside, other=0).to(tl.pointer_type(tl.float32))
        before = tl.load(counter, mask=inside, other=0.0)
        tl.store(counter, before + (1.0 - left_out), mask=inside)
        # in float64: 1 - beta2 ** step is a small difference at first
        step = (before + 1.0).to(tl.float64)
        first = 1.0 - tl.exp(step * tl.load(settings + g * COLUMNS, mask=inside, other=-1.0))
        second = 1.0 - tl.exp(step * tl.load(settings + g * COLUMNS + 1, mask=inside, other=-1.0))
        rate = tl.load(rates + g, mask=inside, other=0.0)
        tl.store(factors + i, (rate / first).to(tl.float32), mask=inside)
        tl.store(factors + n + i, tl.sqrt(second).to(tl.float32), mask=inside)


@triton.jit
def _number(settings, column):
    return tl.load(settings + column).to(tl.float32)


@triton.jit
def _bits_of(p, LOW: tl.constexpr, INTERPRETED: tl.constexpr):
    """The bits of p as bfloat16 or float16, rounded to nearest, ties to even."""
    if LOW == "fp16":
        bits = p.to(tl.float16).to(tl.uint16, bitcast=True)
    elif INTERPRETED:  # the interpreter's own cast cuts bits off
        whole = p.to(tl.uint32, bitcast=True)
        bits = tl.where(p == p, (whole + 0x7FFF + ((whole >> 16) & 1)) >> 16, 0x7FC0).to(tl.uint16)
    else:
        bits = p.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    return bits


@triton.jit
def _moved(
    parameter, first, second, mean, address, low, low_address, gradient, at, within, settings, rate, size, root,
    inverse, limit, factor, average, LOW: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # all loads come before all stores, which the compiler would not let them pass
    g = _load(gradient + at, within)
    p = _load(parameter + at, within)
    m = _load(first + at, within)
    v = _load(second + at, within)
    if average is not None:
        with_average = (tl.zeros_like(at) + address) != 0
        with_average = with_average if within is None else with_average & within
        a = tl.load(mean + at, mask=with_average, other=0.0)
    g = _clipped(g, inverse, limit) * factor
    coupled = _number(settings, 5)
    g = tl.where(coupled != 0.0, g + coupled * p, g)
    p = p * (1.0 - rate * _number(settings, 6))
    m = m + _number(settings, 2) * (g - m)
    v = (1.0 - tl.load(settings + 3)).to(tl.float32) * v + _number(settings, 3) * (g * g)
    p = p - size * (m / (tl.sqrt_rn(v) / root + _number(settings, 4)))
    tl.store(parameter + at, p, mask=within)
    tl.store(first + at, m, mask=within)
    tl.store(second + at, v, mask=within)
    if average is not None:
        tl.store(mean + at, a + tl.load(average) * (p - a), mask=with_average)
    if LOW is not None:  # noqa: SIM102 - for the compiler
        if low_address != 0:
            tl.store(low + at, _bits_of(p, LOW, INTERPRETED), mask=within)


@triton.jit(do_not_specialize=["n", "count"])
def move_kernel(
    addresses, sizes, blocks, group, settings, rates, gradients, inverse, average, factors, shared, n, count, limit,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, LOW: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    if tl.load(shared) == 0.0:
        i = tl.load(blocks + b)
        start = tl.load(blocks + count + b)
        size = tl.load(sizes + i)
        g = tl.load(group + i)
        parameter = _at(addresses, i, ALIGNED)
        first = _at(addresses + n, i, ALIGNED)
        second = _at(addresses + 2 * n, i, ALIGNED)
        mean = _at(addresses + 4 * n, i, ALIGNED)
        address = tl.load(addresses + 4 * n + i)
        # of 16, stores of 8 numbers would be laid out anew, through shared memory
        low = _at(addresses + 5 * n, i, ALIGNED, tl.uint16, 8)
        low_address = tl.load(addresses + 5 * n + i)
        gradient = _at(gradients, i, ALIGNED)
        own = settings + g * COLUMNS
        rate = tl.load(rates + g)
        step_size = tl.load(factors + i)
        root = tl.load(factors + n + i)
        factor = tl.load(shared + 1)
        at = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
        # without a mask loads and stores take 16 bytes at once
        if start + BLOCK <= size:
            _moved(
                parameter, first, second, mean, address, low, low_address, gradient, at, None, own, rate, step_size,
                root, inverse, limit, factor, average, LOW, INTERPRETED,
            )  # fmt: skip
        else:
            _moved(
                parameter, first, second, mean, address, low, low_address, gradient, at, at < size, own, rate,
                step_size, root, inverse, limit, factor, average, LOW, INTERPRETED,
            )  # fmt: skip
