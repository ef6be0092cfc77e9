"""Classifiers, and loss and values of their logits, in Triton, under triton's interpreter, with guards."""

import pytest
import torch

from tests.interpret.device import same, times
from tests.interpret.guards import Guards, require_interpreter

require_interpreter()

from engine.kernels import dispatch
from engine.kernels.cmi import batched, classifiers, cmi, triton
from tests.kernels.test_knn_cmi_op import leaves, problem, rebuilt, run


def logits(groups: int, count: int, seed: int) -> torch.Tensor:
    return 4 * torch.randn(groups, count, generator=torch.Generator().manual_seed(seed))


SIZES = [(1, 1, 1), (3, 7, 2), (2, 63, 130), (6, 128, 128), (2, 600, 1100)]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("groups, b, p", SIZES)
def test_as_torch(groups, b, p, which):
    """Values and gradients, with and without the gradient of either output, against fp64."""
    joint, product, limit = logits(groups, b, 1), logits(groups, p, 2), 5.0
    joint[0, 0] = limit  # at the limit the gradient is still there
    exact = batched.read(joint.double(), product.double(), limit)
    grads = [torch.linspace(*ends, groups).to(joint.device) for ends in ((0.5, -1.0), (1.0, 2.0))]
    with Guards() as guards:
        a, c = guards.input(joint), guards.input(product)
        found = triton.read(a, c, limit)
        backward = [
            (chosen, triton.read_backward(a, c, *map(guards.input, grads), which, limit))
            if None not in chosen
            else (chosen, triton.read_backward(a, c, *chosen, which, limit))
            for chosen in (tuple(grads), (grads[0], None), (None, grads[1]))
        ]
    for f, e in zip(found, exact, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-5, atol=1e-5)
    for chosen, pieces in backward:
        wide = [None if g is None else g.double() for g in chosen]
        expected = batched.read_backward(joint.double(), product.double(), *wide, which, limit)
        if len(expected) < len(pieces):
            expected.append(torch.zeros_like(product).double())
        for f, e in zip(pieces, expected, strict=True):
            torch.testing.assert_close(f.double(), e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e4, -1e4, 100.0])
def test_large_logits_stay_finite(size):
    joint, product = (torch.full((1, 4), s, requires_grad=True) for s in (-size, size))
    reading = cmi(joint, product, "nwj")
    (reading.loss + reading.value).sum().backward()
    assert all(t.isfinite().all() for t in (*reading, joint.grad, product.grad))


def test_not_a_number_shows():
    joint, product = logits(2, 9, 1), logits(2, 9, 2)
    product[1, 3] = torch.nan
    reading = cmi(joint, product, "dv")
    assert reading.loss.isnan().tolist() == reading.value.isnan().tolist() == [False, True]


def test_bitwise_the_same_three_times():
    joint, product = logits(6, 128, 1), logits(6, 128, 2)
    first, *others = (triton.read(joint, product, 9.0) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_other_limits_and_dtypes_run_as_torch():
    joint, product = logits(2, 5, 1), logits(2, 4, 2)
    for wide, limit in ((joint.double(), 9.0), (joint, 1e3)):
        found = triton.read(wide, product.to(wide.dtype), limit)
        assert all(same(a, b) for a, b in zip(found, batched.read(wide, product.to(wide.dtype), limit), strict=True))


# -- classifiers ------------------------------------------------------------------------------------------------------


# widths of the features, joint rows, queries, product rows a query, the classifiers' width, hidden, outputs
PROBLEMS = [
    ((1, 1, 1), 1, 1, 1, 1, 1, 1), ((4, 4, 1), 5, 3, 2, 4, 6, 1), ((40, 1, 40), 35, 9, 3, 40, 70, 1),
    ((7, 3, 2), 9, 4, 1, 7, 20, 2), ((33, 33, 33), 32, 32, 1, 33, 32, 1),
]  # fmt: skip


def flat(layers, slots, product):
    (first, bias), *rest = layers
    return (
        first,
        bias,
        [t for layer in rest for t in layer],
        [s for t in slots for s in t],
        [p for t in product for p in t],
    )


@pytest.mark.parametrize("widths, b, m, k, dim, hidden, out", PROBLEMS)
def test_classifiers_as_torch(widths, b, m, k, dim, hidden, out):
    """Logits, hidden layers and gradients, with and without those of product rows, rows and weights."""
    layers, joint, slots, product, k = problem(widths, b, m, k, dim, hidden, out, torch.float32)
    first, bias, rest, places, rows = flat(layers, slots, product)
    double = [t.double() for t in (first, bias)], [[t.double() for t in part] for part in (rest, joint, rows)]
    (wide_first, wide_bias), (wide_rest, wide_joint, wide_rows) = double
    exact = batched.forward(wide_first, wide_bias, wide_rest, wide_joint, places, wide_rows, k)
    grads = [torch.linspace(-1, 1, t.numel()).view_as(t) for t in exact[:2]]
    with Guards() as guards:
        first, bias = guards.input(first), guards.input(bias)
        rest, joint, rows = ([guards.input(t) for t in part] for part in (rest, joint, rows))
        found = classifiers.forward(first, bias, rest, joint, places, rows, k)
        backward = [
            (two, wanted, classifiers.backward(
                guards.input(grads[0]), guards.input(grads[1]) if two else None, first, rest[::2], joint, places, rows,
                k, found[2:], *wanted,
            ))
            for two in (True, False) for wanted in ((True, True), (True, False), (False, True))
        ]  # fmt: skip
    for f, e in zip(found, exact, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-5, atol=1e-5)
    for two, wanted, pieces in backward:
        expected = batched.backward(
            grads[0].double(), grads[1].double() if two else None, wide_first, wide_rest[::2], wide_joint, places,
            wide_rows, k, exact[2:], *wanted,
        )  # fmt: skip
        for f, e in zip(pieces, expected, strict=True):
            torch.testing.assert_close(f.double(), e, rtol=1e-4, atol=1e-4 * max(1e-3, e.abs().max().item()))


@pytest.mark.parametrize("number", [2, 3])
def test_classifiers_in_deep_tiles(number):
    with dispatch.use(tower_tiles="deep"):
        test_classifiers_as_torch(*PROBLEMS[number])


def test_classifiers_through_the_operation_and_bitwise_the_same():
    layers, joint, slots, product, k = problem((8, 8, 1), 9, 4, 2, 8, 16, dtype=torch.float32)
    runs = []
    for _ in range(times()):
        own = leaves(layers, joint)
        logits = run(*rebuilt(own, joint, layers), slots, product, k)
        value = cmi(*(t[..., 0] for t in logits), "dv")
        runs.append([*logits, *torch.autograd.grad(value.value.sum() + value.loss.sum(), own)])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_many_rows_run_as_library_products(monkeypatch):
    layers, joint, slots, product, k = problem((8, 8, 1), 9, 4, 2, 8, 16, dtype=torch.float32)
    fused = run(layers, joint, slots, product, k)
    monkeypatch.setattr(classifiers, "FEW_ROWS", 8)
    for a, b in zip(fused, run(layers, joint, slots, product, k), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
