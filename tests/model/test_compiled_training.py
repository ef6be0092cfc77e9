"""Modules that read a buffer and update it in one forward pass: compiled, gradients stay right; run again, refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine import MIEstimator
from engine.errors import ConfigError
from engine.kernels import KeyQueue, MILowerBound, infonce
from engine.model.custom_critics import LikelihoodCritic
from engine.model.neighbour_club import NeighbourCLUB
from engine.model.stratified import StratifiedCLUB

ROWS = 12


class Mine(nn.Module):
    """MINE of embeddings that a layer gives."""

    def __init__(self):
        super().__init__()
        self.layer, self.bound = nn.Linear(4, 4), MILowerBound("mine")

    def forward(self, x, y):
        return self.bound(self.layer(y), x)


class Queue(nn.Module):
    """MoCo: the queue is read, and then takes the keys of the batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.queue = nn.Linear(4, 4), KeyQueue(16, 4)

    def forward(self, x, y):
        loss = infonce(self.layer(y), x, negatives=self.queue.keys(), in_batch=False)
        self.queue.push(x.detach())
        return loss


class Of(nn.Module):
    """One number that holds value and loss of an estimator."""

    def __init__(self, estimator: nn.Module):
        super().__init__()
        self.estimator = estimator

    def forward(self, x, y):
        conditional = not isinstance(self.estimator, MIEstimator)
        more = (torch.arange(ROWS)[:, None].remainder(2).float(),) if conditional else ()
        estimate = self.estimator(x, y, *more)
        return estimate.surrogate + estimate.loss.sin()


CASES = {
    **{b: lambda b=b: Of(MIEstimator(4, 4, bound=b, hidden=8)) for b in ("club", "club_sample", "l1out", "ba", "mine")},
    "mine, concat": lambda: Of(MIEstimator(4, 4, bound="mine", critic="concat", hidden=8)),
    "strata": lambda: Of(StratifiedCLUB(4, 4, 2, hidden=8)),
    "neighbours": lambda: Of(NeighbourCLUB(4, 4, 1, hidden=8)),
    "bound": Mine,
    "queue": Queue,
    "likelihood critic": lambda: Of(MIEstimator(4, 4, critic=LikelihoodCritic(4, 4, hidden=8))),
}


@pytest.mark.parametrize("name", CASES)
def test_three_compiled_steps_are_those_of_eager_mode(name: str):
    torch.manual_seed(0)
    eager = CASES[name]()
    other = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x = torch.randn(ROWS, 4)
        y = x + torch.randn(ROWS, 4) + 2  # far from what the buffers begin with
        found = []
        for module, run in ((eager, eager), (other, compiled)):
            leaves = [x.clone().requires_grad_(), y.clone().requires_grad_(), *module.parameters()]
            value = run(*leaves[:2])
            found.append([value, *torch.autograd.grad(value, leaves, allow_unused=True), *module.buffers()])
        for expected, actual in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_pass_that_checkpoint_runs_again_is_refused(name: str, reentrant: bool):
    """It read what the first one had updated, and gave gradients of other numbers."""
    module, (x, y) = CASES[name](), torch.randn(2, ROWS, 4)
    value = checkpoint(module, x.requires_grad_(), y.requires_grad_(), use_reentrant=reentrant)
    with pytest.raises(ConfigError, match="outside of checkpoint and of hooks"):
        value.backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["club", "bound", "queue"])
def test_checkpoint_of_a_compiled_module_is_refused(name: str, reentrant: bool):
    torch._dynamo.reset()
    module, (x, y) = torch.compile(CASES[name](), backend="aot_eager"), torch.randn(2, ROWS, 4)
    value = checkpoint(module, x.requires_grad_(), y.requires_grad_(), use_reentrant=reentrant)
    with pytest.raises(ConfigError, match="while a backward pass runs"):
        value.backward()


@pytest.mark.parametrize("name", ["club", "bound", "queue"])
def test_a_compiled_checkpoint_is_refused(name: str):
    torch._dynamo.reset()
    module, (x, y) = CASES[name](), torch.randn(2, ROWS, 4)

    @torch.compile(backend="aot_eager")
    def again(x, y):
        return checkpoint(module, x, y, use_reentrant=False)

    value = again(x.requires_grad_(), y.requires_grad_())
    with pytest.raises(ConfigError, match="while a backward pass runs"):
        value.backward()


def test_a_pass_in_a_hook_is_refused():
    module, (x, y) = Mine(), torch.randn(2, ROWS, 4)
    x.requires_grad_().register_hook(lambda _: module(x.detach(), y))
    with pytest.raises(ConfigError, match="outside of checkpoint and of hooks"):
        x.sum().backward()


@pytest.mark.parametrize("name", [n for n in CASES if n != "queue"])
def test_checkpoint_of_a_module_in_eval_mode(name: str):
    module, (x, y) = CASES[name](), torch.randn(2, ROWS, 4)
    module(x, y)
    x, y = x.requires_grad_(), y.requires_grad_()
    leaves = [x, y, *module.eval().parameters()]
    found = [
        torch.autograd.grad(value, leaves, allow_unused=True)
        for value in (module(x, y), checkpoint(module, x, y, use_reentrant=False))
    ]
    torch.testing.assert_close(*found)


def test_keys_that_are_read_outside_of_checkpoint():
    """As the error says."""
    module, (x, y) = Queue(), torch.randn(2, ROWS, 4)
    with pytest.raises(ConfigError, match=r"Read keys\(\) outside of checkpoint"):
        checkpoint(module, x, y.requires_grad_(), use_reentrant=False).backward()

    def loss(y, keys):
        return infonce(module.layer(y), x, negatives=keys, in_batch=False)

    keys = module.queue.keys()
    values = loss(y, keys), checkpoint(loss, y, keys, use_reentrant=False)
    module.queue.push(x)
    torch.testing.assert_close(*(torch.autograd.grad(v, [y, *module.layer.parameters()]) for v in values))


def test_a_compiled_queue_copies_its_keys_once():
    nodes = []

    def counted(graph, _):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    queue = KeyQueue(16, 4)
    torch.testing.assert_close(torch.compile(queue.keys, backend=counted, fullgraph=True)(), queue.stored)
    assert sum("as_read" in node for node in nodes) == 1 and not any("clone" in node for node in nodes), nodes


def test_the_operation_keeps_what_torch_asks_of_one():
    for buffer in (torch.randn(3), torch.tensor(4)):
        torch.library.opcheck(torch.ops.engine.as_read.default, (buffer, "buffer", "Wait.", True))
