"""Several rows of one subject: without groups an estimate is too high or too sure, with groups it is neither."""

import math

import numpy as np
import pytest
import torch
from scipy.special import digamma

from engine import estimate_cmi, estimate_mi
from engine.information.columns import standard_error
from engine.information.critics import infonce_shares, log_mean_product
from engine.information.mi import _folds
from engine.information.neighbours import counted_information, jackknifed_information

SUBJECTS, ROWS = 80, 10
GROUP = np.repeat(np.arange(SUBJECTS), ROWS)


def subjects(seed: int, rho: float = 0.0, own: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Each subject has its own x and y, of correlation rho, and rows lie around them."""
    generator = np.random.default_rng(seed)
    u, v = generator.normal(size=(2, SUBJECTS))
    v = rho * u + math.sqrt(1 - rho**2) * v
    x, y = (side[GROUP] + own * generator.normal(size=len(GROUP)) for side in (u, v))
    return x, y


def test_neighbours_of_the_same_subject_are_no_evidence():
    """x and y are independent. Rows of one subject lie together in both all the same."""
    plain = [estimate_mi(*subjects(seed)) for seed in range(10)]
    grouped = [estimate_mi(*subjects(seed), groups=GROUP) for seed in range(10)]
    assert sum(e.interval[0] > 0 for e in plain) >= 5  # "surely some information"
    assert all(e.interval[0] == 0 for e in grouped) and np.mean([e.value for e in grouped]) < 0.03
    assert all(e.groups == SUBJECTS and e.method == "neighbours of other groups" for e in grouped)
    assert grouped[0].ceiling == pytest.approx(digamma(SUBJECTS) - digamma(3))


def test_dependence_between_subjects_is_found():
    rho = 0.9 / (1 + 0.3**2)  # of the rows
    truth = -0.5 * math.log(1 - rho**2)
    estimates = [estimate_mi(*subjects(seed, rho=0.9), groups=GROUP) for seed in range(12)]
    inside = sum(e.interval[0] <= truth <= e.interval[1] for e in estimates)
    assert inside >= 10 and np.mean([e.value for e in estimates]) == pytest.approx(truth, abs=0.08)


def test_critics_are_read_on_other_subjects():
    """Five columns of independent subjects: critics learn to know the subjects."""
    generator = np.random.default_rng(0)
    u, v = generator.normal(size=(2, SUBJECTS, 5))
    x, y = (side[GROUP] + 0.1 * generator.normal(size=(len(GROUP), 5)) for side in (u, v))
    plain, grouped = estimate_mi(x, y, steps=150), estimate_mi(x, y, groups=GROUP, steps=150)
    assert plain.interval[0] > 0.3 and grouped.interval[0] == 0 and grouped.value < 0.1


def test_counts_by_group():
    """Every subject has one x and one y, independent: 80 subjects, not 800 rows, are the evidence."""
    inside = {"plain": 0, "grouped": 0}
    for seed in range(10):
        x, y = (side[GROUP] for side in np.random.default_rng(seed).integers(3, size=(2, SUBJECTS)))
        inside["plain"] += estimate_mi(x, y, discrete=True).interval[0] == 0
        inside["grouped"] += estimate_mi(x, y, discrete=True, groups=GROUP).interval[0] == 0
    assert inside["plain"] <= 3 and inside["grouped"] >= 9


def test_groups_in_a_conditional_estimate():
    """The error is by group, and folds keep groups together."""
    generator = np.random.default_rng(1)
    z = generator.normal(size=len(GROUP))
    x, y = subjects(2)
    plain = estimate_cmi(x + z, y + z, z, steps=20, hidden=8)
    grouped = estimate_cmi(x + z, y + z, z, steps=20, hidden=8, groups=GROUP)
    assert grouped.groups == SUBJECTS and grouped.interval[0] == 0 and grouped.value < 0.03
    assert grouped.standard_error > 1.2 * plain.standard_error
    assert grouped.ceiling == pytest.approx(math.log(SUBJECTS))


def test_folds_keep_groups_together():
    x, y = (torch.tensor(side)[:, None] for side in subjects(0))
    group = torch.tensor(GROUP)
    fold = _folds(x, y, False, group, torch.Generator().manual_seed(0)).view(SUBJECTS, ROWS)
    assert (fold == fold[:, :1]).all() and len(fold[:, 0].unique()) == 5


def test_few_groups_are_flagged():
    x, y = subjects(0)
    assert "few groups" in estimate_mi(x, y, groups=GROUP % 30).flags
    assert "few groups" not in estimate_mi(x, y, groups=GROUP).flags


# -- the parts --------------------------------------------------------------------------------------------------------


def test_the_error_is_that_of_group_means():
    shares = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert standard_error(shares) == pytest.approx(shares.std().item() / math.sqrt(12))
    means = shares.view(4, 3).mean(1)
    by_group = standard_error(shares, torch.arange(12) // 3)
    assert by_group == pytest.approx(means.std().item() / math.sqrt(4))
    assert standard_error(shares, torch.arange(12)) == pytest.approx(standard_error(shares))


def test_jackknife_of_rows_is_about_the_closed_form():
    x, y = torch.randint(4, (2, 500), generator=torch.Generator().manual_seed(0))
    shares, bias = counted_information(x, y)
    same, jackknifed, error = jackknifed_information(x, y, torch.arange(500))
    assert torch.equal(shares, same) and jackknifed == pytest.approx(bias, rel=0.3)
    assert error == pytest.approx(standard_error(shares), rel=0.5)


def test_jackknife_by_leaving_out_one_group_after_another():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(3, (2, 60), generator=generator)
    group = torch.cat([torch.arange(12), torch.randint(12, (48,), generator=generator)])

    def information(kept):
        codes = (side[kept].unique(return_inverse=True)[1] for side in (x, y))
        return counted_information(*codes)[0].mean().item()

    left = np.array([information(group != g) for g in range(12)])
    shares, bias, error = jackknifed_information(x, y, group)
    whole = information(torch.ones(60, dtype=torch.bool))
    assert shares.mean().item() == pytest.approx(whole)
    assert bias == pytest.approx(11 * (left.mean() - whole))
    assert error == pytest.approx(math.sqrt(11 / 12 * ((left - left.mean()) ** 2).sum()))


def test_pairs_of_one_group_are_left_out():
    scores = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    group = torch.arange(6) // 2
    same = (group[:, None] == group) & ~torch.eye(6, dtype=torch.bool)
    shares = infonce_shares(scores, same)
    row, column = scores[0, [0, 2, 3, 4, 5]], scores[[0, 2, 3, 4, 5], 0]
    expected = scores[0, 0] - 0.5 * (row.logsumexp(0) + column.logsumexp(0)) + math.log(5)
    assert shares[0].item() == pytest.approx(expected.item(), abs=1e-6)
    others = scores[group[:, None] != group]
    assert log_mean_product(scores, same) == pytest.approx((others.logsumexp(0) - math.log(24)).item(), abs=1e-6)
