"""What holds for every operation alike: compiled whole, past torch's dispatcher in eager mode, fp32 under autocast."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import classifier_logits, cmi, cube_mix, infonce, mi_lower_bound, registry, siglip
from engine.kernels.critics.op import concat_infonce, concat_scores, grouped_infonce, grouped_mlp
from engine.kernels.knn_product import cpu as knn
from engine.kernels.recurrent import op as recurrent
from tests.kernels import critic_cases
from tests.kernels.compiled import needs_compiler
from tests.kernels.test_cube_mix_op import assert_as_good_as_torch, case

Case = tuple[Callable[..., Tensor], list[Tensor]]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return critic_cases.draw(*shape, seed=seed, dtype=torch.float32)


PRODUCT = [tuple(draw(4 if i == 0 else 2, 3, seed=10 * g + i) for i in range(3)) for g in range(2)]
LENGTH = torch.tensor([4, 2, 3])


def of_classifiers(first, rest, joint) -> Tensor:
    logits = classifier_logits(first, rest, joint, [(0, 1, 2), (2, 0, 1)], PRODUCT, 2)
    reading = cmi(*(t[..., 0] for t in logits), "dv")
    return reading.loss + reading.value


def of_cube(x: Tensor, *weights: Tensor) -> Tensor:
    return cube_mix(x, 1, *weights)


def of_recurrence(x: Tensor, *weights: Tensor) -> Tensor:
    return recurrent.bidirectional(x, LENGTH, list(weights), "gru")


def all_cases() -> dict[str, Case]:
    layers = [critic_cases.linear(2, o, i, seed=o, dtype=torch.float32) for o, i in ((5, 9), (5, 5), (1, 5))]
    classifiers = (layers[0], layers[1:], [draw(6, 3, seed=s) for s in range(3)])
    gru = torch.nn.GRU(3, 4, num_layers=1, batch_first=True, bidirectional=True)
    x, weights = case((3, 12, 2, 5), 1, 10, 9)
    single = {"dtype": torch.float32}
    return {
        "infonce": (infonce, [draw(9, 4), draw(11, 4, seed=1)]),
        "symmetric": (lambda q, k: infonce(q, k, symmetric=True), [draw(9, 4), draw(9, 4, seed=1)]),
        "labels": (lambda q, k: infonce(q, k, labels=torch.arange(9) % 4), [draw(9, 4), draw(9, 4, seed=1)]),
        "ids": (lambda q, k: infonce(q, k, row_ids=torch.arange(9) % 4, reduction="none"), [draw(9, 4), draw(9, 4)]),
        "siglip": (siglip, [draw(9, 4), draw(9, 4, seed=1)]),
        "bound": (lambda q, k: mi_lower_bound(q, k, bound="smile"), [draw(9, 4), draw(9, 4, seed=1)]),
        "scores": (lambda s: mi_lower_bound(s, bound="interpolate"), [draw(2, 9, 9)]),
        "towers": critic_cases.by_tensors(grouped_mlp, critic_cases.grouped(9, (3, 4), (2, 1), 8, 4, **single)),
        "critics": critic_cases.by_tensors(
            lambda *c: grouped_infonce(*c, [0, 3], [1, 2]), critic_cases.grouped(9, (3, 4), (2, 2), 8, 4, **single)
        ),
        "concat": critic_cases.by_tensors(concat_scores, critic_cases.concat(9, 7, (3, 4), 8, **single)),
        "concat infonce": critic_cases.by_tensors(concat_infonce, critic_cases.concat(9, 9, (3, 4), 8, **single)),
        "classifiers": critic_cases.by_tensors(of_classifiers, classifiers),
        "cube": (of_cube, [x, *weights]),
        "recurrence": (of_recurrence, [draw(3, 4, 3), *(w.detach() for w in recurrent.parameters(gru))]),
    }


CASES = all_cases()


def value_and_grads(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    return critic_cases.value_and_grads(function, leaves)


@pytest.fixture
def forgetful() -> None:
    """Several cases are one function's closures, which torch.compile would count as recompilations of one another."""
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CASES)
def test_one_graph_forward_and_backward(name: str, forgetful):
    function, leaves = CASES[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for f, e in zip(value_and_grads(compiled, leaves), value_and_grads(function, leaves), strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize(
    "name", [n if n in ("infonce", "cube") else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_compiled_by_inductor(name: str, forgetful):
    function, leaves = CASES[name]
    compiled = torch.compile(function, fullgraph=True)
    for f, e in zip(value_and_grads(compiled, leaves), value_and_grads(function, leaves), strict=True):
        torch.testing.assert_close(f, e)


def test_a_neighbour_search_is_one_node():
    z, query, key = draw(40, 16), torch.arange(6)[None], torch.arange(6)[None]
    arguments = (z, *knn.prepare(z), query, key, 2, False)
    compiled = torch.compile(lambda *a: registry.call("knn_nearest", *a), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), registry.call("knn_nearest", *arguments))


@pytest.mark.parametrize("name", CASES)
def test_eager_mode_passes_the_dispatcher_by(name: str, monkeypatch):
    """Nothing of torch.ops.engine is called, forward or backward."""
    function, leaves = CASES[name]
    expected = value_and_grads(function, leaves)
    monkeypatch.setattr(registry, "torch", SimpleNamespace(**vars(torch) | {"ops": None}))
    for f, e in zip(value_and_grads(function, leaves), expected, strict=True):
        assert torch.equal(f, e)


@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_nothing(name: str):
    """What is given is used in fp32 and comes back in fp32; gradients have the leaves' types."""
    function, leaves = CASES[name]
    expected = value_and_grads(function, leaves)

    def under_autocast(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(*given)

    for f, e in zip(value_and_grads(under_autocast, leaves), expected, strict=True):
        assert f.dtype == torch.float32
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("name", CASES)
def test_bitwise_the_same_three_times(name: str):
    function, leaves = CASES[name]
    first, *others = (value_and_grads(function, leaves) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@needs_compiler
@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(*[st.sampled_from([1, 2, 7])] * 3),
    axis=st.integers(1, 3),
    length=st.sampled_from([1, 2, 5, 31, 63, 64, 65, 100, 128]),
    hidden=st.sampled_from([1, 3, 8, 9, 64, 65, 100]),
    d_out=st.sampled_from([1, 4, 16, 65, 128]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_axis_mixes_of_any_shape(sizes, axis, length, hidden, d_out, flags):
    ln_first, bias, project = flags
    # over two or three elements LayerNorm cancels all but roundoff of the gradient
    assume((length if ln_first or not project else d_out) >= 4)
    shape = [sizes[0], *sizes[1:], 1]
    shape.insert(axis, length)
    x, weights = case(tuple(shape[:4]), axis, hidden, d_out, ln_first, bias, project)
    assert_as_good_as_torch(x, weights, axis, ln_first=ln_first)


def test_every_operation_has_a_case():
    """An operation that is registered is called by the cases above, or its tests are named here."""
    called: set[str] = set()
    original = registry._run
    names = {id(operation): name for name, operation in registry._operations.items()}

    def spy(operation, *args):
        called.add(names[id(operation)])
        return original(operation, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run", spy)
        for function, leaves in CASES.values():
            value_and_grads(function, leaves)
    own = ("knn_", "dropout", "ragged_", "add_norm", "attention", "bias_gelu", "embed", "sum_parts", "cube_pair")
    own += ("recurrent_turn", "recurrent_join", "recurrent_norm", "stack_sequences", "update_")
    # "mi_": of bounds that tests/kernels/test_mi_bounds_op.py goes through one by one
    named = {name for name in registry._operations if name.startswith((*own, "mi_"))}
    # tests and pages of the documentation register operations of their own
    ours = {name for name, o in registry._operations.items() if (o.cpu.__module__ or "").startswith("engine.")}
    assert called <= ours and not ours - called - named
