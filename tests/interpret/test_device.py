"""What lets the kernels' cases run on a GPU as they are; the device meta stands in for one."""

import pytest
import torch

from tests.interpret import device
from tests.interpret.guards import require_interpreter

require_interpreter()

from engine.kernels import registry
from engine.kernels.cmi import batched
from engine.kernels.registry import use_backend

pytestmark = pytest.mark.skipif(device.on_gpu(), reason="of the help itself: it needs no GPU")


@pytest.fixture
def elsewhere(monkeypatch):
    monkeypatch.setenv(device.VARIABLE, "meta")
    with device.tests_run_there():
        yield


def test_tensors_are_made_there(elsewhere):
    made = (torch.zeros(3), torch.tensor([1.0]), torch.arange(3), torch.full((2,), 1.0), torch.linspace(0, 1, 3))
    assert all(t.is_meta for t in made)
    generator = torch.Generator().manual_seed(0)
    assert torch.randn(3, generator=generator).is_meta and torch.randperm(3, generator=generator).is_meta
    assert torch.zeros(3, device="cpu").is_cpu


def test_random_tensors_are_those_of_the_cpu(monkeypatch):
    """The generator of the CPU draws them, whatever the device."""
    expected = torch.randn(4, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(device, "device", lambda: torch.device("cpu"))
    found = device._made_there(torch.randn)(4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found, expected)


def test_host_functions_take_copies(monkeypatch):
    moved = []
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda t: t.dtype != torch.float64))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: moved.append(t) or t.float())
    found = device.on_the_host(lambda a, b: [a + 1, b])(torch.ones(2, dtype=torch.float64), 3)
    assert len(moved) == 1 and found[1] == 3 and torch.equal(found[0], torch.full((2,), 2.0))


def test_the_backend_of_the_cpu_runs_there_too(elsewhere):
    with use_backend("cpu"):
        assert registry.backend_for(torch.zeros(1)) == "cpu"
    assert batched.read.__wrapped__.__module__ == "engine.kernels.cmi.batched"


def test_everything_is_as_before_afterwards():
    assert registry.backend_for(torch.zeros(1)) == "triton" and not hasattr(batched.read, "__wrapped__")
    assert torch.zeros(1).is_cpu


def test_sameness_is_bitwise_here_and_to_rounding_on_a_gpu(monkeypatch):
    a = torch.tensor([1.0, -3.0])
    near, far = a * (1 + 2**-23), a * 1.001
    assert device.same(a, a) and not device.same(a, near)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    assert device.same(a, near) and not device.same(a, far)


def test_where_there_is_no_gpu_the_reason_is_given(monkeypatch):
    monkeypatch.setenv(device.VARIABLE, "cuda")
    assert "exclude each other" in device.missing()
    monkeypatch.delenv("TRITON_INTERPRET")
    if not torch.cuda.is_available():
        assert "GPU" in device.missing()
