"""Sums that are read late, and averaged weights that take the place of a model's own."""

import copy

import pytest
import torch
from torch import nn

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
