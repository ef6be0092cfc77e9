"""The step's update in one pass: the numbers of the separate passes, and torch's own step wherever it would not be."""

import contextlib
import copy
import gc
import math
import warnings
import weakref

import pytest
import torch
from torch import nn

from engine.kernels import registry
from engine.step import TwoStageStep, updates
from engine.step.fused import KEPT, FusedUpdates
from engine.step.graphs import GraphRunner
from tests.step import test_finite
from tests.step.test_finite import BATCH, SAMPLES, Plain
from tests.step.test_static import make, run

CLOSE = {"rtol": 1e-6, "atol": 5e-7}  # weights and features are of about 1


@pytest.fixture
def fused(monkeypatch):
    """The pass on a CPU, by its formula. Yields the numbers of weights that it has moved, one for each update."""
    moved = []
    move = updates.move

    def counted(table, *arguments, **options):
        moved.append(table.count)
        return move(table, *arguments, **options)

    monkeypatch.setattr(updates, "fuses", lambda parameter: True)
    monkeypatch.setattr(updates, "move", counted)
    return moved


@contextlib.contextmanager
def in_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "fuses", lambda parameter: False)
        yield


# A critic's last bias has a gradient of 0 but for rounding. With a small eps Adam would make a full step of that.


def adam(parameters):
    return torch.optim.Adam(parameters, 1e-2, eps=1e-2, fused=True)


def adamw(parameters):
    return torch.optim.AdamW(parameters, 1e-2, (0.8, 0.99), 1e-2, 0.1, fused=True)


def groups(parameters):
    parameters = list(parameters)
    first = {"params": parameters[:2], "lr": 0.02, "weight_decay": 0.1, "betas": (0.5, 0.9)}
    return torch.optim.Adam([first, {"params": parameters[2:], "eps": 1e-3}], 1e-2, eps=1e-2, fused=True)


OPTIONS = [
    {},
    {"average": 0.98},
    {"average": 0.98, "clip_value": 0.01},
    {"clip_norm": 0.05},
    {"average": 0.9, "clip_value": 0.05, "clip_norm": 0.1, "non_finite": "skip"},
    {"optimizer": adamw, "average": 0.98},
    {"optimizer": groups, "average": 0.98, "clip_norm": 0.1},
    {"autocast": torch.bfloat16, "average": 0.98},
    {"autocast": torch.float16, "average": 0.98, "clip_value": 0.01, "clip_norm": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_twenty_steps_are_those_of_the_separate_passes(options, fused):
    """Four epochs of five batches, of both stages, static; and the state of both optimisers at the end."""
    one = make("emulate", **{"optimizer": adam} | options)
    numbers, tensors = run(one, 4)
    moved, fused[:] = list(fused), []
    assert len(moved) == 4 * 5 + 3 * 5  # in the first epoch there is no stage 1
    with in_parts():
        other = make("emulate", **{"optimizer": adam} | options)
        expected, others = run(other, 4)
    assert not fused
    assert numbers == pytest.approx(expected, **{"rel": CLOSE["rtol"], "abs": CLOSE["atol"]})
    torch.testing.assert_close(tensors, others, **CLOSE)
    for name in ("main_optimizer", "estimator_optimizer"):
        a, b = (getattr(step, name).state_dict() for step in (one, other))
        torch.testing.assert_close(a["state"], b["state"], **CLOSE)
        assert a["param_groups"] == b["param_groups"]
    skipped = 0
    if one.scaler is not None:
        assert one.scaler.state_dict() == other.scaler.state_dict()
        skipped = 16 - round(math.log2(one.scaler.get_scale()))  # each halves the scale
    if one.average is not None:
        assert one.average.state_dict()["updates"] == other.average.state_dict()["updates"] == 20 - skipped


def test_micro_batches_and_steps_that_are_not_static(fused, monkeypatch):
    """Where the host does not look at gradients, as on a GPU."""
    monkeypatch.setattr("engine.step.finite.readable", lambda tensor: False)
    ends = []
    for context in (contextlib.nullcontext(), in_parts()):
        with context:
            step = make("off", optimizer=adam, average=0.9, clip_norm=0.1, accumulate=2)
            ends.append((run(step, 3)[1], len(fused)))
    torch.testing.assert_close(ends[0][0], ends[1][0], **CLOSE)
    assert ends[0][1] == ends[1][1] > 0


# -- steps that are left out --


class Linear(nn.Linear):
    def __init__(self):
        super().__init__(3, 1)

    def forward(self, x):
        return super().forward(x), {"X": x}


@pytest.mark.parametrize("wrong", ["loss", "gradient", "input"])
def test_a_step_that_is_left_out_changes_nothing(wrong, fused):
    step, without = test_finite.make(non_finite="skip", graphs="emulate"), test_finite.make(graphs="emulate")
    result, _ = step.train_epoch(test_finite.batches(wrong), SAMPLES, None, batch_size=BATCH)
    good = [batch for i, batch in enumerate(test_finite.batches()) if i != 2]
    without.train_epoch(good, SAMPLES, None, batch_size=BATCH)
    assert result.skipped == 1 and step.average.updates == without.average.updates == 4
    for a, b in zip(test_finite.state(step), test_finite.state(without), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    assert len(fused) == 5 + 4


@pytest.mark.parametrize("path", ["off", "emulate", "fused"])
def test_the_average_does_not_count_a_step_that_the_scaler_leaves_out(path, monkeypatch):
    """The first batches overflow. The average is that of a run without them, and so is its count."""
    monkeypatch.setattr(updates, "fuses", lambda parameter: path == "fused")
    graphs = "off" if path == "off" else "emulate"

    def start(scale):
        torch.manual_seed(0)
        model = Linear()
        optimizer = torch.optim.Adam(model.parameters(), 0.01, fused=True)
        step = TwoStageStep(model, None, nn.functional.mse_loss, optimizer, average=0.9, graphs=graphs)
        step.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        return step

    loader = test_finite.batches()
    loader[:2] = [(x, y + 1e3, rows) for x, y, rows in loader[:2]]
    step, without = start(2.0**127), start(2.0**10)
    step.train_epoch(loader, SAMPLES, None, batch_size=BATCH)
    skipped = round(127 - math.log2(step.scaler.get_scale()))
    assert skipped >= 2
    without.train_epoch(loader[skipped:], SAMPLES, None, batch_size=BATCH)
    assert step.average.state_dict()["updates"] == without.average.state_dict()["updates"] == 5 - skipped
    for name, value in step.average.values.items():
        torch.testing.assert_close(value, without.average.values[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_a_trial_needs_the_kernels_of_an_update_and_changes_nothing(options, fused, monkeypatch):
    """Which of a kernel's arguments there are decides what is compiled."""
    used = []

    def noting(name, original):
        def run_it(table, *arguments, **settings):
            given = sorted(k for k, v in settings.items() if k not in ("limit", "norm") and v is not None)
            used.append((name, *given, table.aligned))
            return original(table, *arguments, **settings)

        return run_it

    for name in ("inspect", "move"):
        monkeypatch.setattr(updates, name, noting(name, getattr(updates, name)))
    step = make("emulate", **options)
    run(step, 2)
    real, used[:] = set(used), []
    before = [t.clone() for m in (step.model, step.objective) for t in m.state_dict().values()]
    with registry.static():
        for optimizer in (step.main_optimizer, step.estimator_optimizer):
            step.try_update(optimizer)
    assert {u[:-1] for u in used} == {u[:-1] for u in real}
    assert all(u[-1] for u in used)
    after = [t for m in (step.model, step.objective) for t in m.state_dict().values()]
    assert all(map(torch.equal, before, after))


# -- torch's own step --


def one_step(optimizer, model):
    """Whether one pass makes the update, and what the model's weights are then."""
    nn.functional.mse_loss(model(torch.ones(4, 3))[0], torch.zeros(4, 1)).backward()
    return FusedUpdates().work(optimizer, None) is not None


def hooked(parameters):
    optimizer = torch.optim.Adam(parameters, fused=True)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def replaced(parameters):
    optimizer = torch.optim.Adam(parameters, fused=True)
    optimizer.step = lambda: None
    return optimizer


def scheduled(parameters):
    optimizer = torch.optim.Adam(parameters, fused=True)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


class Own(torch.optim.Adam):
    pass


@pytest.mark.parametrize(
    "make_optimizer, expected",
    [
        (lambda p: torch.optim.Adam(p, fused=True), True),
        (lambda p: torch.optim.AdamW(p, fused=True), True),
        (lambda p: torch.optim.Adam(p, torch.tensor(0.1), fused=True), True),
        (scheduled, True),
        (lambda p: torch.optim.Adam(p), False),  # which keeps its counters on the host
        (lambda p: torch.optim.Adam(p, fused=True, amsgrad=True), False),
        (lambda p: torch.optim.Adam(p, fused=True, maximize=True), False),
        (lambda p: torch.optim.NAdam(p), False),
        (lambda p: torch.optim.SGD(p, 0.1, fused=True), False),
        (lambda p: Own(p, fused=True), False),
        (hooked, False),
        (replaced, False),
    ],
)
def test_which_optimisers_one_pass_moves(make_optimizer, expected):
    model = Plain()
    assert one_step(make_optimizer(model.parameters()), model) == expected


@pytest.mark.parametrize("change", ["float64", "strided", "moments"])
def test_weights_that_one_pass_does_not_move(change):
    model = Plain()
    if change == "float64":
        model.two.bias = nn.Parameter(model.two.bias.double())
        model.forward = lambda x: (model.two.bias.float() + x.sum(1, keepdim=True), {})
    elif change == "strided":
        model.one.weight = nn.Parameter(torch.randn(4, 6)[:, ::2])
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    if change == "moments":
        p = model.one.weight
        optimizer.state[p] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros(3, 4).t(),
            "exp_avg_sq": torch.zeros(4, 3),
        }
    assert not one_step(optimizer, model)


def test_a_scheduler_knows_of_the_step_and_the_version_of_the_weights_moves(fused):
    step = make("emulate")
    scheduler = torch.optim.lr_scheduler.StepLR(step.main_optimizer, 1)
    before = [p._version for p in step.model.parameters()]
    run(step, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
    assert fused and all(p._version > v for p, v in zip(step.model.parameters(), before, strict=True))


def test_weights_that_move_in_memory_and_state_that_is_loaded(fused):
    """The addresses are read anew."""
    ends = []
    for context in (contextlib.nullcontext(), in_parts()):
        with context:
            step = make("emulate", optimizer=adam, average=0.9)
            run(step, 1)
            for p in step.model.parameters():
                p.data = p.data.clone()
            saved = copy.deepcopy(step.state_dict())
            run(step, 1)
            step.load_state_dict(saved)
            ends.append(run(step, 2)[1])
    torch.testing.assert_close(*ends, **CLOSE)
    assert fused


def test_parameters_without_gradients_stay_and_tied_weights_have_two_averages(fused):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.unused = nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(2, 2)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.one(x) + self.two(x), {"X": x}

    ends = []
    for context in (contextlib.nullcontext(), in_parts()):
        with context:
            torch.manual_seed(0)
            model = Tied()
            optimizer = torch.optim.Adam(model.parameters(), 0.01, fused=True)
            step = TwoStageStep(
                model, None, nn.functional.mse_loss, optimizer, average=0.9, graphs="emulate", clip_value=0.1
            )
            step.train_epoch(test_finite.batches(), SAMPLES, None, batch_size=BATCH)
            ends.append([*model.state_dict().values(), *step.average.values.values()])
            assert len(optimizer.state) == 3
            assert torch.equal(step.average.values["one.weight"], step.average.values["two.weight"])
    torch.testing.assert_close(*ends, **CLOSE)
    assert fused == [3] * 5


def test_tables_that_a_graph_makes_are_not_kept(monkeypatch):
    """Only a replay of that graph writes them, so no other launch may read them."""
    layer = nn.Linear(3, 1)
    layer(torch.ones(2, 3)).sum().backward()
    updates_of, optimizer = FusedUpdates(), adam(layer.parameters())
    for name in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    captured = updates_of.work(optimizer, None)
    monkeypatch.undo()
    again = updates_of.work(optimizer, None)
    assert captured.plan is not again.plan
    assert updates_of.work(optimizer, None).plan is again.plan


def test_a_graph_keeps_the_tables_that_it_reads(monkeypatch):
    """Although the step keeps only the last ones."""
    layer = nn.Linear(3, 1)
    layer(torch.ones(2, 3)).sum().backward()
    updates_of, optimizer, works = FusedUpdates(), adam(layer.parameters()), []
    updates_of.work(optimizer, None)
    graphs = GraphRunner(torch.device("cpu"), capture=False, strict=True)
    graphs._stream = graphs._pool = None
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: object())
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    assert graphs._captured("key", lambda: works.append(weakref.ref(updates_of.work(optimizer, None).plan)))
    for number in range(KEPT):
        optimizer.param_groups[0]["weight_decay"] = 0.1 + number
        updates_of.work(optimizer, None)
    gc.collect()
    assert works[0]() is not None and works[0]() not in updates_of._plans.values()
    graphs.clear()
    gc.collect()
    assert works[0]() is None


def test_an_average_moves_after_an_update_that_an_error_ended(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no room")

    x, y = torch.ones(4, 3), torch.zeros(4, 1)
    step = test_finite.make()
    with monkeypatch.context() as patch:
        patch.setattr(updates, "fuses", lambda parameter: True)
        patch.setattr("engine.step.finite.readable", lambda tensor: False)
        patch.setattr(updates, "move", broken)
        with pytest.raises(RuntimeError, match="no room"):
            step.stage2(x, y, None, information=False)
    before = {name: step.average.values[name].clone() for name, _ in step.model.named_parameters()}
    step.stage2(x, y, None, information=False)
    assert not all(torch.equal(step.average.values[name], value) for name, value in before.items())


def test_a_table_that_is_used_outlives_newer_ones_that_are_not(monkeypatch):
    """A graph may still read it. The kept tables are few, and the one that was not used for longest goes first."""
    monkeypatch.setattr("engine.step.fused.KEPT", 3)
    updates_of_one = FusedUpdates()
    optimizers = [adam([nn.Parameter(torch.ones(3 + i))]) for i in range(6)]

    def plan(number):
        (parameter,) = optimizers[number].param_groups[0]["params"]
        parameter.grad = torch.ones_like(parameter)
        return updates_of_one.work(optimizers[number], None).plan

    first = plan(0)
    for number in range(1, 6):
        plan(number)
        assert plan(0) is first
    assert len(updates_of_one._plans) == 3
