"""What the published code computes differently: its bounds, its classifier's reading, and how its estimators group."""

import math
from types import SimpleNamespace

import pytest
import torch

from engine.errors import EstimatorError
from engine.kernels.mi_bounds import BOUNDS, bound_value
from engine.mimrl.published import (
    ALPHA,
    PublishedCMIEstimator,
    PublishedMIEstimator,
    mine_loss,
    published_bound,
    published_classifier_loss,
    published_cmi,
    published_estimator,
    published_log_ratio,
)
from engine.mimrl.settings import MIMRLObjectiveConfig as ObjectiveConfig
from engine.model.groups import CMIGroup, MIGroup
from engine.objective import CMI, MI, Objective


def draw(*sizes: int, seed: int = 0, scale: float = 1.0, dtype=torch.float64) -> torch.Tensor:
    return scale * torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_the_bounds_that_differ():
    scores, log_baseline = draw(16, 16, scale=1.5), draw(16, 1, seed=1)
    corrected = {b: bound_value(scores, b, log_baseline, smile_tau=5)[0].item() for b in BOUNDS}
    published = {b: published_bound(scores, b, log_baseline)[0].item() for b in BOUNDS}
    assert {b for b in BOUNDS if abs(corrected[b] - published[b]) > 1e-6} == {"js", "smile", "interpolate"}
    assert published["smile"] == bound_value(scores, "smile", smile_tau=1.0)[0].item()
    assert published["js"] == published["nwj"]
    # e^(S_ij - A_jj), written out
    others = torch.stack([torch.cat([row[:j], row[j + 1 :]]) for row in scores for j in range(16)]).view(16, 16, 15)
    mixture = (ALPHA * others.exp().mean(2) + (1 - ALPHA) * log_baseline.exp()).log()
    away = ~torch.eye(16, dtype=torch.bool)
    marginal = (scores - mixture.diagonal()[None, :]).exp()[away].mean()
    expected = 1 + scores.diagonal().mean() - mixture[away].mean() - marginal
    assert published["interpolate"] == pytest.approx(expected.item())


def test_the_published_constants():
    estimator = PublishedMIEstimator(4, 3, bound="interpolate")
    assert estimator.alpha == ALPHA == pytest.approx(0.5025, abs=1e-4)
    assert estimator.smile_tau == 1.0


def test_mine_loss_survives_scores_beyond_exp():
    scores = (draw(8, 8, dtype=torch.float32) + 500).requires_grad_()
    loss = mine_loss(scores)
    assert loss.isfinite() and torch.autograd.grad(loss, scores)[0].isfinite().all()


def test_mine_trains_downwards():
    torch.manual_seed(0)
    estimator = PublishedMIEstimator(1, 1, bound="mine", hidden=64, embed=16)
    assert "log_ema" not in estimator.state_dict()
    optimizer = torch.optim.Adam(estimator.parameters(), lr=1e-3)
    for seed in range(100):
        x = draw(64, 1, seed=seed, dtype=torch.float32)
        estimate = estimator(x, 0.8 * x + 0.6 * draw(64, 1, seed=1000 + seed, dtype=torch.float32))
        optimizer.zero_grad()
        estimate.loss.backward()
        optimizer.step()
    assert estimate.value.item() < -1


def test_weights_start_as_pytorch_makes_them():
    torch.manual_seed(0)
    estimator, classifier = PublishedMIEstimator(4, 3, hidden=16, embed=8), PublishedCMIEstimator(8, 16)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(n, m) for n, m in ((4, 16), (16, 16), (16, 16), (16, 8))]
    assert all(torch.equal(estimator.critic.g[2 * n].weight, layer.weight) for n, layer in enumerate(layers))
    assert not any(p.any() for name, p in estimator.named_parameters() if name.endswith("bias"))
    assert classifier.classifier[0].bias.any() and classifier.classifier[6].weight.shape == (2, 16)


# -- the classifier of conditional terms -----------------------------------------------------------------------------


def test_value_is_one_plus_half_the_symmetrised_divergence():
    """p = (.8, .2), q = (.5, .5), exact ratio: J = .3 log 1.6 − .3 log .4; and 1 where nothing is to be told apart."""
    ratio = torch.tensor([1.6, 0.4], dtype=torch.float64).log()
    joint, product = ratio[[0] * 8 + [1] * 2], ratio[[0] * 5 + [1] * 5]
    assert published_cmi(joint, product).item() == pytest.approx(1 + 0.5 * (0.3 * math.log(1.6) - 0.3 * math.log(0.4)))
    assert published_cmi(joint * 0, product * 0).item() == 1.0


@pytest.mark.parametrize("last_activate", ["sigmoid", "hardtanh"])
def test_loss_by_hand(last_activate):
    joint, product = draw(3, 2, seed=8, scale=3), draw(3, 2, seed=9, scale=3)
    g = [torch.sigmoid(t) if last_activate == "sigmoid" else t.clamp(1e-4, 1 - 1e-4) for t in (joint, product)]
    joint_part = g[0][:, 0].log() + (1 - g[0][:, 1]).log()
    product_part = (1 - g[1][:, 0]).log() + g[1][:, 1].log()
    expected = -(joint_part.sum() + product_part.sum()) / 12
    torch.testing.assert_close(published_classifier_loss(joint, product, last_activate), expected)


def test_log_ratio():
    t = torch.tensor([[0.0, 5.0], [2.0, 5.0], [30.0, 5.0]], dtype=torch.float64)
    g = torch.sigmoid(torch.tensor([0.0, 2.0, 10.0], dtype=torch.float64))
    torch.testing.assert_close(published_log_ratio(t, "sigmoid"), (g / (1 - g + 1e-6)).log())


def test_joint_rows_are_cut_to_the_product_rows():
    torch.manual_seed(0)
    model = PublishedCMIEstimator(8, 16)
    joint, product = ([draw(n, 8, seed=s, dtype=torch.float32) for s in (n, n + 1, n + 2)] for n in (10, 8))
    whole, cut = model(joint, product), model([part[:8] for part in joint], product)
    assert torch.equal(whole.value, cut.value) and torch.equal(whole.loss, cut.loss)
    with pytest.raises(EstimatorError, match="10 product rows beside 8 joint rows"):
        model(product, joint)


def test_unknown_last_activation():
    with pytest.raises(EstimatorError, match=r"last_activate.*'other'"):
        PublishedCMIEstimator(last_activate="other")


# -- in an objective -------------------------------------------------------------------------------------------------


def published_objective(last_activate: str = "sigmoid", **settings) -> Objective:
    def make(term, dims, settings):
        return published_estimator(term, dims, SimpleNamespace(**dict(settings) | {"cmi_last_activate": last_activate}))

    torch.manual_seed(0)
    settings = ObjectiveConfig(hidden=16, embed=8, k_neighbor=2, **settings)
    terms = [MI("A", "B"), MI("A", "C"), CMI("A", "B", given="C"), CMI("B", "A", given="C")]
    return Objective(terms, {"A": 4, "B": 4, "C": 1}, settings=settings, make_estimator=make, shared_draws=False)


@pytest.mark.parametrize("bound", BOUNDS)
def test_groups_where_the_bound_is_the_general_one(bound: str):
    objective = published_objective(bound=bound)
    kinds = [type(group) for group in objective.estimators.groups]
    alone = bound in ("mine", "js", "smile", "interpolate")
    assert kinds == ([CMIGroup] if alone else [MIGroup, CMIGroup])


@pytest.mark.parametrize("settings", [{}, {"bound": "smile"}, {"last_activate": "hardtanh"}], ids=str)
def test_groups_give_what_the_estimators_give(settings: dict):
    objective = published_objective(**settings)
    rows = {name: draw(12, width, seed=width, dtype=torch.float32) for name, width in (("A", 4), ("B", 4), ("C", 1))}
    rows["B"] = rows["A"] + draw(12, 4, seed=9, dtype=torch.float32)
    products = objective.sample_products(rows, 12, torch.Generator().manual_seed(0))
    first, second = (tuple(products[f"I({pair}|C)"]) for pair in ("A;B", "B;A"))
    assert not torch.equal(first[2], second[2])  # every term draws its own rows
    together = objective.estimate(rows, products)
    for term in objective.terms:
        estimator = objective.split(term)
        given = tuple(rows[name] for name in (term.x, term.y, term.given) if name)
        single = estimator(*given) if term.given is None else estimator(given, tuple(products[str(term)]))
        assert type(estimator) is (PublishedMIEstimator if term.given is None else PublishedCMIEstimator)
        for part in ("value", "loss"):
            torch.testing.assert_close(getattr(together[str(term)], part), getattr(single, part), rtol=1e-5, atol=1e-6)
