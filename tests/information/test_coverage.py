"""How often the 95 % interval holds the truth, over many seeds of tasks with known information."""

import math

import numpy as np
import pytest

from bench.mi.coverage import cases, coverage, markdown

QUICK = ["gaussian, 1 column", "own-channel-8", "own-cross", "often exactly 0", "own-label-shift, discrete=x"]
SEEDS = 40
LEAST = 34  # of 40: a right interval falls short of this in 1 of 300 cases


def check(records: list[dict]) -> None:
    print("\n" + markdown(records))
    assert [r for r in records if r["inside"] < LEAST * r["seeds"] / SEEDS] == []
    assert sum(r["inside"] for r in records) >= 0.93 * sum(r["seeds"] for r in records)


def test_intervals_of_methods_without_training_cover():
    """700 rows; the widths say that the intervals are not merely wide."""
    records = [coverage(name, range(SEEDS), 700) for name in QUICK]
    check(records)
    assert all(r["width"] < 6.5 * r["spread"] for r in records)


@pytest.mark.slow
def test_intervals_cover():
    check([coverage(name, range(SEEDS), 1000) for name in cases() if "bent" not in name])


def test_the_truth_of_the_cubic_is_the_mean_log_ratio_of_samples():
    """The ratio of each sample from the densities themselves; the standard error of the mean is 0.03."""
    task = cases()["cubic"][0]
    x, y = task.draw(2000, np.random.default_rng(0))
    at, step = np.linspace(-6, 6, 4001, retstep=True)
    weight = np.exp(-0.5 * at**2) / math.sqrt(2 * math.pi) * step
    marginal = np.concatenate([np.exp(-0.5 * (part - at**3) ** 2) @ weight for part in np.array_split(y, 20)])
    ratio = -0.5 * (y - x**3)[:, 0] ** 2 - np.log(marginal)
    assert ratio.mean() == pytest.approx(task.truth, abs=0.09)
