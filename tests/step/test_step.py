"""The two-stage step on a foreign model: who learns in which stage, banks, the three kinds of stage-1 features."""

import math

import pytest
import torch
from torch import nn

from engine.config import ObjectiveConfig
from engine.errors import ConfigError
from engine.objective import CMI, MI, Objective
from engine.step import TwoStageStep
from engine.step.bank import FeatureBank
from engine.step.passes import passes_of_epoch

N, BATCH = 40, 10


class TwoFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.x, self.y, self.dropout = nn.Linear(6, 4), nn.Linear(6, 4), nn.Dropout(0.5)
        self.head = nn.Linear(8, 1)
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        x, y = self.dropout(self.x(inputs)), self.y(inputs)
        return self.head(torch.cat([x, y], 1)), {"X": x, "Y": y}


def make(seed: int = 0, **options) -> TwoStageStep:
    torch.manual_seed(seed)
    model, fused = TwoFeatures(), options.pop("fused", None)
    settings = ObjectiveConfig(hidden=16, embed=8, compat="none", bound=options.pop("bound", "infonce"))
    objective = Objective(
        [0.1 * MI("X", "Y"), -0.1 * CMI("X", "C", given="Y")], {"X": 4, "Y": 4, "C": 1}, settings=settings
    )
    return TwoStageStep(
        model, objective, nn.functional.l1_loss, torch.optim.SGD(model.parameters(), 0.05, fused=fused),
        torch.optim.SGD(objective.parameters(), 0.05, fused=fused), **options,
    )  # fmt: skip


def batches(seed: int = 5, n: int = N, size: int = BATCH) -> list:
    generator = torch.Generator().manual_seed(seed)
    x, index = torch.randn(n, 6, generator=generator), torch.arange(n)
    y = x.sum(1, keepdim=True)
    return [(x[i], y[i], i) for i in index.split(size)]


def snapshot(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def moved(before: list[torch.Tensor], module: nn.Module) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_stage_1_moves_only_the_estimators():
    step = make()
    bank = step.collect(batches(), N)
    model, objective = snapshot(step.model), snapshot(step.objective)
    _, features = step.forward(*batches()[0][:2])
    step.stage1(features, step.draw_products(bank.tensors(), BATCH))
    assert not moved(model, step.model)
    assert moved(objective, step.objective)
    assert all(p.grad is None for p in step.model.parameters())


def test_stage_2_moves_only_the_model_and_computes_no_estimator_gradient():
    step = make()
    bank = step.collect(batches(), N)
    model, objective = snapshot(step.model), snapshot(step.objective)
    inputs, target, _ = batches()[0]
    step.stage2(inputs, target, step.draw_products(bank.tensors(), BATCH))
    assert moved(model, step.model)
    assert not moved(objective, step.objective)
    assert all(p.grad is None and p.requires_grad for p in step.objective.parameters())


def test_information_terms_change_stage_2():
    ends = []
    for information in (True, False):
        step = make()
        bank = step.collect(batches(), N)
        inputs, target, _ = batches()[0]
        torch.manual_seed(1)
        step.stage2(inputs, target, step.draw_products(bank.tensors(), BATCH), information=information)
        ends.append(snapshot(step.model))
    assert any(not torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_stage_2_leaves_mines_average_alone():
    step = make(bound="mine")
    bank = step.collect(batches(), N)
    inputs, target, _ = batches()[0]
    _, features = step.forward(inputs, target)
    step.stage1(features, step.draw_products(bank.tensors(), BATCH))
    before = {k: v.clone() for k, v in step.objective.named_buffers()}
    assert before
    step.stage2(inputs, target, step.draw_products(bank.tensors(), BATCH))
    assert all(torch.equal(v, before[k]) for k, v in step.objective.named_buffers())


def test_first_epoch_has_no_information_terms_and_fills_the_bank():
    step = make()
    result, bank = step.train_epoch(batches(), N, None, batch_size=BATCH)
    assert result.information == {} and result.estimators == {}
    assert set(bank.tensors()) == {"X", "Y", "C"}
    assert all(len(v) == N for v in bank.tensors().values())


@pytest.mark.parametrize("kind, forwards", [("fresh", 3 * 4), ("cached", 2 * 4), ("bank", 4)])
def test_how_often_the_model_runs(kind, forwards):
    step = make()
    _, bank = step.train_epoch(batches(), N, None, batch_size=BATCH)
    step.model.calls = 0
    result, _ = step.train_epoch(batches(), N, bank, batch_size=BATCH, stage1_n=2, stage1_features=kind)
    assert step.model.calls == forwards
    assert set(result.information) == {"I(X;Y)", "I(X;C|Y)"} and set(result.estimators) == set(result.information)


@pytest.mark.parametrize("graphs", ["off", "emulate"])
@pytest.mark.parametrize("kind", ["fresh", "cached", "bank"])
def test_a_training_epoch_tells_what_stage_1_saw(kind, graphs):
    """Features of one state of the model, that at the epoch's beginning; of "bank" those that were given."""
    step = make(graphs=graphs, fused=True)
    step.model.dropout.p = 0.0
    first, bank = step.train_epoch(batches(), N, None, batch_size=BATCH)
    expected = bank.tensors() if kind == "bank" else step.collect(batches(), N).tensors()
    result, following = step.train_epoch(batches(), N, bank, batch_size=BATCH, stage1_n=2, stage1_features=kind)
    assert first.features == {}
    assert {k: v.shape for k, v in result.features.items()} == {"X": (N, 4), "Y": (N, 4), "C": (N, 1)}
    for name, value in expected.items():
        torch.testing.assert_close(result.features[name], value)
    assert not torch.allclose(result.features["X"], following.tensors()["X"])


def test_stages_are_announced():
    step, seen = make(), []
    _, bank = step.train_epoch(batches(), N, None, batch_size=BATCH)
    step.train_epoch(
        batches(), N, bank, batch_size=BATCH, stage1_n=1, on_batch=lambda stage, number: seen.append((stage, number))
    )
    assert seen == [(stage, i) for stage in ("collect", "stage1", "stage2") for i in range(4)]


def test_a_last_batch_too_small_for_the_terms_trains_on_the_task_alone():
    step = make()
    data = batches(n=N + 1)
    assert len(data[-1][0]) == 1
    for kind in ("fresh", "cached"):
        _, bank = step.train_epoch(data, N + 1, None, batch_size=BATCH)
        result, bank = step.train_epoch(data, N + 1, bank, batch_size=BATCH, stage1_features=kind)
        assert math.isfinite(result.loss)
        assert len(bank.tensors()["X"]) == N + 1
        assert step.evaluate(data, bank).prediction.shape == (N + 1, 1)


def test_evaluation_keeps_order_and_learns_nothing():
    step = make()
    _, bank = step.train_epoch(batches(), N, None, batch_size=BATCH)
    model = snapshot(step.model)
    result = step.evaluate(batches(), bank)
    assert torch.equal(result.target, torch.cat([b[1] for b in batches()]))
    step.model.eval()
    with torch.no_grad():
        expected = torch.cat([step.model(b[0])[0] for b in batches()])
    torch.testing.assert_close(result.prediction, expected)
    assert set(result.information) == {"I(X;Y)", "I(X;C|Y)"}
    assert not moved(model, step.model)
    assert result.features["X"].shape == (N, 4)


def test_clipping_by_value_and_by_norm():
    for options, limit in (({"clip_value": 1e-3}, None), ({"clip_norm": 1e-3}, 1e-3)):
        step = make(**options)
        inputs, target, _ = batches()[0]
        step.stage2(inputs, target, None, information=False)
        gradient = torch.cat([p.grad.flatten() for p in step.model.parameters()])
        if limit is None:
            assert gradient.abs().max() <= 1e-3 and gradient.abs().max() > 0
        else:
            assert gradient.norm() == pytest.approx(limit, rel=1e-3)


def test_same_seed_same_weights():
    ends = []
    for _ in range(2):
        step, bank = make(seed=3), None
        for _ in range(3):
            _, bank = step.train_epoch(batches(), N, bank, batch_size=BATCH)
        ends.append(snapshot(step.model) + snapshot(step.objective))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_bank_keeps_rows_by_index():
    bank = FeatureBank(5)
    bank.store(torch.tensor([3, 0]), {"X": torch.tensor([[3.0], [0.5]], requires_grad=True)})
    assert torch.equal(bank.tensors()["X"], torch.tensor([[0.5], [3.0]]))
    assert not bank.tensors()["X"].requires_grad
    restored = FeatureBank(5)
    restored.load_state_dict(bank.state_dict())
    assert torch.equal(restored.tensors()["X"], bank.tensors()["X"])


def test_product_rows_are_drawn_for_the_batches_of_every_pass():
    """Stage 1 takes the samples that the bank holds, or in fresh passes all of them, as stage 2 does."""
    bank, loader = FeatureBank(22), [None] * 6
    bank.store(torch.arange(10), {"X": torch.zeros(10, 1)})
    whole, stored = [4, 4, 4, 4, 4, 2], [4, 4, 2]
    assert passes_of_epoch(loader, 22, bank, 4, 2, fresh=False) == [stored, stored, whole]
    assert passes_of_epoch(loader, 22, bank, 4, 1, fresh=True) == [whole, whole]
    assert passes_of_epoch([None] * 5, 20, bank, 4, 0, fresh=True) == [[4] * 5]
    assert passes_of_epoch(iter(loader), 22, bank, 4, 1, fresh=False) == [stored, None]


def test_a_copied_bank_has_memory_of_its_own():
    bank = FeatureBank(3)
    bank.store(torch.tensor([2]), {"X": torch.tensor([[3.0]])})
    copied = bank.copy()
    copied.store(torch.tensor([0, 2]), {"X": torch.tensor([[1.0], [4.0]])})
    assert bank.tensors()["X"].tolist() == [[3.0]] and copied.tensors()["X"].tolist() == [[1.0], [4.0]]
    copied.clear()
    assert copied.tensors()["X"].tolist() == []
    copied.store(torch.tensor([1]), {"X": torch.tensor([[7.0]])})
    assert copied.tensors()["X"].tolist() == [[7.0]]


def test_a_bank_forgets_samples_that_are_not_kept():
    bank = FeatureBank(3)
    bank.store(torch.tensor([0, 1]), {"X": torch.tensor([[1.0], [2.0]])})
    bank.store(torch.tensor([1, 2]), {"X": torch.tensor([[math.nan], [5.0]])}, keep=torch.tensor([False, True]))
    assert bank.tensors()["X"].tolist() == [[1.0], [5.0]] and bank.rows["X"].tolist() == [[1.0], [0.0], [5.0]]


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.zeros(3, 1)], ids=["a number", "another batch"])
def test_a_bank_takes_a_row_per_sample(value):
    with pytest.raises(ConfigError, match=r"feature 'X': found shape .* in a batch of 2; expected \[2, \.\.\.\]"):
        FeatureBank(5).store(torch.tensor([3, 0]), {"X": value})


def test_averaged_weights_are_the_moving_average_and_leave_the_model_as_it_was():
    step = make(average=0.9)
    follow = [p.detach().clone() for p in step.model.parameters()]
    for number, (inputs, target, _) in enumerate(batches()):
        step.stage2(inputs, target, None, information=False)
        rate = 1 - min(0.9, (1 + number) / (10 + number))
        follow = [torch.lerp(a, p.detach(), rate) for a, p in zip(follow, step.model.parameters(), strict=True)]
    own = snapshot(step.model)
    with step.averaged():
        for a, p in zip(follow, step.model.parameters(), strict=True):
            torch.testing.assert_close(a, p.detach())
        assert moved(own, step.model)
    assert not moved(own, step.model)


@pytest.mark.parametrize("graphs", ["off", "emulate"])
def test_a_step_without_optimisers_evaluates_as_one_with_them(graphs):
    trained = make()
    bank = trained.collect(batches(), N)
    alone = TwoStageStep(trained.model, trained.objective, nn.functional.l1_loss, graphs=graphs)
    trained.generator.manual_seed(0)  # so that both draw the same product rows
    result, expected = alone.evaluate(batches(), bank), trained.evaluate(batches(), bank)
    assert (result.loss, result.information) == (expected.loss, expected.information)
    assert len(result.information) == 2


@pytest.mark.parametrize("graphs", ["off", "emulate"])
def test_training_without_an_optimiser_is_a_one_line_error(graphs):
    step = make()
    bank = step.collect(batches(), N)
    step.main_optimizer = None
    alone = TwoStageStep(step.model, step.objective, nn.functional.l1_loss, graphs=graphs)
    with pytest.raises(ConfigError, match=r"no main_optimizer.*Pass main_optimizer="):
        alone.train_epoch(batches(), N, None, batch_size=BATCH)
    alone.main_optimizer = torch.optim.SGD(alone.model.parameters(), 0.1, fused=True)
    with pytest.raises(ConfigError, match="no estimator_optimizer"):
        alone.train_epoch(batches(), N, bank, batch_size=BATCH)
    with pytest.raises(ConfigError, match="no main_optimizer"):
        step.stage2(*batches()[0][:2], None, information=False)
