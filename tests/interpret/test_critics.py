"""The critics' Triton kernels under triton's interpreter, with guards."""

import math

import pytest
import torch

from tests.interpret.device import on_gpu, products, same, times
from tests.interpret.guards import Guards, require_interpreter

require_interpreter()

from engine.errors import ConfigError
from engine.kernels import dispatch
from engine.kernels.critics import plain, reference, slabs, towers, triton
from engine.kernels.critics.op import concat_infonce, concat_scores, grouped_mlp
from tests.kernels.critic_cases import (
    assert_as_good_as_torch,
    cast,
    concat,
    draw,
    grouped,
    infonce,
    tensors,
    value_and_grads,
)  # fmt: skip

# Pairs that do and do not fill tiles and slabs, hidden layers that do and do not fill blocks.
SHAPES = [
    (1, 1, (1, 1), 1, 2), (2, 7, (3, 5), 17, 2), (7, 2, (16, 1), 8, 1), (9, 20, (4, 4), 33, 2), (17, 12, (2, 3), 70, 1),
    (13, 13, (2, 9), 12, 0), (3, 70, (5, 2), 20, 2), (70, 3, (1, 2), 5, 0),
]  # fmt: skip


@pytest.fixture(autouse=True, params=["slabs", "fused"])
def small_slabs(request, monkeypatch):
    """Several slabs, also where a row does not fit one; splits that end before and after a slab does."""
    monkeypatch.setattr(triton, "SLAB", (128, 128))
    monkeypatch.setattr(triton, "SPLITS", 3)
    monkeypatch.setattr(slabs, "SLAB_NUMBERS", 600)
    monkeypatch.setattr(slabs, "BLOCKS", 3)
    with dispatch.use(concat_critic=request.param):
        yield
    return request.param


fused_only = pytest.mark.parametrize("small_slabs", ["fused"], indirect=True)
slabs_only = pytest.mark.parametrize("small_slabs", ["slabs"], indirect=True)


def guarded(function, case, upstream):
    """`function` on tensors between bands of NaN; its allocations lie between canaries."""
    with Guards() as guards:
        x, y, *layers = (guards.input(t) for t in tensors(case))
        return function(x, y, layers, guards.input(upstream))


def by_scores(x, y, layers, upstream):
    scores = triton.concat_forward(x, y, layers)
    found = triton.concat_backward(upstream, x, y, layers, True, True)
    inputs = triton.concat_backward(upstream, x, y, layers, True, False)
    assert same(found[: len(inputs)], inputs), "inputs' gradients differ without the weights'"
    return [scores, *plain.pieces_of(found, plain.concat_shapes(x, y, layers, True, True))]


def by_infonce(transpose):
    def run(x, y, layers, upstream):
        losses, found = triton.concat_infonce(x, y, layers, transpose, True, True)
        alone, nothing = triton.concat_infonce(x, y, layers, transpose, False, False)
        assert same(losses, alone) and not len(nothing)
        found = -upstream * found
        value = math.log(len(x)) - losses.mean()
        return [value, *plain.pieces_of(found, plain.concat_shapes(x, y, layers, True, True))]

    return run


def compare(function, formula, case, tolerance=2e-5, summands=0.0):
    exact = value_and_grads(formula, cast(case, torch.float64))
    upstream = draw(*exact[0].shape, seed=7, dtype=torch.float32)
    found = guarded(function, case, upstream)
    assert_as_good_as_torch(found, value_and_grads(formula, case), exact, tolerance, summands)


@pytest.mark.parametrize("rows, columns, dims, hidden, layers", SHAPES)
def test_scores(rows, columns, dims, hidden, layers):
    compare(by_scores, reference.concat_scores, concat(rows, columns, dims, hidden, layers, torch.float32))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows, columns, dims, hidden, layers", SHAPES)
def test_infonce(rows, columns, dims, hidden, layers, transpose):
    """Rows and columns of the same number, the smaller one."""
    count = min(rows, columns)
    case = concat(count, count, dims, hidden, layers, torch.float32)
    compare(by_infonce(transpose), infonce(transpose), case, summands=math.log(count))


def compare_in(precision, function, formula, case, interpreted, factor=2):
    """By norms: rounding turns ReLUs near 0 over, here others than in torch, and one of them moves the gradients of the
    layers below by several percent.

    On a GPU no further from fp64 than `factor` times torch in the same precision; else than `interpreted`, of the value
    and of gradients.
    """
    exact = value_and_grads(formula, cast(case, torch.float64))
    with products(precision):
        torchs = value_and_grads(formula, case)
    found = guarded(function, case, draw(*exact[0].shape, seed=7, dtype=torch.float32))
    for n, (f, t, e) in enumerate(zip(found, torchs, exact, strict=True)):
        slack = factor * (t - e).norm() + 1e-5 * e.norm() if on_gpu() else interpreted[n > 0] * e.norm()
        assert (f - e).norm() <= slack, n


@fused_only
def test_blocks_of_the_other_precisions(monkeypatch):
    """The larger blocks' bounds. The interpreter multiplies in fp32, but operands are rounded to tf32 before."""
    monkeypatch.setattr(triton, "_precision", lambda: "tf32")
    case = concat(9, 11, (4, 3), 40, 2, torch.float32)
    compare_in("tf32", by_scores, reference.concat_scores, case, (2**-10, 2**-4))


def test_layers_kept_in_16_bits(monkeypatch):
    """As with precision medium; the interpreter truncates where a GPU rounds, and the fused kernels' products are those
    of fp32 in it."""
    monkeypatch.setattr(triton, "_buffer_dtype", lambda precision: torch.bfloat16)
    monkeypatch.setattr(slabs, "_dtype", lambda: torch.bfloat16)
    case = concat(9, 9, (4, 3), 40, 2, torch.float32)
    if on_gpu():  # a layer is rounded twice, before its bias and after it, where torch rounds once
        compare_in("bf16", by_scores, reference.concat_scores, case, (2**-6, 2**-6), factor=3)
    else:
        compare(by_scores, reference.concat_scores, case, 2**-6)
    exact = value_and_grads(infonce(), cast(case, torch.float64))
    upstream = draw(seed=7, dtype=torch.float32)
    for f, e in zip(guarded(by_infonce(False), case, upstream), exact, strict=True):
        assert (f - e).norm() <= 2**-5 * e.norm() + 1e-6


@slabs_only
def test_memory_of_a_slab_is_bounded():
    for rows, columns, hidden in ((10**6, 10**6, 8), (1, 10**6, 100), (10**6, 1, 600), (3, 3, 50), (7, 9, 599)):
        height, width = slabs._size(rows, columns, hidden)
        assert 1 <= height <= rows and 1 <= width <= columns and height * width * hidden <= 600
        height, width = slabs._size(rows, columns, hidden, share=2)
        assert 1 <= height <= rows and 1 <= width <= columns and height * width * hidden <= max(300, hidden)


@slabs_only
@pytest.mark.parametrize("numbers", [600, 4000])
def test_half_slabs(monkeypatch, numbers):
    """As slabs of half the numbers, bit for bit: with parts of a row in a slab, and with several rows."""
    case = concat(13, 13, (2, 9), 12, 2, torch.float32)
    upstream, found = draw(seed=7, dtype=torch.float32), []
    for algorithm, most in (("half_slabs", numbers), ("slabs", numbers // 2)):
        monkeypatch.setattr(slabs, "SLAB_NUMBERS", most)
        with dispatch.use(concat_critic=algorithm):
            compare(by_scores, reference.concat_scores, case)
            found.append(guarded(by_infonce(False), case, upstream))
    assert all(same(a, b) for a, b in zip(*found, strict=True))


@slabs_only
def test_a_slab_takes_one_buffer_beside_its_layers(monkeypatch):
    """Gradients take turns in the last layer's memory and in one more."""
    monkeypatch.setattr(slabs, "SLAB_NUMBERS", 1 << 22)
    for layers in (0, 1, 2):
        weights = tensors(concat(8, 8, (4, 3), 16, layers, torch.float32)[2])
        made = slabs._Slabs(torch.zeros(8, 16), torch.zeros(8, 16), weights[2:], 1, backward=True)
        storage = made.layers.untyped_storage()
        assert made.spare.untyped_storage().data_ptr() == storage.data_ptr()
        assert storage.nbytes() == 4 * 8 * 8 * 16 * (layers + 1 + (layers > 0))


@fused_only
def test_deeper_and_wider_critics():
    """What the fused kernels do not take runs in slabs, and is refused where they are asked for."""
    with pytest.raises(ConfigError, match="fused for rows 5, hidden 300"):
        compare(by_scores, reference.concat_scores, concat(5, 5, (4, 3), 300, 1, torch.float32))
    dispatch.use(concat_critic=None)
    for hidden, layers in ((8, 3), (300, 1)):
        case = concat(5, 5, (4, 3), hidden, layers, torch.float32)
        compare(by_scores, reference.concat_scores, case)
        compare(by_infonce(True), infonce(True), case, summands=math.log(5))


@pytest.mark.parametrize("scale", [100.0, -100.0, 1e4])
def test_large_scores(scale):
    x, y, layers = concat(12, 12, (4, 3), 16, dtype=torch.float32)
    moved = [*layers[:-1], (layers[-1][0], layers[-1][1] + scale)]
    if abs(scale) == 100:
        torch.testing.assert_close(concat_infonce(x, y, moved), concat_infonce(x, y, layers), rtol=1e-4, atol=1e-4)
    large = [*layers[:-1], (layers[-1][0] * scale, layers[-1][1])]
    found = value_and_grads(concat_infonce, (x, y, large))
    for ours, exact in zip(found, value_and_grads(infonce(), cast((x, y, large), torch.float64)), strict=True):
        assert ours.isfinite().all()
        size = exact.abs().max().item()
        torch.testing.assert_close(ours.double(), exact, rtol=1e-2, atol=2e-3 * size + 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad):
    x, y, layers = concat(20, 20, (3, 4), 8, dtype=torch.float32)
    y[17, 2] = bad
    scores = concat_scores(x, y, layers)
    assert not scores[17].isfinite().any() and scores[:17].isfinite().all()
    assert concat_infonce(x, y, layers).isnan() and concat_infonce(x, y, layers, transpose=True).isnan()


# Rows, widths of inputs, towers that read them, hidden width, embedding, hidden layers after the first.
TOWERS = [
    (1, (1,), (2,), 1, 1, 1), (2, (3, 5), (1, 1), 17, 9, 2), (33, (100, 4, 7), (3, 1, 2), 40, 70, 1),
    (65, (2, 70), (2, 2), 70, 33, 2), (9, (5,), (4,), 8, 16, 0),
]  # fmt: skip


def critics(case):
    """Rows and columns of critics: towers in twos, every other one the other way round."""
    count = len(case[2][0][0])
    return [n + (n // 2) % 2 for n in range(0, count, 2)], [n + 1 - (n // 2) % 2 for n in range(0, count, 2)]


def infonce_of_towers(*case):
    out = reference.grouped_mlp(*case)
    scores = torch.stack([out[i] @ out[j].t() for i, j in zip(*critics(case), strict=True)])
    return -scores.log_softmax(2).diagonal(dim1=1, dim2=2).mean(1)


@pytest.mark.parametrize("of_critics", [False, True])
@pytest.mark.parametrize("rows, dims, counts, hidden, out, layers", TOWERS)
@slabs_only
def test_towers(rows, dims, counts, hidden, out, layers, of_critics):
    """Towers' outputs, or critics' losses, and all gradients; with some unwanted the others are the same."""
    case = grouped(rows, dims, counts, hidden, out, layers, torch.float32)
    formula = infonce_of_towers if of_critics else reference.grouped_mlp
    exact = value_and_grads(formula, cast(case, torch.float64))
    upstream, numbers = draw(*exact[0].shape, seed=7, dtype=torch.float32), critics(case) if of_critics else ()
    with Guards() as guards:
        inputs, first, rest = ([guards.input(t) for t in tensors(part)] for part in case)
        more = (*numbers, True) if of_critics else ()
        forward = towers.grouped_infonce if of_critics else towers.mlp_forward
        backward = towers.grouped_infonce_backward if of_critics else towers.mlp_backward
        value, state = forward(inputs[0], inputs[1:], first, rest, *more)
        arguments = guards.input(upstream), inputs, first[::2], rest[::2], state, *numbers
        found = backward(*arguments, True, True)
        some = [backward(*arguments, True, False), backward(*arguments, False, True)]
        if of_critics:
            alone, nothing = forward(inputs[0], inputs[1:], first, rest, *numbers, False)
            torch.testing.assert_close(alone, value)
            assert not nothing.numel()
    assert torch.equal(found, torch.cat(some))
    pieces = plain.pieces_of(found, plain.grad_shapes(inputs, (*first[::2], *rest[::2]), True, True))
    summands = math.log(rows) if of_critics else 0.0
    assert_as_good_as_torch([value, *pieces], value_and_grads(formula, case), exact, 2e-5, summands)


@pytest.mark.parametrize("of_critics, number", [(False, 2), (True, 3), (False, 4)])
@slabs_only
def test_towers_in_deep_tiles(of_critics, number):
    with dispatch.use(tower_tiles="deep"):
        test_towers(*TOWERS[number], of_critics)


@slabs_only
def test_many_rows_run_as_library_products():
    case = grouped(9, (3, 4), (2, 2), 8, 4, dtype=torch.float32)
    with dispatch.use(critic_towers="plain"):
        for f, e in zip(value_and_grads(grouped_mlp, case), value_and_grads(reference.grouped_mlp, case), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)
    inputs, first, rest = (tensors(part) for part in case)
    found = []
    for algorithm in ("plain", "fused"):
        with dispatch.use(critic_towers=algorithm):
            losses, state = towers.grouped_infonce(inputs[0], inputs[1:], first, rest, [0, 3], [1, 2], True)
            arguments = torch.tensor([0.5, 2.0]), inputs, first[::2], rest[::2], state, [0, 3], [1, 2]
            found.append((losses, towers.grouped_infonce_backward(*arguments, True, True)))
    for library, fused in zip(*found, strict=True):
        torch.testing.assert_close(library, fused, rtol=1e-4, atol=1e-5)


@slabs_only
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_of_towers_show_what_is_not_finite(bad):
    inputs, first, rest = grouped(20, (3, 4), (2, 2), 8, 4, dtype=torch.float32)
    inputs[1][17, 2] = bad
    losses, _ = towers.grouped_infonce(inputs[0], inputs[1:], tensors(first), tensors(rest), [0, 2], [1, 3], True)
    assert losses[0].isfinite() and losses[1].isnan()


@slabs_only
@pytest.mark.parametrize("scale", [100.0, -100.0, 1e4])
def test_large_scores_of_towers(scale):
    inputs, first, rest = grouped(20, (4, 3), (2, 2), 16, 8, dtype=torch.float32)
    rest[-1][0][0].mul_(scale)
    first, rest = tensors(first), tensors(rest)
    losses, state = towers.grouped_infonce(inputs[0], inputs[1:], first, rest, [0, 2], [1, 3], True)
    exact, _ = plain.grouped_infonce(
        inputs[0].double(), [inputs[1].double()], cast(first, torch.float64), cast(rest, torch.float64), [0, 2], [1, 3],
        True,
    )  # fmt: skip
    grads = towers.grouped_infonce_backward(
        torch.ones(2), inputs, first[::2], rest[::2], state, [0, 2], [1, 3], True, True
    )
    assert grads.isfinite().all()
    torch.testing.assert_close(losses.double(), exact, rtol=1e-4, atol=1e-4)


def test_through_the_operations_and_bitwise_the_same():
    for function, formula, case in (
        (concat_scores, reference.concat_scores, concat(20, 17, (3, 4), 24, dtype=torch.float32)),
        (concat_infonce, infonce(), concat(20, 20, (3, 4), 24, dtype=torch.float32)),
        (grouped_mlp, reference.grouped_mlp, grouped(9, (3, 4), (2, 1), 8, 4, dtype=torch.float32)),
    ):
        runs = [value_and_grads(function, case) for _ in range(times())]
        for again in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
        for f, e in zip(runs[0], value_and_grads(formula, case), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)
