"""Terms with bounds of a conditional over ranks train like one process on the joined batch."""

import json

import pytest
import torch

from engine.config import ObjectiveConfig
from engine.loaders.make_data import make_data
from engine.objective import CMI, MI, Objective
from engine.vocabulary import VARIATIONAL_BOUNDS
from tests.ranks.test_gather_objective import ROWS, own
from tests.ranks.test_run import QUICK, assert_same_run, trained

TERMS = [
    *(-0.3 * MI("Z", "Y", bound=bound) for bound in VARIATIONAL_BOUNDS),
    *(-0.3 * MI("Z", "S", bound=bound) for bound in VARIATIONAL_BOUNDS),
    -0.2 * CMI("Z", "Y", given="S", bound="club"),
]


def build(gather: str) -> Objective:
    torch.manual_seed(3)
    settings = ObjectiveConfig(hidden=6)
    dims = {"Z": 4, "Y": 2, "S": 1}
    return Objective(TERMS, dims, discrete={"S": 3}, settings=settings, gather=gather, advise=False).double()


def batch(counts) -> dict[str, torch.Tensor]:
    rows, generator = sum(counts), torch.Generator().manual_seed(1)
    z, noise = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (4, 2))
    return {"Z": z, "Y": z[:, :2] + noise, "S": torch.arange(rows).remainder(3)[:, None].double()}


def both_stages(objective: Objective, features):
    """Losses, values, buffers, and gradients of parameters (stage 1) and of continuous features (stage 2)."""
    first = objective(features, stage="estimators")
    first.loss.backward()
    gradients = {name: g.clone() for name, g in objective.estimator_state(grads=True).items() if g is not None}
    leaves = {name: features[name].clone().requires_grad_() for name in "ZY"}
    second = objective(features | leaves, stage="model")
    return {
        "losses": torch.stack([first.loss.detach(), second.loss.detach()]),
        "values": {**first.values, **second.values},
        "details": {n: {k: v.clone() for k, v in e.details.items()} for n, e in first.estimates.items()},
        "gradients": gradients,
        "features": dict(zip(leaves, torch.autograd.grad(second.loss, list(leaves.values())), strict=True)),
        "buffers": {name: b.clone() for name, b in objective.named_buffers()},
    }


def on_a_rank(rank, size, gather, counts):
    return both_stages(build(gather), {name: own(value, rank, counts) for name, value in batch(counts).items()})


def test_objective_equals_the_joined_batch(ranks):
    counts = ROWS[2]
    right = both_stages(build("off"), batch(counts))
    results = ranks(2).run(on_a_rank, "gather", counts)
    close = {"rtol": 1e-9, "atol": 1e-11}
    for rank, found in enumerate(results):
        for part in ("losses", "values", "details", "buffers"):
            torch.testing.assert_close(found[part], right[part], **close)
        for name, gradient in found["features"].items():  # averaging over 2 ranks halves what each one has
            torch.testing.assert_close(gradient / 2, own(right["features"][name], rank, counts), **close)
    for name, gradient in right["gradients"].items():
        torch.testing.assert_close(sum(found["gradients"][name] for found in results) / 2, gradient, **close)


def test_a_run_that_minimises_terms_is_that_of_one_process(ranks, tmp_path):
    path = make_data(tmp_path / "mosi", "mosi", 60, "declarelab")
    terms = '["0.01 * MI(F, A)", "-0.01 * MI(F, V, bound=club_sample)", "-0.01 * MI(F, C, bound=club)"]'
    settings = [*QUICK, f"data.path={path}", f"objective.terms={terms}"]
    trained(0, 1, settings, tmp_path / "one")
    ranks(2).run(trained, settings, str(tmp_path / "many"))
    assert_same_run(tmp_path / "many", tmp_path / "one")
    found, expected = (json.loads((tmp_path / name / "metrics.json").read_text())["left"] for name in ("many", "one"))
    assert list(found) == ["I(F;V) by club_sample", "I(F;C) by club"]
    for term in found:
        for split in ("valid", "test"):
            one, other = ({k: v for k, v in of[term][split].items() if k != "kind"} for of in (found, expected))
            assert one.pop("balanced") is other.pop("balanced") is None  # numbers have no groups
            assert one == pytest.approx(other, rel=1e-3, abs=1e-3)
