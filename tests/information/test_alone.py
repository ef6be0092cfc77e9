"""Estimates do not depend on the settings of torch that the caller has made."""

import contextlib

import numpy as np
import pytest
import torch

from engine import estimate_cmi, estimate_mi
from engine.information import CMIEstimator, MIEstimator

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(200, 2))
Y = X + GENERATOR.normal(size=(200, 2))
QUICK = {"steps": 10, "hidden": 8}


@contextlib.contextmanager
def default_type(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "settings",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: default_type(torch.float64),
        lambda: torch.device("meta"),
    ],
    ids=["no_grad", "inference_mode", "autocast", "float64", "meta"],
)
def test_the_settings_of_the_caller_change_nothing(settings):
    """Under autocast the value was another one; under the others it was a traceback."""
    expected = (
        estimate_mi(X, Y, **QUICK),
        estimate_cmi(X[:, 0], Y[:, 0], X[:, 1], **QUICK),
        estimate_mi(X[:, 0], Y[:, 0]),
    )
    with settings():
        dtype, found = (
            torch.get_default_dtype(),
            (
                estimate_mi(X, Y, **QUICK),
                estimate_cmi(X[:, 0], Y[:, 0], X[:, 1], **QUICK),
                estimate_mi(X[:, 0], Y[:, 0]),
            ),
        )
        assert torch.get_default_dtype() == dtype
        assert torch.get_default_device().type == ("meta" if settings().__class__ is torch.device else "cpu")
    assert found == expected


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        x, y = torch.tensor(X), torch.tensor(Y)
        found = estimate_mi(x, y, **QUICK)
    assert found == estimate_mi(x, y, **QUICK) == estimate_mi(X, Y, **QUICK)


@pytest.mark.parametrize("kind", [MIEstimator, CMIEstimator])
def test_what_an_estimator_has_not(kind):
    with pytest.raises(AttributeError, match="call fit first"):
        _ = kind().estimate_
    with pytest.raises(AttributeError, match="no score"):
        kind().score(X, Y)
    assert not hasattr(kind(), "score")
    assert not hasattr(kind(), "result_")
