"""The published conditional estimator against the recordings: value, loss and all gradients."""

import pytest
import torch

from engine.mimrl.published import PublishedCMIEstimator
from tests.golden.common import assert_grad, assert_values, cases, load, part


def recorded_estimate(name: str, info: dict):
    recorded = load(name)
    model = PublishedCMIEstimator(info["embed_dim"], info["hidden_dim"], last_activate=info["last_activate"])
    parameters = {key.replace("classifier.mlp.", "classifier."): v for key, v in part(recorded, "param.").items()}
    model.load_state_dict(parameters)
    joint = tuple(recorded[key].requires_grad_() for key in ("x", "y", "z"))
    product = tuple(recorded[f"prod_{key}"] for key in ("x", "y", "z"))
    return recorded, model, joint, model(joint, product)


@cases("cmi_")
def test_values(name, info):
    recorded, _, joint, estimate = recorded_estimate(name, info)
    assert len(recorded["prod_x"]) == len(joint[0]) // info["k_neighbor"] * info["k_neighbor"]
    assert_values(estimate.value, recorded["cmi"], "cmi")
    assert_values(estimate.surrogate, recorded["cmi"], "cmi, surrogate")
    assert_values(estimate.loss, recorded["bce_loss"], "bce_loss")


@cases("cmi_")
@pytest.mark.parametrize("of", ["cmi", "loss"])
def test_gradients(name, info, of):
    recorded, model, joint, estimate = recorded_estimate(name, info)
    (estimate.surrogate if of == "cmi" else estimate.loss).backward()
    expected = part(recorded, f"grad_{of}.")
    actual = {key.replace("classifier.", "classifier.mlp."): p.grad for key, p in model.named_parameters()}
    actual |= {key: value.grad for key, value in zip("xyz", joint, strict=True)}
    assert expected and set(expected) <= set(actual)
    for key, gradient in expected.items():
        assert_grad(actual[key], gradient, key)
    # joint rows beyond the number of product rows take no part
    cut = len(recorded["prod_x"])
    assert all(torch.equal(value.grad[cut:], torch.zeros_like(value.grad[cut:])) for value in joint)
