import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.errors import ConfigError, DataError
from engine.losses import LOSSES, task_loss

REGRESSION = ("MAE", "MSE", "RMSE", "SIMSE", "CCC")


def random_pair(n=17, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator), torch.randn(n, generator=generator)


def test_formulas():
    o, t = random_pair()
    n = len(o)
    expected = {
        "MAE": (o - t).abs().sum() / n,
        "MSE": (o - t).pow(2).sum() / n,
        "RMSE": ((o - t).pow(2).sum() / n).sqrt(),
        "SIMSE": ((o - t).sum() / n) ** 2,
    }
    cov = torch.cov(torch.stack([o, t]), correction=0)
    expected["CCC"] = 1 - 2 * cov[0, 1] / (cov[0, 0] + cov[1, 1] + (o.mean() - t.mean()) ** 2)
    for name, value in expected.items():
        torch.testing.assert_close(task_loss(name)(o, t), value, rtol=1e-5, atol=1e-6)


def test_classification_formulas():
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    classes = torch.arange(9) % 4
    entropy = -logits.log_softmax(1)[torch.arange(9), classes].mean()
    torch.testing.assert_close(task_loss("CE", 4)(logits, classes), entropy)
    torch.testing.assert_close(task_loss("Focal", 4)(logits, classes), (1 - (-entropy).exp()) ** 2 * entropy)
    expected = F.binary_cross_entropy(logits.sigmoid(), F.one_hot(classes, 4).float())
    torch.testing.assert_close(task_loss("BCE", 4)(logits, classes), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    classes = 1 if name in REGRESSION else 3
    o = torch.randn(6, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    t = torch.linspace(-1, 1, 6, dtype=torch.float64) if classes == 1 else torch.arange(6) % 3
    assert torch.autograd.gradcheck(lambda x: task_loss(name, classes)(x, t), o)
    assert isinstance(task_loss(name, classes), nn.Module) and name in repr(task_loss(name, classes))


@pytest.mark.parametrize("name", REGRESSION)
def test_column_and_flat_shapes_agree(name):
    o, t = random_pair()
    loss = task_loss(name)
    for a in (o, o[:, None]):
        for b in (t, t[:, None], t.double()):
            torch.testing.assert_close(loss(a, b), loss(o, t))
    with pytest.raises(DataError, match="17 predictions and 16 labels"):
        loss(o[:, None], t[1:])


@pytest.mark.parametrize("name", ["CE", "Focal", "BCE"])
def test_class_labels_of_any_kind(name):
    logits, classes = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    loss = task_loss(name, 3)
    expected = loss(logits, classes)
    for target in (classes[:, None], classes.float(), classes.float()[:, None]):
        torch.testing.assert_close(loss(logits, target), expected)


def test_binary_cross_entropy():
    logits, target = torch.randn(5), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    expected = F.binary_cross_entropy(logits.sigmoid(), target)
    for output in (logits, logits[:, None]):
        torch.testing.assert_close(task_loss("BCE", 1)(output, target[:, None]), expected)
    pairs = torch.randn(5, 2)
    torch.testing.assert_close(task_loss("BCE", 2)(pairs, F.one_hot(target.long())), task_loss("BCE", 2)(pairs, target))


def test_rmse_at_zero_error():
    o = torch.ones(4, requires_grad=True)
    value = task_loss("RMSE")(o, torch.ones(4))
    value.backward()
    assert value.item() == 0 and o.grad.eq(0).all()


def test_ccc_of_constants():
    for constant in (2.0, 0.3):
        o = torch.full((5,), constant, requires_grad=True)
        value = task_loss("CCC")(o, torch.full((5,), constant))
        value.backward()
        assert value.item() == pytest.approx(1, abs=1e-6) and o.grad.abs().max() < 1e-3
    o = torch.zeros(5, requires_grad=True)  # a constant prediction of varying labels still learns
    task_loss("CCC")(o, torch.arange(5.0)).backward()
    assert o.grad.isfinite().all() and o.grad.abs().sum() > 0


def test_loss_and_task_must_fit():
    for name in REGRESSION:
        with pytest.raises(ConfigError, match="num_class=3"):
            task_loss(name, 3)
        with pytest.raises(ConfigError, match=f"{name} with model.task=classification"):
            task_loss(name, 1, "classification")
        task_loss(name, 3, "regression")
    for name in ("CE", "Focal"):
        with pytest.raises(ConfigError, match="num_class of at least 2"):
            task_loss(name, 1)
    with pytest.raises(ConfigError, match=r"CE with model\.task=regression"):
        task_loss("CE", 2, "regression")
    with pytest.raises(ConfigError, match=r"train\.loss"):
        task_loss("Huber")
    with pytest.raises(ConfigError, match=r"model\.task"):
        task_loss("MAE", 1, "ranking")
    with pytest.raises(ConfigError, match="num_class"):
        task_loss("MAE", 0)


@pytest.mark.parametrize("name", ["CE", "Focal", "BCE"])
def test_bad_labels(name):
    loss = task_loss(name, 3)
    for target in ([0.0, 1.0, 0.5], [0, 1, 3], [-1, 0, 1], [float("nan"), 0.0, 1.0]):
        with pytest.raises(DataError, match="class numbers 0 to 2"):
            loss(torch.randn(3, 3), torch.tensor(target))
    with pytest.raises(DataError, match="2 labels for 3 samples"):
        loss(torch.randn(3, 3), torch.tensor([0, 1]))
    with pytest.raises(DataError, match=r"expected \[batch, 3\]"):
        loss(torch.randn(3, 2), torch.tensor([0, 1, 0]))


@pytest.mark.parametrize("name", LOSSES)
def test_types_and_devices_that_do_not_fit(name):
    classes = 1 if name in REGRESSION else 3
    loss, output = task_loss(name, classes), torch.randn(6, classes)
    labels = torch.arange(6) % 2
    for wrong_output, wrong_labels, match in (
        (output.long(), labels, "output of torch.int64"),
        (output, labels.to(torch.complex64), "labels of torch.complex64"),
        (output, labels.to("meta"), "labels on meta"),
        (output, labels.tolist(), "a list as target"),
        (output.numpy(), labels, "a ndarray as output"),
    ):
        with pytest.raises(DataError, match=match) as caught:
            loss(wrong_output, wrong_labels)
        assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("wrong", [-1.0, 1.5, 2.0, float("nan"), float("inf")])
def test_shares_of_classes_out_of_range(wrong):
    output, target = torch.randn(4, 3), F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    expected = F.binary_cross_entropy_with_logits(output, target)
    torch.testing.assert_close(task_loss("BCE", 3)(output, target), expected)
    target[1, 2] = wrong
    with pytest.raises(DataError, match=f"BCE loss: found label {wrong:g}; expected 0 or 1"):
        task_loss("BCE", 3)(output, target)
