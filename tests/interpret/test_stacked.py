"""The cube's kernels in Triton's interpreter: the formula's numbers, within the memory that is theirs."""

import pytest
import torch

from tests.interpret.guards import Guards, require_interpreter

require_interpreter()

from engine.kernels.registry import use_backend
from engine.kernels.stacked import cpu
from engine.kernels.stacked import triton as kernels
from engine.kernels.stacked.cpu import TYPES
from tests.kernels.test_stacked_op import SETTINGS, run, seed, sequences, validity

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def assert_close(found, expected):
    for f, e in zip(found, expected, strict=True):
        assert (f.dtype, f.shape) == (e.dtype, e.shape)
        torch.testing.assert_close(f, e, rtol=LIMITS[f.dtype], atol=LIMITS[f.dtype])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    "batch, d, lengths, size",
    [(1, 1, (1,), 1), (3, 6, (5, 9, 3), 7), (2, 70, (40, 33), 35), (2, 16, (3, 70, 2), 66)],
)
def test_stack_sequences(batch, d, lengths, size, name):
    count = len(lengths)
    types = (torch.bfloat16, torch.float32, torch.float16)
    given = [x.detach() for x in sequences(batch, d, lengths, types)]
    valid = [torch.ones(1, 1).long()] if batch == 1 else validity(batch, lengths)
    defaults = {"fill": [False] * 3, "rates": [0.0] * 3, "hidden": [0.0] * 3}
    settings = tuple(v[:count] for v in (defaults | SETTINGS[name]).values())
    drawn = (*settings, seed() if name == "training" else None)
    grad, mean_grads = torch.randn(batch, size, count, d), [torch.randn(batch, d) for _ in range(count)]
    numbers = [TYPES.index(t) for t in types[:count]]
    with Guards() as guards:
        first, *others = (guards.input(x) for x in given)
        ok = [guards.input(v) for v in valid]
        found = kernels.stack_sequences(first, others, ok, size, *drawn)
        slopes = guards.input(grad), [guards.input(g) for g in mean_grads]
        back = kernels.stack_sequences_backward(*slopes, ok, list(lengths), *drawn, numbers)
    cube, means = cpu.stack_sequences(given[0], given[1:], valid, size, *drawn)
    assert_close([found[0], *found[1]], [cube, *means])
    assert_close(back, cpu.stack_sequences_backward(grad, mean_grads, valid, list(lengths), *drawn, numbers))


@pytest.mark.parametrize("fill", [False, True])
def test_a_sequence_without_places(fill):
    """Its mean is 0, as by the formula, not 0 / 0."""
    x, length = torch.empty(2, 0, 4), torch.ones(2, dtype=torch.int64)
    cube, (mean,) = kernels.stack_sequences(x, [], [length], 3, [fill], [0.0], [0.0], None)
    assert torch.equal(cube, torch.zeros(2, 3, 1, 4)) and torch.equal(mean, torch.zeros(2, 4))


def test_masks_are_the_cpus_bit_for_bit():
    """Of dropout and of hiding, over more than one piece of the hash."""
    x, length = torch.ones(40, 9, 70), torch.full((40,), 9)
    cubes = []
    for host in (kernels, cpu):
        cube, _ = host.stack_sequences(x, [x], [length] * 2, 9, [False] * 2, [0.3, 0.1], [0.0, 0.5], seed())
        cubes.append(cube != 0)
    assert torch.equal(*cubes) and 0.68 < cubes[0][:, :, 0].float().mean() < 0.72


def test_what_is_not_valid_is_not_read():
    given, valid = [x.detach() for x in sequences()], validity()
    for x, ok in zip(given, valid, strict=True):
        x[~(torch.arange(x.shape[1]) < ok[:, None] if ok.dim() == 1 else ok != 0)] = torch.nan
    drawn = ([True, False, True], [0.0] * 3, [0.0] * 3, None)
    cube, means = kernels.stack_sequences(given[0], given[1:], valid, 7, *drawn)
    assert all(t.isfinite().all() for t in (cube, *means))


def test_through_the_operation():
    runs = []
    for backend in ("triton", "cpu"):
        with use_backend(backend):
            runs.append(run(sequences(), validity(), **SETTINGS["training"]))
    assert_close(*runs)
