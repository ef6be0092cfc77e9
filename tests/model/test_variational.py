"""Bounds by a learned conditional: their formulas by other means, gradients, classes, degenerate batches, pairs."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Normal

from engine.errors import ConfigError, EstimatorError
from engine.kernels import registry
from engine.model import neighbour_club
from engine.model.custom_critics import LikelihoodCritic, SoftplusCritic
from engine.model.estimators import Critic, MIEstimator
from engine.model.neighbour_club import NeighbourCLUB, nearest_others
from engine.model.stratified import StratifiedCLUB
from engine.model.variational import (
    Categorical,
    CategoricalMarginal,
    Gaussian,
    GaussianMarginal,
    GaussianNet,
    club,
    club_sample,
    leave_one_out_bound,
    one_hot,
    other_rows,
)
from engine.objective import CMI, Objective
from engine.vocabulary import VARIATIONAL_BOUNDS

SMALL = {"hidden": 16}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(kind: str, rows: int = 7, seed: int = 0):
    """A conditional, its targets, and log q(y_i|x_j) of every pair by torch.distributions, [i, j], float64."""
    drawn = generator(seed)
    if kind == "gaussian":
        mean, log_var, y = (torch.randn(rows, 3, generator=drawn, dtype=torch.float64) for _ in range(3))
        normal = Normal(mean, (log_var / 2).exp())
        return Gaussian(mean, log_var), y, torch.stack([normal.log_prob(row).sum(1) for row in y])
    logits = torch.randn(rows, 4, generator=drawn, dtype=torch.float64)
    labels = torch.randint(4, (rows,), generator=drawn)
    log_probs = torch.stack([TorchCategorical(logits=logits).log_prob(label) for label in labels])
    return Categorical(logits.log_softmax(1)), one_hot(labels[:, None].double(), 4), log_probs


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_the_bounds_are_what_loops_over_all_pairs_give(kind: str):
    q, y, pairs = table(kind)
    rows = len(y)
    own = pairs.diagonal()
    others = [torch.cat([pairs[i, :i], pairs[i, i + 1 :]]) for i in range(rows)]  # of y_i, by the other rows
    torch.testing.assert_close(q.log_prob(y), own)
    torch.testing.assert_close(q.pairs(y), pairs)
    off = (pairs.sum() - own.sum()) / (rows * (rows - 1))
    torch.testing.assert_close(club(q, y), own.mean() - off)
    mixture = torch.stack([o.exp().mean().log() for o in others])
    torch.testing.assert_close(leave_one_out_bound(q, y), (own - mixture).mean())
    other = other_rows(rows, torch.tensor(3))
    picked = torch.stack([pairs[other[i], i] for i in range(rows)])
    torch.testing.assert_close(club_sample(q, y, other), (own - picked).mean())


def test_moments_lose_no_digits_far_from_zero():
    """y at 1000 with deviations of 1, in float32: the value of the same rows at 0."""
    q, y, _ = table("gaussian")
    near = club(q, y).item()
    far = club(Gaussian((q.mean + 1000).float(), q.log_var.float()), (y + 1000).float()).item()
    assert far == pytest.approx(near, abs=2e-3)  # float32 keeps 6e-5 of such a y
    far = leave_one_out_bound(Gaussian((q.mean + 1000).float(), q.log_var.float()), (y + 1000).float()).item()
    assert far == pytest.approx(leave_one_out_bound(q, y).item(), abs=2e-3)


def test_pairs_have_no_fixed_points_and_meet_everyone_equally_often():
    met = torch.zeros(6, 6)
    draws = 6000
    for number in range(draws):
        other = other_rows(6, torch.tensor(number))
        assert sorted(other.tolist()) == list(range(6))
        met[torch.arange(6), other] += 1
    assert met.diagonal().sum() == 0
    expected, off = draws / 5, met[~torch.eye(6, dtype=torch.bool)]
    assert (off - expected).abs().max() < 5 * math.sqrt(expected)
    assert torch.equal(other_rows(6, torch.tensor(5)), other_rows(6, torch.tensor(5)))
    assert other_rows(2, torch.tensor(0)).tolist() == [1, 0]


def test_the_gaussian_marginal_is_a_normal_density():
    torch.manual_seed(0)
    marginal = GaussianMarginal(3).double()
    for parameter in marginal.parameters():
        nn.init.normal_(parameter)
    factor = marginal.lower.tril(-1) + torch.diag(marginal.log_scale.exp())
    normal = torch.distributions.MultivariateNormal(marginal.mean, precision_matrix=factor @ factor.T)
    y = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(marginal(y), normal.log_prob(y))


def test_the_marginal_of_classes_is_a_distribution():
    marginal = CategoricalMarginal(4)
    torch.testing.assert_close(marginal(torch.eye(4)), torch.full((4,), -math.log(4)))
    nn.init.normal_(marginal.logits, std=2)
    torch.testing.assert_close(marginal(torch.eye(4)), TorchCategorical(logits=marginal.logits).probs.log())


def test_a_log_variance_is_limited_smoothly():
    """Within ±5, and the network's own output near 0."""
    net = GaussianNet(2, 1, 8, 1, "relu")
    x = torch.randn(64, 2, generator=generator())
    raw = net.log_var(x)
    torch.testing.assert_close(net(x).log_var, 5 * torch.tanh(raw / 5))
    with torch.no_grad():
        net.log_var[-1].bias.add_(100)
    assert torch.allclose(net(x).log_var, torch.full((64, 1), 5.0))


# -- the estimator ---------------------------------------------------------------------------------------------


def batch(rows: int = 12, classes: int | None = None, dtype=torch.float32):
    x = torch.randn(rows, 4, generator=generator(1), dtype=dtype)
    if classes:
        return x, torch.randint(classes, (rows, 1), generator=generator(2)).to(dtype)
    return x, x[:, :3] + 0.5 * torch.randn(rows, 3, generator=generator(2), dtype=dtype)


def make(bound: str, classes: int | None = None, **options) -> MIEstimator:
    torch.manual_seed(0)
    return MIEstimator(4, 1 if classes else 3, bound=bound, classes=classes, **SMALL | options)


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("bound", VARIATIONAL_BOUNDS)
def test_value_surrogate_and_loss(bound: str, classes: int | None):
    """The loss is the negative log-likelihood, and not the negated bound."""
    estimator = make(bound, classes)
    x, y = batch(classes=classes)
    x.requires_grad_()
    estimate = estimator.eval()(x, y)
    assert estimate.value.shape == estimate.surrogate.shape == estimate.loss.shape == ()
    assert not estimate.value.requires_grad and estimate.surrogate.item() == estimate.value.item()
    q = estimator.q(x)
    likelihood = q.log_prob(q.targets(y)).mean()
    marginal = estimator.marginal(q.targets(y)).mean() if bound == "ba" else 0.0
    torch.testing.assert_close(estimate.loss, -likelihood - marginal)
    if bound == "ba":
        torch.testing.assert_close(estimate.value, (likelihood - marginal).detach())
    estimate.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in estimator.named_parameters() if "weight" in n)
    assert "critic" not in estimator._modules and estimator.group_key is None


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("bound", VARIATIONAL_BOUNDS)
def test_gradients_of_the_features_are_those_of_the_value(bound: str, classes: int | None):
    estimator = make(bound, classes, activation="tanh").double().eval()
    x, y = batch(6, classes, torch.float64)
    x.requires_grad_()
    inputs = (x,) if classes else (x, y.requires_grad_())

    def read(*given):
        estimate = estimator(*given, y) if classes else estimator(*given)
        return estimate.surrogate, estimate.loss

    assert torch.autograd.gradcheck(read, inputs)


def test_gradients_of_parameters_agree_with_finite_differences():
    estimator = make("ba", activation="tanh").double().eval()
    x, y = batch(6, dtype=torch.float64)
    names, values = zip(*estimator.named_parameters(), strict=True)

    def loss(*parameters):
        return torch.func.functional_call(estimator, dict(zip(names, parameters, strict=True)), (x, y)).loss

    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


def test_one_hot_rows_and_numbers_of_classes_give_the_same():
    x, y = batch(classes=3)
    torch.manual_seed(0)
    numbers = MIEstimator(4, 1, bound="l1out", classes=3, **SMALL)
    rows = MIEstimator(4, 3, bound="l1out", classes=3, **SMALL)
    rows.load_state_dict(numbers.state_dict())
    assert numbers(x, y).value == rows(x, one_hot(y, 3)).value == numbers(x, y.long()).value


@pytest.mark.parametrize("wrong", [3.0, -1.0, 0.5, math.nan])
def test_what_is_no_class_is_an_error(wrong: float):
    x, y = batch(classes=3)
    y[2] = wrong
    with pytest.raises(EstimatorError, match=r"found the class .*; expected whole numbers from 0 to 2"):
        make("club", 3)(x, y)
    assert one_hot(torch.tensor([[3.0]]), 3).isnan().all()  # what a GPU makes of it, where no value is looked at


@pytest.mark.parametrize("bound", VARIATIONAL_BOUNDS)
@pytest.mark.parametrize("what", ["one", "nan", "inf", "overflow"])
def test_degenerate_batches(what: str, bound: str):
    x, y = batch(4)
    holed = x.clone()
    holed[1, 2] = math.nan
    x, y = {"one": (x[:1], y[:1]), "nan": (holed, y), "inf": (x, y * math.inf), "overflow": (x, y * 1e30)}[what]
    estimator = make(bound)
    with pytest.raises(EstimatorError) as caught:
        estimator(x, y)
    assert "\n" not in str(caught.value)
    estimator.on_degenerate = "skip"
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    before = {name: buffer.clone() for name, buffer in estimator.named_buffers()}
    estimate = estimator(x, y)
    assert estimate.details["skipped"] == 1 and estimate.value == estimate.loss == 0
    (estimate.loss + estimate.surrogate).backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in (x, y, *estimator.parameters()))
    assert all(torch.equal(buffer, before[name]) for name, buffer in estimator.named_buffers())


def test_autocast_leaves_the_arithmetic_in_float32():
    x, y = batch()
    for bound in VARIATIONAL_BOUNDS:
        estimator = make(bound)
        exact = estimator.eval()(x, y)
        with torch.autocast("cpu", torch.bfloat16):
            lower = estimator(x.bfloat16(), y.bfloat16())
        assert lower.value.dtype == lower.loss.dtype == torch.float32
        assert lower.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)


def test_the_pairs_of_club_sample_are_state():
    x, y = batch()
    estimator = make("club_sample")
    copy = make("club_sample")
    estimator(x, y)  # which starts the moving mean
    first = estimator.draw.clone()
    values = [estimator(x, y).value for _ in range(3)]
    assert estimator.draw == first + 3 and len({v.item() for v in values}) == 3
    copy.load_state_dict(estimator.state_dict())
    assert copy(x, y).value == estimator(x, y).value
    estimator.eval()
    assert estimator(x, y).value == estimator(x, y).value  # read, not changed


def test_y_is_standardised():
    """Another unit and origin of y change no bound. The first batch starts the moving mean, others move it by 1 %."""
    x, y = batch(64)
    for bound in VARIATIONAL_BOUNDS:
        near, far = make(bound), make(bound)
        far.load_state_dict(near.state_dict())
        near(x, y), far(x, 40 * y + 900)
        torch.testing.assert_close(far.q.y_mean, 40 * y.mean(0) + 900)
        assert far.eval()(x, 40 * y + 900).value.item() == pytest.approx(near.eval()(x, y).value.item(), abs=1e-3)
        far.train()(x, 40 * y)
        torch.testing.assert_close(far.q.y_mean, 40 * y.mean(0) + 891)


def test_settings_that_do_not_fit():
    for options, text in [
        ({"bound": "infonce", "classes": 3}, "classes=3"),
        ({"bound": "club", "classes": 2}, "width 3"),
        ({"bound": "club", "critic": nn.Identity()}, "no critic"),
        ({"bound": "kl"}, "club_sample"),
    ]:
        with pytest.raises(EstimatorError, match=text):
            MIEstimator(4, 3, **options)
    with pytest.raises(EstimatorError, match="classes=1 for a y of width 1; expected 2 or more"):
        MIEstimator(4, 1, bound="club", classes=1)


# -- a condition of classes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, 3])
def test_stratified_club_is_club_within_each_stratum(classes: int | None):
    torch.manual_seed(0)
    x, y = batch(14, classes, torch.float64)
    z = torch.tensor([0, 1, 2, 0, 1, 1, 0, 0, 1, 0, 1, 3, 3, 3])[:, None].double()
    estimator = StratifiedCLUB(4, 1 if classes else 3, 5, classes, **SMALL).double().eval()
    estimate = estimator(x, y, z)
    assert estimate.details["left_out"] == 1  # the only row of stratum 2
    total, count = 0.0, 0
    for stratum in (0, 1, 3):
        rows = torch.nonzero(z[:, 0] == stratum)[:, 0]
        q = estimator.q(torch.cat([x[rows], one_hot(z[rows], 5)], 1))
        total, count = total + len(rows) * club(q, q.targets(y[rows])), count + len(rows)
    torch.testing.assert_close(estimate.surrogate, total / count)
    estimate.surrogate.backward()
    with pytest.raises(EstimatorError, match="condition: found the class 5"):
        estimator(x, y, z + 2)
    with pytest.raises(EstimatorError, match="two rows of one z"):
        estimator(x[:3], y[:3], z[:3])
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: estimator(x, y, z).surrogate, (x,))


# -- a continuous condition ------------------------------------------------------------------------------------


class Exact(nn.Module):
    """p(y|x,z) of y = c x + (sum of z) / sqrt(dim z) + noise, as a conditional."""

    def __init__(self, c: float):
        super().__init__()
        self.c = c

    def forward(self, given):
        mean = self.c * given[:, :1] + given[:, 1:].sum(1, keepdim=True) / math.sqrt(given.shape[1] - 1)
        return Gaussian(mean, torch.zeros_like(mean))


@pytest.mark.parametrize("classes", [None, 3])
def test_neighbour_club_by_hand(classes: int | None):
    torch.manual_seed(0)
    x, y = batch(14, classes, torch.float64)
    z = torch.randn(14, 2, dtype=torch.float64)
    estimator = NeighbourCLUB(4, 1 if classes else 3, 2, classes, k=3, **SMALL).double().eval()
    q = estimator.q(torch.cat([x, z], 1))
    targets, total = q.targets(y), 0.0
    for i in range(14):
        near = sorted((j for j in range(14) if j != i), key=lambda j: (z[i] - z[j]).norm().item())[:3]
        for j in near:
            swapped = targets.clone()
            swapped[i] = targets[j]
            total = total + (q.log_prob(targets)[i] - q.log_prob(swapped)[i]) / (3 * 14)
    estimate = estimator(x, y, z)
    torch.testing.assert_close(estimate.surrogate, total)
    torch.testing.assert_close(estimate.loss, -q.log_prob(targets).mean())
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: estimator(x, y, z).surrogate, (x,))
    with pytest.raises(EstimatorError, match=r"z \[14, 1\]"):
        estimator(x, y, z[:, :1])
    with pytest.raises(EstimatorError, match="a batch of 1"):
        estimator(x[:1], y[:1], z[:1])
    assert estimator(x[:3], y[:3], z[:3]).value.isfinite()  # by both others


@pytest.mark.parametrize(("values", "k"), [(1, 5), (4, 5), (4, 15), (4, 20), (64, 5)])
def test_rows_of_one_condition_are_neighbours_equally_often(values, k):
    z = torch.arange(64)[:, None] % values
    found = nearest_others(z.double() ** 1.5, k)
    assert (found != torch.arange(64)[:, None]).all()
    assert all(len(row.unique()) == k for row in found)
    same = 64 // values - 1  # other rows of the same value
    assert (z[found[:, : k if k <= same else 0]] == z[:, None]).all()
    assert ((z[found] == z[:, None]).sum(1) == min(k, same)).all()
    if k <= same:
        assert (found.flatten().bincount(minlength=64) == k).all()


@pytest.mark.parametrize("kind", [StratifiedCLUB, NeighbourCLUB])
def test_conditional_clubs_standardise_y_by_what_they_were_trained_on(kind):
    x, y = batch()
    z = (torch.arange(12) % 3)[:, None].float()
    estimator = kind(4, 3, 3 if kind is StratifiedCLUB else 1, **SMALL)
    estimator.eval()(x, y, z)
    assert estimator.q.begun == 0
    estimator.train()(x, y, z)
    torch.testing.assert_close(estimator.q.y_mean, y.mean(0))
    estimator.requires_grad_(False)(x, y + 5, z)
    torch.testing.assert_close(estimator.q.y_mean, y.mean(0))
    assert kind is StratifiedCLUB or estimator.k == 5


@pytest.mark.parametrize("values", [3, 40])
def test_neighbours_of_some_rows_at_a_time(values, monkeypatch):
    z = torch.randint(values, (41, 2), generator=generator()).double()
    expected = nearest_others(z, 4).sort(1).values
    monkeypatch.setattr(neighbour_club, "SEARCHED", 7)
    assert torch.equal(nearest_others(z, 4).sort(1).values, expected)
    with registry.static():  # a GPU does not look whether there are ties
        assert torch.equal(nearest_others(z, 4).sort(1).values, expected)


@pytest.mark.parametrize("c", [0.0, 1.0])
@pytest.mark.parametrize(("width", "rows"), [(1, 2048), (2, 256), (5, 64)])
def test_neighbour_club_bounds_from_above_by_the_exact_conditional(width: int, rows: int, c: float):
    """I(X;Y|Z) = log(1 + c²) / 2; CLUB with y drawn from p(y|z) is c². Neighbours that are not near only add to it."""
    values = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        shared = z.sum(1, keepdim=True) / math.sqrt(width)
        x = shared + torch.randn(rows, 1, generator=generator, dtype=torch.float64)
        y = c * x + shared + torch.randn(rows, 1, generator=generator, dtype=torch.float64)
        estimator = NeighbourCLUB(1, 1, width, k=5).eval()
        estimator.q = Exact(c).eval()
        values.append(estimator(x, y, z).value)
    found = torch.stack(values)
    error = found.std() / math.sqrt(len(found))
    assert found.mean() > math.log(1 + c * c) / 2 - 2 * error
    if width == 1:
        assert abs(found.mean() - c * c) < 3 * error + 0.01
    else:
        assert found.mean() > c * c - 2 * error


def test_an_objective_minimises_it_given_numbers():
    torch.manual_seed(0)
    objective = Objective([-1 * CMI("X", "Y", given="Z", bound="club")], dims={"X": 2, "Y": 1, "Z": 1})
    assert isinstance(objective.estimators["XY_Z_by_club"], NeighbourCLUB)
    assert not objective.needs_products
    x = torch.randn(32, 2, requires_grad=True)
    rows = {"X": x, "Y": x[:, :1].detach() + 0.1 * torch.randn(32, 1), "Z": torch.randn(32, 1)}
    known = {name: value.detach() for name, value in rows.items()}
    optimizer = torch.optim.Adam(objective.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        objective.estimator_loss(known).loss.backward()
        optimizer.step()
    out = objective.model_loss(rows)
    assert out.values["I(X;Y|Z) by club"] > 0.3
    gradient = torch.autograd.grad(out.loss, x)[0]
    assert gradient[:, 0].abs().mean() > gradient[:, 1].abs().mean() > 0  # the column that tells of y
    assert objective.read(known, 16)["I(X;Y|Z) by club"].value > 0


# -- critics of one's own --------------------------------------------------------------------------------------


class Product(nn.Module):
    """Scores y_i . W x_j; transposed if asked to."""

    def __init__(self, transposed: bool = False):
        super().__init__()
        self.linear, self.transposed = nn.Linear(4, 3), transposed

    def forward(self, x, y):
        scores = y @ self.linear(x).T
        return scores.T if self.transposed else scores


@pytest.mark.parametrize("bound", ["infonce", "smile", "tuba"])
def test_a_critic_of_ones_own(bound: str):
    torch.manual_seed(0)
    module, (x, y) = Product(), batch()
    estimator = MIEstimator(4, 3, critic=module, bound=bound)
    estimate = estimator(x, y)
    if bound == "infonce":
        logits = y @ module.linear(x).T
        expected = math.log(12) - nn.functional.cross_entropy(logits, torch.arange(12))
        torch.testing.assert_close(estimate.value, expected.detach())
    estimate.loss.backward()
    assert module.linear.weight.grad.abs().sum() > 0 and estimator.group_key is None


def test_what_a_critic_returns_is_checked():
    x, y = batch()
    with pytest.raises(EstimatorError, match=r"critic Product: found scores with a row per x"):
        MIEstimator(4, 3, critic=Product(transposed=True))(x, y)
    with pytest.raises(EstimatorError, match=r"critic Bilinear: found scores \[12, 1\]; expected scores \[12, 12\]"):
        MIEstimator(4, 3, critic=nn.Bilinear(4, 3, 1))(x, y)


def test_softplus_and_likelihood_critics():
    x, y = batch()
    torch.manual_seed(0)
    inner = Critic(4, 3, hidden=16, embed=8)
    scores = nn.functional.softplus(inner(x, y))
    value = MIEstimator(4, 3, critic=SoftplusCritic(inner))(x, y).value
    torch.testing.assert_close(value, math.log(12) - nn.functional.cross_entropy(scores, torch.arange(12)).detach())
    critic = LikelihoodCritic(4, 3, hidden=16).eval()
    q = critic.q(x)
    expected = torch.stack([Normal(q.mean, (q.log_var / 2).exp()).log_prob(row).sum(1) for row in y])
    torch.testing.assert_close(critic(x, y), expected)
    MIEstimator(4, 1, critic=LikelihoodCritic(4, 1, classes=3))(*batch(classes=3)).loss.backward()
    critic.train()(x, y)  # which starts the moving mean
    torch.testing.assert_close(critic.q.y_mean, y.mean(0))
    moved = critic.eval()(x, y)
    q = critic.q(x)
    expected = torch.stack([Normal(q.mean, (q.log_var / 2).exp()).log_prob(row).sum(1) for row in q.targets(y)])
    torch.testing.assert_close(moved, expected)


def test_looking_at_the_orientation_leaves_a_critic_as_it_was():
    """Each part keeps its mode, and dropout does not hide a transposed table."""

    class Dropping(Product):
        def __init__(self, transposed):
            super().__init__(transposed)
            self.drop, self.still = nn.Dropout(0.5), nn.Dropout(0.5).eval()

        def forward(self, x, y):
            return super().forward(self.drop(self.still(x)), y)

    torch.manual_seed(0)
    x, y = batch()
    estimator, calls = MIEstimator(4, 3, critic=Dropping(False)), []
    estimator.critic.module.register_forward_hook(lambda *_: calls.append(1))
    estimator(x, y)
    assert len(calls) == 3  # of which two look
    estimator(x, y)
    assert len(calls) == 4
    assert estimator.critic.module.drop.training and not estimator.critic.module.still.training
    with pytest.raises(EstimatorError, match="a row per x"):
        MIEstimator(4, 3, critic=Dropping(True))(x, y)


def test_terms_know_their_bounds():
    from engine import CMI, MI

    for wrong in (lambda: MI("Z", "S", bound="kl"), lambda: CMI("Z", "S", given="Y", bound="l1out")):
        with pytest.raises(ConfigError, match="one of"):
            wrong()
    with pytest.raises(ConfigError, match="critic"):
        MI("Z", "S", bound="club", critic="concat")


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_a_constant_column_leaves_the_moving_variance(value):
    """Seven equal numbers have a variance of 5e-17 by rounding, which would become the unit of y."""
    net = GaussianNet(2, 2, 8, 2, "relu")
    y = torch.stack([torch.full((7,), value), torch.arange(7.0)], 1)
    net.observe(y)
    assert net.y_variance[0] == 1 and net.y_mean[0] == 0
    assert net.y_variance[1] == 4 and net.y_mean[1] == 3  # of 0 to 6
    alone = GaussianNet(2, 1, 8, 2, "relu")  # of one column torch sums in another order
    alone.observe(y[:, :1])
    assert alone.y_variance == 1 and alone.y_mean == 0 and alone.begun == 0


@pytest.mark.parametrize("bound", VARIATIONAL_BOUNDS)
def test_rows_that_are_no_classes_are_refused(bound):
    torch.manual_seed(0)
    estimator, x = MIEstimator(2, 3, bound=bound, classes=3), torch.randn(8, 2)
    one_hot = nn.functional.one_hot(torch.arange(8) % 3, 3).float()
    assert estimator(x, one_hot).value.isfinite()
    for wrong in (torch.randn(8, 3), 2 * one_hot, one_hot * float("nan")):
        with pytest.raises(EstimatorError, match="expected one-hot rows"):
            estimator(x, wrong)
