"""Sums that are read late, and averaged weights that take the place of a model's own."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.step.averages import Average, WeightAverage


def test_sums_are_read_when_they_are_asked_for():
    read, average = [], Average()

    def later(value):
        return lambda: read.append(value) or {"a": (value, 2)}

    average.add_later(later(1.5))
    average.add_sums({"a": (4.0, 1)})
    average.add_later(later(0.25))
    assert read == []
    assert average.state_dict() == {"batches": [], "sums": {"a": [5.75, 5]}} and read == [1.5, 0.25]
    average.add_later(dict)
    assert average.sums() == {"a": (5.75, 5)} and len(read) == 2


class Masked(nn.Module):
    """A causal mask as a buffer and as a frozen parameter, and a moving average that has not begun."""

    def __init__(self):
        super().__init__()
        mask = torch.full((3, 3), -torch.inf).triu(1)
        self.layer, self.frozen = nn.Linear(2, 2), nn.Parameter(mask.clone(), requires_grad=False)
        self.register_buffer("mask", mask)
        self.register_buffer("log_ema", torch.tensor(-torch.inf))
        self.register_buffer("mean", torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_entries_that_are_infinite_stay_what_they_are(kind):
    model = Masked()
    average = WeightAverage(model, 0.5)
    average.update(kind(0.25))
    for value in (3.0, 5.0):
        model.log_ema.fill_(value)
        model.mean.fill_(9.0)
        average.update(kind(0.25))
    values = average.values
    assert torch.equal(values["mask"], model.mask) and torch.equal(values["frozen"], model.frozen)
    assert values["log_ema"] == 3.5  # begun at 3, then a quarter of the way to 5
    torch.testing.assert_close(values["mean"], torch.tensor([4.5, 5.0625]))


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_an_update_that_is_left_out_copies_no_infinite_entry(rate):
    model = Masked().double()
    model.log_ema.fill_(3.0)
    average = WeightAverage(model, 0.5)
    before = copy.deepcopy(average.values)
    for value in (torch.inf, torch.nan):
        model.log_ema.fill_(value)
        model.mean[0] = value
        average.update(rate)
        assert all(torch.equal(average.values[k], v) for k, v in before.items())


class Counted(TorchDispatchMode):
    """Counts operations other than views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func.overloadpacket) not in VIEWS
        return func(*args, **(kwargs or {}))


VIEWS = {f"aten.{name}" for name in ("view", "detach", "alias", "split_with_sizes", "_unsafe_view")}


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_more_buffers_need_no_more_operations(kind):
    counts = []
    for size in (1, 20):
        average = WeightAverage(nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(size))), 0.5)
        with Counted() as counted:
            average.update(kind(0.25))
        counts.append(counted.count)
    assert 0 < counts[0] == counts[1] < 20, counts


def averaged_kinds():
    def tied(model):
        model[2].weight = model[1].weight

    def copying(model):
        """A state that is not the module's own memory."""
        model[1].register_state_dict_post_hook(
            lambda m, state, prefix, local: state.update({k: v.clone() for k, v in state.items()})
        )

    def noticing(model):
        """A module that computes something from what it loads."""
        model.register_load_state_dict_post_hook(lambda m, keys: setattr(m, "loads", getattr(m, "loads", 0) + 1))

    return [lambda model: None, tied, copying, noticing]


@pytest.mark.parametrize("change", averaged_kinds(), ids=["plain", "tied", "copying", "noticing"])
def test_averaged_weights_are_loaded_as_by_load_state_dict(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    change(model)
    average = WeightAverage(model, 0.5)
    for value in average.values.values():
        value.add_(torch.randn_like(value))
    if model[1].weight is model[2].weight:
        average.values["2.weight"].copy_(average.values["1.weight"])
    other = copy.deepcopy(model)
    other.load_state_dict(average.values, strict=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with average.applied():
        assert same(model.state_dict(), other.state_dict())
    assert same(model.state_dict(), before)
    assert getattr(model, "loads", 2) == 2


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rate_of(decay, update):
    return 1 - min(decay, (1 + update) / (10 + update))


def test_the_rate_of_every_update():
    average = WeightAverage(nn.Linear(2, 1), 0.2)
    assert [average.next_rate() for _ in range(4)] == pytest.approx([0.9, 1 - 2 / 11, 0.8, 0.8], rel=1e-12)
    assert average.state_dict()["updates"] == 4


def test_updates_that_the_device_leaves_out_are_not_counted():
    average, rates = WeightAverage(nn.Linear(2, 1), 0.5), []
    for hold in (0.0, 1.0, 0.0, 0.0):
        average.hold = torch.tensor(hold)
        rates.append(float(average.rate(average.next_rate())))
    assert rates == pytest.approx([rate_of(0.5, 0), 0, rate_of(0.5, 1), rate_of(0.5, 2)], rel=1e-6)
    assert average.updates == 4 and average.state_dict()["updates"] == 3
    average.load_state_dict({"updates": 7, "values": {}})
    assert float(average.rate(average.next_rate())) == pytest.approx(rate_of(0.5, 7), rel=1e-6)


@pytest.mark.parametrize("rate", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_an_update_moves_by_its_rate(rate):
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    average = WeightAverage(model, 0.5)
    assert "0.num_batches_tracked" not in average.values and "0.running_mean" in average.values
    before = copy.deepcopy(average.values)
    with torch.no_grad():
        for parameter in (*model.parameters(), model[0].running_mean):
            parameter.add_(torch.randn_like(parameter))
    average.update(rate, moved=frozenset({"1.bias"}))
    for name, value in model.state_dict().items():
        if name in before:
            expected = before[name] + (0 if name == "1.bias" else 0.25) * (value - before[name])
            torch.testing.assert_close(average.values[name], expected)


def test_averages_of_a_checkpoint_are_taken_over():
    average, other = (WeightAverage(nn.Linear(2, 1), 0.5) for _ in range(2))
    average.next_rate()
    own = other.values["weight"]
    other.load_state_dict(average.state_dict())
    assert same(other.values, average.values) and other.updates == 1
    assert other.values["weight"] is own  # a captured graph keeps its address


def test_names_of_averages():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    average = WeightAverage(model, 0.5)
    others = [nn.Parameter(torch.zeros(1))]
    assert average.names_of([model[1].bias, model[1].weight, *others]) == ["1.bias", "0.weight", None]
