"""The Triton kernels of the axis mix, forward and backward, under triton's interpreter, with guards."""

import pytest
import torch

from tests.interpret.device import on_gpu, same, tolerance
from tests.interpret.guards import Guards, require_interpreter

require_interpreter()

from engine.kernels.cube_mix import op, triton
from engine.kernels.registry import use_backend
from tests.kernels.test_cube_mix_op import NAMES, case, run

# Columns that do and do not fill a block, every axis, with and without products.
SHAPES = [
    ((2, 20, 3, 11), 1, 18, 17),
    ((5, 4, 3, 19), 3, 33, 21),
    ((3, 12, 2, 9), 1, 20, 9),
    ((2, 5, 3, 30), 2, 3, 3),
    ((3, 5, 2, 7), 2, 4, 5),
    ((65, 2, 1, 5), 3, 8, 7),
    ((1, 1, 1, 1), 1, 1, 1),
    ((33, 1, 1, 1), 2, 16, 9),
]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """A program of the short axes' backward pass loops over two blocks of columns: more would only take time."""
    monkeypatch.setattr(triton, "SHORT_STEPS", 2)


def compare(x, weights, axis, precision="fp32", **settings):
    before, after = x.shape[:axis].numel(), x.shape[axis + 1 :].numel()
    activation, ln_first = settings.get("activation", "gelu"), settings.get("ln_first", False)
    with Guards() as guards:
        inputs = [None if w is None else guards.input(w) for w in weights]
        u = guards.input(x.reshape(before, x.shape[axis], after))
        y, kept = triton.forward(u, *inputs, activation, ln_first, 1e-6, True)
        alone, nothing = triton.forward(u, *inputs, activation, ln_first, 1e-6, False)
        assert same(alone, y) and not nothing.numel()
        cotangent = guards.input(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        found = triton.backward(cotangent, u, kept, *inputs, activation, ln_first, 1e-6, True)
        again = triton.backward(cotangent, u, kept, *inputs, activation, ln_first, 1e-6, False)
    assert len(again) == len(found) - 1
    assert all(same(a, b) for a, b in zip(found, again, strict=False)), "weights' gradients differ without dx"
    found = [y, found[-1], *found[:-1]]
    shape = (*x.shape[:axis], -1, *x.shape[axis + 1 :])
    exact = run("reference", x, weights, axis, cotangent.view(shape), torch.float64, **settings)
    torchs = run("reference", x, weights, axis, cotangent.view(shape), **settings)
    # LayerNorm over one element divides what should be 0, and is a rounding on a GPU, by the root of its epsilon
    alone = on_gpu() and weights[-1].numel() == 1
    present = ["y", "x", *(n for n, w in zip(NAMES, weights, strict=True) if w is not None)]
    for name, e, t, f in zip(present, exact, torchs, found, strict=True):
        slack = tolerance(precision) * e.abs().max() + 2 * (t - e).abs().max() + (1e-3 if alone else 1e-6)
        error = (f.view(e.shape) - e).abs()
        assert (error <= slack).all(), f"{name}: {error.max():.2e} of {e.abs().max():.2e}"


@pytest.mark.parametrize("ln_first", [False, True])
@pytest.mark.parametrize("shape, axis, hidden, d_out", SHAPES)
def test_shapes(shape, axis, hidden, d_out, ln_first):
    x, weights = case(shape, axis, hidden, d_out, ln_first)
    compare(x, weights, axis, ln_first=ln_first)


@pytest.mark.parametrize("ln_first", [False, True])
@pytest.mark.parametrize("shape, axis, hidden, d_out", [SHAPES[0], SHAPES[3]])
def test_without_biases_and_projection(shape, axis, hidden, d_out, ln_first):
    x, weights = case(shape, axis, hidden, d_out, ln_first, bias=False, project=False)
    compare(x, weights, axis, ln_first=ln_first)


@pytest.mark.parametrize("activation", op.ACTIVATIONS)
@pytest.mark.parametrize("shape, axis, hidden, d_out", [((2, 9, 2, 5), 1, 9, 6), SHAPES[4]])
def test_activations(activation, shape, axis, hidden, d_out):
    x, weights = case(shape, axis, hidden, d_out, scale=1.5)
    x[0, 0] = 0
    compare(x, weights, axis, activation=activation)


@pytest.mark.parametrize("precision", ["tf32"])
def test_blocks_of_the_other_precisions(monkeypatch, precision):
    """The larger blocks' bounds; the interpreter multiplies in fp32 whatever is asked."""
    monkeypatch.setattr(triton, "_precision", lambda: precision)
    x, weights = case((2, 70, 3, 23), 1, 34, 50)
    compare(x, weights, 1, precision)


def test_through_the_operation_and_bitwise_determinism():
    x, weights = case((3, 17, 2, 9), 1, 9, 6)
    first = run("triton", x, weights, 1)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, run("triton", x, weights, 1), strict=True))
    for a, b in zip(first, run("reference", x, weights, 1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with use_backend("triton"):
        empty = op.cube_mix(x[:0], 1, *weights)
    assert empty.shape == (0, 6, 2, 9)
