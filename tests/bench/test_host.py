"""What the host does in an epoch of replayed graphs is on record, and between two stages it never waits for the GPU."""

import pytest
import torch

from bench import guard, host
from engine.step.static import StaticPasses


@pytest.fixture(scope="module")
def found():
    return host.outside_of_graphs(host.tiny)


def test_counters_are_those_on_record(found):
    recorded = guard.load()
    if others := guard.other_environment(recorded):
        pytest.skip("the counters hold elsewhere: " + ", ".join(others))
    lines = guard.host_differences(recorded["host"], found)
    assert not lines, "\n".join([*lines, 'if meant: python -m bench.guard --update --reason "..."'])


def test_nothing_waits_within_a_stage_or_before_stage_2(found):
    assert [found["waits"][name] for name in ("begin to collect", "within stages", "stage1 to stage2")] == [0, 0, 0]


def test_a_planted_wait_is_seen(found, monkeypatch):
    original = StaticPasses._begin_sums

    def begin_sums(self, position):
        float(torch.ones(1, device=self.device))
        return original(self, position)

    monkeypatch.setattr(StaticPasses, "_begin_sums", begin_sums)
    planted = host.outside_of_graphs(host.tiny)["waits"]
    more = {name for name, number in planted.items() if number != found["waits"][name]}
    assert more == {"begin to collect", "collect to stage1", "within stages", "stage1 to stage2", "evaluate"}
    assert planted["stage1 to stage2"] == 1


def test_a_replayed_batch_takes_few_calls():
    """Of functions, whatever the number of parameters; a walk over the parameters takes hundreds."""
    called = host.calls_a_batch(host.tiny)
    assert set(called) == {"collect", "stage1", "stage2"} and max(called.values()) <= 40, called
