"""Loss and values of classifiers' logits in Triton, under triton's interpreter, with guards."""

import pytest
import torch

from tests.interpret.guards import Guards, require_interpreter

require_interpreter()

from engine.kernels.cmi import cmi, cpu, triton


def logits(groups: int, count: int, seed: int) -> torch.Tensor:
    return 4 * torch.randn(groups, count, generator=torch.Generator().manual_seed(seed))


SIZES = [(1, 1, 1), (3, 7, 2), (2, 63, 130), (6, 128, 128), (2, 600, 1100)]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("groups, b, p", SIZES)
def test_as_torch(groups, b, p, which):
    """Values and gradients, with and without the gradient of either output, against fp64."""
    joint, product, limit = logits(groups, b, 1), logits(groups, p, 2), 5.0
    joint[0, 0] = limit  # at the limit the gradient is still there
    exact = cpu.read(joint.double(), product.double(), limit)
    grads = torch.linspace(0.5, -1.0, groups), torch.linspace(1.0, 2.0, groups)
    with Guards() as guards:
        a, c = guards.input(joint), guards.input(product)
        found = triton.read(a, c, limit)
        backward = [
            (chosen, triton.read_backward(a, c, *map(guards.input, grads), which, limit))
            if None not in chosen
            else (chosen, triton.read_backward(a, c, *chosen, which, limit))
            for chosen in (grads, (grads[0], None), (None, grads[1]))
        ]
    for f, e in zip(found, exact, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-5, atol=1e-5)
    for chosen, pieces in backward:
        wide = [None if g is None else g.double() for g in chosen]
        expected = cpu.read_backward(joint.double(), product.double(), *wide, which, limit)
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
        assert all(torch.equal(a, b) for a, b in zip(found, cpu.read(wide, product.to(wide.dtype), limit), strict=True))
