import math

import pytest
import torch

from engine.config import ObjectiveConfig
from engine.errors import EstimatorError
from engine.kernels import registry
from engine.kernels.mi_bounds import BOUNDS
from engine.mimrl.published import PublishedMIEstimator
from engine.model.cmi import CMIEstimator
from engine.model.default import default_estimator
from engine.model.estimators import BASELINES, LogBaseline, MIEstimator, build_mlp, finite, mlp_layers, run_mlp
from engine.model.neighbour_club import NeighbourCLUB
from engine.model.stratified import StratifiedCLUB
from engine.objective import Term

SMALL = {"hidden": 16, "embed": 8}
KINDS = (MIEstimator, PublishedMIEstimator)


def batch(count: int = 12, dim_x: int = 4, dim_y: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dim_x, generator=generator)
    return x, x[:, :dim_y] + 0.5 * torch.randn(count, dim_y, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("critic", ["separate", "concat"])
@pytest.mark.parametrize("baseline", BASELINES)
def test_value_surrogate_and_loss(critic: str, baseline: str, bound: str, kind: type[MIEstimator]):
    estimator = kind(4, 3, critic, bound, baseline=baseline, **SMALL)
    x, y = batch()
    x.requires_grad_()
    estimate = estimator(x, y)
    assert estimate.value.shape == estimate.surrogate.shape == estimate.loss.shape == ()
    assert not estimate.value.requires_grad and estimate.surrogate.item() == estimate.value.item()
    if (bound, kind) != ("mine", PublishedMIEstimator):
        assert estimate.loss.item() == -estimate.value.item()
    estimate.loss.backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    learns = {name: p.grad is not None and p.grad.abs().sum() > 0 for name, p in estimator.named_parameters()}
    assert all(learns[name] for name in learns if name.startswith("critic") and name.endswith("weight"))
    if baseline == "unnormalized" and bound in ("tuba", "interpolate"):
        assert learns["baseline.mlp.0.weight"]


def test_parameter_names():
    names = set(MIEstimator(4, 3, "separate", "tuba", "unnormalized").state_dict())
    expected = {
        f"{part}.{i}.{p}"
        for part in ("critic.g", "critic.h", "baseline.mlp")
        for i in (0, 2, 4, 6)
        for p in ("weight", "bias")
    }
    assert names == expected
    names = set(MIEstimator(4, 3, "concat", "mine", "gaussian").state_dict())
    assert names == {f"critic.f.{i}.{p}" for i in (0, 2, 4, 6) for p in ("weight", "bias")} | {"log_ema"}


def test_start():
    torch.manual_seed(0)
    estimator = MIEstimator(128, 128)
    assert all(not p.any() for name, p in estimator.named_parameters() if name.endswith("bias"))
    scores = estimator.critic(torch.randn(64, 128), torch.randn(64, 128))
    assert 0.05 < scores.std() < 5  # neither flat nor saturated for standardised features


@pytest.mark.parametrize("kind", ["separate", "concat"])
def test_one_orientation(kind: str):
    """Changing y_i changes row i alone; the published concat critic alone is transposed."""
    for estimator in KINDS:
        critic = estimator(4, 3, kind, **SMALL).critic
        x, y = batch(6)
        moved = y.clone()
        moved[2] += 1
        changed = (critic(x, moved) - critic(x, y)).abs() > 1e-6
        by_row = torch.zeros(6, 6, dtype=torch.bool)
        by_row[2] = True
        transposed = kind == "concat" and estimator is PublishedMIEstimator
        assert torch.equal(changed, by_row.t() if transposed else by_row)


def test_baselines():
    _, y = batch()
    assert torch.equal(LogBaseline(3, "constant")(y), torch.zeros(12, 1))
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(y).sum(1, keepdim=True)
    torch.testing.assert_close(LogBaseline(3, "gaussian")(y), normal)
    assert LogBaseline(3, "unnormalized")(y).shape == (12, 1)
    assert not list(LogBaseline(3, "constant").parameters()) and not list(LogBaseline(3, "gaussian").parameters())


def bad_batches():
    x, y = batch(4)
    holed = x.clone()
    holed[1, 2] = math.nan
    return {"one": (x[:1], y[:1]), "nan": (holed, y), "inf": (x, y * math.inf), "overflow": (x * 1e30, y * 1e30)}


@pytest.mark.parametrize("what", ["one", "nan", "inf", "overflow"])
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_batches(what: str, bound: str, kind: type[MIEstimator]):
    x, y = bad_batches()[what]
    estimator = kind(4, 3, bound=bound, baseline="unnormalized", **SMALL)
    with pytest.raises(EstimatorError) as caught:
        estimator(x, y)
    assert "\n" not in str(caught.value)

    estimator.on_degenerate = "skip"
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    estimate = estimator(x, y)
    assert estimate.details["skipped"] == 1
    assert estimate.value == estimate.surrogate == estimate.loss == 0
    (estimate.loss + estimate.surrogate).backward()
    for tensor in (x, y, *estimator.parameters()):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))
    if hasattr(estimator, "log_ema"):
        assert estimator.log_ema == -math.inf  # a skipped batch leaves the average alone


def test_estimates_that_overflow_are_degenerate_too():
    """Finite scores whose exponentials do not fit: NWJ's estimate would be minus infinity, its gradient with it."""
    torch.manual_seed(0)
    estimator = MIEstimator(4, 3, bound="nwj", **SMALL)
    with torch.no_grad():
        estimator.critic.g[6].weight.mul_(3000)
    with pytest.raises(EstimatorError, match="-inf from scores of up to"):
        estimator(*batch())


def test_shapes_are_checked():
    estimator = MIEstimator(4, 3)
    x, y = batch()
    for wrong in ((y, x), (x, y[:5]), (x[None], y[None])):
        with pytest.raises(EstimatorError, match="mutual information"):
            estimator(*wrong)
    for setting in ({"bound": "kl"}, {"critic": "bilinear"}, {"baseline": "zero"}):
        with pytest.raises(EstimatorError, match="one of"):
            MIEstimator(4, 3, **setting)


def test_the_former_option_names_the_class_to_use():
    with pytest.raises(EstimatorError, match="PublishedMIEstimator") as caught:
        MIEstimator(4, 3, compat="mimrl")
    assert "\n" not in str(caught.value)
    assert MIEstimator(4, 3, compat="none").bound == "infonce"


def test_mine_average_is_state():
    torch.manual_seed(0)
    estimator = MIEstimator(4, 3, bound="mine", ema_rate=0.5, **SMALL)
    assert estimator.log_ema == -math.inf
    estimator(*batch(seed=0))
    first = estimator.log_ema.clone()
    assert first.isfinite()
    estimator(*batch(seed=1))
    second = estimator.log_ema.clone()
    assert second != first

    estimator.eval()
    x, y = batch(seed=2)
    value = estimator(x, y).value
    assert estimator.log_ema == second  # read, not changed

    copy = MIEstimator(4, 3, bound="mine", ema_rate=0.5, **SMALL)
    copy.load_state_dict(estimator.state_dict())
    assert copy.log_ema == second and copy.eval()(x, y).value == value
    copy.reset_average()
    assert copy.log_ema == -math.inf


def pair(count: int, seed: int):
    """Correlated Gaussians of one dimension, I = -log(.6) = .511 nats."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, generator=generator)
    return x, 0.8 * x + 0.6 * torch.randn(count, 1, generator=generator)


def train(steps: int = 200, **setting) -> float:
    torch.manual_seed(0)
    estimator = MIEstimator(1, 1, hidden=64, embed=16, **setting)
    optimizer = torch.optim.Adam(estimator.parameters(), lr=1e-3)
    for seed in range(steps):
        optimizer.zero_grad()
        estimator(*pair(64, seed)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        values = [estimator.eval()(*pair(64, 10_000 + seed)).value for seed in range(100)]
    return torch.stack(values).mean().item()


# js_fgan's value is a divergence of another kind, not the information
@pytest.mark.parametrize("bound", [bound for bound in BOUNDS if bound != "js_fgan"])
def test_short_training_comes_near_the_truth(bound: str):
    truth = -math.log(0.6)
    assert 0.75 * truth < train(bound=bound, baseline="unnormalized") < 1.1 * truth


def test_a_tower_that_was_changed_is_called_as_it_is():
    x = torch.randn(5, 4)
    tower = build_mlp(4, 2, 8, 1, "leakyrelu")
    assert mlp_layers(tower, "leakyrelu") is not None and mlp_layers(tower) is None
    tower[1].negative_slope = 0.3
    assert mlp_layers(tower, "leakyrelu") is None
    torch.testing.assert_close(run_mlp(tower, x, "leakyrelu"), tower(x))
    for part in (slice(None), 0):
        tower = build_mlp(4, 2, 8, 1, "relu")
        expected = tower(x)
        (tower if part != 0 else tower[-1]).register_forward_hook(lambda module, inputs, output: 2 * output)
        torch.testing.assert_close(run_mlp(tower, x), 2 * expected)


def test_which_estimates_store_no_scores_of_all_pairs():
    for bound in (*BOUNDS, "club", "club_sample", "l1out", "ba"):
        assert MIEstimator(4, 3, bound=bound, **SMALL).streams == (bound in ("club", "club_sample", "ba"))


def test_large_numbers_are_finite():
    """Also where their sum is not."""
    assert finite(torch.full((4,), 3e38), torch.zeros(2)) and not finite(torch.zeros(2), torch.tensor([0.0, math.nan]))
    assert not finite(torch.tensor([math.inf, -math.inf]))


def test_the_estimator_of_a_term_has_all_settings():
    settings = ObjectiveConfig(
        critic="concat", bound="interpolate", baseline="unnormalized", hidden=12, embed=5, alpha=0.3, smile_tau=2.0,
        ema_rate=0.2, cmi_estimator="nwj", k_neighbor=3, on_degenerate="skip",
    )  # fmt: skip
    dims, classes = {"X": 4, "Y": 3, "Z": 6, "L": 1}, {"L": 7}

    def of(*names, **options):
        estimator = default_estimator(Term(*names, **options), dims, settings, classes)
        assert estimator.on_degenerate == "skip"
        return estimator

    mi = of("X", "Y")
    assert (mi.dim_x, mi.dim_y, mi.bound, mi.critic.kind) == (4, 3, "interpolate", "concat")
    assert (mi.alpha, mi.smile_tau, mi.ema_rate) == (0.3, 2.0, 0.2) and mi.critic.f[0].weight.shape == (12, 7)
    assert mi.classes is None and mi.baseline.mlp[0].weight.shape == (12, 3)
    other = of("X", "L", bound="smile", critic="separate")
    assert other.bound == "smile" and other.critic.g[-1].weight.shape == (5, 12) and other.classes is None
    assert of("X", "L", bound="club").classes == 7 and of("L", "X", bound="club").classes is None
    cmi = of("X", "Y", "Z")
    assert type(cmi) is CMIEstimator and (cmi.dim, cmi.estimator) == (6, "nwj")
    assert cmi.classifier[0].weight.shape == (12, 18) and of("X", "Y", "Z", bound="dv").estimator == "dv"
    near = of("X", "Y", "Z", bound="club")
    assert type(near) is NeighbourCLUB and (near.k, near.dim_z, near.classes) == (3, 6, None)
    within = of("X", "Y", "L", bound="club")
    assert type(within) is StratifiedCLUB and within.strata == 7 and within.classes is None
    assert near.q.mean[0].weight.shape == (12, 10) and within.q.mean[0].weight.shape == (12, 11)
    assert of("X", "L", "Z", bound="club").classes == of("X", "L", "L", bound="club").classes == 7


@pytest.mark.parametrize("bound", [*BOUNDS, "club", "club_sample", "l1out", "ba"])
def test_what_cannot_be_looked_at_is_zero_where_it_is_to_be_skipped(bound):
    """As in a graph: no value is read, and one that is not finite becomes 0. Moving averages do not see it."""
    x, y = batch(8)
    for on_degenerate in ("raise", "skip"):
        estimator = MIEstimator(4, 3, bound=bound, on_degenerate=on_degenerate, **SMALL)
        before = {name: buffer.clone() for name, buffer in estimator.named_buffers() if name != "draw"}
        with registry.static():
            found = estimator(x, y * math.nan)
        for value in (found.value, found.surrogate, found.loss):
            assert value == 0 if on_degenerate == "skip" else value.isnan()
    assert all(torch.equal(dict(estimator.named_buffers())[name], value) for name, value in before.items())
