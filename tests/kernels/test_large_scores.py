"""Gradients of scores of up to 1e8 by the CPU's kernels and by the formulas."""

import math

import pytest
import torch
import torch.distributed as dist

from engine.kernels import mi_lower_bound, use_backend
from engine.kernels.contrastive import cpu as contrastive
from engine.kernels.contrastive.losses import NEGATIVES, ROWS
from engine.kernels.critics import cpu as critics
from engine.kernels.mi_bounds import cpu
from engine.kernels.ranks.autograd import BoundOverRanks, BoundSettings, RowLosses
from engine.kernels.ranks.group import Ranks
from engine.kernels.ranks.streaming import Scoring
from tests.kernels.large_scores import (
    CASES,
    SIZES,
    by_the_concat_critic,
    by_towers,
    check_critic,
    check_interpolated,
    check_joint,
    check_products,
    check_scores,
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
@pytest.mark.parametrize("bound", ["infonce", "dv", "mine"])
def test_gradients_of_equal_stored_scores(bound, backend):
    """A log-sum-exp is between two numbers of fp32: what its rounding takes is all that is lost."""
    for size in (1e2, 1e4, 1e6):
        scores = {"scores": torch.full((8, 8), size)}
        found, exact = gradients(lambda scores: mi_lower_bound(scores, bound=bound), scores, backend)
        torch.testing.assert_close(found["scores"], exact["scores"], rtol=math.expm1(1e-7 * size), atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_interpolated_bounds(backend):
    check_interpolated(backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["sum", "none", "symmetric"])
def test_joint_scores_far_from_the_others(name, backend, products):
    check_joint(name, backend)


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


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(dist.group.WORLD, 0, 1)
    dist.destroy_process_group()


def test_scores_over_ranks_above_their_log_sum_exp(one_rank):
    """Scores of 1 are 41 in the backward pass: every share is 1."""

    def score(rows, columns, parameters):
        return rows + 0 * columns.mT + 1 + 40 * torch.is_grad_enabled()

    def gradient(function, *first):
        rows = torch.zeros(1, 3, 1, dtype=torch.float64, requires_grad=True)
        values = function.apply(scoring, *first, torch.zeros(1, 3, dtype=torch.float64), rows, rows.detach(), None)
        return torch.autograd.grad((values[0] if first else values).sum(), rows)[0].flatten().tolist()

    scoring = Scoring(score, one_rank, [3], 3, 3)
    assert gradient(RowLosses) == pytest.approx([2 - 2 / 3] * 3)
    average = torch.full((1,), -math.inf, dtype=torch.float64)
    assert gradient(BoundOverRanks, BoundSettings("dv"), None, average) == pytest.approx([1 / 3 - 2 / 3] * 3)
    # of the interpolated bound with scores of 1: p, and the weight of a row's marginal term
    p, weight = math.e / (1 + math.e), 2 * math.e / (1 + math.e) ** 2
    found = gradient(BoundOverRanks, BoundSettings("interpolate", alpha=0.5), None, average)
    # every pair weighs as much as both others; the first row's largest score is its own, which is no other
    assert found == pytest.approx([1 / 3 - p / 6 - 2 * (n / 6 + weight / 3) for n in (1, 2, 2)])
