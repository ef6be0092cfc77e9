"""Bounds at the exact critic, log p(x,y)/p(x)p(y), of correlated Gaussians (d = 20, B = 64): nothing is trained.

Published figures: mean and SD over 3000 batches. Ours come from 600 others; both samplings' errors count, and half a
unit of the figure's last digit.
"""

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from engine.kernels.mi_bounds import bound_value
from engine.mimrl.published import published_bound
from tests.truth.gaussian import DIM, correlation, log_ratio, sample

BATCHES, PUBLISHED_BATCHES, B = 600, 3000, 64

# information: rho, then (mean, SD where known, half a unit of the last digit)
FIGURES = {
    2: {
        "rho": 0.4258,
        "joint": (2.00, 0.24, 0.005),
        "infonce": (1.809, 0.20, 0.0005),
        "nwj": (2.00, 0.26, 0.005),
        "nwj at log r": (1.63, 0.24, 0.005),
        "dv": (2.00, 0.26, 0.005),
        "smile 1": (2.369, 0.24, 0.0005),
        "smile 5": (2.024, 0.25, 0.0005),
        "js_fgan": (-0.686, None, 0.0005),
        "interpolate .01": (2.00, None, 0.005),
        "interpolate .5025": (1.93, None, 0.005),
        "interpolate 1": (1.83, None, 0.005),
    },
    4: {
        "rho": 0.5742,
        "joint": (4.00, 0.32, 0.005),
        "infonce": (3.067, 0.18, 0.0005),
        "nwj": (4.01, 0.52, 0.005),
        "nwj at log r": (3.63, 0.36, 0.005),
        "dv": (4.06, 0.44, 0.005),
        "smile 1": (4.653, 0.33, 0.0005),
        "smile 5": (4.265, 0.37, 0.0005),
        "js_fgan": (-0.332, None, 0.0005),
    },
    6: {
        "rho": 0.6717,
        "joint": (5.99, 0.37, 0.005),
        "infonce": (3.736, 0.12, 0.0005),
        "nwj": (6.03, 1.1, 0.005),
        "nwj at log r": (5.64, 0.53, 0.005),
        "dv": (6.23, 0.67, 0.005),
        "smile 1": (6.816, 0.38, 0.0005),
        "smile 5": (6.698, 0.46, 0.0005),
        "js_fgan": (-0.152, None, 0.0005),
    },
    8: {
        "rho": 0.7421,
        "joint": (8.01, 0.42, 0.005),
        "infonce": (4.022, 0.07, 0.0005),
        "dv": (8.61, 1.0, 0.005),
        "smile 1": (8.927, 0.42, 0.0005),
        "smile 5": (9.326, 0.57, 0.0005),
        "js_fgan": (-0.066, None, 0.0005),
    },
    10: {
        "rho": 0.7951,
        "joint": (10.0, 0.43, 0.05),
        "infonce": (4.121, 0.04, 0.0005),
        "dv": (11.28, 1.4, 0.005),
        "smile 1": (10.97, 0.43, 0.005),
        "smile 5": (12.05, 0.69, 0.005),
        "js_fgan": (-0.028, None, 0.0005),
        "interpolate .01": (8.35, 0.45, 0.005),
        "interpolate .5025": (5.56, 0.09, 0.005),
        "interpolate 1": (4.11, 0.04, 0.005),
    },
}
NWJ_MEDIANS = {8: 8.4, 10: 10.6}


@cache
def oracle(information: int) -> Tensor:
    generator = torch.Generator().manual_seed(information)
    rho = correlation(information)
    return log_ratio(*sample(rho, (BATCHES, B, DIM), generator), rho)


def estimate(scores: Tensor, what: str) -> float:
    bound, _, number = what.partition(" ")
    if what == "joint":
        return scores.diagonal().mean().item()
    if what == "nwj":
        return bound_value(scores + 1, "nwj")[0].item()  # NWJ's best critic is 1 + log r
    if what == "nwj at log r":
        return published_bound(scores, "js")[0].item()
    if bound == "smile":
        return bound_value(scores, "smile", smile_tau=float(number))[0].item()
    if bound == "interpolate":
        return bound_value(scores, "interpolate", alpha=float(number))[0].item()
    return bound_value(scores, bound)[0].item()


@pytest.mark.parametrize("information", FIGURES)
def test_correlation_of_the_level(information: int):
    assert correlation(information) == pytest.approx(FIGURES[information]["rho"], abs=5e-5)


@pytest.mark.parametrize(
    "information, what", [(i, what) for i, row in FIGURES.items() for what in row if what != "rho"]
)
def test_mean_within_four_standard_errors(information: int, what: str):
    values = torch.tensor([estimate(scores, what) for scores in oracle(information)])
    mean, sd, rounding = FIGURES[information][what]
    own = values.std().item()
    error = math.sqrt(own**2 / BATCHES + (sd or own) ** 2 / PUBLISHED_BATCHES)
    assert abs(values.mean().item() - mean) <= 4 * error + rounding


@pytest.mark.parametrize("information", NWJ_MEDIANS)
def test_nwj_median_where_its_spread_means_nothing(information: int):
    """Four binomial standard errors of the median's rank, both samplings counted; figures of one decimal."""
    values = torch.tensor([estimate(scores, "nwj") for scores in oracle(information)]).sort().values
    ranks = 4 * 0.5 * math.sqrt(BATCHES) * math.sqrt(1 + BATCHES / PUBLISHED_BATCHES)
    low, high = values[round(BATCHES / 2 - ranks)].item(), values[round(BATCHES / 2 + ranks)].item()
    assert low - 0.05 <= NWJ_MEDIANS[information] <= high + 0.05


@pytest.mark.parametrize("information", FIGURES)
def test_corrected_js_is_nwj_at_its_best_critic(information: int):
    for scores in oracle(information)[:20]:
        corrected, nwj = bound_value(scores, "js")[0], bound_value(scores + 1, "nwj")[0]
        torch.testing.assert_close(corrected, nwj, rtol=1e-4, atol=1e-4)
