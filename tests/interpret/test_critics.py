"""The concat critic's Triton kernels under triton's interpreter, with guards."""

import math

import pytest
import torch

from tests.interpret.device import same, tolerance
from tests.interpret.guards import Guards, require_interpreter

require_interpreter()

from engine.kernels.critics import plain, reference, triton
from engine.kernels.critics.op import concat_infonce, concat_scores, grouped_mlp
from tests.kernels.critic_cases import (
    assert_as_good_as_torch,
    cast,
    concat,
    draw,
    grouped,
    infonce,
    tensors,
    value_and_grads,
)  # fmt: skip

# Pairs that do and do not fill tiles and slabs, hidden layers that do and do not fill blocks.
SHAPES = [
    (1, 1, (1, 1), 1, 2), (2, 7, (3, 5), 17, 2), (7, 2, (16, 1), 8, 1), (9, 20, (4, 4), 33, 2), (17, 12, (2, 3), 70, 1),
    (13, 13, (2, 9), 12, 0), (3, 70, (5, 2), 20, 2), (70, 3, (1, 2), 5, 0),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    """Several slabs, and splits that end before and after a slab does."""
    monkeypatch.setattr(triton, "SLAB", (128, 128))
    monkeypatch.setattr(triton, "SPLITS", 3)


def guarded(function, case, upstream):
    """`function` on tensors between bands of NaN; its allocations lie between canaries."""
    with Guards() as guards:
        x, y, *layers = (guards.input(t) for t in tensors(case))
        return function(x, y, layers, guards.input(upstream))


def by_scores(x, y, layers, upstream):
    scores = triton.concat_forward(x, y, layers)
    found = triton.concat_backward(upstream, x, y, layers, True, True)
    inputs = triton.concat_backward(upstream, x, y, layers, True, False)
    assert same(found[: len(inputs)], inputs), "inputs' gradients differ without the weights'"
    return [scores, *plain.pieces_of(found, plain.concat_shapes(x, y, layers, True, True))]


def by_infonce(transpose):
    def run(x, y, layers, upstream):
        losses, found = triton.concat_infonce(x, y, layers, transpose, True, True)
        alone, nothing = triton.concat_infonce(x, y, layers, transpose, False, False)
        assert same(losses, alone) and not len(nothing)
        found = -upstream * found
        value = math.log(len(x)) - losses.mean()
        return [value, *plain.pieces_of(found, plain.concat_shapes(x, y, layers, True, True))]

    return run


def compare(function, formula, case, tolerance=2e-5, summands=0.0):
    exact = value_and_grads(formula, cast(case, torch.float64))
    upstream = draw(*exact[0].shape, seed=7, dtype=torch.float32)
    found = guarded(function, case, upstream)
    assert_as_good_as_torch(found, value_and_grads(formula, case), exact, tolerance, summands)


@pytest.mark.parametrize("rows, columns, dims, hidden, layers", SHAPES)
def test_scores(rows, columns, dims, hidden, layers):
    compare(by_scores, reference.concat_scores, concat(rows, columns, dims, hidden, layers, torch.float32))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows, columns, dims, hidden, layers", SHAPES)
def test_infonce(rows, columns, dims, hidden, layers, transpose):
    """Rows and columns of the same number, the smaller one."""
    count = min(rows, columns)
    case = concat(count, count, dims, hidden, layers, torch.float32)
    compare(by_infonce(transpose), infonce(transpose), case, summands=math.log(count))


def test_blocks_of_the_other_precisions(monkeypatch):
    """The larger blocks' bounds; the interpreter multiplies in fp32 whatever is asked."""
    monkeypatch.setattr(triton, "_precision", lambda: "tf32")
    case = concat(9, 11, (4, 3), 40, 2, torch.float32)
    compare(by_scores, reference.concat_scores, case, tolerance("tf32"))


def test_layers_kept_in_16_bits(monkeypatch):
    """As with precision medium, but for the products' own rounding; the interpreter truncates where a GPU rounds."""
    monkeypatch.setattr(triton, "_buffer_dtype", lambda precision: torch.bfloat16)
    case = concat(9, 9, (4, 3), 40, 2, torch.float32)
    compare(by_scores, reference.concat_scores, case, 2**-6)


def test_deeper_and_wider_critics():
    """What the kernels do not take runs by torch's products."""
    for hidden, layers in ((8, 3), (300, 1)):
        case = concat(5, 5, (4, 3), hidden, layers, torch.float32)
        compare(by_scores, reference.concat_scores, case)
        compare(by_infonce(True), infonce(True), case, summands=math.log(5))


@pytest.mark.parametrize("scale", [100.0, -100.0, 1e4])
def test_large_scores(scale):
    x, y, layers = concat(12, 12, (4, 3), 16, dtype=torch.float32)
    moved = [*layers[:-1], (layers[-1][0], layers[-1][1] + scale)]
    if abs(scale) == 100:
        torch.testing.assert_close(concat_infonce(x, y, moved), concat_infonce(x, y, layers), rtol=1e-4, atol=1e-4)
    large = [*layers[:-1], (layers[-1][0] * scale, layers[-1][1])]
    found = value_and_grads(concat_infonce, (x, y, large))
    for ours, exact in zip(found, value_and_grads(infonce(), cast((x, y, large), torch.float64)), strict=True):
        assert ours.isfinite().all()
        size = exact.abs().max().item()
        torch.testing.assert_close(ours.double(), exact, rtol=1e-2, atol=2e-3 * size + 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad):
    x, y, layers = concat(20, 20, (3, 4), 8, dtype=torch.float32)
    y[17, 2] = bad
    scores = concat_scores(x, y, layers)
    assert not scores[17].isfinite().any() and scores[:17].isfinite().all()
    assert concat_infonce(x, y, layers).isnan() and concat_infonce(x, y, layers, transpose=True).isnan()


def test_through_the_operations_and_bitwise_the_same():
    for function, formula, case in (
        (concat_scores, reference.concat_scores, concat(20, 17, (3, 4), 24, dtype=torch.float32)),
        (concat_infonce, infonce(), concat(20, 20, (3, 4), 24, dtype=torch.float32)),
        (grouped_mlp, reference.grouped_mlp, grouped(9, (3, 4), (2, 1), 8, 4, dtype=torch.float32)),
    ):
        runs = [value_and_grads(function, case) for _ in range(3)]
        for again in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
        for f, e in zip(runs[0], value_and_grads(formula, case), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)
