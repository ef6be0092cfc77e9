import math

import pytest
import torch

from engine.kernels.mi_bounds import BOUNDS
from engine.mimrl.published import mine_loss, published_bound
from tests.golden.common import assert_grad, assert_values, cases, load


@cases("bounds_")
@pytest.mark.parametrize("bound", BOUNDS)
def test_bound(name: str, info: dict, bound: str):
    recorded = load(name)
    scores = recorded["scores"].requires_grad_()
    log_baseline = recorded["log_baseline"].requires_grad_()
    alpha = 1 / (1 + math.exp(-info["alpha_logit"]))

    value, surrogate = published_bound(scores, bound, log_baseline, alpha=alpha)
    grad_scores, grad_baseline = torch.autograd.grad(surrogate, (scores, log_baseline), allow_unused=True)

    assert_values(value, recorded[f"{bound}.value"], "value")
    assert_values(surrogate, recorded[f"{bound}.value"], "surrogate")
    assert_grad(grad_scores, recorded[f"{bound}.grad_scores"], "grad_scores")
    if f"{bound}.grad_log_baseline" in recorded:
        assert_grad(grad_baseline, recorded[f"{bound}.grad_log_baseline"], "grad_log_baseline")


@cases("bounds_")
def test_mine_loss(name: str, info: dict):
    recorded = load(name)
    scores = recorded["scores"].requires_grad_()
    loss = mine_loss(scores)
    assert_values(loss, recorded["mine.loss"], "loss")
    assert_grad(torch.autograd.grad(loss, scores)[0], recorded["mine.loss_grad_scores"], "loss_grad_scores")
