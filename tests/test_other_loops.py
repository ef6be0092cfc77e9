"""Batches, model outputs and loops of other people: what the step takes, and what it says about mistakes."""

import io
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from engine.config import ObjectiveConfig
from engine.errors import CheckpointError, ConfigError, DataError, EngineError, NonFiniteError
from engine.objective import CMI, MI, Objective
from engine.step import TwoStageStep
from engine.step.batches import Numbered, read_batch
from engine.step.checks import task_of
from engine.step.outputs import read_output
from engine.step.recent import RecentFeatures

N, BATCH = 24, 8
SETTINGS = ObjectiveConfig(hidden=16, embed=8, compat="none")


class Pair(nn.Module):
    """Two encoders and a head. `form` makes the output of a subclass."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.x, self.y, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, 1)
        self.dropout = nn.Dropout(dropout)

    def parts(self, inputs):
        x, y = self.dropout(self.x(inputs)), self.y(inputs)
        return self.head(torch.cat([x, y], 1)), x, y

    def forward(self, x):
        prediction, a, b = self.parts(x)
        return prediction, {"X": a, "Y": b}


@dataclass
class Output:
    logits: torch.Tensor
    hidden_states: tuple
    pooled: torch.Tensor
    loss: torch.Tensor | None = None


def objective_of(*terms) -> Objective:
    return Objective(terms or [0.1 * MI("X", "Y")], {"X": 4, "Y": 4, "C": 1}, settings=SETTINGS)


def make(
    model=None, objective=True, task_loss=functional.mse_loss, seed=0, rate=0.05, fused=None, **options
) -> TwoStageStep:
    torch.manual_seed(seed)
    model = Pair() if model is None else model
    objective = objective_of() if objective is True else objective
    return TwoStageStep(
        model, objective, task_loss, torch.optim.SGD(model.parameters(), rate, fused=fused),
        None if objective is None else torch.optim.SGD(objective.parameters(), rate, fused=fused), **options,
    )  # fmt: skip


def data(n: int = N) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 6, generator=generator)
    return x, x.sum(1, keepdim=True), torch.arange(n)


def tuples(n: int = N, size: int = BATCH) -> list:
    return list(zip(*(part.split(size) for part in data(n)), strict=True))


def dicts(key: str = "y") -> list:
    return [{"x": x, key: y, "index": i} for x, y, i in tuples()]


def weights(step: TwoStageStep) -> list[torch.Tensor]:
    modules = [m for m in (step.model, step.objective) if m is not None]
    return [p.detach().clone() for module in modules for p in module.parameters()]


def trained(step: TwoStageStep, loader, epochs: int = 2, **options) -> list[torch.Tensor]:
    bank = None
    for _ in range(epochs):
        _, bank = step.train_epoch(loader, N, bank, batch_size=BATCH, **options)
    return weights(step)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- batches --


@pytest.mark.parametrize("key", ["y", "label", "labels", "target"])
def test_dict_batches_train_as_tuples_do(key):
    assert same(trained(make(), dicts(key)), trained(make(), tuples()))


def test_dict_batches_in_a_static_step():
    assert same(trained(make(graphs="emulate", fused=True), dicts()), trained(make(fused=True), tuples()))
    with pytest.raises(ConfigError, match="no index"):
        make(graphs="emulate", objective=None, fused=True).train_epoch(
            [(x, y) for x, y, _ in tuples()], N, None, batch_size=BATCH
        )


def test_a_data_loader_with_row_numbers():
    x, y, _ = data()
    plain = TensorDataset(x, y)
    loader = DataLoader(Numbered(plain), BATCH)
    assert same(trained(make(), loader), trained(make(), tuples()))
    with pytest.raises(DataError, match=r"no index.*Numbered"):
        make().train_epoch(DataLoader(plain, BATCH), N, None, batch_size=BATCH)


def test_no_index_is_needed_without_a_bank():
    x, y, _ = data()
    loader = DataLoader(TensorDataset(x, y), BATCH)
    step = make(objective=None)
    result, bank = step.train_epoch(loader, N, None, batch_size=BATCH)
    assert result.loss > 0 and bank.tensors() == {}
    assert same(weights(step), trained(make(objective=None), tuples(), 1))
    with_terms = make()
    _, bank = with_terms.train_epoch(tuples(), N, None, batch_size=BATCH)
    assert with_terms.evaluate(loader, bank).information.keys() == {"I(X;Y)"}


def test_batches_without_a_target_train_on_the_terms_alone():
    loader = [{"x": x, "index": i} for x, _, i in tuples()]
    step = make(task_loss=None, objective=objective_of(1.0 * MI("X", "Y")), rate=0.1)
    start = weights(step)
    first, bank = step.train_epoch(loader, N, None, batch_size=BATCH)
    assert first.loss == 0 and same(start, weights(step))  # the first epoch only fills the bank
    values = []
    for _ in range(40):
        result, bank = step.train_epoch(loader, N, bank, batch_size=BATCH)
        values.append(result.information["I(X;Y)"])
    assert result.loss == pytest.approx(-values[-1], rel=1e-5) and result.task == 0
    assert values[-1] > values[0] + 0.5
    assert step.evaluate(loader).target is None


class TwoHeads(Pair):
    def forward(self, x):
        prediction, a, b = self.parts(x)
        return {"prediction": {"size": prediction, "sign": prediction * 2}, "X": a, "Y": b}


def test_dicts_of_targets_and_predictions():
    def loss(prediction, target):
        return functional.mse_loss(prediction["size"], target["size"]) + functional.l1_loss(
            prediction["sign"], target["sign"]
        )

    loader = [{"x": x, "labels": {"size": y, "sign": y.sign()}, "index": i} for x, y, i in tuples()]
    objective = Objective(
        [0.1 * MI("X", "Y"), -0.1 * CMI("X", "size", given="sign")], {"X": 4, "Y": 4, "size": 1, "sign": 1},
        settings=SETTINGS,
    )  # fmt: skip
    step = make(TwoHeads(), objective, loss)
    result, bank = step.train_epoch(loader, N, None, batch_size=BATCH)
    result, bank = step.train_epoch(loader, N, bank, batch_size=BATCH)
    assert set(result.information) == {"I(X;Y)", "I(X;size|sign)"}
    evaluated = step.evaluate(loader, bank)
    assert torch.equal(evaluated.target["size"], data()[1])
    with torch.no_grad():
        torch.testing.assert_close(evaluated.prediction["sign"], 2 * step.model.parts(data()[0])[0])


def test_read_batch_names_what_is_wrong():
    x, y, i = tuples()[0]
    for item, found in (
        ("text", "a str"),
        ((x, y, i, i), "a tuple of 4"),
        ((x, y[:3], i), "target of 3 rows and index of 8 rows"),
        ({"x": x, "y": y, "label": y}, "keys y and label"),
        ((x, y, i.float()), r"torch.float32 \[8\]"),
        ((x, [1, 2]), "a list"),
        ((x, torch.tensor(1.0)), "target of no rows"),
    ):
        with pytest.raises(DataError, match=found):
            read_batch(item)
    assert read_batch(x).rows == 8 and read_batch([x, y]).index is None


# -- outputs --


class AsDict(Pair):
    def forward(self, x):
        prediction, a, b = self.parts(x)
        return {"logits": prediction, "features": {"X": a, "Y": b}}


class AsFlatDict(Pair):
    def forward(self, x):
        prediction, a, b = self.parts(x)
        return {"prediction": prediction, "X": a, "Y": b, "more": a}


class AsNamedTuple(Pair):
    def forward(self, x):
        prediction, a, b = self.parts(x)
        return namedtuple("Out", "logits X Y")(prediction, a, b)


class AsDataclass(Pair):
    def forward(self, x):
        prediction, a, b = self.parts(x)
        return Output(prediction, (b[:, None], a[:, None]), b)


class AsHuggingFace(Pair):
    def forward(self, x, labels=None):
        from transformers.modeling_outputs import SequenceClassifierOutput

        prediction, a, b = self.parts(x)
        loss = None if labels is None else functional.mse_loss(prediction, labels)
        return SequenceClassifierOutput(loss=loss, logits=prediction, hidden_states=(b[:, None], a[:, None]))


def from_states(output, inputs):
    assert inputs is not None
    return {"X": output.hidden_states[-1][:, 0], "Y": output.hidden_states[0][:, 0]}


@pytest.mark.parametrize(
    "kind, features",
    [
        (AsDict, None), (AsFlatDict, None), (AsFlatDict, ("X", "Y")), (AsFlatDict, {"X": "more", "Y": "Y"}),
        (AsNamedTuple, None), (AsDataclass, from_states), (AsHuggingFace, from_states), (Pair, ["X", "Y"]),
    ],
)  # fmt: skip
def test_outputs_of_every_form_train_alike(kind, features):
    torch.manual_seed(0)
    expected = trained(make(Pair()), tuples())
    torch.manual_seed(0)
    assert same(trained(make(kind(), features=features), tuples()), expected)


def test_a_model_that_computes_its_own_loss():
    torch.manual_seed(0)
    expected = trained(make(Pair()), tuples())
    torch.manual_seed(0)
    step = make(AsHuggingFace(), task_loss="model", features=from_states)
    assert same(trained(step, dicts("labels")), expected)
    with pytest.raises(ConfigError, match=r"no loss.*Give the model its target"):
        make(Pair(), task_loss="model").train_batch(tuples()[0])

    class Unused(AsHuggingFace):
        def forward(self, x, labels=None):
            return super().forward(x, torch.zeros(len(x), 1))

    with pytest.raises(ConfigError, match='task_loss="model"'):
        make(Unused(), task_loss=None, features=from_states).train_batch(tuples()[0])


@pytest.mark.parametrize(
    "output, found",
    [
        (lambda p, a, b: (p, a, b), r"a tuple \(Tensor, Tensor, Tensor\)"),
        (lambda p, a, b: ((p, p), {"X": a, "Y": b}), "prediction: found a tuple"),
        (lambda p, a, b: (p, {"X": a}), r"feature 'Y'.*label="),
        (lambda p, a, b: p, r"feature 'X'.*features="),
        (lambda p, a, b: (p, {"X": a, "Y": b[:, None]}), r"float32 \[8, 1, 4\]; expected float \[B, width\]"),
        (lambda p, a, b: (p, {"X": a, "Y": b[:5]}), "5 rows in a batch of 8"),
        (lambda p, a, b: (p, {"X": a, "Y": b.long()}), "found torch.int64"),
        (lambda p, a, b: (p[:5], {"X": a, "Y": b}), r"shape \[5, 1\] for a batch of 8"),
        (lambda p, a, b: {"X": a, "Y": b}, "no prediction"),
        (lambda p, a, b: "text", "a str"),
    ],
)  # fmt: skip
def test_a_wrong_output_is_one_line(output, found):
    class Wrong(Pair):
        def forward(self, x):
            return output(*self.parts(x))

    with pytest.raises(ConfigError, match=found) as caught:
        make(Wrong()).train_epoch(tuples(), N, None, batch_size=BATCH)
    assert "\n" not in str(caught.value)


def test_features_that_are_not_there():
    with pytest.raises(ConfigError, match=r"entry 'nowhere'.*entries are \['X', 'Y', 'features'\]"):
        make(features={"X": "nowhere", "Y": "Y"}).train_batch(tuples()[0])
    with pytest.raises(ConfigError, match="function that returns a Tensor"):
        make(features=lambda output, inputs: output[0]).train_batch(tuples()[0])
    with pytest.raises(ConfigError, match=r"entry 'hidden_states'.*a tuple.*lambda output, inputs"):
        make(AsDataclass(), features={"X": "hidden_states"}).train_batch(tuples()[0])


# -- other mistakes --


@pytest.mark.parametrize("loss", [functional.mse_loss, nn.L1Loss(), lambda p, t: ((p - t) ** 2).mean()])
def test_a_loss_that_broadcasts_a_column_against_a_row_is_refused(loss):
    loader = [(x, y[:, 0], i) for x, y, i in tuples()]
    with pytest.raises(ConfigError, match=r"\[8, 1\] and \[8\], which broadcasts to \[8, 8\]"):
        make(task_loss=loss).train_epoch(loader, N, None, batch_size=BATCH)

    def agreed(prediction, target):
        return functional.mse_loss(prediction[:, 0], target)

    assert same(trained(make(task_loss=agreed), loader), trained(make(task_loss=functional.mse_loss), tuples()))


def test_losses_of_classes_take_their_usual_shapes():
    class Classes(Pair):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 3)

    loader = [(x, (y[:, 0] > 0).long(), i) for x, y, i in tuples()]
    assert make(Classes(), task_loss=nn.CrossEntropyLoss()).train_epoch(loader, N, None, batch_size=BATCH)[0].loss > 0


def test_a_loss_that_is_no_number():
    with pytest.raises(ConfigError, match=r"a tensor \[8, 1\].*mean over the batch"):
        make(task_loss=nn.MSELoss(reduction="none")).train_batch(tuples()[0])
    with pytest.raises(ConfigError, match="no target in the batch"):
        make().train_batch(data()[0])


def test_size_and_bank_belong_together():
    step = make()
    _, bank = step.train_epoch(tuples(), N, None, batch_size=BATCH)
    with pytest.raises(ConfigError, match=r"a bank of 24 samples with size=30"):
        step.train_epoch(tuples(), 30, bank, batch_size=BATCH)
    with pytest.raises(DataError, match=r"rows 0 to 7; expected rows from 0 to 4"):
        step.train_epoch(tuples(), 5, None, batch_size=BATCH)
    with pytest.raises(ConfigError, match=r"also 'C' of I\(X;C\)"):
        without = make(label=None)
        _, bank = without.train_epoch(tuples(), N, None, batch_size=BATCH)
        make(objective=objective_of(MI("X", "C"))).train_epoch(tuples(), N, bank, batch_size=BATCH)


def test_optimisers_of_other_parameters():
    model, other, objective = Pair(), Pair(), objective_of()

    def sgd(*modules):
        return torch.optim.SGD([p for m in modules for p in m.parameters()], 0.1)

    with pytest.raises(ConfigError, match="none of the 6 parameters of Pair"):
        TwoStageStep(model, objective, functional.mse_loss, sgd(other), sgd(objective))
    with pytest.raises(ConfigError, match=r"estimator_optimizer: found none of the \d+ parameters of Objective"):
        TwoStageStep(model, objective, functional.mse_loss, sgd(model), sgd(other))
    with pytest.raises(ConfigError, match="that the other stage's optimiser holds too"):
        TwoStageStep(model, objective, functional.mse_loss, sgd(model, objective), sgd(objective))


def test_a_model_in_evaluation_mode_is_trained_in_training_mode():
    step = make(Pair(dropout=0.5))
    step.model.eval()
    step.train_batch(tuples()[0])
    assert step.model.training
    step.evaluate(tuples())
    assert not step.model.training


def test_wrapped_modules():
    model = Pair()
    plain = make(model)
    expected = trained(plain, tuples())
    torch.manual_seed(0)
    wrapped = nn.DataParallel(Pair())  # without GPUs it passes everything on
    step = make(wrapped, average=0.9)
    got = trained(step, dicts())
    assert len(got) == len(expected) and step.device.type == "cpu"


# -- micro-batches --


def epoch_of(accumulate: int, size: int, n: int = N, objective=None, **options) -> TwoStageStep:
    step = make(objective=objective, accumulate=accumulate, **options)
    for _ in range(2):
        step.train_epoch(tuples(n, size), n, None, batch_size=size)
    return step


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.01}, {"clip_value": 0.01}, {"average": 0.9}])
@pytest.mark.parametrize("n", [24, 22, 18], ids=["full", "smaller last batch", "incomplete group"])
def test_micro_batches_are_equal_to_the_large_batch(n, options):
    """Groups of 3 batches of 4 rows against batches of 12: 24 = 12 + 12, 22 = 12 + 4 + 4 + 2, 18 = 12 + 4 + 2."""
    large, small = epoch_of(1, 12, n, **options), epoch_of(3, 4, n, **options)
    for a, b in zip(weights(large), weights(small), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    if large.average is not None:
        assert large.average.updates == small.average.updates == 4
        for name, value in large.average.values.items():
            torch.testing.assert_close(value, small.average.values[name], rtol=1e-5, atol=1e-7)


def test_micro_batches_of_the_estimators():
    """Stage 1 by hand: gradients of both halves, weighted by their rows."""
    features = {"X": torch.randn(10, 4), "Y": torch.randn(10, 4)}
    parts = [{k: v[:6] for k, v in features.items()}, {k: v[6:] for k, v in features.items()}]
    step, by_hand = make(accumulate=2), make()
    for part in parts:
        step.stage1(part, None)
    loss = sum(len(part["X"]) / 10 * by_hand.objective.estimator_loss(part).loss for part in parts)
    loss.backward()
    by_hand.estimator_optimizer.step()
    for a, b in zip(weights(step), weights(by_hand), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert step.groups["estimators"].batches == 0


def test_micro_batches_with_a_loss_scale():
    expected = epoch_of(1, 12, 18)
    step = make(objective=None, accumulate=3)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(2):
        step.train_epoch(tuples(18, 4), 18, None, batch_size=4)
    for a, b in zip(weights(expected), weights(step), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_flush_ends_a_group_in_a_loop_of_ones_own():
    step = make(objective=None, accumulate=4)
    start = weights(step)
    for x, y, _ in tuples():
        step.stage2(x, y, None)
    assert same(start, weights(step))
    step.flush()
    assert not same(start, weights(step))
    moved = weights(step)
    step.flush()
    assert same(moved, weights(step))


def test_micro_batches_exclude_static_steps():
    with pytest.raises(ConfigError, match="accumulate=2 with graphs='emulate'"):
        make(accumulate=2, graphs="emulate")
    with pytest.raises(ConfigError, match="accumulate"):
        make(accumulate=0)


# -- one batch at a time, and state --


def online(step: TwoStageStep, recent: RecentFeatures, batches) -> None:
    for batch in batches:
        step.train_batch(batch, recent)


def test_train_batch_is_both_stages_on_one_forward_pass():
    step, by_hand = make(), make()
    step.train_batch(tuples()[0], stage1_n=2)
    x, y, _ = tuples()[0]
    prediction, features = by_hand.forward(x, y)
    for _ in range(2):
        by_hand.stage1(features, None)
    by_hand.objective.requires_grad_(False)
    loss = functional.mse_loss(prediction, y) + by_hand.objective.model_loss(features).loss
    by_hand.main_optimizer.zero_grad()
    loss.backward()
    by_hand.main_optimizer.step()
    for a, b in zip(weights(step), weights(by_hand), strict=True):
        torch.testing.assert_close(a, b)


def test_conditional_terms_draw_from_recent_features():
    terms = [0.1 * MI("X", "Y"), -0.1 * CMI("X", "C", given="Y")]
    step, recent = make(objective=objective_of(*terms)), RecentFeatures(20)
    first = step.train_batch(tuples()[0], recent)
    assert first.information is None and len(recent) == 8
    assert set(step.train_batch(tuples()[1], recent).information.values) == {"I(X;Y)", "I(X;C|Y)"}
    step.train_batch(tuples()[2], recent)
    assert len(recent) == 20 and set(recent.tensors()) == {"X", "Y", "C"}
    newest = data()[1][4:]  # the last 20 of 24 samples
    assert torch.equal(recent.tensors()["C"].flatten().sort().values, newest.flatten().sort().values)
    with pytest.raises(ConfigError, match="RecentFeatures"):
        step.train_batch(tuples()[0])


def saved(state) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def adam(seed: int) -> TwoStageStep:
    torch.manual_seed(seed)
    model, objective = Pair(dropout=0.5), objective_of(0.1 * MI("X", "Y"), -0.1 * CMI("X", "C", given="Y"))
    optimizers = torch.optim.Adam(model.parameters(), 0.01), torch.optim.Adam(objective.parameters(), 0.01)
    step = TwoStageStep(model, objective, functional.mse_loss, *optimizers, average=0.9, accumulate=2)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    return step


@pytest.mark.parametrize("stopped", [2, 3], ids=["between updates", "within a group of micro-batches"])
def test_a_step_goes_on_bit_equal_from_its_state(stopped):
    step, recent = adam(0), RecentFeatures(16)
    batches = tuples() * 3
    online(step, recent, batches[:stopped])
    state = saved({"step": step.state_dict(), "recent": recent.state_dict()})
    assert (step.groups["main"].batches > 0) == (stopped == 3)
    online(step, recent, batches[stopped:])
    again, other = adam(1), RecentFeatures(16)
    online(again, other, batches[:1])
    again.load_state_dict(state["step"])
    other.load_state_dict(state["recent"])
    online(again, other, batches[stopped:])
    assert same(weights(step), weights(again))
    assert all(torch.equal(v, again.average.values[k]) for k, v in step.average.values.items())


def test_a_state_without_the_modules():
    step = adam(0)
    state = step.state_dict(parts=())
    assert not {"model", "objective", "random"} & set(state)
    with pytest.raises(ConfigError, match="parts"):
        step.state_dict(parts=("models",))


def test_a_state_of_another_step_is_refused():
    state = saved(adam(0).state_dict())
    with pytest.raises(CheckpointError, match="average in the state, but not in this step"):
        make().load_state_dict(state)
    other = make(objective=objective_of(MI("X", "Y")), average=0.9, accumulate=2)
    other.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(CheckpointError) as caught:
        other.load_state_dict(state)
    assert isinstance(caught.value, EngineError) and "\n" not in str(caught.value)


# -- what would otherwise be silent, or a traceback --------------------------------------------------------------------


def test_a_dicts_entry_features_may_be_a_tensor():
    class Model(Pair):
        def forward(self, x):
            prediction, a, b = self.parts(x)
            return {"prediction": prediction, "features": a, "Y": b}

    terms = Objective([MI("features", "Y")], {"features": 4, "Y": 4}, settings=SETTINGS)
    output = make(Model(), terms).train_batch(tuples()[0])
    assert set(output.features) == {"features", "Y", "C"} and output.features["features"].shape == (BATCH, 4)


def test_a_single_name_of_an_entry():
    output = {"logits": torch.ones(4, 1), "pooled": torch.zeros(4, 8)}
    assert list(read_output(output, None, "pooled").features) == ["pooled"]


def test_a_target_does_not_replace_a_feature_of_the_model():
    class Model(Pair):
        def forward(self, x):
            prediction, a, b = self.parts(x)
            return prediction, {"X": a, "C": b[:, :1]}

    with pytest.raises(ConfigError, match="feature 'C': found one from the model and the target"):
        make(Model(), objective_of(MI("X", "C"))).train_batch(tuples()[0])
    kept = make(Model(), objective_of(MI("X", "C")), label=None)
    inputs, target, _ = tuples()[0]
    own = kept.model(inputs)[1]["C"].detach()
    assert torch.equal(kept.train_batch((inputs, target)).features["C"], own)


class Reconstruction(nn.Linear):
    def __init__(self, prediction: bool):
        torch.manual_seed(0)  # all have the same weights
        super().__init__(6, 6)
        self.prediction = prediction

    def forward(self, x):
        output = {"prediction": super().forward(x)}
        loss = (output["prediction"] - x).square().mean()
        return {**(output if self.prediction else {}), "loss": loss}


@pytest.mark.parametrize("prediction", [True, False])
def test_micro_batches_of_a_model_without_target_and_features(prediction):
    """Batches of 8 and 4 rows weigh as the batch of 12 that they make up."""
    x = data()[0][:12]
    steps = [make(Reconstruction(prediction), None, "model", accumulate=count) for count in (1, 2)]
    steps[0].train_batch(x)
    for part in (x[:8], x[8:]):
        steps[1].train_batch(part)
    for one, two in zip(weights(steps[0]), weights(steps[1]), strict=True):
        torch.testing.assert_close(one, two)


def test_micro_batches_of_a_pass_without_target_and_features():
    x = data()[0][:12]
    steps = [make(Reconstruction(False), None, "model", accumulate=count) for count in (1, 2)]
    steps[0].train_epoch([x], 12, None, batch_size=12)
    steps[1].train_epoch([x[:8], x[8:]], 12, None, batch_size=8)
    for one, two in zip(weights(steps[0]), weights(steps[1]), strict=True):
        torch.testing.assert_close(one, two)


def test_a_loader_or_a_batch_that_is_empty():
    x, y, _ = tuples()[0]
    with pytest.raises(DataError, match="the loader: found no batch"):
        make().train_epoch([], BATCH, None, batch_size=BATCH)
    with pytest.raises(DataError, match="the loader: found no batch"):
        make().evaluate([])
    with pytest.raises(DataError, match="found no rows"):
        make().train_batch((x[:0], y[:0]))


@pytest.mark.parametrize("extra, found", [(None, "a NoneType"), (torch.zeros(5, 2, 2), r"shape \[5, 2, 2\]")])
def test_a_feature_that_no_bank_can_keep(extra, found):
    class Model(Pair):
        def forward(self, x):
            prediction, features = super().forward(x)
            return prediction, {**features, "attention": extra}

    with pytest.raises(ConfigError, match=f"feature 'attention': found {found}"):
        make(Model()).train_epoch(tuples(), N, None, batch_size=BATCH)


def test_no_prediction_on_the_models_device():
    assert task_of(None, None, None, None, torch.device("meta")).device.type == "meta"


def test_recent_features_move_to_the_models_device():
    recent = RecentFeatures(4)
    recent.store({"X": torch.ones(4, 2)})
    recent.to("meta")
    assert recent.rows["X"].device.type == "meta"
    loaded = RecentFeatures(4)
    loaded.store({"X": torch.ones(4, 2)})
    loaded.store({"X": torch.ones(4, 2, device="meta")})
    assert loaded.rows["X"].device.type == "meta"


def test_skipped_micro_batches_count_in_a_row_over_passes():
    """A pass that ends without an open group of micro-batches has made no step."""
    x, y, index = data()
    inputs = torch.full_like(x, float("nan"))
    step = make(objective=None, accumulate=2, non_finite="skip")
    with pytest.raises(NonFiniteError, match=r"no step of this epoch that could be made \(1 left out\)"):
        step.train_epoch([(inputs, y, index)], N, None, batch_size=N)
    assert step.finite.position.in_a_row == 1


@pytest.mark.parametrize(
    "options, found",
    [
        ({"stage1_features": "cache"}, "stage1_features='cache'"),  # would be taken as "bank"
        ({"stage1_n": -1}, "stage1_n=-1"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_settings_of_an_epoch_that_are_none(options, found):
    step = make()
    with pytest.raises(ConfigError, match=found):
        step.train_epoch(tuples(), N, None, **{"batch_size": BATCH, **options})


@pytest.mark.parametrize("options", [{"task_loss": "mse"}, {"accumulate": 1.5}, {"accumulate": 0}])
def test_settings_of_a_step_that_are_none(options):
    """A group of 1.5 micro-batches would never be complete."""
    (name,) = options
    with pytest.raises(ConfigError, match=f"TwoStageStep: found {name}="):
        make(**options)
