"""The dropout operation: a mask that is a hash of seed and place."""

import pytest
import torch
from torch.nn.functional import dropout as torchs_dropout

from engine.errors import EstimatorError
from engine.kernels.dropout import Dropout, cpu, dropout, reference
from engine.kernels.registry import use_backend

SIZES = (1, 2, 7, 63, 64, 65, reference.PIECE - 1, reference.PIECE, reference.PIECE + 1, 40 * reference.PIECE + 3)


def seed(value):
    return torch.tensor([value])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_kernel_equals_formula(size, dtype):
    x = torch.randn(size, dtype=dtype)
    for s in (0, 1, 2**62 + 12345, 2**40):
        assert torch.equal(cpu.apply(x, seed(s), 0.3), reference.dropout(x, seed(s), 0.3))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_mask_does_not_depend_on_threads(threads):
    x, before = torch.ones(20 * reference.PIECE + 5), torch.get_num_threads()
    expected = reference.dropout(x, seed(77), 0.5)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(cpu.apply(x, seed(77), 0.5), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_share_that_is_dropped(p):
    n = 4_000_000
    dropped = 1 - reference.keep(n, seed(5), p).double().mean()
    assert abs(dropped - p) < 5 * (p * (1 - p) / n) ** 0.5


def test_neighbours_and_seeds_are_independent():
    n, p = 2_000_000, 0.3
    a, b = (reference.keep(n, seed(s), p).double() for s in (10, 11))
    noise = 5 * p * (1 - p) / n**0.5
    for x, y in ((a, b), (a[1:], a[:-1]), (a[128:], a[:-128]), (a[reference.PIECE :], a[: -reference.PIECE])):
        assert abs((x * y).mean() - x.mean() * y.mean()) < noise


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradient_goes_through_the_same_mask(backend):
    x = torch.randn(50, 70, dtype=torch.float64, requires_grad=True)
    with use_backend(backend):
        torch.manual_seed(3)
        y = dropout(x, 0.4)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    kept = y != 0
    torch.testing.assert_close(grad, kept.double() / 0.6)
    torch.testing.assert_close(y, torch.where(kept, x / 0.6, 0.0))


def test_gradcheck():
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)

    def run(x):
        torch.manual_seed(1)
        return dropout(x, 0.5)

    assert torch.autograd.gradcheck(run, x)


def test_non_contiguous_input():
    x = torch.randn(30, 40).T
    torch.testing.assert_close(cpu.apply(x, seed(9), 0.2), reference.dropout(x.contiguous(), seed(9), 0.2))


def test_seeded_by_torchs_generator():
    x = torch.ones(1000)
    torch.manual_seed(4)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(4)
    assert torch.equal(dropout(x, 0.5), first) and torch.equal(dropout(x, 0.5), second)
    assert not torch.equal(first, second)


def test_what_torch_does_itself():
    x = torch.randn(100, dtype=torch.float16)
    torch.manual_seed(0)
    ours = dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(ours, torchs_dropout(x, 0.5))
    x = x.float()
    assert dropout(x, 0.0) is x and dropout(x, 0.5, training=False) is x
    assert torch.equal(dropout(x, 1.0), torch.zeros(100))
    with pytest.raises(EstimatorError, match="a probability from 0 to 1"):
        dropout(x, 1.5)


def test_module_is_a_dropout():
    module = Dropout(0.5)
    assert isinstance(module, torch.nn.Dropout) and (module(torch.ones(1000)) == 0).any()
    module.eval()
    assert torch.equal(module(torch.ones(10)), torch.ones(10))


def test_registered():
    torch.library.opcheck(torch.ops.engine.dropout.default, (torch.randn(5, 7), seed(3), 0.3))


def test_compiles_without_graph_breaks():
    x = torch.randn(64, 32, requires_grad=True)

    def run(x):
        return dropout(x * 2, 0.5).square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(x), x)
    dropped = (grad == 0).float().mean()
    assert 0.4 < dropped < 0.6


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda dtype: None)
    x = torch.randn(100, requires_grad=True)
    (dropout(x, 0.5).sum()).backward()
    assert 0.2 < (x.grad == 0).float().mean() < 0.8
    assert torch.equal(cpu.apply(x.detach(), seed(3), 0.5), reference.dropout(x.detach(), seed(3), 0.5))
