"""The search for races finds those that are made on purpose, and lets pass what is in order on a GPU too."""

import pytest
import torch

from tests.interpret.guards import require_interpreter

require_interpreter()

import triton
import triton.language as tl

from tests.interpret import device
from tests.interpret.races import no_races

pytestmark = pytest.mark.skipif(device.on_gpu(), reason="tests the help for the interpreter, which a GPU does not use")


@pytest.fixture(autouse=True)
def triton_backend():
    """None of the folder's own search around these, which would find the same."""


@triton.jit
def everybody_writes(out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.program_id(0).to(tl.float32))


@triton.jit
def reads_the_neighbour(x, n, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(x + at, tl.load(x + at + 1, mask=at + 1 < n, other=0.0), mask=at < n)


@triton.jit
def reads_an_element_back(x, out, N: tl.constexpr, BARRIER: tl.constexpr):
    tl.store(x + tl.arange(0, N), tl.arange(0, N).to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out, tl.load(x + N - 1))


@triton.jit
def turns_round_in_place(x, N: tl.constexpr, BARRIER: tl.constexpr):
    i = tl.arange(0, N)
    turned = tl.load(x + N - 1 - i)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + i, turned)


@triton.jit
def in_place(x, N: tl.constexpr):
    at = x + tl.program_id(0) * N + tl.arange(0, N)
    for _ in range(2):
        tl.store(at, tl.load(at) + 1.0)


@triton.jit
def folds(out, N: tl.constexpr, SAME: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i % 4, tl.where(SAME, 1, i).to(tl.float32))


@triton.jit
def counts(out, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(out, 1.0)
    else:
        tl.store(out, tl.load(out) + 1.0)


@triton.jit
def halves(x, out, N: tl.constexpr):
    """Bits of a float32, as 16-bit numbers: program 1 reads what program 0 writes."""
    if tl.program_id(0) == 0:
        tl.store(x + tl.arange(0, N), 1.0)
    else:
        tl.store(out, tl.load(x.to(tl.pointer_type(tl.int16)) + 3))


@triton.jit
def promises(x, start, N: tl.constexpr, MULTIPLE: tl.constexpr):
    at = tl.multiple_of(start, MULTIPLE) + tl.arange(0, N)
    tl.store(tl.multiple_of(x, 4) + at, 1.0)


def numbers(n: int = 64) -> torch.Tensor:
    return torch.zeros(n)


def odd_address() -> torch.Tensor:
    return numbers().view(torch.int8)[6:]


def read_back(barrier: bool) -> None:
    reads_an_element_back[(1,)](numbers(), numbers(), N=16, BARRIER=barrier)


BETWEEN_PROGRAMS, BETWEEN_THREADS = "a race between programs", "a race between threads"

RACES = {
    "all programs write": (lambda: everybody_writes[(2,)](numbers(), N=16), BETWEEN_PROGRAMS),
    "a neighbour's block": (lambda: reads_the_neighbour[(4,)](numbers(), 64, N=16), BETWEEN_PROGRAMS),
    "a sum without atomics": (lambda: counts[(3,)](numbers(), ATOMIC=False), BETWEEN_PROGRAMS),
    "another width": (lambda: halves[(2,)](numbers(), torch.zeros(1, dtype=torch.int16), N=16), BETWEEN_PROGRAMS),
    "a neighbour's element": (lambda: reads_the_neighbour[(1,)](numbers(), 16, N=16), BETWEEN_THREADS),
    "no barrier before reading": (lambda: read_back(barrier=False), BETWEEN_THREADS),
    "no barrier before writing": (lambda: turns_round_in_place[(1,)](numbers(), N=64, BARRIER=False), BETWEEN_THREADS),
    "one address twice": (lambda: folds[(1,)](numbers(), N=16, SAME=False), "different values to one address"),
    "a false promise": (lambda: promises[(1,)](numbers(), 12, N=16, MULTIPLE=8), "12 is no multiple of 8"),
    "a false address": (lambda: promises[(1,)](odd_address(), 0, N=16, MULTIPLE=8), "multiple of 4"),
}

IN_ORDER = {
    "one program": lambda: everybody_writes[(1,)](numbers(), N=16),
    "a barrier before reading": lambda: read_back(barrier=True),
    "every program on its own": lambda: in_place[(4,)](numbers(), N=16),
    "one address twice, one value": lambda: folds[(1,)](numbers(), N=16, SAME=True),
    "an atomic sum": lambda: counts[(3,)](numbers(), ATOMIC=True),
    "promises kept": lambda: promises[(1,)](numbers(), 24, N=16, MULTIPLE=8),
}


@pytest.mark.parametrize("case", RACES)
def test_a_race_is_found(case):
    launch, what = RACES[case]
    with pytest.raises(AssertionError, match=what), no_races():
        launch()


def test_the_lines_are_named():
    with pytest.raises(AssertionError) as told, no_races():
        read_back(barrier=False)
    line = reads_an_element_back.fn.__code__.co_firstlineno
    assert str(told.value) == (
        "reads_an_element_back: a race between threads of a program, no barrier between: one address is "
        f"read at {__name__}:{line + 5}, written at {__name__}:{line + 2}"
    )


@pytest.mark.parametrize("case", IN_ORDER)
def test_what_is_in_order_passes(case):
    with no_races():
        IN_ORDER[case]()


def test_a_barrier_before_writing_is_enough():
    x = torch.arange(64.0)
    with no_races():
        turns_round_in_place[(1,)](x, N=64, BARRIER=True)
    assert torch.equal(x, torch.arange(63.0, -1, -1))
