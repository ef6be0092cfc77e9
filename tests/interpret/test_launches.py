"""Declared launches against those of the host functions, which run on CPU tensors in triton's interpreter.

Counted are launches of Triton kernels, and torch's own operations that compute. One of these is one launch, except for
a product that begins with a bias: torch copies the bias first.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.interpret import device
from tests.interpret.guards import require_interpreter

require_interpreter()

from engine.kernels import dispatch, registry
from engine.kernels.cmi import classifiers
from engine.kernels.critics import slabs, triton
from tests.kernels.critic_cases import concat, grouped, tensors
from tests.kernels.test_knn_cmi_op import problem

NOTHING = ("aten::empty", "aten::new_empty", "aten::_unsafe_view")


class Launches(TorchDispatchMode):
    """Counts while entered. What the kernels compute matters to `compute` alone; other tests compare it."""

    def __init__(self, compute: bool = False) -> None:
        super().__init__()
        self.count, self.compute = 0, compute

    def __enter__(self) -> Launches:
        self.noticing = device.launches_noticed(self._one, self.compute)
        self.noticing.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.noticing.__exit__(*exception)
        return super().__exit__(*exception)

    def _one(self) -> None:
        self.count += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, returns = func._schema.name, [r.alias_info for r in func._schema.returns]
        views = returns and all(r is not None and not r.is_write for r in returns)
        if not views and not name.startswith(NOTHING):
            self.count += 2 if name == "aten::baddbmm" else 1
        return func(*args, **(kwargs or {}))


def test_the_counter_counts():
    x, w, b = torch.ones(2, 3, 4), torch.ones(2, 4, 5), torch.ones(2, 1, 5)
    with Launches() as counter:
        y = torch.empty(3).fill_(1).view(1, 3).expand(2, 3)
    assert counter.count == 1 and y.shape == (2, 3)
    with Launches() as counter:
        x.relu_().mT.unbind()
        torch.baddbmm(b, x, w)
        torch.stack([x, x])
    assert counter.count == 4


def check(name: str, *args: Any, compute: bool = False) -> Any:
    declared = registry.launches(name, *args)
    with Launches(compute) as counter:
        found = registry._operations[name].cuda(*args)
    assert counter.count == declared, f"{name} launches {counter.count}, {declared} declared"
    return found


WANTED = [(True, True), (True, False), (False, True)]


@pytest.mark.parametrize("algorithm", ["plain", "fused"])
@pytest.mark.parametrize("layers", [0, 2])
def test_towers(monkeypatch, algorithm, layers):
    monkeypatch.setitem(dispatch._override, "critic_towers", algorithm)
    inputs, first, rest = (tensors(part) for part in grouped(5, (3, 4), (2, 2), 8, 4, layers, torch.float32))
    numbers, weights = ([0, 3], [1, 2]), (first[::2], rest[::2])
    out, state = check("critics_mlp_forward", inputs[0], inputs[1:], first, rest)
    for wanted in WANTED:
        check("critics_mlp_backward", torch.ones_like(out), inputs, *weights, state, *wanted)
    arguments = inputs[0], inputs[1:], first, rest, *numbers
    check("critics_grouped_infonce", *arguments, False)
    losses, state = check("critics_grouped_infonce", *arguments, True)
    arguments = torch.ones_like(losses), inputs, *weights, state, *numbers
    for wanted in WANTED:
        check("critics_grouped_infonce_backward", *arguments, *wanted)


def test_flagship():
    """Five critics of four layers with InfoNCE, forward and backward: ten launches."""
    inputs, first, rest = (tensors(part) for part in grouped(3, (2,) * 4, (3, 3, 2, 2), 4, 4, 2, torch.float32))
    numbers = [1, 3, 4, 6, 9], [0, 2, 5, 7, 8]
    forward = registry.launches("critics_grouped_infonce", inputs[0], inputs[1:], first, rest, *numbers, True)
    arguments = torch.ones(5), inputs, first[::2], rest[::2], torch.empty(0), *numbers, False, True
    assert forward + registry.launches("critics_grouped_infonce_backward", *arguments) == 10


@pytest.mark.parametrize("preferred", ["slabs", "half_slabs", "fused"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_concat_critic(monkeypatch, preferred, layers):
    monkeypatch.setitem(dispatch._override, "concat_critic", preferred)
    monkeypatch.setattr(triton, "SLAB", (128, 128))
    for numbers in (100, 4000):  # slabs of parts of a row, and of all pairs
        monkeypatch.setattr(slabs, "SLAB_NUMBERS", numbers)
        x, y, weights = concat(10, 17, (3, 4), 8, layers, torch.float32)
        weights = tensors(weights)
        check("critics_concat_forward", x, y, weights)
        for wanted in WANTED:
            check("critics_concat_backward", torch.ones(10, 17), x, y, weights, *wanted)
        for wanted in (*WANTED, (False, False)):
            check("critics_concat_infonce", x[:10], y, weights, False, *wanted)


def test_no_pairs(monkeypatch):
    for preferred in ("slabs", "fused"):
        monkeypatch.setitem(dispatch._override, "concat_critic", preferred)
        x, y, weights = concat(0, 5, (3, 4), 8, 2, torch.float32)
        weights = tensors(weights)
        check("critics_concat_forward", x, y, weights)
        found = check("critics_concat_backward", torch.ones(0, 5), x, y, weights, True, True, compute=True)
        assert not found.any()


@pytest.mark.parametrize("few", [0, 100])
@pytest.mark.parametrize("widths", [(4, 4, 1), (7, 3, 2)])
def test_classifiers(monkeypatch, few, widths):
    monkeypatch.setattr(classifiers, "FEW_ROWS", few)
    layers, joint, slots, product, k = problem(widths, 5, 3, 2, max(widths), 6, 1, torch.float32)
    (first, bias), *rest = layers
    rest, places = [t for layer in rest for t in layer], [s for three in slots for s in three]
    rows = [t for three in product for t in three]
    logits = check("cmi_forward", first, bias, rest, joint, places, rows, k)
    of_joint, of_product = (torch.ones_like(t) for t in logits[:2])
    for other in (of_product, None):
        for wanted in WANTED:
            arguments = of_joint, other, first, rest[::2], joint, places, rows, k, logits[2:]
            check("cmi_backward", *arguments, *wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reading(dtype):
    joint, product, grad = torch.ones(2, 5, dtype=dtype), torch.ones(2, 4, dtype=dtype), torch.ones(2, dtype=dtype)
    check("cmi_read", joint, product, 9.0)
    for which in range(3):
        for grads in ((grad, grad), (grad, None), (None, grad)):
            check("cmi_read_backward", joint, product, *grads, which, 9.0)
