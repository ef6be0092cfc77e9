"""The modules beside the functions: same results, and what they keep."""

import copy
import math

import pytest
import torch

from engine.errors import EstimatorError
from engine.kernels import InfoNCE, KeyQueue, MILowerBound, SigLIP, infonce, mi_lower_bound, siglip, use_backend


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


class TestTemperatureLimit:
    def test_a_learned_scale_comes_back_to_its_limit(self):
        """As CLIP clamps its logit scale after a step: the parameter itself is brought back, and can leave again."""
        module = InfoNCE(0.02, learnable=True, max_scale=100, cosine=True, symmetric=True)
        q = draw(8, 4)
        with torch.no_grad():
            module.log_temperature.fill_(-9.0)  # as after a step that went beyond
        loss = module(q, q + 0.1)
        assert module.log_temperature.item() == pytest.approx(-math.log(100))
        torch.testing.assert_close(loss, infonce(q, q + 0.1, temperature=0.01, cosine=True, symmetric=True))
        module.log_temperature.grad = None
        module(q, -q).backward()
        assert module.log_temperature.grad < 0  # a descent raises the temperature

    def test_eval_mode_changes_no_parameter(self):
        module = InfoNCE(0.02, learnable=True, max_scale=100).eval()
        with torch.no_grad():
            module.log_temperature.fill_(-9.0)
        module(draw(4, 3), draw(4, 3))
        assert module.log_temperature.item() == -9.0

    def test_refused(self):
        with pytest.raises(EstimatorError, match=r"InfoNCE: .*0.001 with max_scale 100"):
            InfoNCE(0.001, learnable=True, max_scale=100)
        with pytest.raises(EstimatorError, match="max_scale = 0"):
            SigLIP(max_scale=0)


def test_infonce_passes_every_option_on():
    q, k, queue = draw(6, 4), draw(6, 4, seed=1), draw(5, 4, seed=2)
    labels, ids, mask = torch.arange(6) % 3, torch.arange(6) % 4, draw(6, 6, seed=3) > 0
    for fixed, given in (
        ({"decoupled": True, "hardness": 0.5}, {"labels": labels, "row_ids": ids}),
        ({"label_smoothing": 0.1}, {"mask": mask, "key_ids": ids, "row_ids": labels}),
        ({}, {"negatives": queue, "in_batch": False}),
        ({}, {"labels": labels, "key_labels": ids, "exclude_self": True}),
    ):
        expected = infonce(q, k, temperature=0.3, **fixed, **given)
        assert torch.equal(InfoNCE(0.3, **fixed)(q, k, **given), expected) and not torch.equal(expected, infonce(q, k))


def test_siglip_is_the_function_and_learns():
    q, k = draw(16, 4), draw(16, 4, seed=1)
    labels = torch.arange(16) % 5
    module = SigLIP(0.2, -3.0)
    expected = siglip(q, k, 0.2, -3.0, cosine=True, labels=labels)
    torch.testing.assert_close(module(q, k, labels=labels), expected)
    assert [n for n, _ in module.named_parameters()] == ["log_temperature", "bias"]
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(module(q, k))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    other = SigLIP()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(q, k), module(q, k)) and "bias=" in repr(other)
    fixed = SigLIP(0.2, -3.0, learnable=False, cosine=False)
    assert not list(fixed.parameters()) and torch.equal(fixed(q, k), siglip(q, k, 0.2, -3.0))


class TestKeyQueue:
    def test_the_oldest_keys_leave_first(self):
        queue, keys = KeyQueue(5, 2), torch.arange(14.0).view(7, 2)
        queue.push(keys[:3])
        assert torch.equal(queue.keys()[:3], keys[:3])
        queue.push(keys[3:7])  # wraps round
        assert torch.equal(queue.keys(), keys[[5, 6, 2, 3, 4]])
        other = KeyQueue(5, 2)
        other.load_state_dict(queue.state_dict())
        queue.push(keys[:1]), other.push(keys[:1])
        assert torch.equal(other.keys(), queue.keys()) and torch.equal(queue.keys()[2], keys[0])

    def test_a_push_before_the_backward_pass_changes_nothing(self):
        queue, q, k = KeyQueue(6, 4), draw(3, 4).requires_grad_(), draw(3, 4, seed=1)
        before = queue.keys()
        loss = InfoNCE(0.5)(q, k, negatives=queue.keys(), in_batch=False)
        queue.push(k)
        (found,) = torch.autograd.grad(loss, q)
        expected = torch.autograd.grad(infonce(q, k, temperature=0.5, negatives=before, in_batch=False), q)[0]
        assert torch.equal(found, expected) and not queue.stored.requires_grad

    def test_it_starts_with_directions(self):
        torch.testing.assert_close(KeyQueue(9, 4).keys().norm(dim=1), torch.ones(9))

    @pytest.mark.parametrize("shape", [(2, 3), (7, 4), (4,)])
    def test_keys_that_do_not_fit(self, shape):
        with pytest.raises(EstimatorError, match="KeyQueue"):
            KeyQueue(6, 4).push(torch.zeros(shape))

    def test_a_list_is_refused(self):
        with pytest.raises(EstimatorError, match="KeyQueue: found a list"):
            KeyQueue(6, 4).push([[0.0] * 4])

    def test_sizes(self):
        with pytest.raises(EstimatorError, match="size = 0"):
            KeyQueue(0, 4)
