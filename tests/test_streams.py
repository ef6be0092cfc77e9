"""Work side by side: which streams it is queued on, in which order, and what no device but CUDA notices."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import streams
from engine.streams import run_parallel


class Stream:
    """Stands in for a CUDA stream and writes down what is asked of it."""

    def __init__(self, name, log):
        self.name, self.log, self.device, self.device_index, self.cuda_stream = name, log, "cuda:0", 0, hash(name)

    def record_event(self):
        self.log.append(f"event on {self.name}")
        return self.name

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for event of {event}")

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def gpu(monkeypatch):
    """Streams that exist in name only: `log` of what happens on them, and `tensor()`, one on CUDA without data."""
    log, current = [], []
    current.append(Stream("main", log))

    @contextmanager
    def stream(side):
        current.append(side)
        yield
        current.pop()

    def record_stream(tensor, on):
        log.append(f"{tensor.title} used on {on.name}")

    names = iter("abcdefgh")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"side {next(names)}", log))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    monkeypatch.setattr(streams, "_streams", {})
    monkeypatch.setattr(streams, "ENABLED", True)

    def tensor(name):
        with FakeTensorMode():
            made = torch.empty(2, device="cuda")
        made.title = name
        return made

    def call(name):
        log.append(f"{name} on {current[-1].name}")
        return tensor(f"result of {name}")

    return SimpleNamespace(log=log, tensor=tensor, call=call)


def test_the_first_stays_and_the_others_fork_and_join(gpu):
    x, y = gpu.tensor("x"), gpu.tensor("y")
    results = run_parallel([(lambda x: gpu.call("one"), (x,)), (lambda many, n: [gpu.call("two")], ([y], 3))])
    assert results[0].title == "result of one" and results[1][0].title == "result of two"
    assert gpu.log == [
        "event on main", "one on main", "side a waits for event of main", "y used on side a", "two on side a",
        "main waits for side a", "result of two used on main",
    ]  # fmt: skip


def test_streams_are_kept_and_nested_ones_are_others(gpu):
    x = gpu.tensor("x")

    def both(x):
        return run_parallel([(lambda x: gpu.call("left"), (x,)), (lambda x: gpu.call("right"), (x,))])

    for _ in range(2):
        gpu.log.clear()
        run_parallel([(both, (x,)), (both, (x,))])
        calls = [line for line in gpu.log if line.startswith(("left", "right"))]
        assert calls == ["left on main", "right on side a", "left on side a", "right on side b"]
        assert gpu.log[-3:] == ["main waits for side a", "result of left used on main", "result of right used on main"]


def test_it_is_off_but_for_capture(gpu, monkeypatch):
    monkeypatch.setattr(streams, "ENABLED", None)
    x = gpu.tensor("x")
    calls = [(lambda x: gpu.call("one"), (x,)), (lambda x: gpu.call("two"), (x,))]
    run_parallel(calls)
    assert gpu.log == ["one on main", "two on main"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for capturing in (False, True):
        gpu.log.clear()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
        run_parallel(calls)
        assert ("two on side a" in gpu.log) == capturing


def test_other_devices_call_in_order(monkeypatch):
    monkeypatch.setattr(streams, "ENABLED", True)
    x, seen = torch.ones(1), []

    def add(x, n):
        seen.append(n)
        return x + n

    assert [float(r) for r in run_parallel([(add, (x, 1)), (add, (x, 2))])] == [2, 3] and seen == [1, 2]
    assert run_parallel([(len, ("ab",))]) == [2] and run_parallel([]) == []
