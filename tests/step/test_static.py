"""The static step, uncaptured: the same numbers as one operation after another, in every setting that it takes."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine.config import ObjectiveConfig
from engine.errors import ConfigError, DataError, NonFiniteError
from engine.kernels import registry
from engine.loaders.feed import CopyFeed
from engine.mimrl.published import published_estimator
from engine.mimrl.settings import MIMRLObjectiveConfig
from engine.objective import CMI, MI, Objective
from engine.step import TwoStageStep
from engine.step.averages import WeightAverage
from engine.step.batches import whole_batches
from engine.step.graph_state import StateWatch
from engine.step.graphs import CaptureWatch, GraphRunner, NotCapturable
from engine.step.notes import Notes
from engine.vocabulary import BOUNDS
from tests.step.test_step import TwoFeatures, batches

N, BATCH = 45, 10  # the last batch has 5 rows


def adam(parameters):
    return torch.optim.Adam(parameters, 1e-2, fused=True)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, fused=True)


def make(graphs, model=None, optimizer=adam, settings=None, device="cpu", **options) -> TwoStageStep:
    torch.manual_seed(0)
    model = (model or TwoFeatures)().to(device)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    published = (settings or {}).get("compat") == "mimrl"
    settings = (MIMRLObjectiveConfig if published else ObjectiveConfig)(hidden=16, embed=8, **settings or {})
    objective = Objective(
        [0.1 * MI("X", "Y"), -0.1 * CMI("X", "C", given="Y")],
        {"X": 4, "Y": 4, "C": 1},
        settings=settings,
        shared_draws=not published,
        make_estimator=published_estimator if published else None,
    ).to(device)
    optimizers = optimizer(model.parameters()), optimizer(objective.parameters())
    return TwoStageStep(model, objective, nn.functional.mse_loss, *optimizers, graphs=graphs, **options)


def run(step, epochs=3, loader=None, **options):
    """Every number of some epochs, and the weights at the end."""
    numbers, bank = [], None
    for _ in range(epochs):
        loader = batches(n=N) if loader is None else loader
        result, bank = step.train_epoch(loader, N, bank, batch_size=BATCH, **options)
        numbers += [result.loss, result.task, *result.information.values(), *result.estimators.values()]
    kept = [] if step.average is None else list(step.average.values.values())
    weights = [p.detach() for m in (step.model, step.objective) for p in m.parameters()]
    return numbers, [*weights, *kept, *bank.rows.values()]


def assert_equal(a, b, rtol=1e-5, atol=1e-6):
    assert a[0] == pytest.approx(b[0], rel=rtol, abs=atol)
    torch.testing.assert_close(a[1], b[1], rtol=rtol, atol=atol)


@pytest.mark.parametrize("features", ["cached", "fresh", "bank"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": sgd},
        {"average": 0.98, "clip_norm": 1.0, "clip_value": 0.5},
        {"autocast": torch.bfloat16},
        {"autocast": torch.float16},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_a_static_epoch_gives_what_an_eager_one_gives(options, features):
    eager, static = (
        run(make(graphs, **options), stage1_n=2, stage1_features=features) for graphs in ("off", "emulate")
    )
    assert_equal(eager, static)


@pytest.mark.parametrize("critic", ["separate", "concat"])
@pytest.mark.parametrize("bound", BOUNDS)
def test_every_bound_and_critic(bound, critic):
    settings = {"bound": bound, "critic": critic, "baseline": "unnormalized"}
    assert_equal(run(make("off", settings=settings)), run(make("emulate", settings=settings)))


@pytest.mark.parametrize("settings", [{"compat": "mimrl"}, {"cmi_estimator": "dv"}, {"on_degenerate": "skip"}], ids=str)
def test_every_kind_of_conditional_estimate(settings):
    assert_equal(run(make("off", settings=settings)), run(make("emulate", settings=settings)))


def test_two_runs_of_a_seed_are_bit_equal():
    a, b = (run(make("emulate")) for _ in range(2))
    assert a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


def test_without_terms_and_with_a_dataloader():
    numbers = []
    for graphs in ("off", "emulate"):
        torch.manual_seed(0)
        model, data = TwoFeatures(), batches(n=N, size=1)
        model.dropout.p = 0.0
        samples = [(x[0], y[0], i[0]) for x, y, i in data]
        loader = torch.utils.data.DataLoader(samples, BATCH)
        step = TwoStageStep(model, None, nn.functional.mse_loss, adam(model.parameters()), graphs=graphs)
        numbers.append(step.train_epoch(loader, N, None, batch_size=BATCH)[0].loss)
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)


# -- what changes between steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda step: step.main_optimizer.param_groups[0].update(lr=0.0),
        lambda step: step.estimator_optimizer.param_groups[0].update(lr=0.1),
        lambda step: step.main_optimizer.param_groups[0].update(weight_decay=0.5),
        lambda step: setattr(step, "clip_value", 1e-4),
        lambda step: setattr(step.model.dropout, "p", 0.999999),
        lambda step: step.model.head.weight.requires_grad_(False),
        lambda step: setattr(step.model, "head", copy.deepcopy(step.model.x.__class__(8, 1))),
    ],
    ids=["lr", "lr of the estimators", "weight decay", "clip", "dropout", "frozen", "replaced"],
)
def test_a_change_between_epochs_takes_effect_and_is_noticed(change):
    ends = []
    for graphs in ("off", "emulate"):
        step = make(graphs, optimizer=sgd)
        run(step, 2)
        torch.manual_seed(7)
        change(step)
        ends.append((step, run(step, 1)))
    if "dropout" not in repr(change):
        assert_equal(ends[0][1], ends[1][1], rtol=1e-4)


def test_what_cannot_be_captured_is_run_once():
    """A step that was broken off and begun anew would train twice on its batch."""
    graphs, calls = GraphRunner(torch.device("cpu"), capture=False, strict=False), []

    def reads():
        calls.append(torch.ones(1).item())

    for _ in range(3):
        graphs.run("key", reads)
    assert len(calls) == 3


class _Capture:
    """A capture that fails for want of memory; with `unjoined` its end fails, too, as torch says it then."""

    def __init__(self, unjoined: bool):
        self.unjoined = unjoined

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is not None and self.unjoined:
            raise RuntimeError("capturing stream has unjoined work")


@pytest.mark.parametrize("unjoined", [False, True])
def test_out_of_memory_while_streams_are_apart_spares_the_generator(unjoined, monkeypatch, caplog):
    """A capture that could not end leaves torch's generator broken, and with it all graphs that draw from it."""
    mended, pools = [], iter(range(9))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr("engine.step.graphs.mend_generator", mended.append)
    graphs = GraphRunner(torch.device("cpu"), capture=True, strict=False)
    monkeypatch.setattr(torch.cuda, "graph", lambda *a, **k: _Capture(False))
    for _ in range(2):
        graphs.run("kept", lambda: None)
    assert len(graphs) == 1
    monkeypatch.setattr(torch.cuda, "graph", lambda *a, **k: _Capture(unjoined))
    calls = []

    def large():
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("none left")

    for _ in range(3):
        graphs.run("large", large)
    assert len(calls) == 4 and len(mended) == unjoined and "out of memory" in caplog.text
    assert len(graphs) == (0 if unjoined else 1) and graphs._pool == (1 if unjoined else 0)
    graphs.run("kept", lambda: None)  # is captured again, without another warm-up
    assert len(graphs) == 1


def optimizer_like(optimizer, model):
    """An optimiser of the same settings, without a state."""
    fresh = type(optimizer)(model.parameters())
    fresh.param_groups[0].update({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})
    return fresh


def test_graphs_are_forgotten_when_what_they_hold_changes():
    step = make("emulate")
    run(step, 2)
    graphs = step.static.graphs
    for change in (
        lambda: step.main_optimizer.param_groups[0].update(weight_decay=0.1),
        lambda: setattr(step.model.dropout, "p", 0.25),
        lambda: setattr(step, "clip_norm", 2.0),
        lambda: setattr(step.model, "head", nn.Linear(8, 1)),
        lambda: setattr(step.model.head, "weight", nn.Parameter(torch.zeros(1, 8))),
        lambda: step.model.x.weight.requires_grad_(False),
        lambda: setattr(step.model.x.weight, "data", torch.zeros(4, 6)),
        lambda: step.main_optimizer.load_state_dict(copy.deepcopy(step.main_optimizer.state_dict())),
        lambda: setattr(step, "main_optimizer", optimizer_like(step.main_optimizer, step.model)),
        lambda: setattr(step, "average", WeightAverage(step.model, 0.9)),
        lambda: setattr(step, "average", WeightAverage(step.model, 0.9)),
        lambda: setattr(step, "task_loss", nn.functional.l1_loss),
    ):
        cleared = []
        graphs.clear = lambda cleared=cleared: (cleared.append(1), GraphRunner.clear(graphs))
        run(step, 1)
        assert not cleared
        change()
        run(step, 1)
        assert cleared
    step.main_optimizer.param_groups[0]["lr"] = 0.5  # a number that graphs read
    cleared.clear()
    run(step, 1)
    assert not cleared


def test_a_learning_rate_is_read_at_every_batch():
    step = make("emulate", optimizer=sgd)
    before = [p.detach().clone() for p in step.model.parameters()]

    def stop(stage, number):
        if stage == "stage2" and number == 0:
            step.main_optimizer.param_groups[0]["lr"] = 0.0
            before[:] = [p.detach().clone() for p in step.model.parameters()]

    step.train_epoch(batches(n=N), N, None, batch_size=BATCH, on_batch=stop)
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


def test_a_pass_that_was_stopped_leaves_no_sums_behind():
    def stop(stage, number):
        if number == 2:
            raise KeyboardInterrupt

    stopped, other = (make("emulate", optimizer=sgd) for _ in range(2))
    for step in (stopped, other):
        step.main_optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(KeyboardInterrupt):
        stopped.train_epoch(batches(n=N), N, None, batch_size=BATCH, on_batch=stop)
    assert run(stopped, 1)[0] == run(other, 1)[0]


class Replaying(GraphRunner):
    """Captures on any device: a graph is the function itself."""

    def __init__(self):
        super().__init__(torch.device("cpu"), capture=False, strict=True)
        self.capture, self.cleared, self.replays = True, 0, 0

    def clear(self):
        self._graphs.clear()
        self._seen.clear()
        self.cleared += 1

    def stream(self):
        return contextlib.nullcontext()

    def _captured(self, key, function):
        def replay():
            self.replays += 1
            with registry.static():
                function()

        self._graphs[key] = SimpleNamespace(replay=replay)
        return True


def replaying(**options):
    step = make("emulate", **options)
    step.static.graphs = Replaying()
    return step


@pytest.mark.parametrize("features", ["cached", "fresh", "bank"])
def test_replayed_batches_give_what_uncaptured_ones_give(features):
    step = replaying(average=0.98)
    found = run(step, stage1_n=2, stage1_features=features)
    expected = run(make("emulate", average=0.98), stage1_n=2, stage1_features=features)
    assert found[0] == expected[0] and all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    assert step.static.graphs.replays > 20


def addresses(value, path="", seen=None):
    """{path: address} of every tensor that an object holds, however deep."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        seen[path] = value.data_ptr()
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            addresses(item, f"{path}/{number}", seen)
    elif isinstance(value, dict):
        for name, item in value.items():
            addresses(item, f"{path}/{name}", seen)
    elif type(value).__module__.startswith("engine.") and hasattr(value, "__dict__"):
        addresses(vars(value), path, seen)
    return seen


class Pinned(Replaying):
    """Requires of every replay that the buffers which were there at the capture are where they were."""

    BUFFERS = ("_known", "_order", "_draws", "_totals", "_left_out", "_notes", "_banks")

    def __init__(self, static):
        super().__init__()
        self.static, self.captured = static, []

    def buffers(self):
        return addresses({name: getattr(self.static, name) for name in self.BUFFERS})

    def _captured(self, key, function):
        held = self.buffers()
        super()._captured(key, function)
        replay = self._graphs[key].replay

        def checked():
            now = self.buffers()
            assert not [name for name in held if now.get(name) != held[name]], key
            replay()

        self._graphs[key] = SimpleNamespace(replay=checked)
        self.captured.append(key)
        return True


@pytest.mark.parametrize("features", ["cached", "fresh", "bank"])
def test_graphs_read_buffers_that_stay_where_they_are(features):
    """Through evaluations, which draw rows of their own, and through data and batches of other sizes."""
    found, options = [], {"stage1_n": 2, "stage1_features": features}
    sizes = [(N, 10)] * 3 + [(N, 15)] * 2 + [(N, 10)] * 2 + [(N + 20, 10)] * 3 + [(N, 10)]
    for step in (make("emulate"), make("emulate")):
        if found:
            step.static.graphs = Pinned(step.static)
        bank, numbers = None, []
        for size, batch in sizes:
            loader = batches(n=size, size=batch)
            bank = None if bank is not None and bank.size != size else bank
            result, bank = step.train_epoch(loader, size, bank, batch_size=batch, **options)
            held_out = step.evaluate(batches(n=15), bank)
            numbers += [result.loss, result.task, *result.information.values(), held_out.loss]
        found.append((numbers, [p.detach() for p in step.model.parameters()]))
    assert found[0][0] == found[1][0] and all(map(torch.equal, found[0][1], found[1][1]))
    assert step.static.graphs.replays > 20


def test_what_is_drawn_for_an_evaluation_makes_no_graph_anew():
    step, bank, loader, held_out = replaying(), None, batches(n=N), batches(n=15)
    for epoch in range(3):
        _, bank = step.train_epoch(loader, N, bank, batch_size=BATCH)
        before = step.static.graphs.cleared
        step.evaluate(held_out, bank)
        assert step.static.graphs.cleared == before, epoch


@pytest.mark.parametrize("only_looks", [False, True])
def test_a_parameter_that_a_callback_replaces_is_captured_anew(only_looks):
    """Before the next batch; before the next pass, where the callback had promised to change nothing."""

    class Known(list):
        """A loader with a feed of its own, as those of the engine: only the callback runs between two batches."""

        def feed(self):
            return CopyFeed(lambda: whole_batches(step.batches(self)), torch.device("cpu"))

    step, bank, loader, cleared = replaying(), None, Known(batches(n=N)), []
    for _ in range(4):
        _, bank = step.train_epoch(loader, N, bank, batch_size=BATCH)
    graphs, before = step.static.graphs, step.static.graphs.cleared

    def on_batch(stage, number):
        if stage == "stage2":
            cleared.append(graphs.cleared - before)
            if number == 1:
                step.model.x.weight.data = step.model.x.weight.data.clone()

    on_batch.only_looks = only_looks
    _, bank = step.train_epoch(loader, N, bank, batch_size=BATCH, on_batch=on_batch)
    assert cleared == ([0] * 5 if only_looks else [0, 0, 1, 1, 1])
    step.train_epoch(loader, N, bank, batch_size=BATCH)
    assert graphs.cleared - before == 1


def test_a_parameter_that_a_loader_replaces_is_captured_anew():
    class Freezes(list):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if self.step is not None and number == 2:
                    self.step.model.x.weight.requires_grad_(False)
                yield batch

    loader, bank = Freezes(batches(n=N)), None
    step, loader.step = replaying(), None
    for _ in range(4):
        _, bank = step.train_epoch(loader, N, bank, batch_size=BATCH, stage1_features="bank")
    before, loader.step = step.static.graphs.cleared, step
    frozen = step.model.x.weight.detach().clone()
    step.train_epoch(loader, N, bank, batch_size=BATCH, stage1_features="bank")
    assert step.static.graphs.cleared == before + 1 and not torch.equal(step.model.x.weight, frozen)
    frozen = step.model.x.weight.detach().clone()
    step.train_epoch(loader, N, bank, batch_size=BATCH, stage1_features="bank")
    assert torch.equal(step.model.x.weight, frozen)


def test_a_learning_rate_that_a_callback_changes_counts_at_the_next_replay():
    ends = []
    for step in (make("off", optimizer=sgd), replaying(optimizer=sgd)):
        run(step, 2)

        def on_batch(stage, number, step=step):
            step.main_optimizer.param_groups[0]["lr"] = 0.05 / (number + 1)

        on_batch.only_looks = True
        step.train_epoch(batches(n=N), N, None, batch_size=BATCH, on_batch=on_batch)
        ends.append([p.detach() for p in step.model.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


class InOrder(list):
    """A loader that a static step evaluates itself."""

    in_order = True

    def batch_sizes(self):
        return [len(batch[0]) for batch in self]


CALLED_BACK = {
    "evaluate": (lambda step, bank: step.evaluate(InOrder(batches(n=N)), bank), 0),
    "read": (lambda step, bank: step.objective.read(dict(bank.tensors()), BATCH), 0),
    "weights of terms": (lambda step, bank: step.objective.set_weights({"I(X;Y)": 3.0}), 0),
    "modes": (lambda step, bank: (step.model.eval(), step.objective.eval()), 0),
    "an update": (lambda step, bank: step.main_optimizer.step(), 0),
    "a batch more": (lambda step, bank: step.stage2(*batches(n=N)[0][:2], None, information=False), 0),
    "load the model": (lambda step, bank: step.model.load_state_dict(scaled(step.model.state_dict(), 0.5)), 0),
    "load the step": (lambda step, bank: step.load_state_dict(copy.deepcopy(step.state_dict())), 1),
    "another optimiser": (lambda step, bank: setattr(step, "main_optimizer", sgd(step.model.parameters())), 1),
    "weight decay": (lambda step, bank: step.main_optimizer.param_groups[0].update(weight_decay=0.5), 1),
    "clip": (lambda step, bank: setattr(step, "clip_value", 1e-3), 1),
    "another layer": (lambda step, bank: setattr(step.model, "head", copy.deepcopy(step.model.head)), 1),
    "freeze": (lambda step, bank: step.model.x.weight.requires_grad_(False), 1),
    "freeze a term": (lambda step, bank: step.objective.freeze("I(X;Y)"), 1),
}  # fmt: skip


def scaled(state, factor):
    return {name: value * factor for name, value in state.items()}


@pytest.mark.parametrize(
    ("name", "stage"),
    [*((name, "stage2") for name in CALLED_BACK), ("evaluate", "stage1"), ("freeze a term", "stage1")],
)
def test_what_a_callback_does_within_a_pass_is_what_it_does_in_an_eager_one(name, stage):
    """And graphs are forgotten before the next batch if they hold what was changed, and only then."""
    call, forgets = CALLED_BACK[name]
    ends = []
    for step in (make("off"), replaying()):
        run(step, 2)
        cleared = []

        def on_batch(now, number, step=step, cleared=cleared):
            if now == stage and step.static is not None:
                cleared.append(step.static.graphs.cleared)
            if (now, number) == (stage, 1):
                call(step, step.collect(batches(n=N), N))

        result, _ = step.train_epoch(
            batches(n=N), N, step.collect(batches(n=N), N), batch_size=BATCH, on_batch=on_batch
        )
        numbers = [result.loss, result.task, *result.information.values(), *result.estimators.values()]
        ends.append((numbers, [p.detach() for m in (step.model, step.objective) for p in m.parameters()]))
        assert not cleared or cleared[2] - cleared[1] == forgets
    assert_equal(ends[0], ends[1], rtol=1e-4)


@pytest.mark.parametrize("graphs", ["off", "emulate"])
def test_an_epoch_within_an_epoch_is_refused(graphs):
    step = make(graphs)

    def on_batch(stage, number):
        step.train_epoch(batches(n=N), N, None, batch_size=BATCH)

    with pytest.raises(ConfigError, match=r"within an epoch of the same step; .* after train_epoch has returned"):
        step.train_epoch(batches(n=N), N, None, batch_size=BATCH, on_batch=on_batch)
    step.train_epoch(batches(n=N), N, None, batch_size=BATCH)


def test_a_value_that_is_not_finite_is_placed_in_its_own_pass():
    """Although it is read at the end of the epoch."""
    for stage, passes, number in (("stage1", 1, 3), ("stage2", 0, 2)):
        step, seen = make("emulate"), []
        _, bank = step.train_epoch(batches(n=N), N, None, batch_size=BATCH)

        def on_batch(now, batch, step=step, stage=stage, number=number, passes=passes, seen=seen):
            seen.append(now)
            if now == stage and batch == number - 1 and seen.count(stage) > 5 * passes:
                with torch.no_grad():
                    next(iter((step.objective if stage == "stage1" else step.model).parameters())).fill_(float("nan"))

        said = rf"found a value that is not finite in batch {number} of {stage}"
        with pytest.raises(NonFiniteError, match=said):
            step.train_epoch(batches(n=N), N, bank, batch_size=BATCH, stage1_n=2, on_batch=on_batch)
        assert seen.count("stage2") == 5  # nothing was read before


def test_the_watch_sees_every_kind_of_change():
    step = make("emulate")
    run(step, 2)
    modules, optimizers = step.static._modules(), step.static._optimizers()
    head = step.model.head
    for change in (
        lambda: setattr(step.model.dropout, "p", 0.125),
        lambda: setattr(step.model, "more", nn.Linear(1, 1)),
        lambda: step.model.register_buffer("value", torch.zeros(1)),
        lambda: head.register_parameter("extra", nn.Parameter(torch.zeros(1))),
        lambda: setattr(head, "weight", nn.Parameter(torch.zeros(1, 8))),
        lambda: setattr(head.weight, "data", torch.ones(1, 8)),
        lambda: head.weight.requires_grad_(False),
        lambda: step.main_optimizer.state[step.model.x.weight].update(exp_avg=torch.zeros(4, 6)),
        lambda: step.main_optimizer.state.pop(step.model.x.bias),
    ):
        watch = StateWatch(modules, optimizers)
        assert watch.unchanged(modules, optimizers) and not watch.moved() and not watch.replaced()
        change()
        assert not watch.unchanged(modules, optimizers)
    watch = StateWatch(modules, optimizers)
    assert not watch.unchanged(modules, [adam(step.model.parameters()), optimizers[1]])
    assert not watch.unchanged([copy.deepcopy(modules[0]), modules[1]], optimizers)


# -- what is refused ----------------------------------------------------------------------------------------------


class Reads(TwoFeatures):
    def forward(self, inputs):
        if float(inputs.sum()) > 1e9:
            raise ValueError
        return super().forward(inputs)


class Selects(TwoFeatures):
    def forward(self, inputs):
        return super().forward(inputs + inputs[inputs > 1e9].sum())


class Searches(TwoFeatures):
    def forward(self, inputs):
        return super().forward(inputs + inputs.nonzero().sum() * 0)


@pytest.mark.parametrize(
    ("model", "operation", "why"),
    [(Reads, "local_scalar_dense", "waits"), (Selects, "index", "depends"), (Searches, "nonzero", "depends")],
)
def test_a_model_that_cannot_be_captured_is_named(model, operation, why):
    with pytest.raises(NotCapturable, match=rf"{operation} at test_static.py:\d+: .*{why}") as problem:
        run(make(True, model=model), 1)
    assert "train.graphs=off" in str(problem.value)


def test_auto_goes_on_without_graphs_and_says_why(caplog):
    eager = run(make("off", model=Reads))
    step = make("emulate", model=Reads)
    step.static.graphs.strict = False
    with caplog.at_level("WARNING", logger="engine"):
        assert_equal(eager, run(step))
    assert caplog.text.count("without CUDA graphs") == 1 and "test_static.py" in caplog.text


def test_a_loader_without_a_length_is_refused():
    with pytest.raises(ConfigError, match="list_iterator without a length"):
        run(make("emulate"), 1, loader=iter(batches(n=N)))


def test_a_batch_of_a_size_that_was_not_foreseen_is_refused():
    pieces = batches(n=N)
    pieces[0], pieces[4] = pieces[4], pieces[0]
    odd = [tuple(t[:7] for t in pieces[1]), *pieces[1:]]
    step = make("emulate")
    with pytest.raises(ConfigError, match="a batch of 7 samples"):
        run(step, 2, loader=odd)


def test_inputs_that_are_not_tensors_are_refused():
    odd = [((x, "text"), y, i) for x, y, i in batches(n=N)]
    with pytest.raises(ConfigError, match="str among its inputs"):
        run(make("emulate"), 1, loader=odd)


def test_an_optimizer_that_reads_its_rate_on_the_host_is_refused():
    step = make("emulate", optimizer=lambda p: torch.optim.SGD(p, 0.1))
    with pytest.raises(ConfigError, match=r"optimiser SGD.*fused=True"):
        run(step, 1)


def test_an_optimizer_that_counts_its_steps_on_the_host_is_refused():
    step = make("emulate", optimizer=lambda p: torch.optim.Adam(p, 0.1))
    with pytest.raises(ConfigError, match=r"optimiser Adam on cpu.*fused=True"):
        run(step, 1)


@pytest.mark.parametrize("features", ["cached", "fresh", "bank"])
def test_a_later_epoch_without_a_batch_is_refused(features: str):
    step, used = make("off"), iter(())
    _, bank = step.train_epoch(batches(n=N), N, None, batch_size=BATCH)
    with pytest.raises(DataError, match="no batch"):
        step.train_epoch(used, N, bank, batch_size=BATCH, stage1_features=features)


def test_auto_means_a_gpu():
    assert make("auto").static is None  # on a CPU


def test_values_are_checked_after_the_epoch():
    step = make("emulate")
    _, bank = step.train_epoch(batches(n=N), N, None, batch_size=BATCH)
    with torch.no_grad():
        next(iter(step.objective.parameters())).fill_(float("nan"))
    said = r"objective term I\(X;Y\): found a value that is not finite in batch 0 of stage1"
    with pytest.raises(NonFiniteError, match=said):
        step.train_epoch(batches(n=N), N, bank, batch_size=BATCH)


# -- the pieces -----------------------------------------------------------------------------------------------------


def test_watch_lets_host_functions_of_cpu_kernels_look_at_values():
    values, offsets = torch.arange(6.0)[:, None], torch.tensor([0, 2, 6])
    from engine.kernels.ragged import pad

    with CaptureWatch():
        assert pad(values, offsets, torch.tensor([1]), 4)[0].shape == (1, 4, 1)
        with pytest.raises(NotCapturable):
            values.sum().item()


def test_graphs_run_under_the_static_flag_and_watch_only_once():
    seen = []
    graphs = GraphRunner(torch.device("cpu"), capture=False, strict=True)
    for _ in range(2):
        graphs.run("key", lambda: seen.append((registry.is_static(), torch._C._len_torch_dispatch_stack())))
    assert seen == [(True, 1), (True, 0)] and not registry.is_static()


def test_notes_tell_the_first_pass_and_batch():
    notes = Notes(torch.device("cpu"))
    assert notes.begin_epoch(5) and notes.begin_pass("stage1", 0, 2) is False
    assert notes.first_not_finite() is None
    notes.note("stage1", ["a", "b"], torch.tensor([1.0, 2.0]), torch.tensor([1]))
    assert not notes.begin_pass("stage1", 2, 2)
    notes.note("stage1", ["a", "b"], torch.tensor([1.0, float("inf")]), torch.tensor([3]))
    assert notes.begin_pass("stage2", 4, 3)  # more batches than were foreseen: what was noted is kept
    notes.note("losses", ["task"], torch.tensor([float("nan")]), torch.tensor([6]))
    assert notes.first_not_finite() == ("stage1", 1, "b")
    assert notes.begin_epoch(5) is False and notes.first_not_finite() is None
    notes.begin_pass("stage2", 0, 5)
    notes.note("losses", ["task"], torch.tensor([float("nan")]), torch.tensor([4]))
    assert notes.first_not_finite() == ("stage2", 4, "task")
