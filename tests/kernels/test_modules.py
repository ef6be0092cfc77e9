"""The modules beside the functions: same results, and what they keep."""

import copy
import math

import pytest
import torch

from engine.errors import EstimatorError
from engine.kernels import InfoNCE, MILowerBound, infonce, mi_lower_bound, use_backend


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_infonce_is_the_function():
    q, k, queue = draw(6, 4), draw(6, 4, seed=1), draw(5, 4, seed=2)
    module = InfoNCE(0.2, cosine=True)
    expected = infonce(q, k, temperature=0.2, cosine=True, negatives=queue)
    assert torch.equal(module(q, k, negatives=queue), expected) and not list(module.parameters())
    positives = torch.tensor([1, 2, 3, 4, 5, 0])
    expected = infonce(q, q, temperature=0.2, cosine=True, positives=positives, exclude_self=True)
    assert torch.equal(module(q, q, positives=positives, exclude_self=True), expected)


def test_a_learned_temperature_learns_and_is_saved():
    module = InfoNCE(0.5, learnable=True, symmetric=True)
    q, k = draw(16, 4), draw(16, 4, seed=1)
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(module(q, k))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] and module.temperature > 0.5  # of embeddings that know nothing of each other
    other = InfoNCE(learnable=True, symmetric=True)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(q, k), module(q, k)) and "symmetric=True" in repr(other)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_is_positive(temperature):
    with pytest.raises(EstimatorError, match="InfoNCE"):
        InfoNCE(temperature)


@pytest.mark.parametrize("bound", ["infonce", "smile", "tuba"])
def test_bound_is_the_function(bound):
    q, k, a = draw(2, 6, 4), draw(2, 6, 4, seed=1), draw(2, 6, seed=2)
    module = MILowerBound(bound, smile_tau=2.0)
    expected = mi_lower_bound(q, k, bound=bound, smile_tau=2.0, log_baseline=a, temperature=0.5)
    assert torch.equal(module(q, k, log_baseline=a, temperature=0.5), expected)
    assert torch.equal(module(draw(6, 6)), mi_lower_bound(draw(6, 6), bound=bound, smile_tau=2.0))
    assert not module.state_dict() and bound in repr(module)


@pytest.mark.parametrize("groups", [None, 2])
def test_mine_carries_its_average(groups):
    module, lead = MILowerBound("mine", ema_rate=0.1, groups=groups), () if groups is None else (groups,)
    log_ema = torch.full(lead, -math.inf)
    for seed in range(3):
        scores = draw(*lead, 7, 7, seed=seed)
        expected, log_ema = mi_lower_bound(scores, bound="mine", log_ema=log_ema, ema_rate=0.1)
        assert torch.equal(module(scores), expected) and torch.equal(module.log_ema, log_ema)
    module.eval()
    module(draw(*lead, 7, 7, seed=9))
    assert torch.equal(module.log_ema, log_ema)
    other = MILowerBound("mine", groups=groups)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.log_ema, log_ema)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_mines_average_has_no_gradient(backend):
    """A buffer that kept its graph could not be copied."""
    module = MILowerBound("mine", groups=2)
    with use_backend(backend):
        module(draw(2, 6, 4).requires_grad_(), draw(2, 6, 4, seed=1)).sum().backward()
        module(draw(2, 6, 6).requires_grad_()).sum().backward()
    assert not module.log_ema.requires_grad and torch.equal(copy.deepcopy(module).log_ema, module.log_ema)
