"""CMIEstimator: one pass for loss and value, gradients to both kinds of rows, stated rules for degenerate batches."""

import math

import pytest
import torch

from engine.errors import EstimatorError
from engine.kernels.cmi import LOGIT_LIMIT
from engine.mimrl.published import PublishedCMIEstimator
from engine.model.cmi import CMIEstimator


def rows(n: int, widths=(8, 8, 8), seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, width, generator=generator) for width in widths)


KINDS = (CMIEstimator, PublishedCMIEstimator)


def estimator(kind: type[CMIEstimator] = CMIEstimator, **options) -> CMIEstimator:
    torch.manual_seed(0)
    return kind(**{"dim": 8, "hidden": 16, **options})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["ldr", "dv", "nwj"])
def test_estimate(kind, which):
    estimate = estimator(kind, estimator=which)(rows(6), rows(4, seed=1))
    assert estimate.value.shape == estimate.surrogate.shape == estimate.loss.shape == ()
    assert not estimate.value.requires_grad and torch.equal(estimate.value, estimate.surrogate)
    assert set(estimate.details) == {"ldr", "dv", "nwj"}
    assert not any(v.requires_grad for v in estimate.details.values())
    if kind is CMIEstimator:
        assert torch.equal(estimate.value, estimate.details[which])


def test_classifier_runs_once_over_all_rows(monkeypatch):
    import engine.model.cmi as module

    calls = []
    run = module.run_mlp
    monkeypatch.setattr(module, "run_mlp", lambda tower, x: calls.append(len(x)) or run(tower, x))
    estimator()(rows(6), rows(4, seed=1))
    assert calls == [10]


@pytest.mark.parametrize("which", ["ldr", "dv", "nwj"])
def test_gradients_reach_joint_and_product_rows(which):
    joint, product = rows(6), rows(4, seed=1)
    for part in (*joint, *product):
        part.requires_grad_()
    model = estimator(estimator=which)
    model(joint, product).surrogate.backward()
    assert all(part.grad.abs().sum() > 0 for part in joint)
    reached = [part.grad is not None and bool(part.grad.abs().sum() > 0) for part in product]
    assert reached == [which != "ldr"] * 3  # LDR is a mean over joint rows alone
    assert all(p.grad is not None for p in model.parameters())


def test_names_and_start():
    model = estimator()
    assert list(model.state_dict()) == [f"classifier.{i}.{p}" for i in (0, 2, 4, 6) for p in ("weight", "bias")]
    assert model.classifier[0].weight.shape == (16, 24) and model.classifier[6].weight.shape == (1, 16)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_narrow_features_are_repeated_to_dim(width):
    joint, product = rows(6, (width, 8, 1)), rows(4, (width, 8, 1), seed=1)
    model = estimator()

    def tiled(parts):
        return tuple(part[:, torch.arange(8) % part.shape[1]] for part in parts)

    assert torch.equal(model(joint, product).value, model(tiled(joint), tiled(product)).value)


def test_values_are_clamped_and_losses_are_not():
    model = estimator()
    with torch.no_grad():
        model.classifier[6].bias += 1000
    estimate = model(rows(6), rows(4, seed=1))
    assert estimate.value == pytest.approx(LOGIT_LIMIT)
    assert 300 < estimate.loss.item() < 500  # four of ten rows are wrong by some 1000 nats
    estimate.loss.backward()
    assert model.classifier[6].bias.grad.item() == pytest.approx(0.4)


def test_untrained_constant_classifier_reads_nothing():
    """All logits equal: 0 nats by the corrected estimator, 1 by the published one."""
    for kind, expected in zip(KINDS, (0.0, 1.0), strict=True):
        model = estimator(kind)
        for p in model.parameters():
            torch.nn.init.zeros_(p)
        estimate = model(rows(6), rows(6, seed=1))
        assert estimate.value.item() == expected
        assert estimate.loss.item() == pytest.approx(math.log(2))


def test_autocast_keeps_logits_in_fp32():
    model = estimator()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        estimate = model(rows(6), rows(4, seed=1))
    assert estimate.value.dtype == estimate.loss.dtype == torch.float32
    assert estimate.value.item() == pytest.approx(model(rows(6), rows(4, seed=1)).value.item(), abs=0.05)


# -- degenerate batches -----------------------------------------------------------------------------------------------


def spoiled(n: int, value: float) -> tuple[torch.Tensor, ...]:
    parts = rows(n)
    parts[1][0, 0] = value
    return parts


CASES = {
    "batch of one": (rows(1), rows(1, seed=1), "a batch of 1"),
    "no product rows": (rows(3), rows(0), "no product rows for a batch of 3"),
    "NaN among joint rows": (spoiled(4, math.nan), rows(4, seed=1), "non-finite logits"),
    "infinity among product rows": (rows(4, seed=1), spoiled(4, math.inf), "non-finite logits"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_degenerate_batches_raise_one_line(case, kind):
    joint, product, found = CASES[case]
    with pytest.raises(EstimatorError, match=found) as caught:
        estimator(kind)(joint, product)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_degenerate_batches_are_skipped_on_request(case, kind):
    joint, product, _ = CASES[case]
    joint = tuple(part.clone().requires_grad_() for part in joint)
    model = estimator(kind, on_degenerate="skip")
    estimate = model(joint, product)
    assert estimate.details["skipped"] == 1
    assert estimate.value == estimate.surrogate == estimate.loss == 0
    (estimate.surrogate + estimate.loss).backward()
    assert all((part.grad == 0).all() for part in joint)
    assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize(
    "joint, product",
    [
        (rows(4, (8, 9, 8)), rows(4)),
        (rows(4), rows(4, (8, 8, 0))),
        ((*rows(4)[:2], rows(5)[2]), rows(4)),
        (rows(4)[:2], rows(4)),
        ((*rows(4)[:2], torch.randn(4)), rows(4)),
    ],
)
def test_shapes_that_do_not_fit(joint, product):
    with pytest.raises(EstimatorError, match="rows"):
        estimator()(joint, product)


@pytest.mark.parametrize("option", ["estimator", "on_degenerate"])
def test_unknown_option(option):
    with pytest.raises(EstimatorError, match=f"{option}.*'other'"):
        CMIEstimator(**{option: "other"})


def test_the_former_option_names_the_class_to_use():
    with pytest.raises(EstimatorError, match="PublishedCMIEstimator") as caught:
        CMIEstimator(compat="mimrl")
    assert "\n" not in str(caught.value)
