"""Gradients of scores of up to 1e8 by the Triton kernels, whose backward passes compute scores again."""

import math

import pytest
import torch

from tests.interpret.guards import require_interpreter

require_interpreter()

from engine.kernels import dispatch, mi_lower_bound
from engine.kernels.contrastive import triton as contrastive
from engine.kernels.contrastive.losses import NEGATIVES, POSITIVE_COUNT, POSITIVES, ROWS, SPREAD, WEIGHTS
from engine.kernels.critics import triton as concat_critic
from engine.kernels.mi_bounds import chunked, plan
from engine.kernels.mi_bounds import scores as score_kernels
from engine.kernels.mi_bounds import triton as fused
from engine.kernels.mi_bounds.statistics import LSE, SHARE
from tests.kernels.critic_cases import concat, tensors
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

ONES, ONE = torch.ones(1, 3, 1), torch.ones(())
LOW, ZERO = torch.full((1, 3), -39.0), torch.zeros(1, 3)  # log-sum-exps 40 below scores of 1


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    for name in ("ROWS", "GRADIENT_ROWS", "CELLS", "MIXTURE", "MIXTURE_CELLS"):
        monkeypatch.setattr(score_kernels, name, {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4})
    for name in ("STATISTICS", "GRADIENTS"):
        monkeypatch.setattr(contrastive, name, {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4})


@pytest.fixture(params=["fused", "chunked"])
def algorithm(request):
    with dispatch.use(infonce=request.param, mi_bound=request.param):
        yield request.param


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_scores(name, algorithm):
    for size in SIZES:
        check_scores(name, size, "triton")


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_embeddings(name, algorithm):
    check_products(name, "triton")


@pytest.mark.parametrize("name", ["sum", "symmetric", "hard"])
def test_gradients_of_embeddings_in_parts(name, monkeypatch):
    """Library products of parts in bf16."""
    monkeypatch.setattr(plan, "LEAST_SPLIT", 0)
    with dispatch.use(infonce="chunked", mi_bound="chunked"):
        check_products(name, "triton")


@pytest.mark.parametrize("bound", ["infonce", "dv", "mine"])
def test_gradients_of_stored_scores(bound):
    for size in SIZES:
        scores = {"scores": (size * draw((12, 12), 4)).float()}
        found, exact = gradients(lambda scores: mi_lower_bound(scores, bound=bound), scores, "triton")
        torch.testing.assert_close(found["scores"], exact["scores"], rtol=1e-5, atol=1e-6)


def test_interpolated_bounds():
    check_interpolated("triton")


@pytest.mark.parametrize("name", ["sum", "none", "symmetric"])
def test_joint_scores_far_from_the_others(name, algorithm):
    check_joint(name, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("home", [fused, chunked], ids=["fused", "chunked"])
def test_recomputed_scores_above_their_log_sum_exp(home, dtype):
    """Every share is 1: rows weigh 2 and columns 3, positives nothing."""
    q = k = ONES.to(dtype)
    for columns, expected in (((None, None), -4.0), ((ZERO + 3, LOW), -10.0)):
        dq, dk = home.gradients(q, k, ONE, None, False, ZERO + 2, LOW, *columns, ZERO)
        assert dq.flatten().tolist() == [expected] * 3 == dk.flatten().tolist()
    state = torch.zeros(4, 1, 3)
    state[LSE], state[SHARE] = -39, 0.5
    found = home.infonce_keys if home is fused else lambda *given: home.infonce_gradients(*given)[1]
    # two others, and half of the positive
    assert found(q, k, ONE, None, False, ZERO + 1, state).flatten().tolist() == [1.5] * 3


def test_interpolated_bounds_of_scores_above_their_log_sum_exp():
    weight = ZERO + math.log(2)
    found = chunked.mixture_gradients(ONES, ONES, ONE, ZERO, 0.5, LOW, weight, torch.ones(1))
    equal = chunked.mixture_gradients(ONES, ONES, ONE, ZERO, 0.5, ZERO + 1, weight, torch.ones(1))
    for f, e in zip(found, equal, strict=True):
        torch.testing.assert_close(f, e)


def test_contrastive_losses_of_scores_above_their_log_sum_exp():
    """All pairs of one label are positives; then none is, and each is weighted by its hardness 1."""
    state = torch.full((ROWS, 1, 3), -39.0)
    state[POSITIVE_COUNT] = 3
    for labels, place, hardness, expected in (
        (torch.zeros(3, dtype=torch.int64), POSITIVES, 0.0, 3.0), (torch.arange(3), NEGATIVES, 1.0, 4.0),
        (torch.zeros(3, dtype=torch.int64), SPREAD, 0.0, 2.0), (torch.arange(3), WEIGHTS, 1.0, 2.0),
    ):  # fmt: skip
        grads = torch.zeros(ROWS, 1, 3)
        grads[place] = 1.0
        pairs = None, labels, labels, None, None, None, False
        dq, dk, _ = contrastive.gradients(ONES, ONES, ONE, None, hardness, True, grads, state, *pairs)
        torch.testing.assert_close(torch.cat([dq, dk]).flatten(), torch.full((6,), expected))


def test_concat_critics_scores_above_their_log_sum_exp():
    """As if every score had the whole weight of its row: gradients are those of given scores' gradients 1/B."""
    x, y, layers = concat(9, 9, (4, 3), 16, dtype=torch.float32)
    weights = tensors(layers)
    of_x, of_y = (v @ w.T for v, w in zip((x, y), weights[0].split([4, 3], 1), strict=True))
    found, expected = [], []
    for sums, given, shift in ((found, None, -1e4), (expected, torch.full((9, 9), 1 / 9).fill_diagonal_(0), None)):
        shift = None if shift is None else torch.full((9,), shift)
        sums += [torch.empty_like(t) for t in (of_y, of_x, *weights[2:-1])]
        last = torch.empty(1)
        diagonal = None if shift is None else torch.zeros(9)
        concat_critic._gradients(of_y, of_x, weights[2:], given, shift, diagonal, *sums[:2], [*sums[2:], last])
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("algorithm", ["fused", "slabs"])
def test_gradients_of_the_concat_critic(algorithm):
    with dispatch.use(concat_critic=algorithm):
        check_critic(by_the_concat_critic)


@pytest.mark.parametrize("algorithm", ["fused", "plain"])
def test_gradients_of_separate_critics(algorithm):
    with dispatch.use(critic_towers=algorithm):
        check_critic(by_towers)
