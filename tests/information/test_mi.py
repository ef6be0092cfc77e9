"""`estimate_mi` against truths in closed form, its intervals and flags, and what it refuses."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import engine
from engine.errors import EstimatorError
from engine.information import critics
from engine.information.columns import normal_scores
from engine.information.estimate import ADVICE
from engine.information.gaussian import canonical, closed_form, sampling_bias
from engine.information.mi import BOUNDS, estimate_mi
from engine.information.neighbours import counted_information, neighbour_information

QUICK = {"steps": 300, "batch_size": 128}


def gaussian(rho: float, dims: int, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """Pairs of columns of correlation rho, and their information."""
    x, noise = np.random.default_rng(seed).normal(size=(2, count, dims))
    return x, rho * x + math.sqrt(1 - rho**2) * noise, -dims / 2 * math.log(1 - rho**2)


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims, rho", [(1, 0.9), (2, 0.9), (5, 0.6), (25, 0.5)])
def test_gaussians(dims, rho):
    x, y, truth = gaussian(rho, dims, 3000)
    estimate = estimate_mi(3 * x + 5, y, **QUICK)
    assert estimate.value == pytest.approx(truth, abs=0.06 + 0.02 * truth)
    assert estimate.interval[0] <= truth <= estimate.interval[1]
    assert estimate.method == ("neighbours" if dims == 1 else "gaussian")


@pytest.mark.parametrize(("rho", "dims", "count"), [(0.8, 50, 200), (0.8, 20, 200)])
def test_strong_dependence_of_many_columns_on_few_rows(rho: float, dims: int, count: int):
    """DV of a Gaussian fitted to few rows reads two to three times the truth."""
    x, y, truth = gaussian(rho, dims, count, seed=3)
    estimate = estimate_mi(x, y, steps=5)
    assert estimate.value == pytest.approx(truth, abs=2 * math.sqrt(dims / (count - 2 * dims)))
    assert estimate.interval[0] < truth < estimate.interval[1] and "noise" not in estimate.flags
    assert estimate.interval[0] > 1.0
    assert estimate["dv"] > 1.1 * truth


def test_weak_dependence_of_many_columns_on_few_rows_is_not_called_noise():
    x, y, truth = gaussian(0.3, 100, 500, seed=3)
    estimate = estimate_mi(x, y, steps=5)
    assert estimate.value < truth < estimate.interval[1] < truth + 2
    assert "overfitted" in estimate.flags and "noise" not in estimate.flags
    estimate = estimate_mi(x[:, :50], y[:, 50:], steps=5)  # independent
    assert estimate.value == 0 and "noise" in estimate.flags
    assert "overfitted" in estimate_mi(x[:200], y[:200], steps=5).flags  # as many columns as rows: nothing shows it


def test_intervals_reach_what_ranks_of_few_rows_cannot_show():
    """Ranks lose 0.2 of 5.9 nats here, about two standard errors."""
    inside, errors = 0, []
    for seed in range(20):
        x, y, truth = gaussian(0.99, 3, 300, seed=seed)
        estimate = estimate_mi(x, y, steps=5)
        inside += estimate.interval[0] < truth < estimate.interval[1] < truth + 0.8
        errors.append(estimate.value - truth)
    assert inside >= 18 and -0.35 < sum(errors) / 20 < 0


def test_uncorrelated_columns_of_two_latent_variables_are_not_added_up():
    """Each pair of columns looks Gaussian, and few of the 20 correlate, but all are functions of two numbers."""
    generator = torch.Generator().manual_seed(1)
    turns, shift = 3 * torch.randn(2, 20, generator=generator), 2 * math.pi * torch.rand(20, generator=generator)
    latent, others = (torch.randn(n, 2, generator=generator) for n in (400, 20_000))
    x, known = (math.sqrt(2) * torch.cos(u @ turns + shift) for u in (latent, others))
    y = x + 0.5 * torch.randn(x.shape, generator=generator)
    # log p(y|x) - log p(y), p(y) as a mean over other latent variables
    marginal = (-2 * torch.cdist(y, known).square()).logsumexp(1) - math.log(len(known))
    truth = (-2 * (y - x).square().sum(1) - marginal).mean().item()
    assert 5 < truth < 8
    estimate = estimate_mi(x, y, steps=5)
    assert estimate["gaussian"] > 1.3 * truth
    assert 0.5 * truth < estimate.value < 1.1 * truth and estimate.interval[0] < truth < estimate.interval[1]
    assert {"saturated", "overfitted"} <= set(estimate.flags)


def test_high_information_is_read_beyond_the_ceiling_and_flagged():
    x, y, truth = gaussian(math.sqrt(1 - math.exp(-1)), 20, 2000)
    assert truth == pytest.approx(10)
    estimate = estimate_mi(x, y, **QUICK)
    assert estimate.value == pytest.approx(10, abs=0.5) and "saturated" in estimate.flags
    assert estimate["infonce"] < math.log(400) < estimate.value


def test_many_columns_for_few_rows():
    """130 columns of noise in 2,000 rows: chance alone correlates, and the value is right all the same."""
    x, y, truth = gaussian(0.8, 3, 2000)
    noise = np.random.default_rng(1).normal(size=(2, 2000, 65))
    estimate = estimate_mi(np.hstack([x, noise[0]]), np.hstack([noise[1], y]), **QUICK)
    assert estimate.value == pytest.approx(truth, abs=0.15) and "overfitted" in estimate.flags
    assert estimate.interval[0] <= truth <= estimate.interval[1]


def test_columns_turned_by_their_length():
    """A spiral: no single column tells much, the length tells how far to turn back."""
    x, y, truth = gaussian(0.9, 2, 4000)
    angle = (y**2).sum(1)
    turned = np.stack(
        [np.cos(angle) * y[:, 0] - np.sin(angle) * y[:, 1], np.sin(angle) * y[:, 0] + np.cos(angle) * y[:, 1]], 1
    )
    estimate = estimate_mi(x, turned, steps=600)
    assert estimate.value == pytest.approx(truth, abs=0.2) and "network" in estimate.method
    assert estimate["gaussian"] < 0.2
    assert estimate.interval[0] <= truth <= estimate.interval[1]


def test_a_student_is_dependent_through_the_length_alone():
    generator = np.random.default_rng(0)
    both = generator.normal(size=(4000, 6)) * np.sqrt(2 / generator.chisquare(2, (4000, 1)))
    estimate = estimate_mi(both[:, :3], both[:, 3:], **QUICK)
    assert estimate.value == pytest.approx(0.291, abs=0.06)
    assert estimate.method.startswith("gaussian with radii") and "heavy tails" in estimate.flags


@pytest.mark.parametrize("dims", [1, 5, 25])
def test_independent_columns_read_nothing(dims):
    x, y = np.random.default_rng(dims).standard_t(1.5, size=(2, 1500, dims))
    estimate = estimate_mi(x, y, **QUICK)
    assert 0 <= estimate.value < 0.02 and "noise" in estimate.flags
    assert estimate.interval[0] == 0 < estimate.interval[1]


def test_outliers_and_monotone_maps_change_nothing():
    x, y, _ = gaussian(0.8, 2, 1500)
    plain = estimate_mi(x, y, **QUICK)
    mapped = estimate_mi(np.exp(x), y**3 + 1000, **QUICK)
    # the lengths of rows may change, but nothing here is chosen by them
    assert mapped.value == pytest.approx(plain.value, abs=1e-6)
    x[:5] = 1e6
    spoiled = estimate_mi(x, y, **QUICK)
    # 5 of 1,500 rows did carry information
    assert spoiled.value == pytest.approx(plain.value, abs=0.08) and "heavy tails" in spoiled.flags


def test_two_discrete_variables_are_counted():
    generator = np.random.default_rng(0)
    x = generator.integers(8, size=5000)
    y = np.where(generator.random(5000) < 0.3, (x + generator.integers(1, 8, size=5000)) % 8, x)
    truth = math.log(8) + 0.7 * math.log(0.7) + 0.3 * math.log(0.3 / 7)
    estimate = estimate_mi(x, y)
    assert estimate.method == "counts" and estimate.value == pytest.approx(truth, abs=0.03)
    assert estimate.interval[0] <= truth <= estimate.interval[1]


def test_a_label_and_a_column():
    """Four classes, two apart: 0.702 nats by numerical integration."""
    generator = np.random.default_rng(0)
    label = generator.integers(4, size=4000)
    estimate = estimate_mi(label, np.array([-3.0, -1.0, 1.0, 3.0])[label] + generator.normal(size=4000), **QUICK)
    assert "discrete columns" in estimate.flags
    levels = np.array([-3.0, -1.0, 1.0, 3.0])
    at = np.linspace(-9, 9, 20001)
    density = np.exp(-0.5 * (at[:, None] - levels) ** 2).mean(1) / math.sqrt(2 * math.pi)
    truth = np.trapezoid(-density * np.log(density), at) - 0.5 * math.log(2 * math.pi * math.e)
    assert estimate.value == pytest.approx(truth, abs=0.06)


@pytest.mark.parametrize("bound", BOUNDS)
def test_every_bound_is_finite_and_near_the_truth(bound):
    generator = np.random.default_rng(3)
    both = generator.normal(size=(1500, 4)) * np.sqrt(1 / generator.chisquare(1, (1500, 1)))
    estimate = estimate_mi(both[:, :2], both[:, 2:], bound=bound, **QUICK)
    # 0.432 nats; a Student of 1 degree of freedom, on which exponentials of scores overflow
    assert estimate.value == pytest.approx(0.432, abs=0.2) and math.isfinite(estimate.interval[1])
    assert estimate[bound] == estimate.readings[bound]


# -- the result -------------------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_results_and_leave_the_generator_alone():
    x, y, _ = gaussian(0.5, 3, 400)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    first = estimate_mi(x, y, seed=7, **QUICK)
    assert torch.equal(torch.rand(3), expected)
    again = estimate_mi(x, y, seed=7, **QUICK)
    assert dict(again.to_dict()) == dict(first.to_dict()) and torch.equal(again.pointwise, first.pointwise)
    assert estimate_mi(x, y, seed=8, **QUICK)["infonce"] != first["infonce"]


def test_the_result_can_be_read_in_many_ways(tmp_path):
    x, y, _ = gaussian(0.7, 2, 400)
    estimate = estimate_mi(x, y, **QUICK)
    assert float(estimate) == estimate.value == estimate["value"] == json.loads(json.dumps(estimate.to_dict()))["value"]
    assert estimate["dv"] == estimate.readings["dv"] and "nwj" not in estimate and {"value", "dv"} <= set(estimate)
    assert len(estimate.advice) == len(estimate.flags) and estimate.samples == len(estimate.pointwise) == 400
    assert estimate.pointwise.mean().item() == pytest.approx(estimate["infonce"], abs=1e-6)
    assert estimate.history[0]["step"] == 0 and estimate.history[-1]["held_out"] is not None
    assert f"{estimate.value:.3f} nats" in str(estimate)
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    assert estimate.plot(tmp_path / "estimate.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KeyError):
        estimate["nothing like it"]


def test_every_flag_has_advice():
    source = Path(engine.__file__).parent
    text = "".join(path.read_text() for path in (source / "information").glob("*.py"))
    assert all(text.count(f'"{flag}"') >= 2 for flag in ADVICE), "a flag that nothing raises"


def test_copies_of_a_row_share_a_fold():
    """Or the critic would be read on rows that it was trained on, and find information where there is none."""
    x, y = np.random.default_rng(0).normal(size=(2, 500, 10))
    estimate = estimate_mi(np.tile(x, (4, 1)), np.tile(y, (4, 1)), **QUICK)
    assert "repeated rows" in estimate.flags and estimate.value < 0.05


def test_discrete_rows_may_repeat():
    """Two bits that are equal in 80 % of rows: equal rows are no copies, and are read like any others."""
    generator = np.random.default_rng(0)
    x = generator.integers(2, size=1000)
    y = np.where(generator.random(1000) < 0.2, 1 - x, x)
    truth = math.log(2) + 0.8 * math.log(0.8) + 0.2 * math.log(0.2)
    estimate = estimate_mi(x, y, bound="infonce", **QUICK)
    assert estimate.value == pytest.approx(truth, abs=0.05) and "repeated rows" not in estimate.flags


def test_copies_that_leave_no_folds_are_refused():
    x = np.random.default_rng(0).normal(size=(60, 2))
    x[10:] = x[0]
    with pytest.raises(EstimatorError, match="so many copies of rows"):
        estimate_mi(x, x + np.arange(2))


def test_constant_columns_are_left_out():
    x, y, truth = gaussian(0.8, 2, 1500)
    estimate = estimate_mi(np.hstack([x, np.full((1500, 1), 518.123)]), y, **QUICK)
    assert estimate.flags == ("constant columns",) and estimate.value == pytest.approx(truth, abs=0.1)
    nothing = estimate_mi(np.zeros(100), y[:100])
    assert nothing.value == 0 and nothing.interval == (0, 0) and nothing.flags == ("constant columns",)


@pytest.mark.parametrize("dims", [1, 3])
def test_a_column_with_itself_is_flagged(dims):
    x = np.random.default_rng(0).normal(size=(600, dims))
    estimate = estimate_mi(x, x, **QUICK)
    assert "saturated" in estimate.flags and estimate.value > 4


def test_training_that_ends_early_is_flagged():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(1500, 3))
    estimate = estimate_mi(x, np.sign(x[:, :1] * x[:, 1:2]) + 0.1 * generator.normal(size=(1500, 1)), steps=60)
    assert "not converged" in estimate.flags


@pytest.mark.parametrize(
    "x, y, options, told",
    [
        (np.zeros(100), np.zeros(99), {}, "100 rows of x and 99 of y"),
        (np.zeros(49), np.zeros(49), {}, "49 samples"),
        (np.full(700, math.nan), np.zeros(700), {}, "700 non-finite entries in x"),
        (np.zeros((700, 2, 2)), np.zeros(700), {}, r"x \[700, 2, 2\]"),
        (np.zeros((700, 0)), np.zeros(700), {}, r"x \[700, 0\]"),
        (np.array(["a"] * 100), np.zeros(100), {}, "entries of type"),
        (np.zeros(100), np.zeros(100), {"bound": "js_fgan"}, "another divergence"),
        (np.zeros(100), np.zeros(100), {"bound": "club"}, "bound 'club'"),
        (np.zeros(100), np.zeros(100), {"steps": 0}, "steps = 0"),
        (np.zeros(100), np.zeros(100), {"batch_size": 1}, "batch_size = 1"),
        (np.zeros(100), np.zeros(100), {"lr": math.nan}, "lr = nan"),
        (np.zeros(100), np.zeros(100), {"alpha": 2}, "alpha = 2"),
    ],
)
def test_bad_input_is_told_in_one_line(x, y, options, told):
    with pytest.raises(EstimatorError, match=told) as caught:
        estimate_mi(x, y, **options)
    assert "\n" not in str(caught.value)


# -- the parts --------------------------------------------------------------------------------------------------------


def test_normal_scores_are_quantiles_of_ranks():
    values = torch.tensor([[3.0], [-1e9], [7.0], [3.0]], dtype=torch.float64)
    expected = torch.special.ndtri(torch.tensor([0.5, 0.125, 0.875, 0.5], dtype=torch.float64))
    assert torch.allclose(normal_scores(values)[:, 0].double(), expected, atol=1e-6)


def test_canonical_correlations_of_known_columns():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 50_000, 3, generator=generator, dtype=torch.float64)
    rho = torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    fit = canonical(x @ turn, rho * x + (1 - rho**2).sqrt() * noise)
    assert torch.allclose(fit.correlation, rho, atol=0.02)
    u, v, a, b = fit.log_ratio(x @ turn, rho * x + (1 - rho**2).sqrt() * noise)
    # the mean of the log ratio over the rows of the fit is the information itself
    assert ((u * v).sum(1) + a + b).mean().item() == pytest.approx(fit.information, abs=1e-4)


def test_a_column_that_is_there_twice_adds_nothing():
    x, noise = torch.randn(2, 300, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    twice = canonical(torch.cat([x, x[:, :1] - 2 * x[:, 1:2]], 1), x + noise)
    assert twice.information == pytest.approx(canonical(x, x + noise).information, abs=1e-6)
    assert twice.x.shape == (4, 3)


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_the_closed_form_is_free_of_bias_and_knows_its_error(rho):
    """Over 400 draws of 60 rows and 4 columns of each side."""
    x, noise = torch.randn(2, 400, 60, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    forms = [closed_form(a, b) for a, b in zip(x, rho * x + math.sqrt(1 - rho**2) * noise, strict=True)]
    found = torch.tensor([form.information for form in forms])
    assert found.mean().item() == pytest.approx(-2 * math.log(1 - rho**2), abs=4 * found.std().item() / 20)
    error = forms[0].chance if rho == 0 else np.mean([form.error for form in forms])
    assert found.std().item() < error < 1.25 * found.std().item()
    shown = sum(form.shows_more_than(0.0) for form in forms)
    assert shown <= 4 if rho == 0 else shown == 400


def test_shrinkage_subtracts_what_is_due_to_chance():
    """60 columns of noise in 200 rows correlate by up to 0.8. One pair that does correlate is found."""
    x, y = torch.randn(2, 200, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plain, shrunk = canonical(x, y), canonical(x, y, 0.1)
    assert plain.correlation[0] > 0.6 and shrunk.information < 0.25 * plain.information
    y[:, 0] = 0.9 * x[:, 0] + math.sqrt(0.19) * y[:, 0]
    assert canonical(x, y, 0.1).correlation[0].item() == pytest.approx(0.9, abs=0.05)


def test_sampling_bias_is_what_independent_samples_show():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(400, 2, 60, 4, generator=generator, dtype=torch.float64)
    shown = torch.tensor([canonical(x, y).information for x, y in draws])
    error = shown.std().item() / math.sqrt(len(shown))
    assert abs(shown.mean().item() - sampling_bias(60, 4, 4)) < 4 * error
    assert sampling_bias(100_000, 4, 4) == pytest.approx(16 / 200_000, rel=0.01)


def test_neighbour_information_does_not_depend_on_the_blocks(monkeypatch):
    from engine.information import neighbours

    x, y, truth = (torch.as_tensor(v) for v in gaussian(0.9, 1, 3000))
    whole = neighbour_information(x[:, 0], y[:, 0])
    monkeypatch.setattr(neighbours, "BLOCK", 1000)
    parts = neighbour_information(x[:, 0], y[:, 0])
    assert {k: len(v) for k, v in parts.items()} == {3: 3000, 10: 3000}
    for estimate in (whole, parts):
        assert estimate[3].mean().item() == pytest.approx(truth.item(), abs=0.06)


def test_counts_of_few_rows_are_corrected():
    """Independent digits: 64 cells in 1,000 rows show (64 - 8 - 8 + 1) / 2000 = 0.0245 nats that are not there."""
    generator = torch.Generator().manual_seed(0)
    estimate = []
    for _ in range(40):
        shares, bias = counted_information(*torch.randint(8, (2, 1000), generator=generator))
        estimate.append((shares.mean().item(), shares.mean().item() - bias))
    raw, corrected = np.mean(estimate, 0)
    assert raw == pytest.approx(0.0245, abs=0.003) and abs(corrected) < 0.003


# -- critics ----------------------------------------------------------------------------------------------------------

SETTINGS = critics.CriticSettings(10, 8, 1e-3, 6, "nwj", 0.01, 5.0)


def made(kind, group=None):
    """Critics of two folds with random weights, on 24 rows, and a Gaussian base of different ranks."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 24, 3, generator=generator, dtype=torch.float64)
    y = (x + noise)[:, :2]
    fits = [
        (canonical(x[rows], y[rows, :width]), x, y[:, :width]) for rows, width in ((slice(16), 2), (slice(8, 24), 1))
    ]
    base = critics.Base("gaussian", 24, fits, 2, group)
    inputs = critics.Inputs(*(torch.randn(2, 24, width, generator=generator) for width in (3, 2)))
    found = kind(base, inputs, 6, generator)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return found, fits


def one_score(critic, fold, fit, x, y, i, j) -> float:
    """Of x of row i and y of row j: the Gaussian's log p(u,v) / p(u)p(v), and what the network adds."""
    rho = fit.correlation
    u, v = (x[i] - fit.mean_x) @ fit.x[:, : len(rho)], (y[j] - fit.mean_y) @ fit.y[:, : len(rho)]
    gaussian = (rho * u * v - rho**2 * (u**2 + v**2) / 2) / (1 - rho**2) - torch.log(1 - rho**2) / 2
    own_x, own_y = critic.inputs.x[fold, i], critic.inputs.y[fold, j]
    if isinstance(critic, critics.Separate):
        network = critic.tower_x.of_fold(fold, own_x[None]) @ critic.tower_y.of_fold(fold, own_y[None]).T
    else:
        first = own_x @ critic.first_x[fold] + own_y @ critic.first_y[fold] + critic.first_bias[fold]
        network = (first.relu() @ critic.second[fold] + critic.second_bias[fold]).relu() @ critic.last[fold]
    return gaussian.sum().item() + network.item()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", [critics.Separate, critics.Concatenated])
@torch.no_grad()
def test_scores_of_all_pairs_are_those_of_each_pair(kind, grouped, monkeypatch):
    """And the readings are the formulas of all pairs, without those of one group."""
    monkeypatch.setattr(critics, "CHUNK_PAIRS", 4)
    group = torch.arange(24) // 2 if grouped else None
    critic, fits = made(kind, group)
    rows = torch.randperm(24, generator=torch.Generator().manual_seed(1))[:11]
    for fold, (fit, a, b) in enumerate(fits):
        expected = torch.tensor([[one_score(critic, fold, fit, a, b, i, j) for j in rows] for i in rows])
        same = torch.zeros(11, 11, dtype=torch.bool)
        if grouped:
            same = (group[rows][:, None] == group[rows]) & ~torch.eye(11, dtype=torch.bool)
        if kind is critics.Separate:
            torch.testing.assert_close(critic.of_fold(fold, rows), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(critic.scores(rows.expand(2, -1))[fold], expected, rtol=1e-4, atol=1e-4)
        left = expected.masked_fill(same, -math.inf)
        count = (~same).sum(1).log()
        infonce = expected.diagonal() - (left.logsumexp(0) + left.logsumexp(1)) / 2 + count
        others = expected[~(same | torch.eye(11, dtype=torch.bool))]
        joint = expected.diagonal().mean()
        shares, readings = critic.read(fold, rows, 0.25, SETTINGS)
        torch.testing.assert_close(shares, infonce, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(critic.shares(fold, rows), infonce, rtol=1e-4, atol=1e-4)
        dv = joint - (others.logsumexp(0) - math.log(len(others)))
        assert readings["infonce"] == pytest.approx(infonce.mean().item(), abs=1e-4)
        assert readings["ldr"] == pytest.approx(joint.item(), abs=1e-4)
        assert readings["dv"] == pytest.approx(dv.item(), abs=1e-4)
        if kind is critics.Separate:
            assert critic.log_normaliser(fold, rows) == pytest.approx(joint.item() - dv.item(), abs=1e-4)
        if kind is critics.Separate and not grouped:  # NWJ of the log ratio, less the normaliser
            nwj = 1 + (joint - 0.25).item() - (others - 0.25).exp().mean().item()
            assert readings["nwj"] == pytest.approx(nwj, rel=1e-4)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", [critics.Separate, critics.Concatenated])
def test_a_loss_is_the_negated_infonce_of_every_fold(kind, grouped):
    """Up to the logarithm of the rows that are compared. A critic of pairs takes half of a batch."""
    critic, _ = made(kind, torch.arange(24) // 2 if grouped else None)
    rows = torch.arange(36).view(2, 18) % 24  # whole groups
    settings = critics.CriticSettings(10, 8, 1e-3, 6, "infonce", 0.01, 5.0)
    half = kind is critics.Concatenated
    shares = [critic.shares(fold, part[: 9 if half else 18]).mean().item() for fold, part in enumerate(rows)]
    constant = 0.0 if half else 2 * math.log(17 if grouped else 18)
    assert critic.loss(rows, settings).item() == pytest.approx(constant - sum(shares), abs=1e-4)


def test_readings_of_blocks_are_means_over_all_rows(monkeypatch):
    """Folds of 41 and 40 rows in blocks of 13 to 21."""
    x, y, _ = gaussian(0.8, 2, 203)
    monkeypatch.setattr(critics, "READ_ROWS", 30)
    estimate = estimate_mi(x, y, steps=5, hidden=8)
    assert estimate.pointwise.mean().item() == pytest.approx(estimate["infonce"], abs=1e-6)


def test_the_ceiling_of_the_interpolated_bound():
    x, y, _ = gaussian(0.8, 2, 200)
    estimate = estimate_mi(x, y, bound="interpolate", alpha=0.3, steps=5, hidden=8)
    assert estimate.ceiling == pytest.approx(1 + math.log(39 / 0.3))  # folds of 40 rows
    assert estimate.value == pytest.approx((estimate["training"] + estimate["interpolate"]) / 2)
    assert estimate_mi(x, y, bound="nwj", steps=5, hidden=8).ceiling is None


def test_no_interval_is_smaller_than_what_could_be_detected():
    """A Gaussian pair of 8 / N nats would read two standard errors above 0. Only groups are independent."""
    x, y, _ = gaussian(0.0, 2, 400)
    rows, groups = (estimate_mi(x, y, steps=5, hidden=8, groups=g).interval for g in (None, np.arange(400) // 10))
    assert rows[1] >= 8 * 2 / 400 and groups[1] >= 8 * 2 / 40 > rows[1]
