"""`estimate_cmi` against closed forms, on independent data, and on what users hand in. Gaussian chains: tests/truth."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from engine import estimate_cmi
from engine.errors import EstimatorError
from engine.information.cmi import _attenuation, _neighbour_shuffle, _Reading
from engine.information.folds import TrainingSettings
from engine.information.likelihood import _Classes, _Mixtures, _Networks, _ridge_regressions, fit
from tests.information import cmi_cases, knn


def normal(n: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, columns))


def chain(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """I(X;Y|Z) = log(4 / 3) / 2 = 0.1438."""
    x, e, f = normal(n, 3, seed).T
    return x, x + e, x + e + f


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, n, steps", [("sine, 2", 3000, 300), ("spread, 1", 2000, 200)])
def test_conditional_independence(name, n, steps):
    samples, truth = cmi_cases.CASES[name]
    assert truth == 0
    estimate = estimate_cmi(*samples(n, 0), steps=steps)
    assert estimate.value < 0.02 and estimate.readings["dv"] > -0.03


@pytest.mark.slow
@pytest.mark.parametrize("n", [5000, 10_000])
@pytest.mark.parametrize("name", [name for name, (_, truth) in cmi_cases.CASES.items() if truth == 0])
def test_conditional_independence_in_more_dimensions(name, n):
    estimate = estimate_cmi(*cmi_cases.CASES[name][0](n, 0))
    print(f"\n{name}, {n}: {estimate}, {estimate.readings}")
    assert estimate.value < 0.02


@pytest.mark.parametrize(
    "name, n, steps", [("sign, 1", 3000, 500), ("label, 3", 2000, 100), ("published F, 10", 4000, 50)]
)
def test_dependence(name, n, steps):
    samples, truth = cmi_cases.CASES[name]
    estimate = estimate_cmi(*samples(n, 0), steps=steps)
    assert abs(estimate.value - truth) < max(0.1 * truth, 0.1), estimate.readings


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (_, truth) in cmi_cases.CASES.items() if truth > 0])
def test_dependence_of_many_kinds(name):
    samples, truth = cmi_cases.CASES[name]
    estimate = estimate_cmi(*samples(10_000, 0))
    neighbours = knn.frenzel_pompe(*samples(10_000, 0))
    print(f"\n{name}: true {truth:.3f}, nearest neighbours {neighbours:.3f}, {estimate}, {estimate.readings}")
    assert abs(estimate.value - truth) < max(0.1 * truth, 0.1)


def test_nearest_neighbours_and_ours():
    """Ten columns of z already leave nearest neighbours at less than half of 2.308 nats."""
    samples, truth = cmi_cases.CASES["published F, 10"]
    data = samples(2000, 1)
    assert knn.frenzel_pompe(*data) < truth / 2
    assert estimate_cmi(*data, steps=50).value == pytest.approx(truth, abs=0.1)
    x, y, z = chain(2000)
    assert knn.frenzel_pompe(x, y, z) == pytest.approx(0.1438, abs=0.05)  # in few columns they are right


def test_outliers_do_no_harm():
    x, e, z = normal(3000, 3).T
    y = 0.75 * x + math.sqrt(1 - 0.75**2) * e + z
    clean = estimate_cmi(x, y, z, steps=50)
    assert clean.value == pytest.approx(-0.5 * math.log(1 - 0.75**2), abs=0.05)
    x[:5], y[2:7], z[4:9] = 1e4, -1e4, 1e4
    spoilt = estimate_cmi(x, y, z, steps=50)
    assert spoilt.value == pytest.approx(clean.value, abs=0.02)
    assert "heavy tails" in spoilt.flags and "heavy tails" not in clean.flags


def test_a_monotone_map_changes_nothing():
    x, y, z = chain(1000)
    plain, bent = estimate_cmi(x, y, z, steps=100), estimate_cmi(np.exp(3 * x), y**3, z, steps=100)
    assert bent.value == pytest.approx(plain.value, abs=0.02)


def test_the_interval_covers():
    """In 95 of 100 runs if it is right; here at least 26 of 30, and it is no wider than it need be."""
    truth, inside, widths = math.log(4 / 3) / 2, 0, []
    for seed in range(30):
        low, high = estimate_cmi(*chain(400, seed), steps=5, hidden=8, seed=seed).interval
        inside += low <= truth <= high
        widths.append(high - low)
    assert inside >= 26
    assert np.mean(widths) < 0.14  # the samples alone leave 4 x 0.5 sqrt(.25) / 20 = 0.1


# -- what is on the border --------------------------------------------------------------------------------------------


def test_x_that_is_z():
    _, y, z = chain(1000)
    estimate = estimate_cmi(z, y, z, steps=50)
    assert estimate.value < 0.02


def test_y_that_is_x():
    """Infinite; what is given is about log N, and flagged."""
    x, _, z = chain(1000)
    estimate = estimate_cmi(x, x, z, steps=50)
    assert estimate.value > 0.8 * math.log(1000) and "saturated" in estimate.flags
    assert math.isfinite(estimate.interval[1])


def test_two_equal_columns_of_x():
    x, y, z = chain(1000)
    one, two = estimate_cmi(x, y, z, steps=25), estimate_cmi(np.stack([x, x], 1), y, z, steps=25)
    assert two.value == pytest.approx(one.value, abs=0.03)


def test_constant_columns():
    x, y, z = chain(600)
    wide = [np.stack([v, np.full(600, 518.123)], 1) for v in (x, y, z)]
    plain, estimate = estimate_cmi(x, y, z, steps=25), estimate_cmi(*wide, steps=25)
    assert estimate.value == pytest.approx(plain.value, abs=1e-9)
    assert "constant columns" in estimate.flags and "constant columns" not in plain.flags
    nothing = estimate_cmi(np.zeros(600), y, z)
    assert nothing.value == 0 and nothing["dv"] == 0 and nothing.interval == (0, 0)
    without = estimate_cmi(x, y, np.zeros(600), steps=25)  # I(X;Y) = log(2) / 2
    assert without.value == pytest.approx(math.log(2) / 2, abs=0.08)


def test_repeated_rows_are_flagged_and_no_evidence():
    x, y, z = chain(300)
    once, often = (estimate_cmi(*(np.tile(v, times) for v in (x, y, z)), steps=24) for times in (1, 10))
    assert "repeated rows" in often.flags and "repeated rows" not in once.flags
    assert often.value == pytest.approx(once.value, abs=0.05)
    assert often.standard_error == pytest.approx(once.standard_error, rel=0.3)
    independent = estimate_cmi(*(np.tile(v, 10) for v in normal(300, 3).T), steps=48)
    assert independent.value < 0.02


def test_more_columns_of_z_than_rows():
    z = normal(300, 400)
    x = z[:, 0] + normal(300, 1, 1)[:, 0]
    estimate = estimate_cmi(x, x + normal(300, 1, 2)[:, 0], z, steps=25)
    assert 0.2 < estimate.value < 0.5  # log(2) / 2 = 0.35
    nothing = estimate_cmi(x, z[:, 0] + normal(300, 1, 2)[:, 0], z, steps=25)
    assert nothing.interval[0] < 0.1


def test_categories():
    """Given z of two columns, x and y are correlated by 0.6 in half of the categories."""
    rng = np.random.default_rng(0)
    z = rng.integers(0, 2, (4000, 2))
    x, e = rng.normal(size=(2, 4000))
    rho = np.where(z[:, 0] == z[:, 1], 0.6, 0.0)
    y = rho * x + np.sqrt(1 - rho**2) * e + 10 * z[:, 1]
    estimate = estimate_cmi(x, y, z, discrete=True, steps=400)
    assert estimate.value == pytest.approx(-0.25 * math.log(1 - 0.36), abs=0.03)


# -- the result -------------------------------------------------------------------------------------------------------


def test_result():
    estimate = estimate_cmi(*chain(600), steps=48)
    assert estimate["dv"] == estimate["ldr"] == estimate["nwj"] == pytest.approx(float(estimate), abs=0.01)
    assert {"x given y", "y given x", "gaussian", "training"} <= set(estimate.readings)
    assert estimate.pointwise.shape == (600,) and estimate.pointwise.dtype == torch.float64
    assert estimate.pointwise.mean().item() == pytest.approx(estimate["dv"], abs=0.002)
    assert estimate.ceiling == pytest.approx(math.log(600))
    assert [r["step"] for r in estimate.history] == [0, 10, 20, 30, 40, 48]
    low, high = estimate.interval
    assert low <= estimate.value <= high
    assert estimate["dv"] == max(estimate["x given y"], estimate["y given x"])


def test_a_side_of_many_columns_is_not_predicted_from_few():
    """Ten columns from one. Nine are still tried."""
    x, y, z = chain(200)
    for columns, tried in ((9, {"x given y", "y given x"}), (10, {"x given y"})):
        wide = np.hstack([y[:, None], normal(200, columns - 1, 1)])
        found = [estimate_cmi(*sides, z, steps=1, hidden=2) for sides in ((x, wide), (wide, x))]
        assert {name for name in found[0].readings if "given" in name} == tried
        turned = {name.translate(str.maketrans("xy", "yx")) for name in found[1].readings if "given" in name}
        assert turned == tried


def test_negative_readings_are_given_as_zero():
    estimate = next(
        e for e in (estimate_cmi(*normal(200, 3, seed).T, steps=5, seed=seed) for seed in range(20)) if e["dv"] < 0
    )
    assert estimate.value == 0 and {"below zero", "noise"} <= set(estimate.flags)
    assert estimate.interval[0] == 0 and "null" not in estimate.readings


def test_a_small_value_is_compared_with_a_null():
    estimate = estimate_cmi(*chain(4000, 1), steps=100)
    assert abs(estimate["null"]) < 0.02 and "noise" not in estimate.flags
    assert estimate.value == pytest.approx(estimate["dv"] - max(estimate["null"], 0))
    assert estimate.value == pytest.approx(math.log(4 / 3) / 2, abs=0.04)


def test_equal_seeds_give_equal_results():
    x, y, z = chain(600)
    torch.manual_seed(1)
    first = estimate_cmi(x, y.tolist(), torch.tensor(z), steps=20, seed=4)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert estimate_cmi(x, y, z, steps=20, seed=4) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert estimate_cmi(x, y, z, steps=20, seed=5) != first


def test_shuffle_among_neighbours():
    z = torch.from_numpy(normal(500, 1))
    order = _neighbour_shuffle(z, 5, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(500))
    assert (order == torch.arange(500)).float().mean() < 0.02
    assert (z[order] - z).abs().median() < 0.03  # of a spread of 1
    place = z[:, 0].argsort().argsort()
    apart = (place[order] - place).abs()  # five neighbours lie within five places
    assert (apart <= 5).float().mean() > 0.8 and (apart > 2).float().mean() > 0.2


def test_shuffle_among_neighbours_of_other_groups():
    """Rows of a group lie together in z, and none gets a row of its own group. Among rows of equal z any will do."""
    group = torch.arange(600) // 6
    z = group[:, None].double() + 0.01 * torch.from_numpy(normal(600, 1))
    order = _neighbour_shuffle(z, 12, torch.Generator().manual_seed(0), group)
    assert sorted(order.tolist()) == list(range(600))
    apart = (group[order] - group).abs()
    assert (apart == 0).float().mean() < 0.02 and (apart <= 2).float().mean() > 0.8
    label = torch.arange(600)[:, None].double() % 3
    order = _neighbour_shuffle(label, 5, torch.Generator().manual_seed(0))
    assert (label[order] == label).float().mean() > 0.9


def test_the_gaussian_reading_is_corrected_for_its_degrees():
    """Four columns on each side in 120 rows: unseen rows are predicted worse by 16 / 192 nats, which are added."""
    missing = []
    for seed in range(8):
        z, e, f = (normal(120, columns, 3 * seed + i) for i, columns in enumerate((1, 4, 4)))
        u, v, rho = e, (e + f) / math.sqrt(2), math.sqrt(0.5)
        truth = (rho * u * v - rho**2 * (u**2 + v**2) / 2) / (1 - rho**2) - math.log(1 - rho**2) / 2  # of each row
        read = estimate_cmi(z + e, z + e + f, z, steps=1, hidden=2, seed=seed)["gaussian"]
        missing.append(truth.sum(1).mean() - read)
    assert abs(np.mean(missing)) < 0.1 and np.std(missing) < 0.1


def test_the_ceiling_is_that_of_the_narrower_side():
    x, y, z = chain(200)
    assert estimate_cmi(np.stack([x, normal(200, 1)[:, 0]], 1), y, z, steps=5, hidden=4).ceiling == math.log(200)


def test_few_groups_and_overfitting_are_flagged():
    x, y, z = chain(200)
    assert "few groups" in estimate_cmi(x, y, z, steps=5, hidden=4, groups=np.arange(200) % 30).flags
    assert "few groups" not in estimate_cmi(x, y, z, steps=5, hidden=4, groups=np.arange(200) % 40).flags


# -- the parts --------------------------------------------------------------------------------------------------------


def density(overfit: float = 0.0, spread: float = 1.0) -> SimpleNamespace:
    return SimpleNamespace(overfit=overfit, spread=spread, history=[{"held_out": 0.0}] * 2, picks=[0])


def test_what_widens_an_interval():
    """What z may explain beyond what was learnt reaches down, what the other side may explain reaches up."""
    found = [
        _Reading.interval(
            SimpleNamespace(
                best=SimpleNamespace(value=1.0, density=density(overfit)), value=1.0 + more, attenuation=more,
                standard_error=0.1, confounding=confounding,
            )
        )
        for overfit, confounding, more in ((0, 0, 0), (0.5, 0, 0), (0, 0.25, 0), (0, 0, 0.125))
    ]  # fmt: skip
    assert found[0] == pytest.approx((1 - 0.196, 1 + 0.196))
    assert found[1] == pytest.approx((1 - 0.196, 1.5 + 0.196)) and found[2] == pytest.approx((0.75 - 0.196, 1.196))
    assert found[3] == pytest.approx((1 - 0.196, 1.25 + 0.196))  # by as much again as the value


def test_flags_of_a_reading():
    def flags(value=1.0, finest=1.0, **of_density):
        best = SimpleNamespace(density=density(**of_density), finest=finest)
        return _Reading.flags(
            SimpleNamespace(value=value, ceiling=5.0, best=best, grain=0.01, densities=[best.density])
        )

    assert flags() == flags(3.9) == flags(0.1, overfit=0.09) == flags(overfit=0.45) == []
    assert flags(4.1) == flags(finest=0.04, spread=0.1) == ["saturated"] and flags(finest=0.04, spread=0.5) == []
    assert flags(overfit=0.55) == flags(0.1, overfit=0.11) == ["overfitted"]


def side(overfit: float, dims: int = 1, picks: tuple[int, ...] = (0, 3)) -> SimpleNamespace:
    return SimpleNamespace(dims=dims, given_z=SimpleNamespace(overfit=overfit, picks=picks))


def test_attenuation_is_undone_as_spearman_does():
    """Noise of the shares a and b lowers a squared correlation by (1 + a)(1 + b)."""
    rho, a, b = 0.6, 0.06, 0.03
    read = -0.5 * math.log(1 - rho**2 / (1 + a) / (1 + b))
    for dims in (1, 3):
        found = _attenuation(dims * read, side(dims * a / 0.75, dims), side(dims * b / 0.75, dims))
        assert found == pytest.approx(dims * (-0.5 * math.log(1 - rho**2) - read))
    assert _attenuation(read, side(0.06, picks=(0, 0)), side(0.03, picks=(0, 0))) == 0  # regressions need none
    assert _attenuation(read, side(0.2), side(0.0)) == 0  # of a large optimism less is known
    assert _attenuation(-0.1, side(0.06), side(0.03)) == 0
    high = -0.5 * math.log(1 - 0.99)  # no correlation becomes 1
    assert _attenuation(high, side(0.06), side(0.03)) == pytest.approx(0.5 * math.log(2))


@pytest.mark.parametrize("dims", [1, 3])
def test_a_mixture_is_a_density_and_its_residual_is_its_distribution(dims):
    """log p(e) = sum of log phi(r) + log dr/de, where r_i depends on no later column. The density integrates to 1."""
    torch.manual_seed(0)
    network = _Mixtures(2, dims, 2, 12, torch.Generator().manual_seed(0))
    weights = [p.detach() + 0.4 * torch.randn_like(p) for p in network.parameters]
    e, c = torch.randn(2, 5, dims, dtype=torch.float64), torch.randn(2, 5, 2)

    def residual(e):
        return network.residual(e, c, weights)

    slopes = torch.autograd.functional.jacobian(residual, e)  # [2, 5, dims, 2, 5, dims]
    slopes = torch.stack([torch.stack([slopes[m, b, :, m, b] for b in range(5)]) for m in range(2)])
    assert (slopes.triu(1) == 0).all()
    normal_log = -0.5 * residual(e).square() - 0.5 * math.log(2 * math.pi)
    expected = (normal_log + slopes.diagonal(dim1=2, dim2=3).log()).sum(2)
    found = network.log_density(e.float(), c, weights)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    if dims == 1:
        at, step = torch.linspace(-60, 60, 48_001), 120 / 48_000
        total = network.log_density(at.expand(2, -1)[..., None], c[:, :1].expand(-1, len(at), -1), weights).exp().sum(1)
        torch.testing.assert_close(total * step, torch.ones(2), rtol=1e-3, atol=0)


def test_classes_start_from_the_probabilities_that_are_known():
    network = _Classes(2, 3, 2, 8, torch.Generator().manual_seed(0))
    known = torch.tensor([0.2, 0.5, 0.3]).log()
    e = torch.cat([torch.tensor([[0.0], [2.0], [1.0]]), known.expand(3, -1)], 1).expand(2, -1, -1)
    c = torch.randn(2, 3, 2)
    torch.testing.assert_close(network.log_density(e, c), known[[0, 2, 1]].expand(2, -1))
    weights = [p.detach() + 0.4 * torch.randn_like(p) for p in network.parameters]
    changed = network.residual(e.double(), c, weights)
    assert torch.equal(changed[..., 0], e[..., 0].double())
    torch.testing.assert_close(changed[..., 1:].exp().sum(2), torch.ones(2, 3).double(), rtol=1e-5, atol=0)
    own = changed[..., 1:].gather(2, e[..., :1].long())[..., 0]
    torch.testing.assert_close(network.log_density(e, c, weights).double(), own, rtol=1e-4, atol=1e-5)
    assert (changed[..., 1:] - known).abs().max() > 0.1


@pytest.mark.parametrize("columns", [3, 40])
@pytest.mark.parametrize("dims", [1, 2])
def test_ridge_regressions_by_their_formulas(dims, columns):
    """Fitted to some rows, read on all; more columns than rows, too."""
    generator = torch.Generator().manual_seed(0)
    design = torch.randn(30, columns, generator=generator, dtype=torch.float64)
    target = design[:, :dims] + torch.randn(30, dims, generator=generator, dtype=torch.float64)
    rows = torch.arange(24)
    found = dict(_ridge_regressions(target, design, rows))
    assert len(found) >= 2 * dims
    for (ridge, shrinkage), regression in found.items():
        d, t = design - design[rows].mean(0), target - target[rows].mean(0)
        gram = d[rows].T @ d[rows] / 24
        damped = gram + ridge * torch.eye(columns, dtype=torch.float64)
        degrees = torch.linalg.solve(damped, gram).trace().item()
        error = t - d @ torch.linalg.solve(damped, d[rows].T @ t[rows] / 24)
        spread = error[rows].T @ error[rows] / (24 - 1 - degrees)
        spread = (1 - shrinkage) * spread + shrinkage * torch.diag(spread.diag())
        expected = multivariate_normal(np.zeros(dims), spread.numpy()).logpdf(error.numpy())
        assert regression.degrees == pytest.approx(degrees, rel=1e-6)
        np.testing.assert_allclose(regression.log_density.numpy(), expected, rtol=1e-5, atol=1e-5)
        assert regression.log_volume.item() == pytest.approx(0.5 * torch.logdet(spread).item(), abs=1e-6)
        whitened = torch.linalg.solve(torch.linalg.cholesky(spread), error.T).T
        torch.testing.assert_close(regression.residual, whitened, rtol=1e-5, atol=1e-5)


def test_a_reference_is_subtracted_from_regressions_and_networks_alike():
    x, noise = torch.from_numpy(normal(300, 2)).T
    target = (torch.sin(3 * x) + 0.2 * noise)[:, None].expand(3, -1, -1)
    fold, reference = torch.arange(300) % 3, torch.from_numpy(normal(300, 3, 5)).T
    settings = TrainingSettings(150, 64, 1e-2, 16)
    plain, less = (
        fit(target, [x[:, None].expand(3, -1, -1)], fold, settings, torch.Generator().manual_seed(0), reference=r)
        for r in (None, reference)
    )
    assert all(less.picks) and less.picks == plain.picks
    own = reference[fold, torch.arange(300)]
    torch.testing.assert_close(less.chosen, plain.chosen - own, rtol=0, atol=1e-5)
    torch.testing.assert_close(less.regression, plain.regression - own, rtol=0, atol=1e-9)
    assert plain.chosen.mean() > plain.regression.mean() + 0.3
    assert plain.overfit == pytest.approx(max(0.0, plain.training - plain.chosen.mean().item()))


def test_folds_of_several_sizes_are_read_on_their_own_rows():
    x, noise = torch.from_numpy(normal(300, 2)).T
    fold = (torch.arange(300) % 5).clamp(max=2)
    target = (x.square() + 0.2 * noise)[:, None].expand(3, -1, -1)
    design, generator = x[:, None].expand(3, -1, -1), torch.Generator().manual_seed(0)
    found = fit(target, [design], fold, TrainingSettings(10, 64, 3e-2, 16), generator)
    assert found.picks == [1, 1, 1]
    means = [found.chosen[fold == f].mean().item() for f in range(3)]
    assert found.history[1]["held_out"] == pytest.approx(np.mean(means), abs=1e-6)


def test_a_fold_that_keeps_its_regression_keeps_its_residual():
    network = _Mixtures(2, 1, 1, 4, torch.Generator().manual_seed(0))
    start = torch.randn(2, 9, 1, dtype=torch.float64)
    networks = _Networks(network, start, torch.randn(2, 9, 1), torch.zeros(2, 9))
    weights = [p.detach() + 0.4 for p in network.parameters]
    residual = networks.residual(weights, [0, 3])
    assert torch.equal(residual[0], start[0]) and not torch.allclose(residual[1], start[1], atol=0.1)
    assert torch.equal(networks.residual(weights, [0, 0]), start)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, columns", [(50, 1), (60, 5), (60, 30)])
def test_few_rows(n, columns):
    x, y, z = (normal(n, columns, seed) for seed in range(3))
    estimate = estimate_cmi(x, y, z, steps=5)
    assert all(math.isfinite(v) for v in (estimate.value, *estimate.interval, *estimate.readings.values()))
    assert estimate.interval[0] < 0.3


@pytest.mark.parametrize(
    "change, found",
    [
        ({"x": torch.zeros(99)}, "99, 100 and 100 rows"),
        ({"y": torch.zeros(100, 2, 2)}, r"y \[100, 2, 2\]"),
        ({"x": torch.zeros(100, 0)}, r"x \[100, 0\]"),
        ({"z": torch.zeros(100, 0)}, r"z \[100, 0\]"),
        ({"z": torch.full((100,), math.nan)}, "100 non-finite entries in z"),
        ({"x": np.array(["a"] * 100)}, "x: ndarray with entries of type <U1"),
        ({"k": 0}, "k = 0"),
        ({"steps": 0}, "steps = 0"),
        ({"method": "product"}, "option method"),
        ({"held_out": 0.5}, "option held_out"),
        ({"discrete": True}, "a discrete z of 100 categories in 100 rows"),
        ({"x": torch.zeros(49), "y": torch.zeros(49), "z": torch.zeros(49)}, "49 samples; expected at least 50"),
    ],
)
def test_bad_input(change, found):
    samples = dict(zip("xyz", chain(100), strict=True))
    with pytest.raises(EstimatorError, match=found) as caught:
        estimate_cmi(**samples | change)
    assert "\n" not in str(caught.value)
