"""Metrics and task losses against the reference's recorded values (rtol 1e-5)."""

import pytest
import torch

from engine.losses import task_loss
from engine.metrics import avec2019_metrics, reference_names, regression_metrics
from tests.golden.common import assert_values, cases, load

RTOL = 1e-5


@cases("metrics")
def test_metrics(name, info):
    tensors = load(name)
    prediction, target = tensors["predictions"].numpy(), tensors["targets"].numpy()
    ours = {**regression_metrics(prediction, target), **avec2019_metrics(prediction, target)}
    ours = {reference_names[key]: value for key, value in ours.items() if key in reference_names}
    assert info and set(info) <= set(ours)
    assert {key: ours[key] for key in info} == pytest.approx(info, rel=RTOL, abs=0)


@cases("losses")
def test_losses(name, info):
    tensors = load(name)
    recorded = sorted(key.removesuffix(".value") for key in tensors if key.endswith(".value"))
    names = {"mae": "MAE", "mse": "MSE", "rmse": "RMSE", "simse": "SIMSE", "ccc": "CCC", "ce": "CE", "focal": "Focal"}
    assert recorded and set(recorded) <= set(names)
    for loss in recorded:
        classifies = loss in ("ce", "focal")
        output = tensors["logits" if classifies else "output"].clone().requires_grad_()
        target = tensors["classes" if classifies else "target"]
        value = task_loss(names[loss], output.shape[-1] if classifies else 1)(output, target)
        assert_values(value, tensors[f"{loss}.value"], f"{loss} value", rtol=RTOL, atol=1e-7)
        (grad,) = torch.autograd.grad(value, output)
        assert_values(grad, tensors[f"{loss}.grad"], f"{loss} grad", rtol=RTOL, atol=1e-8)
