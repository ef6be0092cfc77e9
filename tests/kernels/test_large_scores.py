"""Gradients of scores of up to 1e8 by the CPU's kernels and by the formulas."""

import math

import pytest
import torch

from engine.kernels import mi_lower_bound, use_backend
from engine.kernels.contrastive import cpu as contrastive
from engine.kernels.contrastive.losses import NEGATIVES, ROWS
from engine.kernels.critics import cpu as critics
from engine.kernels.mi_bounds import cpu
from tests.kernels.large_scores import (
    CASES,
    SIZES,
    by_the_concat_critic,
    by_towers,
    check_critic,
    check_products,
    check_scores,
    check_two_largest,
    gradients,
)
from tests.kernels.mi_cases import draw


@pytest.fixture(params=["compiled", "torch"])
def products(request, monkeypatch):
    """With the C++ kernel, and with torch's products in its place."""
    if request.param == "torch":
        for module in (cpu, critics):
            monkeypatch.setattr(module, "library", lambda dtype: None)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_scores(name, backend, products):
    for size in SIZES:
        check_scores(name, size, backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_embeddings(name, backend, products):
    check_products(name, backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bound", ["infonce", "dv", "mine"])
def test_gradients_of_stored_scores(bound, backend):
    """What the forward pass saw is what the backward pass sees: rows' gradients have their digits at every size."""
    for size in SIZES:
        scores = {"scores": (size * draw((12, 12), 4)).float()}
        found, exact = gradients(lambda scores: mi_lower_bound(scores, bound=bound), scores, backend)
        torch.testing.assert_close(found["scores"], exact["scores"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_two_largest_scores(backend):
    check_two_largest(backend)


def test_recomputed_scores_above_their_log_sum_exp():
    """Of scores 1 with statistics 40 below them: every share is 1."""
    q = k = torch.ones(1, 3, 1, dtype=torch.float64)
    scale, zero = torch.ones((), dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    found, equal = (
        cpu.mixture_gradients(q, k, scale, zero, 0.5, rest, zero + math.log(2), scale[None])
        for rest in (zero - 39, zero + 1)
    )
    torch.testing.assert_close(found, equal)
    grads, state = torch.zeros(ROWS, 1, 3, dtype=torch.float64), torch.zeros(ROWS, 1, 3, dtype=torch.float64) - 39
    grads[NEGATIVES] = 1.0
    dq, dk, _ = contrastive.gradients(q, k, scale, None, 0.0, True, grads, state, *[None] * 6, False)
    assert dq.flatten().tolist() == [2, 2, 2] == dk.flatten().tolist()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("gradient", [by_the_concat_critic, by_towers])
def test_gradients_of_critics(gradient, backend, products):
    with use_backend(backend):
        check_critic(gradient)


def test_rows_of_gradients_add_up_to_zero():
    """What a positive gains the others of its row lose."""
    scores = (1e8 * draw((12, 12), 5)).float().requires_grad_()
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            (found,) = torch.autograd.grad(mi_lower_bound(scores), scores)
        assert found.sum(1).abs().max() < 1e-7
