"""Bounds by a conditional on correlated Gaussians of known information: with the true conditional, and trained.

With the true q(y|x) = N(rho x, 1 - rho²), CLUB's expectation is d t with t = rho² / (1 - rho²): a row's own y has a
mean square of 1 - rho² about the prediction, and another row's y one of 1 + rho². The information is (d/2) log(1 + t).
"""

import math

import pytest
import torch
from torch.distributions import Normal

from engine.model.estimators import MIEstimator
from engine.model.variational import Categorical, Gaussian, club, club_sample, leave_one_out_bound, other_rows
from tests.truth.gaussian import sample

CASES = [(1, 0.5), (1, 0.9), (5, 0.3), (5, 0.7), (20, 0.5)]


def truth(dim: int, rho: float) -> float:
    return -0.5 * dim * math.log(1 - rho * rho)


def oracle(x: torch.Tensor, rho: float) -> Gaussian:
    return Gaussian(rho * x, torch.full_like(x, math.log(1 - rho * rho)))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


@pytest.mark.parametrize(("dim", "rho"), CASES)
def test_club_with_the_true_conditional_has_its_closed_form(dim: int, rho: float):
    generator = torch.Generator().manual_seed(0)
    readings, sampled = [], []
    for number in range(300):
        x, y = sample(rho, (64, dim), generator)
        readings.append(club(oracle(x, rho), y).item())
        sampled.append(club_sample(oracle(x, rho), y, other_rows(64, torch.tensor(number))).item())
    expected = dim * rho * rho / (1 - rho * rho)
    assert expected > truth(dim, rho)
    for values in (readings, sampled):
        mean, error = mean_and_error(values)
        assert abs(mean - expected) < 4 * error


@pytest.mark.parametrize(("dim", "rho"), [(1, 0.5), (5, 0.7)])
def test_l1out_with_the_true_conditional_is_what_simulation_gives(dim: int, rho: float):
    """Each row of its own simulation has 15 fresh others. The mean is above the information."""
    generator = torch.Generator().manual_seed(0)
    readings = [
        leave_one_out_bound(oracle(x, rho), y).item()
        for x, y in (sample(rho, (16, dim), generator) for _ in range(1500))
    ]
    mean, error = mean_and_error(readings)
    x, y = sample(rho, (40_000, dim), generator)
    others = torch.randn(40_000, 15, dim, generator=generator)
    deviation = math.sqrt(1 - rho * rho)
    own = Normal(rho * x, deviation).log_prob(y).sum(1)
    mixture = Normal(rho * others, deviation).log_prob(y[:, None]).sum(2).exp().mean(1).log()
    simulated, other_error = mean_and_error((own - mixture).tolist())
    assert abs(mean - simulated) < 4 * math.hypot(error, other_error)
    assert mean > truth(dim, rho) - 4 * error


def test_classes_with_the_true_conditional():
    """y of 3 classes, x of 3 values: p(y|x) in closed form, CLUB by its definition over the joint distribution."""
    joint = torch.tensor([[0.30, 0.02, 0.03], [0.05, 0.25, 0.05], [0.02, 0.08, 0.20]], dtype=torch.float64)
    of_x, of_y = joint.sum(1), joint.sum(0)
    conditional = (joint / of_x[:, None]).log()
    information = (joint * (joint / torch.outer(of_x, of_y)).log()).sum().item()
    expected = (joint * conditional).sum().item() - (torch.outer(of_x, of_y) * conditional).sum().item()
    assert expected > information
    generator, readings, above = torch.Generator().manual_seed(0), [], []
    for _ in range(400):
        cell = torch.multinomial(joint.flatten(), 64, replacement=True, generator=generator)
        y = torch.nn.functional.one_hot(cell % 3, 3).double()
        q = Categorical(conditional[cell // 3])
        readings.append(club(q, y).item())
        above.append(leave_one_out_bound(q, y).item())
    mean, error = mean_and_error(readings)
    assert abs(mean - expected) < 4 * error
    mean, error = mean_and_error(above)
    assert information - 4 * error < mean < information + 0.1


def trained(bound: str, dim: int, rho: float, steps: int = 400) -> tuple[float, float]:
    """Mean and standard error of 40 readings on new rows, of an estimator that has learnt from others."""
    torch.manual_seed(0)
    estimator = MIEstimator(dim, dim, bound=bound, hidden=64, layers=1)
    optimizer = torch.optim.Adam(estimator.parameters(), 5e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        estimator(*sample(rho, (256, dim), generator)).loss.backward()
        optimizer.step()
        rates.step()
    estimator.eval()
    with torch.no_grad():
        return mean_and_error([estimator(*sample(rho, (256, dim), generator)).value.item() for _ in range(40)])


@pytest.mark.parametrize(("dim", "rho"), [(1, 0.8), (5, 0.5)])
@pytest.mark.parametrize("bound", ["club", "club_sample", "l1out"])
def test_trained_upper_bounds_are_above_the_truth(bound: str, dim: int, rho: float):
    mean, error = trained(bound, dim, rho)
    assert mean > truth(dim, rho) - 4 * error
    if bound != "l1out":
        assert mean < 1.3 * dim * rho * rho / (1 - rho * rho) + 4 * error  # near that of the true conditional


@pytest.mark.parametrize(("dim", "rho"), [(1, 0.8), (5, 0.5)])
def test_barber_agakov_is_below_the_truth_and_near_it(dim: int, rho: float):
    mean, error = trained("ba", dim, rho)
    assert 0.9 * truth(dim, rho) - 4 * error < mean < truth(dim, rho) + 4 * error


def test_independent_features_read_near_zero():
    for bound in ("club", "l1out", "ba"):
        mean, error = trained(bound, 2, 0.0)
        assert abs(mean) < 0.03 + 4 * error
