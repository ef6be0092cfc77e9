"""All weights cast at once: autocast's numbers, in one operation each way."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from engine.model.lowered import autocast_type, lower


class Names(TorchDispatchMode):
    """The names of the operations that were dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 3))


def lowered_linears(module, dtype):
    """Weights and biases of the module's Linears in `dtype`, by their names."""
    names = [f"{n}.{own}" for n, m in module.named_modules() if type(m) is nn.Linear for own, _ in m.named_parameters()]
    return dict(zip(names, lower([(module.get_parameter(name),) for name in names], dtype), strict=True))


def gradients(module, run):
    module.zero_grad()
    torch.manual_seed(1)
    y = run(torch.randn(5, 6))
    y.float().square().sum().backward()
    return [y, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_autocasts(dtype):
    module = network()

    def ours(x):
        with torch.autocast("cpu", dtype):
            return functional_call(module, lowered_linears(module, autocast_type(x.device)), (x,))

    def autocasts(x):
        with torch.autocast("cpu", dtype):
            return module(x)

    found = gradients(module, ours)
    assert all(g.dtype == torch.float32 for g in found[1:])
    for f, e in zip(found, gradients(module, autocasts), strict=True):
        assert torch.equal(f, e)


def test_one_copy_each_way():
    module = network()
    with Names() as forward:
        lowered = lowered_linears(module, torch.bfloat16)
    assert list(lowered) == ["0.weight", "0.bias", "2.weight", "4.weight", "4.bias"]
    loss = sum(t.float().sum() for t in lowered.values())
    with Names() as backward:
        loss.backward()
    assert forward.names.count("_foreach_copy_") == backward.names.count("_foreach_copy_") == 1
    assert "_to_copy" not in forward.names and "clone" not in backward.names


def test_a_changed_parameter_is_seen():
    module = network()
    before = lowered_linears(module, torch.bfloat16)["0.weight"]
    with torch.no_grad():
        module[0].weight.add_(1)
    after = lowered_linears(module, torch.bfloat16)["0.weight"]
    assert torch.equal(after, module[0].weight.bfloat16()) and not torch.equal(before, after)


def test_groups_lie_end_to_end():
    a, b, c = (torch.randn(n, 3, requires_grad=True) for n in (2, 4, 1))
    ab, whole = lower([(a, b), (c,)], torch.bfloat16)
    assert torch.equal(ab, torch.cat([a, b]).bfloat16()) and torch.equal(whole, c.bfloat16())
    slope = torch.randn(6, 3).bfloat16()
    (ab * slope).sum().backward()
    assert torch.equal(torch.cat([a.grad, b.grad]), slope.float()) and c.grad is None


def test_a_tensor_of_the_type_is_itself():
    a, b = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    one, two = lower([(a,), (a, b)], torch.float32)
    assert one is a and torch.equal(two, torch.cat([a, b]))


def test_frozen_ones_get_no_gradient():
    a, b, c = (torch.randn(2, 3, requires_grad=need) for need in (True, False, False))
    one, two = lower([(a, b), (c,)], torch.bfloat16)
    assert one.requires_grad and not two.requires_grad
    one.sum().backward()
    assert a.grad is not None and b.grad is None


def test_gradcheck():
    tensors = [torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (2, 3, 1)]
    assert torch.autograd.gradcheck(lambda a, b, c: lower([(a, b), (c,), (a, a)], torch.float64)[0:3], tensors)


def test_compiles_without_graph_breaks():
    module = network()

    def run(x):
        return functional_call(module, lowered_linears(module, torch.bfloat16), (x.bfloat16(),)).float()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for f, e in zip(gradients(module, compiled), gradients(module, run), strict=True):
        torch.testing.assert_close(f, e)


def test_autocasts_type():
    cpu = torch.device("cpu")
    assert autocast_type(cpu) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_type(cpu) == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert autocast_type(cpu) is None
