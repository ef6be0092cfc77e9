"""Losses and gradients that are not finite: the run stops and says where, or leaves out the step and counts it."""

import json
import math

import pytest
import torch
from torch import nn

from engine import trainer
from engine.config import ObjectiveConfig
from engine.errors import ConfigError, EstimatorError, NonFiniteError
from engine.model import conditional_club, estimators
from engine.objective import MI, Objective
from engine.step import TwoStageStep, finite
from engine.step.finite import MOST_IN_A_ROW
from engine.training import parts
from tests.small_runs import changed, history

SAMPLES, BATCH = 20, 4


class Plain(nn.Module):
    """A model with running statistics, without dropout. The inputs 1e9 break its gradient and nothing else."""

    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x):
        hidden = self.one(self.norm(x).clamp(-9, 9))
        if hidden.requires_grad:
            broken = torch.where((x == 1e9).any(), math.inf, 1.0)
            hidden.register_hook(lambda gradient: gradient * broken)
        return self.two(hidden), {"H": hidden}


def make(with_objective=False, **options):
    torch.manual_seed(3)
    model, objective, second = Plain(), None, None
    if with_objective:
        settings = ObjectiveConfig(bound="mine", hidden=6, embed=4)
        objective = Objective([0.1 * MI("H", "C")], {"H": 4, "C": 1}, settings=settings)
        second = torch.optim.Adam(objective.parameters(), 0.01, fused=True)
    optimizer = torch.optim.Adam(model.parameters(), 0.01, fused=True)
    return TwoStageStep(model, objective, nn.functional.mse_loss, optimizer, second, average=0.9, **options)


def batches(wrong=None, at=2):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(SAMPLES, 3, generator=generator), torch.randn(SAMPLES, 1, generator=generator)
    if wrong == "loss":
        y[at * BATCH + 1] = math.inf
    elif wrong is not None:
        x[at * BATCH + 1, 0] = {"gradient": 1e9, "input": math.nan}[wrong]
    return [(x[rows], y[rows], rows) for rows in torch.arange(SAMPLES).split(BATCH)]


def state(step):
    found = [*step.model.state_dict().values(), *step.average.values.values()]
    found += [v for s in step.main_optimizer.state.values() for v in s.values()]
    if step.objective is not None:
        found += [*step.objective.state_dict().values()]
        found += [v for s in step.estimator_optimizer.state.values() for v in s.values()]
    return [value.clone() for value in found]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("loss", r"task loss: found a loss of inf in batch 2 of stage2 \(4 samples, rows 8, 9, 10, 11\)"),
        ("input", r"task loss: found a loss of nan in batch 2"),
        (
            "gradient",
            r"gradient of norm\.weight and 3 more parameters: found values that are not finite in batch 2 of st",
        ),
    ],
)
def test_a_run_stops_before_the_update(wrong, said):
    step = make()
    whole = make()
    whole.train_epoch(batches()[:2], SAMPLES, None, batch_size=BATCH)
    with pytest.raises(NonFiniteError, match=said):
        step.train_epoch(batches(wrong), SAMPLES, None, batch_size=BATCH)
    for a, b in zip(step.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert step.average.updates == 2


@pytest.mark.parametrize("graphs", ["off", "emulate"])
@pytest.mark.parametrize("wrong", ["loss", "gradient", "input"])
def test_a_step_that_is_left_out_changes_nothing(wrong, graphs):
    """The epoch ends as one without that batch. A static step leaves it out on the device."""
    step, without = make(non_finite="skip", graphs=graphs), make(graphs=graphs)
    if graphs == "emulate":  # whose warm-up the device still counts until it is read
        step.average.decay = without.average.decay = 1e-9
    result, bank = step.train_epoch(batches(wrong), SAMPLES, None, batch_size=BATCH)
    good = [batch for i, batch in enumerate(batches()) if i != 2]
    expected, _ = without.train_epoch(good, SAMPLES, None, batch_size=BATCH)
    assert same(state(step), state(without))
    assert (result.skipped, expected.skipped) == (1, 0)
    assert result.loss == expected.loss
    assert step.average.updates == without.average.updates == 4
    assert not bank.filled[8:12].any() and bank.filled.sum() == 16


@pytest.mark.parametrize("graphs", ["off", "emulate"])
@pytest.mark.parametrize("features", ["fresh", "cached", "bank"])
def test_the_estimators_leave_out_a_step_too(features, graphs):
    """A sample whose features are NaN reaches no bank, and MINE's average stays finite."""
    step = make(with_objective=True, non_finite="skip", graphs=graphs)
    _, bank = step.train_epoch(batches("input"), SAMPLES, None, batch_size=BATCH)
    result, _ = step.train_epoch(
        batches("input"), SAMPLES, bank, batch_size=BATCH, stage1_features=features, stage1_n=2
    )
    assert result.skipped == (1 if features != "fresh" else 3)
    assert len(result.features["H"]) == 16  # normalisation over the batch breaks its other rows, too
    assert all(bool(value.isfinite().all()) for value in state(step))
    assert math.isfinite(result.loss) and math.isfinite(result.estimators["I(H;C)"])


def test_mines_average_does_not_see_a_step_that_is_left_out():
    step = make(with_objective=True, non_finite="skip")
    good = [{"H": torch.randn(6, 4), "C": torch.randn(6, 1)} for _ in range(3)]
    for features in good[:2]:
        step.stage1(features, None)
    before = state(step)
    broken = {"H": torch.full((6, 4), 1e38), "C": torch.full((6, 1), 1e38)}
    assert step.finite.guarded("stage1", 0, None, lambda: step.stage1(broken, None)) is None
    assert same(state(step), before)
    assert step.finite.guarded("stage1", 1, None, lambda: step.stage1(good[2], None)) is not None
    assert not same(state(step), before)


def test_an_estimate_that_is_not_finite_names_its_batch():
    step = make(with_objective=True)
    _, bank = step.train_epoch(batches(), SAMPLES, None, batch_size=BATCH)
    bank.rows["H"][5] = math.nan
    step.finite.ids = [f"clip{row}" for row in range(SAMPLES)]
    with pytest.raises(EstimatorError, match=r"non-finite scores in batch \d of stage1 \(4 samples, ids .*clip5"):
        step.train_epoch(batches(), SAMPLES, bank, batch_size=BATCH, stage1_features="bank")


def test_many_in_a_row_stop_the_run():
    step = make(non_finite="skip")
    wrong = [batch for _ in range(MOST_IN_A_ROW // 5 + 1) for batch in batches("loss", 0)[:1] * 5]
    with pytest.raises(NonFiniteError, match=rf"task loss: found {MOST_IN_A_ROW} steps in a row that were left out"):
        step.train_epoch([*batches(), *wrong], SAMPLES, None, batch_size=BATCH)
    step = make(non_finite="skip", graphs="emulate")
    with pytest.raises(NonFiniteError, match=rf"found {MOST_IN_A_ROW} steps in a row that were left out"):
        step.train_epoch([*batches(), *batches("loss", 0)[:1] * 20], SAMPLES, None, batch_size=BATCH)
    step = make(non_finite="skip")
    with pytest.raises(NonFiniteError, match=r"no step of this epoch that could be made \(2 left out\)"):
        step.train_epoch(batches("loss", 0)[:1] * 2, SAMPLES, None, batch_size=BATCH)


def test_a_static_epoch_says_it_at_its_end():
    step = make(graphs="emulate")
    with pytest.raises(NonFiniteError, match="task loss: found a value that is not finite in batch 2 of stage2"):
        step.train_epoch(batches("loss"), SAMPLES, None, batch_size=BATCH)
    assert not math.isfinite(step.model.two.weight.sum())  # as on a GPU, the steps until then were made
    step = make(graphs="emulate")
    with pytest.raises(NonFiniteError, match="loss: found a value that is not finite in batch 3 of stage2"):
        step.train_epoch(batches("gradient"), SAMPLES, None, batch_size=BATCH)
    sgd = torch.optim.SGD(step.model.parameters(), 0.1, fused=True)
    with pytest.raises(ConfigError, match="non_finite='skip' and an optimiser that the host has to tell"):
        TwoStageStep(step.model, None, nn.functional.mse_loss, sgd, graphs="emulate", non_finite="skip")
    with pytest.raises(ConfigError, match="non_finite='no'; expected one of stop, skip"):
        make(non_finite="no")


@pytest.fixture
def unread(monkeypatch):
    """As on a GPU, whose values the host does not read."""
    for module in (finite, estimators, conditional_club):
        monkeypatch.setattr(module, "readable", lambda tensor: False)


class Numbered(list):
    """Batches that tell their rows."""

    def rows(self, number):
        return self[number][2]


def test_an_eager_pass_says_at_its_end_what_the_host_did_not_look_at(unread):
    step = make()
    said = r"task loss: found a value that is not finite in batch 2 of stage2 \(4 samples, rows 8, 9, 10, 11\)"
    with pytest.raises(NonFiniteError, match=said):
        step.train_epoch(Numbered(batches("loss")), SAMPLES, None, batch_size=BATCH)
    step = make(with_objective=True)
    _, bank = step.train_epoch(batches(), SAMPLES, None, batch_size=BATCH)
    bank.rows["H"][5] = math.nan
    said = r"objective term I\(H;C\): found a value that is not finite in batch \d of stage1"
    with pytest.raises(NonFiniteError, match=said):
        step.train_epoch(batches(), SAMPLES, bank, batch_size=BATCH, stage1_features="bank")


def test_a_loss_scaler_leaves_out_what_overflows_and_nothing_is_noted(unread):
    """Its steps overflow until it has found a scale. That is no reason to stop."""
    step = make(autocast=torch.float16)
    step.train_epoch(batches("loss"), SAMPLES, None, batch_size=BATCH)
    assert all(p.isfinite().all() for p in step.model.parameters())


def test_an_eager_pass_leaves_out_on_the_device_what_the_host_did_not_look_at(unread):
    step = make(non_finite="skip")
    result, _ = step.train_epoch(Numbered(batches("loss")), SAMPLES, None, batch_size=BATCH)
    assert result.skipped == 1 and math.isfinite(result.loss)
    assert all(bool(value.isfinite().all()) for value in state(step))


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_with_a_loss_scaler_the_host_looks_at_no_gradients(policy, request):
    """Nor is a step left out on the device: the scaler does that."""
    one = torch.zeros(1)
    scaled, plain = (make(autocast=dtype, non_finite=policy).finite for dtype in (torch.float16, None))
    assert plain.host_looks(one) and not scaled.host_looks(one)
    assert not plain.on_device(one) and not scaled.on_device(one)
    request.getfixturevalue("unread")
    assert not plain.host_looks(one) and plain.on_device(one) == (policy == "skip") and not scaled.on_device(one)


def test_clipped_gradients_may_be_infinite():
    """An infinite gradient that clip_value makes finite trains, as it always did."""
    step = make(clip_value=1.0)
    step.model.two.weight.register_hook(lambda gradient: gradient + math.inf)
    step.train_epoch(batches(), SAMPLES, None, batch_size=BATCH)
    assert all(p.isfinite().all() for p in step.model.parameters())


class Breaks:
    """A task loss that is NaN at some calls in training."""

    def __init__(self, at):
        self.at, self.calls = at, 0

    def __call__(self, prediction, target):
        loss = (prediction - target).abs().mean()
        if prediction.requires_grad:
            self.calls += 1
            if self.calls in self.at:
                return loss * math.nan
        return loss


@pytest.fixture
def breaking(monkeypatch):
    def break_at(*calls):
        make_step = parts._step

        def broken(*arguments):
            step = make_step(*arguments)
            step.task_loss = Breaks(calls)
            return step

        monkeypatch.setattr(parts, "_step", broken)

    return break_at


def test_a_run_counts_what_it_left_out(config, tmp_path, breaking):
    breaking(2, 7, 8)
    with pytest.warns(UserWarning, match="epoch 1: 2 steps left out, whose loss or gradient was not finite"):
        trainer.train(changed(config, train={"non_finite": "skip"}), tmp_path / "run")
    assert [record["skipped_steps"] for record in history(tmp_path / "run")] == [1, 2, 0]
    assert json.loads((tmp_path / "run/metrics.json").read_text())["skipped_steps"] == 3


def test_a_run_that_stopped_goes_on_by_the_other_policy(config, tmp_path, breaking):
    """Also within its first epoch, where there is a checkpoint."""
    settings, out = changed(config, epochs=2, train={"checkpoint_steps": 1}), tmp_path / "run"
    breaking(3)
    said = (
        r"task loss: found a loss of nan in batch 2 of stage2 \(6 samples, ids .*, \.\.\.\); .* can go on in epoch 0, "
        r"after 2 batches that way: with --resume and another .*train\.non_finite"
    )
    with pytest.raises(NonFiniteError, match=said):
        trainer.train(settings, out)
    breaking(1)  # the same batch, the first of those that are left
    with pytest.warns(UserWarning, match="epoch 0: 1 steps left out"):
        trainer.train(changed(settings, train={"non_finite": "skip"}), out, resume=True)
    assert [record["skipped_steps"] for record in history(out)] == [1, 0]
