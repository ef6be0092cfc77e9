"""16-bit copies of weights that a static step keeps: the trajectories of casts, bit for bit, however weights change."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.loaders.feed import CopyFeed
from engine.model.lowered import Copies, autocast_type, in_use, lower
from engine.step import TwoStageStep, fused, known_code, updates
from engine.step.batches import whole_batches
from engine.step.passes import nothing
from tests.step.test_static import BATCH, N, Replaying
from tests.step.test_step import batches


class Model(nn.Module):
    """Two layers whose weights `lower` casts: two of them end to end, one alone."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, 1)

    def forward(self, x):
        weights = [(self.one.weight, self.two.weight), (self.out.weight,)]
        both, out = lower(weights, autocast_type(x.device) or torch.float32)
        hidden = F.linear(x.to(both.dtype), both).float().tanh()
        return F.linear(hidden.to(out.dtype), out).float() + self.out.bias, {"X": hidden}


class Known(list):
    """A loader as the engine's own: no code of a user's runs between two batches."""

    def feed(self):
        return CopyFeed(lambda: whole_batches(self.step.batches(self)), torch.device("cpu"))


@pytest.fixture(autouse=True)
def trusted(monkeypatch):
    """The classes of these tests are taken for the engine's."""
    monkeypatch.setattr(known_code, "CLASSES", (*known_code.CLASSES, "tests."))
    monkeypatch.setattr(known_code, "FUNCTIONS", (*known_code.FUNCTIONS, "tests."))


@pytest.fixture(params=["one pass", "in parts"])
def update(request, monkeypatch):
    monkeypatch.setattr(updates, "fuses", lambda parameter: request.param == "one pass")
    return request.param


def adam(parameters):
    return torch.optim.Adam(parameters, 0.05, fused=True)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, fused=True)


def make(kept, model=Model, optimizer=adam, autocast=torch.bfloat16, replays=True, **options):
    torch.manual_seed(0)
    model = model()
    step = TwoStageStep(
        model,
        None,
        nn.functional.mse_loss,
        optimizer(model.parameters()),
        autocast=autocast,
        graphs="emulate",
        **options,
    )
    if replays:
        step.static.graphs = Replaying()
    if not kept:
        step.static._begin_copies = lambda: None
    return step


def loader_of(step, kind=Known):
    loader = kind(batches(n=N))
    loader.step = step
    return loader


def epoch(step, loader, on_batch=nothing):
    """One pass over the features, and one of training: every number that they give."""
    bank = step.static.collect(loader, N, on_batch)
    found = [value.clone() for value in bank.rows.values()]
    step.train_epoch(loader, N, None, batch_size=BATCH, on_batch=on_batch)
    return [*found, *(value.clone() for value in step.model.state_dict().values())]


@contextlib.contextmanager
def counting():
    """How often a kept copy was taken."""
    taken, take = [], Copies.take

    def counted(self, group):
        whole = take(self, group)
        taken.append(whole is not None)
        return whole

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Copies, "take", counted)
        yield taken


def trajectory(kept, change=lambda step, number: None, epochs=3, kind=Known, on_batch=None, **options):
    """Everything that some epochs give, `change` made after each of them; and whether copies were read."""
    step = make(kept, **options)
    loader, found = loader_of(step, kind), []
    with counting() as taken:
        for number in range(epochs):
            found += epoch(step, loader, nothing if on_batch is None else on_batch(step))
            change(step, number)
    return found, any(taken)


def assert_same(reads_copies=True, **options):
    found, taken = trajectory(True, **options)
    expected, never = trajectory(False, **options)
    assert taken == reads_copies and not never
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("replays", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"average": 0.9, "clip_norm": 0.1, "clip_value": 0.05}, {"optimizer": sgd}],
    ids=["Adam, average and clipping", "SGD"],
)
def test_trajectories_are_those_of_casts(options, replays, update):
    assert_same(replays=replays, **options)


def test_fp16_with_steps_that_the_scaler_leaves_out(update):
    def raise_scale(step, number):
        step.scaler.update(2.0**60)

    assert_same(autocast=torch.float16, change=raise_scale)


# -- weights that change between two passes --


def by_copy(step, number):
    with torch.no_grad():
        step.model.one.weight.copy_(torch.randn(4, 6, generator=torch.Generator().manual_seed(number)))


def by_data(step, number):
    step.model.one.weight.data.mul_(-1)


def by_new_data(step, number):
    step.model.one.weight.data = step.model.one.weight.data * 0.5


def by_foreach(step, number):
    parameters = list(step.model.parameters())
    with torch.no_grad():
        torch._foreach_copy_(parameters, [p.neg() for p in parameters])


def by_state(step, number):
    step.model.load_state_dict({k: v * 1.5 for k, v in step.model.state_dict().items()})


def by_step_state(step, number):
    state = copy.deepcopy(step.state_dict())
    step.model.one.weight.data.zero_()
    step.load_state_dict(state)
    step.model.two.weight.data.zero_()


def by_new_parameter(step, number):
    new = nn.Parameter(step.model.one.weight.detach() + 1)
    step.main_optimizer.param_groups[0]["params"][0] = step.model.one.weight = new


def by_freezing(step, number):
    step.model.one.weight.requires_grad_(number % 2 == 1)
    by_data(step, number)


def by_optimizer(step, number):
    for p in step.model.parameters():
        p.grad = torch.ones_like(p)
    step.main_optimizer.step()


def by_another_step(step, number):
    other = TwoStageStep(
        step.model, None, nn.functional.mse_loss, sgd(step.model.parameters()), autocast=torch.bfloat16
    )
    other.train_epoch(batches(n=N), N, None, batch_size=BATCH)


def by_moving_there_and_back(step, number):
    step.model.double().float()
    by_data(step, number)


def by_autocasts_type(step, number):
    step.autocast = None if number == 0 else torch.bfloat16
    by_data(step, number)


def by_a_deep_copy(step, number):
    step.model.load_state_dict(copy.deepcopy(step.model).half().float().state_dict())


def by_inference_mode(step, number):
    with torch.inference_mode():
        step.evaluate(batches(n=N))
    by_data(step, number)


BETWEEN = [
    by_copy, by_data, by_new_data, by_foreach, by_state, by_step_state, by_new_parameter, by_freezing, by_optimizer,
    by_another_step, by_moving_there_and_back, by_autocasts_type, by_a_deep_copy, by_inference_mode,
]  # fmt: skip


@pytest.mark.parametrize("change", BETWEEN, ids=lambda change: change.__name__)
def test_weights_that_change_between_two_passes(change, update):
    assert_same(change=change)


def test_averaged_weights_within_a_pass_over_the_features(update):
    def averaged(step, number):
        with step.averaged():
            found.append(step.static.collect(loaders[-1], N, nothing).rows["X"].clone())

    ends = []
    for kept in (True, False):
        step, found = make(kept, average=0.5), []
        loaders = [loader_of(step)]
        for number in range(3):
            found += epoch(step, loaders[-1])
            averaged(step, number)
        ends.append(found)
    assert all(map(torch.equal, *ends)) and not torch.equal(ends[0][-1], ends[0][-5])


# -- code that is not known: no copies --


@pytest.mark.parametrize("kind", [Known, list])
def test_a_callback_or_a_loader_of_a_users_own_may_write(kind, update):
    def writing(step):
        def on_batch(stage, number):
            step.model.one.weight.data.mul_(0.9)

        return on_batch

    class Loader(kind):
        pass

    assert_same(reads_copies=False, kind=Loader, on_batch=writing)


def test_passes_with_and_without_a_callback_take_turns(update):
    """Graphs of both kinds are kept. Those of one kind do not write the copies that the other kind reads."""
    ends = []
    for kept in (True, False):
        step, found = make(kept), []
        loader = loader_of(step)
        with counting() as taken:
            for number in range(6):

                def on_batch(stage, batch, step=step):
                    step.model.one.weight.data.mul_(0.9)

                found += epoch(step, loader, on_batch if number % 2 else nothing)
        assert any(taken) == kept and step.static.graphs.replays > 20
        ends.append(found)
    assert all(map(torch.equal, *ends))


class Clamping(Model):
    """Writes its own weights in every forward pass."""

    def forward(self, x):
        self.one.weight.data.clamp_(-0.2, 0.2).mul_(0.9)
        return super().forward(x)


Clamping.__module__ = "users"


def hooked(kind):
    class Hooked(Model):
        def __init__(self):
            super().__init__()

            def write(*_):
                self.one.weight.data.mul_(0.9)

            if kind == "forward":
                self.register_forward_pre_hook(write)
            elif kind == "gradient":
                self.out.bias.register_hook(write)
            else:
                self.out.bias.register_post_accumulate_grad_hook(write)

    return Hooked


def hooked_adam(parameters):
    optimizer = adam(parameters)

    def write(*_):
        optimizer.param_groups[0]["params"][0].data.mul_(0.9)

    optimizer.register_step_post_hook(write)
    return optimizer


@pytest.mark.parametrize(
    "options",
    [
        {"model": Clamping},
        *({"model": hooked(kind)} for kind in ("forward", "gradient", "accumulated")),
        {"optimizer": hooked_adam},
    ],
    ids=["forward pass", "forward hook", "gradient hook", "accumulation hook", "optimizer hook"],
)
def test_code_that_is_not_known_may_write(options, update):
    assert_same(reads_copies=False, **options)


def test_a_hook_that_comes_later_ends_the_copies(update):
    def write(model, inputs):
        model.one.weight.data.mul_(0.9)

    def add_hook(step, number):
        if number == 1:
            step.model.register_forward_pre_hook(write)

    # graphs that were captured before do not hold the hook, with copies or without: both begin anew
    def change(step, number):
        add_hook(step, number)
        step.static.graphs.clear()

    assert_same(change=change)
    step = make(True)
    loader = loader_of(step)
    for number in range(3):
        epoch(step, loader)
        add_hook(step, number)
    assert step.static._lowered is None


# -- the tests above can fail --


@pytest.mark.parametrize("broken", ["pass", "update"])
def test_without_the_refresh_trajectories_differ(broken, update, monkeypatch):
    original = Copies.refresh

    def refresh(self, weights=None):
        if (weights is None) != (broken == "pass") or not self.__dict__.setdefault("cast", False):
            self.cast = True
            original(self, weights)

    if broken == "pass":
        monkeypatch.setattr(Copies, "refresh", refresh)
    else:
        monkeypatch.setattr(Copies, "refresh", lambda self, weights=None: original(self) if weights is None else None)
        monkeypatch.setattr(updates, "in_use", lambda: None)
    found, taken = trajectory(True, change=by_data)
    expected, _ = trajectory(False, change=by_data)
    assert taken and not all(map(torch.equal, found, expected))


# -- the copies themselves --


def test_copies_are_only_taken_within_their_context_and_of_their_type():
    a, b = (nn.Parameter(torch.randn(2, 3)) for _ in range(2))
    copies = Copies(torch.bfloat16)
    with copies.used():
        lower([(a, b)], torch.bfloat16)
        assert in_use() is copies
    assert in_use() is None and copies.make() and not copies.make()
    copies.of(a).fill_(7)
    with copies.used():
        whole, half = (lower([(a, b)], dtype)[0] for dtype in (torch.bfloat16, torch.float16))
    assert (whole[:2] == 7).all() and torch.equal(whole[2:], b.bfloat16())
    assert torch.equal(half, torch.cat([a, b]).half()) and torch.equal(
        lower([(a, b)], torch.bfloat16)[0][:2], a.bfloat16()
    )
    copies.refresh([a])
    assert torch.equal(copies.of(a), a.bfloat16())
    slope = torch.randn(4, 3).bfloat16()
    with copies.used():
        (lower([(a, b)], torch.bfloat16)[0] * slope).sum().backward()
    assert torch.equal(torch.cat([a.grad, b.grad]), slope.float())


def test_weights_that_have_no_copy():
    """Of another type, not whole, twice in one group, or in a group beside one that was kept already."""
    a, b = (nn.Parameter(torch.randn(2, 2)) for _ in range(2))
    groups = [(a,), (a, b), (b, b), (nn.Parameter(torch.randn(2, 2).t()),), (nn.Parameter(torch.randn(2, 2).double()),)]
    copies = Copies(torch.bfloat16)
    for _ in range(2):
        with copies.used():
            for group, cast in zip(groups, lower(groups, torch.bfloat16), strict=True):
                assert torch.equal(cast, torch.cat(group).bfloat16())
        copies.make()
    assert copies.of(a) is not None and copies.of(b) is None


def test_what_a_forward_pass_computes_is_not_kept():
    """It is another tensor in each one. Were it noted, all graphs would be made anew after every batch."""
    a, copies = nn.Parameter(torch.randn(2, 2)), Copies(torch.bfloat16)
    for computed in (a * 2, a.detach() * 3):
        with copies.used():
            cast = lower([(computed,), (a, computed)], torch.bfloat16)
        assert torch.equal(cast[0], computed.bfloat16()) and torch.equal(cast[1], torch.cat([a, computed]).bfloat16())
        assert not copies.make() and not copies._wholes


def test_copies_made_in_inference_mode_can_be_written_outside():
    a, copies = nn.Parameter(torch.randn(2, 2)), Copies(torch.bfloat16)
    with torch.inference_mode(), copies.used():
        lower([(a,)], torch.bfloat16)
        copies.make()
    a.data.add_(1)
    copies.refresh()
    assert torch.equal(copies.of(a), a.bfloat16()) and not copies.of(a).is_inference()


def test_the_updates_tables_are_made_before_a_graph_is(monkeypatch):
    """One that is made within a capture is made again in every replay."""
    monkeypatch.setattr(updates, "fuses", lambda parameter: True)
    step, made = make(True), []

    class Noted(fused.Table):
        def __init__(self, weights, groups, low):
            made.append((len(step.static.graphs), any(w.low is not None for w in weights)))
            super().__init__(weights, groups, low)

    monkeypatch.setattr(fused, "Table", Noted)
    step.train_epoch(loader_of(step), N, None, batch_size=BATCH, on_batch=nothing)
    assert made == [(0, False), (0, True)] and step.static.graphs.replays
