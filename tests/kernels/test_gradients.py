"""Gradients of gradients, torch.func and forward-mode AD through every operation: right, or refused in one line."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad, gradgradcheck

from engine.errors import ConfigError
from engine.kernels import infonce, mi_lower_bound, registry, use_backend
from engine.kernels.dropout.op import dropout
from tests.kernels.critic_cases import draw
from tests.kernels.differentiable import bare_cases, cases, functions

CASES, BARE = cases(), bare_cases()
# whose gradients have gradients themselves: torch's own operations, or linear ones
SECOND = ("dropout", "infonce, own negatives", "infonce, own negatives decoupled")
REMEDY = r'use_backend\("reference"\)'


def fresh(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def penalty(function, leaves: list[Tensor]) -> Tensor:
    """What a gradient penalty adds to a loss."""
    found = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True, allow_unused=True)
    return sum(g.square().sum() for g in found if g is not None)


class TestGradientsOfGradients:
    @pytest.mark.parametrize("name", [*(n for n in CASES if n not in SECOND), *BARE])
    def test_refused_in_one_line(self, name: str):
        function, tensors = (CASES | BARE)[name]
        leaves = fresh(tensors)
        loss = function(*leaves).sum()
        added = penalty(function, leaves)
        for total in (added, loss + added):  # beside a loss, an ignored penalty would not even be noticed
            with pytest.raises(ConfigError, match=REMEDY) as caught:
                total.backward(retain_graph=True)
            assert "\n" not in str(caught.value)
        firsts = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        for leaf in (x for x, g in zip(leaves, firsts, strict=True) if g is not None):
            # of one alone: torch leaves out what no path leads to
            with pytest.raises(ConfigError, match=REMEDY):
                torch.autograd.grad(added, leaf, retain_graph=True, allow_unused=True)

    @pytest.mark.parametrize("name", [*(n for n in CASES if n not in SECOND), *BARE])
    def test_refused_behind_other_operations(self, name: str):
        """The same where the tensors are no leaves, but made of others."""
        function, tensors = (CASES | BARE)[name]
        leaves = fresh(tensors)
        made = [2 * t for t in leaves]
        firsts = torch.autograd.grad(function(*made).sum(), made, retain_graph=True, allow_unused=True)
        for asked in (n for n, g in enumerate(firsts) if g is not None):
            with pytest.raises(ConfigError, match=REMEDY):
                added = penalty(function, made)
                torch.autograd.grad(added, leaves[asked], retain_graph=True, allow_unused=True)
            with pytest.raises(ConfigError, match=REMEDY):
                added = penalty(function, made)
                torch.autograd.grad(added, made[asked], retain_graph=True, allow_unused=True)

    # MINE's moving average counts as a constant in all its gradients, and not in numerical ones
    @pytest.mark.parametrize("name", [n for n in CASES if "mine" not in n])
    def test_right_by_the_formulas(self, name: str):
        function, tensors = CASES[name]
        with use_backend("auto" if name in SECOND else "reference"):
            # of piecewise linear functions a second gradient is zero, which numerical ones are too
            assert gradgradcheck(function, fresh(tensors), raise_exception=True, rtol=1e-4, atol=1e-5)

    def test_a_gradient_penalty_is_that_of_cross_entropy(self):
        q, k = fresh([draw(16, 8, seed=0), draw(16, 8, seed=1)])
        with use_backend("reference"):
            found = torch.autograd.grad(penalty(infonce, [q, k]), (q, k))
        expected = penalty(lambda q, k: F.cross_entropy(q @ k.t(), torch.arange(16)), [q, k])
        for f, e in zip(found, torch.autograd.grad(expected, (q, k)), strict=True):
            torch.testing.assert_close(f, e)

    def test_first_gradients_are_the_same_with_a_graph(self):
        for function, tensors in (CASES | BARE).values():
            leaves = fresh(tensors)
            plain = torch.autograd.grad(function(*leaves).sum(), leaves, allow_unused=True)
            kept = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True, allow_unused=True)
            for p, g in zip(plain, kept, strict=True):
                assert (p is None) == (g is None) and (p is None or torch.equal(p, g))

    def test_gradients_kept_with_a_graph_can_be_clipped(self):
        q, k = fresh([draw(6, 4, seed=0), draw(6, 4, seed=1)])
        with pytest.warns(UserWarning, match="create_graph"):
            infonce(q, k).backward(create_graph=True)
        torch.nn.utils.clip_grad_norm_([q, k], 1e-3)
        assert torch.stack([q.grad, k.grad]).norm() <= 1.001e-3

    def test_dropout_masks_all_orders_alike(self):
        x = torch.ones(50, requires_grad=True)
        y = dropout(x, 0.5)
        (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        kept = y != 0
        # y = 2 x where kept: d(8 x^3) = 24 x^2, and 48 x after that
        assert torch.equal(first, torch.where(kept, 24.0, 0.0)) and torch.equal(second, torch.where(kept, 48.0, 0.0))


def engine_functions_of(output: Tensor) -> set[str]:
    """Names of the engine's autograd.Functions in the graph of `output`."""
    own, found, left = {f.__name__ for f in functions()}, set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is not None:
            found.add(node.name().removesuffix("Backward"))
            left += [n for n, _ in node.next_functions]
    return found & own


# These need several processes: tests/ranks has their cases.
OVER_RANKS = {"RowLosses", "SigmoidRowLosses", "BoundOverRanks", "_Gather", "_Scatter", "_Sum"}

# These lie between cuDNN's recurrences, and are differentiated within _Governed, which has a case and refuses.
WITHIN_GOVERNED = {"Turn", "Join", "Norm"}


def test_every_function_has_a_case():
    """An autograd.Function that the engine gains is refused or differentiated twice above."""
    reached: set[str] = set()
    for function, tensors in (CASES | BARE).values():
        reached |= engine_functions_of(function(*fresh(tensors)))
    # _Last is what refuses
    assert {f.__name__ for f in functions()} == reached | WITHIN_GOVERNED | {"_Last"} | OVER_RANKS


def test_every_function_is_told_apart_by_its_backward():
    twice = {"_Dropout", "_Last", "OwnScores", "_Gather", "_Scatter", "_Sum"} | WITHIN_GOVERNED
    for function in functions():
        assert (function.__name__ in twice) != getattr(function.backward, "differentiable_once", False), function


def test_no_bare_operation_loses_a_gradient():
    """torch.ops.engine.* have no gradients; torch would only warn and go on without."""
    called: dict[str, tuple] = {}
    run, names = registry._run, {id(o): n for n, o in registry._operations.items()}

    def spy(operation, *args):
        called.setdefault(names[id(operation)], args)
        return run(operation, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run", spy)
        for function, tensors in CASES.values():
            function(*fresh(tensors)).sum().backward()
    assert len(called) > 20
    for name, args in called.items():
        first = next(i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point())
        given = args[first].detach().requires_grad_()
        found = getattr(torch.ops.engine, name)(*args[:first], given, *args[first + 1 :])
        outputs = [found] if isinstance(found, Tensor) else list(found)
        out = next(o for o in outputs if o.is_floating_point() and o.numel())
        with pytest.raises(ConfigError, match=f"torch.ops.engine.{name}:"):
            out.sum().backward()
    for name in registry._operations:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"engine::{name}", "Autograd"), name


class TestTransforms:
    @pytest.mark.parametrize("name", CASES)
    def test_grad(self, name: str):
        function, tensors = CASES[name]
        numbers = tuple(range(len(tensors)))
        found = torch.func.grad(lambda *t: function(*t).sum(), argnums=numbers)(*tensors)
        leaves = fresh(tensors)
        with use_backend("reference" if name != "dropout" else "auto"):
            expected = torch.autograd.grad(function(*leaves).sum(), leaves, allow_unused=True)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, torch.zeros_like(f) if e is None else e)

    @pytest.mark.parametrize("name", CASES)
    def test_vmap(self, name: str):
        """Over the first tensor: as one call after the other."""
        function, (first, *rest) = CASES[name]
        batch = torch.stack([first, 2 * first, first + 1])
        found = torch.func.vmap(lambda t: function(t, *rest), randomness="same")(batch)
        torch.testing.assert_close(found, torch.stack([function(t, *rest) for t in batch]))

    @pytest.mark.parametrize("name", CASES)
    def test_forward_mode(self, name: str):
        """A directional derivative, by torch.func.jvp and by dual tensors, is that of the gradients."""
        function, tensors = CASES[name]
        tangents = [draw(*t.shape, seed=50 + i) for i, t in enumerate(tensors)]
        leaves = fresh(tensors)
        out = function(*leaves)
        weights = draw(*out.shape, seed=99)
        grads = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
        expected = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True) if g is not None)
        value, by_func = torch.func.jvp(function, tuple(tensors), tuple(tangents))
        torch.testing.assert_close(value, out.detach())
        torch.testing.assert_close((by_func * weights).sum(), expected.detach())
        with forward_ad.dual_level():
            dual = function(*map(forward_ad.make_dual, tensors, tangents))
            torch.testing.assert_close((forward_ad.unpack_dual(dual).tangent * weights).sum(), expected.detach())

    @pytest.mark.parametrize("name", ["infonce", "bound smile", "concat infonce", "cmi", "cube_mix", "recurrence"])
    def test_jacrev_and_jacfwd(self, name: str):
        function, (first, *rest) = CASES[name]
        with use_backend("reference"):
            expected = torch.autograd.functional.jacobian(lambda t: function(t, *rest), first)
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(transform(lambda t: function(t, *rest))(first), expected)

    @pytest.mark.parametrize(
        "name", ["infonce, symmetric", "infonce, MoCo", "towers", "critics", "concat infonce", "cmi", "cube_mix"]
    )
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    def test_jit_trace(self, name: str):
        """A trace computes with the tensors that it is given later, and keeps none of the first ones' results."""
        function, tensors = CASES[name]
        traced = torch.jit.trace(function, tuple(tensors), check_trace=False)
        others = [1.5 * t for t in tensors]
        torch.testing.assert_close(traced(*others), function(*others))

    def test_hessian(self):
        q, k = draw(4, 3, seed=0), draw(4, 3, seed=1)
        found = torch.func.hessian(lambda q: infonce(q, k))(q)
        expected = torch.func.hessian(lambda q: F.cross_entropy(q @ k.t(), torch.arange(4)))(q)
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("name", [n for n in CASES if n not in SECOND])
    def test_batches_of_gradients_are_refused(self, name: str):
        function, tensors = CASES[name]
        leaves = fresh(tensors)
        out = function(*leaves)
        with pytest.raises(ConfigError, match=REMEDY):
            torch.autograd.grad(out, leaves[0], torch.stack([torch.ones_like(out)] * 2), is_grads_batched=True)

    @pytest.mark.parametrize("name", SECOND)
    def test_batches_of_gradients(self, name: str):
        function, tensors = CASES[name]
        leaves = fresh(tensors)
        out = function(*leaves)
        upstream = torch.stack([torch.ones_like(out), draw(*out.shape, seed=5)])
        (found,) = torch.autograd.grad(out, leaves[0], upstream, is_grads_batched=True, retain_graph=True)
        expected = [torch.autograd.grad(out, leaves[0], u, retain_graph=True)[0] for u in upstream]
        torch.testing.assert_close(found, torch.stack(expected))

    def test_a_backend_that_was_asked_for_says_that_it_cannot(self):
        q = draw(4, 3, seed=0)
        with use_backend("cpu"), pytest.raises(ConfigError, match=REMEDY):
            torch.func.grad(lambda q: infonce(q, q))(q)

    def test_nothing_is_left_behind(self):
        q = draw(4, 3, seed=0).requires_grad_()
        torch.func.grad(lambda q: infonce(q, q))(q)
        with forward_ad.dual_level():
            assert registry.backend_for(q) == "reference"
        assert registry.backend_for(q) == "cpu"
        assert engine_functions_of(mi_lower_bound(q, q, bound="dv")) == {"Bound"}
