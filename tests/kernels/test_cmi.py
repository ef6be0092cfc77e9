"""Readings and losses of the conditional estimator on fixed logits (T0 of the ladder: algebra)."""

import math

import pytest
import torch

from engine.kernels.cmi import LOGIT_LIMIT, classifier_loss, cmi_values
from engine.kernels.cmi.batched import runs


def logits(n: int, seed: int, *columns: int) -> torch.Tensor:
    return 3 * torch.randn(n, *columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_values_by_hand():
    """Two joint and three product logits whose exponentials are 2, 3 | 1, 2, 6."""
    values = cmi_values(torch.tensor([2.0, 3.0]).log(), torch.tensor([1.0, 2.0, 6.0]).log())
    ldr = math.log(6) / 2
    torch.testing.assert_close(values["ldr"], torch.tensor(ldr))
    torch.testing.assert_close(values["dv"], torch.tensor(ldr - math.log(3)))
    torch.testing.assert_close(values["nwj"], torch.tensor(1 + ldr - 3))


def test_values_are_the_textbook_formulas():
    joint, product = logits(7, 0), logits(5, 1)
    values = cmi_values(joint, product)
    torch.testing.assert_close(values["dv"], joint.mean() - product.exp().mean().log())
    torch.testing.assert_close(values["nwj"], 1 + joint.mean() - product.exp().mean())
    assert values["nwj"] <= values["dv"]  # log u <= u − 1


def test_dv_ignores_a_constant_and_nwj_is_dv_at_the_best_one():
    joint, product = logits(9, 2), logits(6, 3)
    dv = cmi_values(joint, product)["dv"]
    torch.testing.assert_close(cmi_values(joint + 4, product + 4)["dv"], dv)
    best = product.logsumexp(0) - math.log(6)
    torch.testing.assert_close(cmi_values(joint - best, product - best)["nwj"], dv)


def test_large_logits_stay_finite():
    values = cmi_values(torch.full((4,), 200.0), torch.full((4,), 200.0))
    assert values["ldr"] == 200 and values["dv"].abs() < 1e-3
    joint, product = torch.full((4,), -1e4), torch.full((4,), 1e4)
    assert classifier_loss(joint, product) == 1e4


def test_loss_is_cross_entropy_of_the_posterior():
    """Posterior of the joint class = b e^t / (b e^t + b')."""
    joint, product = logits(8, 4), logits(3, 5)
    posterior = 8 * joint.exp() / (8 * joint.exp() + 3), 8 * product.exp() / (8 * product.exp() + 3)
    expected = -(posterior[0].log().sum() + (1 - posterior[1]).log().sum()) / 11
    torch.testing.assert_close(classifier_loss(joint, product), expected)
    with_equal_counts = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.cat([joint[:3], product]), torch.tensor([1.0] * 3 + [0.0] * 3, dtype=torch.float64)
    )
    torch.testing.assert_close(classifier_loss(joint[:3], product), with_equal_counts)


@pytest.mark.parametrize("counts", [(600, 600), (900, 300), (200, 1000)])
def test_loss_is_least_at_the_log_ratio_whatever_the_counts(counts):
    """Two cells with p = (.8, .2) and q = (.5, .5): the best logits are log 1.6 and log .4."""
    b, c = counts
    joint = torch.tensor([0, 1]).repeat_interleave(torch.tensor([b * 8 // 10, b * 2 // 10]))
    product = torch.tensor([0, 1]).repeat_interleave(torch.tensor([c // 2, c // 2]))
    t = torch.tensor([1.6, 0.4], dtype=torch.float64).log().requires_grad_()
    # the loss is convex in t: where its gradient vanishes it is least
    (gradient,) = torch.autograd.grad(classifier_loss(t[joint], t[product]), t)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["ldr", "dv", "nwj", "loss"])
def test_gradients(name):
    joint, product = logits(5, 6).requires_grad_(), logits(4, 7).requires_grad_()

    def function(p, q):
        return classifier_loss(p, q) if name == "loss" else cmi_values(p, q)[name]

    assert torch.autograd.gradcheck(function, (joint, product))


def test_limit():
    assert math.isclose(LOGIT_LIMIT, math.log(9999), rel_tol=1e-12)  # the log odds of 1 - 1e-4


def test_neighbouring_classifiers_of_equal_widths_run_together():
    joint = [torch.zeros(5, width) for width in (2, 3, 3, 4)]
    first, second = [0, 1, 2, 0, 2, 1, 1, 2, 3], [3, 3, 0, 3, 3, 0]  # (2, 3, 3) twice, (3, 3, 4) and (4, 4, 2) twice
    assert runs(joint, first + second) == [slice(0, 2), slice(2, 3), slice(3, 5)]
    assert runs(joint, second) == [slice(0, 2)]
    assert runs(joint, first[:3] + second + first[:3]) == [slice(0, 1), slice(1, 3), slice(3, 4)]
