"""The counters of a training step are those on record, and a planted regression of each kind is seen."""

import pytest
import torch

from bench import guard, machine
from engine.objective import Objective


@pytest.fixture(scope="module")
def counters():
    return guard.measure()


def test_counters_are_those_on_record(counters):
    recorded = guard.load()
    if others := guard.other_environment(recorded):
        pytest.skip("the counters hold elsewhere: " + ", ".join(others))
    lines = guard.differences(recorded["counters"], counters)
    assert not lines, "\n".join([*lines, 'if meant: python -m bench.guard --update --reason "..."'])


def test_counting_twice_gives_the_same(counters):
    assert guard.measure(("fast",))["fast"] == counters["fast"]


def plant(monkeypatch, regression):
    """Run `regression(features)` in every stage-1 update."""
    original = Objective.estimator_loss

    def estimator_loss(self, features, products=None):
        regression(features)
        return original(self, features, products)

    monkeypatch.setattr(Objective, "estimator_loss", estimator_loss)


REGRESSIONS = {
    # an operation that allocates nothing and multiplies nothing
    "aten_calls": lambda features: features["F"].mul_(1.0),
    # 4,000 bytes that nobody needs
    "bytes_allocated": lambda features: torch.empty(1000),
    # a product that nobody needs
    "flops": lambda features: features["F"] @ features["F"].t(),
}


@pytest.mark.parametrize("counter", REGRESSIONS)
def test_a_planted_regression_is_seen(counters, monkeypatch, counter):
    plant(monkeypatch, REGRESSIONS[counter])
    planted = guard.measure(("fast",))
    lines = guard.differences(counters, planted)
    seen = {line.split(":")[0] for line in lines}
    assert f"fast stage1 {counter}" in seen
    assert not any(line.startswith("fast stage2") for line in lines), "stage 2 was not touched"
    more = {name: planted["fast"]["stage1"][name] - counters["fast"]["stage1"][name] for name in guard.COUNTERS}
    if counter == "aten_calls":
        assert more == {"aten_calls": 1, "bytes_allocated": 0, "flops": 0}
        assert any("aten.mul_" in line for line in lines)
    elif counter == "bytes_allocated":
        assert more == {"aten_calls": 1, "bytes_allocated": 4000, "flops": 0}
    else:
        assert more["flops"] == 2 * guard.BATCH**2 * 32


def test_more_memory_in_as_many_operations_is_seen():
    sizes = []
    for size in (10, 20):
        with guard.Counters() as counters:
            torch.zeros(size).add(1).view(-1)
        sizes.append((sum(counters.operations.values()), counters.bytes))
    assert sizes == [(3, 2 * 40), (3, 2 * 80)]


def test_an_update_needs_a_reason(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(guard, "FILE", tmp_path / "guard.json")
    with pytest.raises(SystemExit) as stop:
        guard.main(["--update"])
    assert stop.value.code == 2 and "--reason" in capsys.readouterr().err
    assert not guard.FILE.exists()
    measured = {"fast": {"stage1": {"aten_calls": 3, "bytes_allocated": 5, "flops": 7, "operations": {"aten.mm": 3}}}}
    launched = {"fast": {"stage1": 11}}
    monkeypatch.setattr(guard, "measure", lambda: measured)
    monkeypatch.setattr(guard, "measure_launches", lambda: launched)
    waited = {"waits": {"stage1 to stage2": 0}}
    monkeypatch.setattr(guard, "measure_host", lambda: waited)
    assert guard.main(["--update", "--reason", "one product fewer"]) == 0
    assert guard.load()["history"][-1]["reason"] == "one product fewer"
    assert guard.main([]) == 0
    launched["fast"]["stage1"] = 12
    waited["waits"]["stage1 to stage2"] = 2
    measured["fast"]["stage1"] |= {"aten_calls": 4, "operations": {"aten.mm": 3, "aten.add": 1}}
    capsys.readouterr()
    assert guard.main([]) == 1
    out = capsys.readouterr().out
    assert "fast stage1 launches: recorded 11, found 12" in out
    assert "host, waits, stage1 to stage2: recorded 0, found 2" in out
    assert "fast stage1 aten_calls: recorded 3, found 4" in out and "aten.add 0 -> 1" in out


def test_floors_are_those_of_the_processors_instructions(monkeypatch, tmp_path):
    monkeypatch.setattr(guard, "FILE", tmp_path / "guard.json")
    for instructions, ratio in (("AVX2", 2.0), ("AVX512", 4.0), ("AVX2", 3.0)):
        monkeypatch.setattr(machine, "instructions", lambda name=instructions: name)
        monkeypatch.setattr(guard, "measured_ratio", lambda name, ratio=ratio: ratio)
        guard.update_floors("a test", ("gru",))
    assert guard.floors() == {"gru": round(guard.MARGIN * 3.0, 2)}
    monkeypatch.setattr(machine, "instructions", lambda: "AVX512")
    assert guard.floors() == {"gru": round(guard.MARGIN * 4.0, 2)}
    monkeypatch.setattr(machine, "instructions", lambda: "NEON")
    assert guard.floors() == {}
    assert guard.load()["history"][0]["changes"] == ["floor of gru, AVX2: 1.4"]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("name", guard.FLOOR_SUITES)
def test_ratios_stay_above_their_floors(name):
    floor = guard.floors().get(name)
    if floor is None:
        pytest.skip(f"no floor is on record for {machine.instructions()}: python -m bench.guard --update-floors")
    assert guard.measured_ratio(name) >= floor
