"""Trained estimates against the published plateau levels: separate critic, d = 20, B = 64, I = 2, 4, 6, 8, 10 nats.

The published levels are read off the figure of the SMILE demo (EMA-200 line, last 40 % of each level of 4000 steps),
with a reading error of about .05. Tolerances: InfoNCE .15 and never above log B, SMILE at tau 5 and NWJ .3 (NWJ by its
median, and up to 6 nats: beyond that its spread exceeds any tolerance worth stating).

SMILE at tau 1 plateaus above the published curve here (2.10, 4.24, 6.25, 8.22, 10.30), with Xavier weights as with
PyTorch's own, though the same critic read at tau 5 agrees with it. So tau 1 is held to the published level from below
and to the exact critic's value (`test_mi_oracle`) from above.
"""

import math

import pytest
from torch import Tensor

from tests.truth.gaussian import plateau, staircase
from tests.truth.test_mi_oracle import FIGURES

LEVELS = [2, 4, 6, 8, 10]
PUBLISHED = {
    "infonce": [1.67, 2.90, 3.62, 3.96, 4.09],
    "smile 1": [1.95, 3.96, 5.91, 7.92, 9.84],
    "smile 5": [1.67, 3.70, 5.86, 8.15, 10.51],
    "nwj": [1.41, 2.48, 3.20, 3.75, 4.09],
}
BOUNDS = {
    "infonce": {"bound": "infonce"},
    "smile 1": {"bound": "smile", "smile_tau": 1.0},
    "smile 5": {"bound": "smile", "smile_tau": 5.0},
    "nwj": {"bound": "nwj"},
}


def climb(train: str, read: list[str], levels: list[int], steps: int) -> dict[str, Tensor]:
    return staircase(BOUNDS[train], {name: BOUNDS[name] for name in read}, levels, steps)


def check(values: Tensor, name: str, tolerance: float) -> None:
    assert plateau(values) == pytest.approx(PUBLISHED[name][: len(values)], abs=tolerance)


def test_first_levels_of_infonce():
    """A sixth of the published steps, the published tolerance."""
    values = climb("infonce", ["infonce"], [2, 4], 700)["infonce"]
    check(values, "infonce", 0.15)
    assert values.max() <= math.log(64)


def test_first_levels_of_smile():
    values = climb("smile 5", ["smile 1", "smile 5"], [2, 4], 700)
    check(values["smile 1"], "smile 1", 0.3)
    check(values["smile 5"], "smile 5", 0.3)


def test_first_level_of_nwj():
    """In so few steps NWJ does not arrive at the second level."""
    check(climb("nwj", ["nwj"], [2], 700)["nwj"], "nwj", 0.3)


@pytest.mark.slow
def test_whole_staircase():
    infonce = climb("infonce", ["infonce"], LEVELS, 4000)["infonce"]
    check(infonce, "infonce", 0.15)
    assert infonce.max() <= math.log(64)

    smile = climb("smile 5", ["smile 1", "smile 5"], LEVELS, 4000)
    check(smile["smile 5"], "smile 5", 0.3)
    exact = [FIGURES[level]["smile 1"][0] for level in LEVELS]
    for value, published, highest in zip(plateau(smile["smile 1"]), PUBLISHED["smile 1"], exact, strict=True):
        assert published - 0.3 < value < highest

    nwj = climb("nwj", ["nwj"], LEVELS, 4000)["nwj"]
    medians = nwj[:3, -1600:].median(1).values.tolist()
    assert medians == pytest.approx(PUBLISHED["nwj"][:3], abs=0.3)

    spread = [values[-1, -1600:].std().item() for values in (infonce, smile["smile 5"], nwj)]
    assert spread == sorted(spread)  # at 10 nats
