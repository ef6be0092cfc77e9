"""Grouped MLPs and the concat critic as operations: backends against the formula, gradients, registration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.critics import cpu, reference
from engine.kernels.critics.op import concat_infonce, concat_scores, grouped_infonce, grouped_mlp
from engine.kernels.registry import call, use_backend
from tests.kernels.compiled import needs_compiler
from tests.kernels.critic_cases import (
    assert_as_good_as_torch,
    cast,
    concat,
    draw,
    grouped,
    infonce,
    leaves,
    tensors,
    value_and_grads,
)  # fmt: skip


@pytest.fixture(params=[pytest.param("compiled", marks=needs_compiler), "plain", "reference"])
def backend(request, monkeypatch):
    """The three ways a CPU tensor can go: the compiled kernel, plain torch without it, the formula."""
    if request.param == "plain":
        monkeypatch.setattr(cpu, "library", lambda dtype: None)
    with use_backend("reference" if request.param == "reference" else "cpu"):
        yield request.param


def pairs(case) -> tuple[list[int], list[int]]:
    """Rows and columns of critics: the towers in twos, some of them the other way round."""
    count = len(case[2][0][0])
    return [n + (n // 2) % 2 for n in range(0, count, 2)], [n + 1 - (n // 2) % 2 for n in range(0, count, 2)]


def critics(*case) -> Tensor:
    return grouped_infonce(*case, *pairs(case))


def critics_formula(*case) -> Tensor:
    out = reference.grouped_mlp(*case)
    scores = torch.stack([out[i] @ out[j].t() for i, j in zip(*pairs(case), strict=True)])
    return math.log(scores.shape[1]) + scores.log_softmax(2).diagonal(dim1=1, dim2=2).mean(1)


FUNCTIONS = {
    "grouped": (grouped_mlp, reference.grouped_mlp),
    "critics": (critics, critics_formula),
    "concat": (concat_scores, reference.concat_scores),
    "infonce": (concat_infonce, infonce()),
    "infonce transposed": (lambda *case: concat_infonce(*case, transpose=True), infonce(True)),
}


def small(name: str):
    if name == "critics":
        return grouped(3, (2, 4), (3, 1), 5, 3)
    return grouped(3, (2, 4), (2, 1), 5, 3) if name == "grouped" else concat(4, 4, (2, 3), 5)


def sized(name: str, rows: int, columns: int, dims: tuple[int, ...], hidden: int, dtype=torch.float64):
    if name == "grouped":
        return grouped(rows, dims, [1 + i % 2 for i in range(len(dims))], hidden, 1 + hidden // 3, dtype=dtype)
    if name == "critics":  # an even number of towers, as wide as hidden layers are
        counts = [2 + i % 2 for i in range(len(dims))]
        counts[-1] += sum(counts) % 2
        return grouped(rows, dims, counts, hidden, max(hidden, 8), dtype=dtype)
    return concat(rows, rows if "infonce" in name else columns, (dims[0], dims[-1]), hidden, dtype=dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name: str, backend: str):
    case = leaves(small(name))

    def function(*flat: Tensor) -> Tensor:
        rest = iter(flat)

        def rebuild(part):
            return next(rest) if isinstance(part, Tensor) else type(part)(rebuild(p) for p in part)

        return FUNCTIONS[name][0](*rebuild(case))

    assert torch.autograd.gradcheck(function, tensors(case))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "rows, columns, dims, hidden",
    [
        (1, 1, (1,), 1), (2, 7, (3, 5), 17), (7, 2, (16,), 8), (63, 64, (31, 2), 33), (64, 63, (64, 1, 7), 16),
        (65, 100, (5, 128), 40), (100, 65, (200, 3), 20), (257, 1, (9, 256), 12),
    ],
)  # fmt: skip
def test_shapes(name: str, rows: int, columns: int, dims: tuple[int, ...], hidden: int, backend: str):
    """Value and all gradients in fp64 against the formula under autograd."""
    case = sized(name, rows, columns, dims, hidden)
    for f, e in zip(*(value_and_grads(g, case) for g in FUNCTIONS[name]), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_depths(layers: int, backend: str):
    for name, case in (
        ("grouped", grouped(20, (3, 4), (2, 2), 18, 4, layers=layers)),
        ("critics", grouped(20, (3, 4), (2, 2), 18, 4, layers=layers)),
        ("concat", concat(20, 19, (3, 4), 18, layers=layers)),
        ("infonce", concat(20, 20, (3, 4), 18, layers=layers)),
    ):
        for f, e in zip(*(value_and_grads(g, case) for g in FUNCTIONS[name]), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fp32_is_as_good_as_torchs(name: str, backend: str):
    case = sized(name, 70, 50, (40, 33), 96)
    ours, formula = FUNCTIONS[name]
    single = cast(case, torch.float32)
    exact = value_and_grads(formula, cast(single, torch.float64))
    summands = math.log(70) if name == "critics" or "infonce" in name else 0.0
    found, torchs = value_and_grads(ours, single), value_and_grads(formula, single)
    assert_as_good_as_torch(found, torchs, exact, summands=summands)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bitwise_the_same_every_time(name: str, backend: str):
    case = sized(name, 130, 70, (20, 11), 64, torch.float32)
    runs = [value_and_grads(FUNCTIONS[name][0], case) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_threads(name: str):
    """More threads than cores, towers or rows give the same numbers."""
    case = sized(name, 40, 9, (5, 7), 32)
    expected = value_and_grads(FUNCTIONS[name][1], case)
    threads = torch.get_num_threads()
    try:
        for n in (1, 3, 8):
            torch.set_num_threads(n)
            for f, e in zip(value_and_grads(FUNCTIONS[name][0], case), expected, strict=True):
                torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-11)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_not_contiguous(name: str, backend: str):
    case = sized(name, 30, 21, (6, 5), 19)

    def turned(part):
        return part.mT.contiguous().mT if isinstance(part, Tensor) and part.dim() > 1 else part

    def everywhere(part):
        return turned(part) if isinstance(part, Tensor) else type(part)(map(everywhere, part))

    strided = everywhere(case)
    assert any(not t.is_contiguous() for t in tensors(strided))
    for f, e in zip(
        value_and_grads(FUNCTIONS[name][0], strided), value_and_grads(FUNCTIONS[name][1], case), strict=True
    ):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("wanted", ["inputs", "weights"])
def test_only_gradients_that_are_needed(name: str, wanted: str, backend: str):
    case = sized(name, 12, 10, (4, 3), 8)
    towers = name in ("grouped", "critics")
    inputs = tensors(case[0]) if towers else list(case[:2])
    weights = tensors(*case[1:]) if towers else tensors(case[2])
    expected = dict(zip(map(id, tensors(case)), value_and_grads(FUNCTIONS[name][1], case)[1:], strict=True))
    chosen, others = (inputs, weights) if wanted == "inputs" else (weights, inputs)
    for t in chosen:
        t.requires_grad_()
    out = FUNCTIONS[name][0](*case)
    grads = torch.autograd.grad(out, chosen, draw(*out.shape, seed=7))
    for t, g in zip(chosen, grads, strict=True):
        torch.testing.assert_close(g, expected[id(t)], rtol=1e-9, atol=1e-11)
    assert not any(t.requires_grad for t in others)
    assert not FUNCTIONS[name][0](*cast(case, torch.float32)).isnan().any()
    with torch.no_grad():
        torch.testing.assert_close(FUNCTIONS[name][0](*case), out.detach())


@pytest.mark.parametrize("scale", [100.0, -100.0, 1e4])
def test_large_scores_of_separate_critics(scale: float, backend: str):
    inputs, first, rest = grouped(33, (4, 3), (2, 2), 16, 8, dtype=torch.float32)
    rest[-1][0][0].mul_(scale)
    case = inputs, first, rest
    found, exact = value_and_grads(critics, case), value_and_grads(critics_formula, cast(case, torch.float64))
    assert all(t.isfinite().all() for t in found)
    if backend != "reference":  # which rounds as torch does, in another order
        assert_as_good_as_torch(found, value_and_grads(critics_formula, case), exact, 1e-3)


@pytest.mark.parametrize("scale", [100.0, -100.0, 1e4])
def test_large_scores(scale: float, backend: str):
    """Shifted by ±100 InfoNCE does not change; at ±1e4 value and gradients stay finite."""
    x, y, layers = concat(33, 33, (4, 3), 16, dtype=torch.float32)
    moved = [*layers[:-1], (layers[-1][0], layers[-1][1] + scale)]
    if abs(scale) == 100:
        torch.testing.assert_close(concat_infonce(x, y, moved), concat_infonce(x, y, layers), rtol=1e-4, atol=1e-4)
    large = [*layers[:-1], (layers[-1][0] * scale, layers[-1][1])]
    for ours, exact in zip(
        value_and_grads(concat_infonce, (x, y, large)),
        value_and_grads(infonce(), cast((x, y, large), torch.float64)),
        strict=True,
    ):
        assert ours.isfinite().all()
        size = exact.abs().max().item()  # the last bias has none: InfoNCE does not depend on it
        torch.testing.assert_close(ours.double(), exact, rtol=1e-2, atol=2e-3 * size + 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad: float, backend: str):
    inputs, first, rest = grouped(20, (3, 4), (2, 2), 8, 4, dtype=torch.float32)
    inputs[1][17, 2] = bad
    value = grouped_infonce(inputs, first, rest, [0, 2], [1, 3])
    assert value[0].isfinite() and value[1].isnan()
    out = grouped_mlp(inputs, first, rest)
    assert not out[2:, 17].isfinite().all() and out[:2].isfinite().all() and out[2:, :17].isfinite().all()
    x, y, layers = concat(20, 20, (3, 4), 8, dtype=torch.float32)
    y[17, 2] = bad
    scores = concat_scores(x, y, layers)
    assert not scores[17].isfinite().any() and scores[:17].isfinite().all()
    assert concat_infonce(x, y, layers).isnan() and concat_infonce(x, y, layers, transpose=True).isnan()


def test_infinite_scores_of_one_sign_show(backend: str):
    x, y, layers = concat(20, 20, (3, 4), 8, dtype=torch.float32)
    weight = layers[-1][0].clone()
    weight[0, 3] = -math.inf
    assert concat_infonce(x, y, [*layers[:-1], (weight, layers[-1][1])]).isnan()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_computes_in_fp32(name: str, backend: str):
    case = sized(name, 24, 24, (6, 5), 16, torch.float32)
    plain = value_and_grads(FUNCTIONS[name][0], case)

    def under_autocast(*case):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return FUNCTIONS[name][0](*case)

    mixed = value_and_grads(under_autocast, case)
    for a, b in zip(plain, mixed, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b)
    half = cast(case, torch.bfloat16)
    assert FUNCTIONS[name][0](*half).dtype == torch.float32
    assert value_and_grads(FUNCTIONS[name][0], half)[1].dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_other_activations_run_as_the_formula(activation: str):
    case = grouped(5, (3,), (2,), 6, 2)
    torch.testing.assert_close(grouped_mlp(*case, activation), reference.grouped_mlp(*case, activation), rtol=0, atol=0)
    case = concat(5, 4, (3, 2), 6)
    torch.testing.assert_close(concat_scores(*case, activation), reference.concat_scores(*case, activation))
    x, y, layers = concat(5, 5, (3, 2), 6)
    expected = math.log(5) + reference.concat_scores(x, y, layers, activation).log_softmax(1).diagonal().mean()
    torch.testing.assert_close(concat_infonce(x, y, layers, activation), expected)


def test_errors_name_the_shapes():
    inputs, first, rest = grouped(5, (3, 2), (1, 2), 4, 2)
    short = [inputs[0], inputs[1][:4]]
    for bad in (([], [], rest), (inputs, first, []), (inputs[:1], first[:1], rest), (short, first, rest)):
        with pytest.raises(EstimatorError, match="grouped_mlp"):
            grouped_mlp(*bad)
    for numbers in (([0], [1]), ([0, 1], [1, 2]), ([0, 1], [2])):
        with pytest.raises(EstimatorError, match="every MLP once"):
            grouped_infonce(inputs, first, rest, *numbers)
    x, y, layers = concat(5, 4, (3, 2), 6)
    for bad in ((x, y, layers[:1]), (y, y, layers), (x, y, layers[:-1]), (x[0], y, layers)):
        with pytest.raises(EstimatorError, match="concat_scores"):
            concat_scores(*bad)
    with pytest.raises(EstimatorError, match="4 and 5 rows"):
        concat_infonce(x, y, layers)


def test_opcheck():
    """With rows that fill the vectors of every processor. Beyond them a state is memory that nothing has written."""
    inputs, first, rest = grouped(16, (3, 2), (1, 2), 4, 2, dtype=torch.float32)
    first, rest = tensors(first), tensors(rest)
    names = torch.ops.engine
    torch.library.opcheck(names.critics_mlp_forward.default, (inputs[0], inputs[1:], first, rest))
    out, state = call("critics_mlp_forward", inputs[0], inputs[1:], first, rest)
    arguments = (torch.ones_like(out), inputs, first[::2], rest[::2], state)
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(names.critics_mlp_backward.default, (*arguments, *wanted))
    inputs, first, rest = grouped(16, (3, 2), (2, 2), 4, 2, dtype=torch.float32)
    first, rest, numbers = tensors(first), tensors(rest), ([0, 3], [1, 2])
    for grads in (False, True):
        arguments = (inputs[0], inputs[1:], first, rest, *numbers, grads)
        torch.library.opcheck(names.critics_grouped_infonce.default, arguments)
    losses, state = call("critics_grouped_infonce", *arguments)
    arguments = (torch.ones_like(losses), inputs, first[::2], rest[::2], state, *numbers)
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(names.critics_grouped_infonce_backward.default, (*arguments, *wanted))
    x, y, layers = concat(4, 5, (3, 2), 6, dtype=torch.float32)
    layers = tensors(layers)
    torch.library.opcheck(names.critics_concat_forward.default, (x, y, layers))
    torch.library.opcheck(names.critics_concat_backward.default, (torch.ones(4, 5), x, y, layers, True, True))
    torch.library.opcheck(names.critics_concat_infonce.default, (x[:4], y, layers, False, True, True))


@pytest.mark.parametrize("name", ["grouped", "critics", "concat", "infonce"])
def test_compiles_as_one_graph(name: str):
    case = sized(name, 9, 9, (4, 3), 8, torch.float32)
    compiled = torch.compile(FUNCTIONS[name][0], fullgraph=True, backend="aot_eager")
    for f, e in zip(value_and_grads(compiled, case), value_and_grads(FUNCTIONS[name][0], case), strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grouped", "critics", "concat", "infonce"])
def test_compiles_with_inductor(name: str):
    case = sized(name, 9, 9, (4, 3), 8, torch.float32)
    compiled = torch.compile(FUNCTIONS[name][0], fullgraph=True)
    for f, e in zip(value_and_grads(compiled, case), value_and_grads(FUNCTIONS[name][0], case), strict=True):
        torch.testing.assert_close(f, e)
