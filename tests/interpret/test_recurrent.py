"""The kernels between the recurrences in Triton's interpreter: the formulas' numbers, within their memory."""

import pytest
import torch

from tests.interpret.guards import Guards, require_interpreter

require_interpreter()

from engine.kernels.recurrent import cudnn, op, plumbing
from engine.kernels.recurrent import triton as kernels
from engine.kernels.registry import use_backend
from tests.kernels.test_recurrent import between_recurrences

# texts, steps, width; more than one tile of rows, and of columns
SHAPES = [(1, 1, 1), (3, 7, 5), (40, 5, 130), (5, 61, 16)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lengths(texts, steps):
    return torch.arange(texts) * 3 % steps + 1


def assert_same(found, expected):
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape and torch.equal(f, e)


@pytest.mark.parametrize("texts, steps, width", SHAPES)
@pytest.mark.parametrize("by_step", [False, True])
def test_turn(texts, steps, width, by_step):
    x, length = draw(texts, steps, width), lengths(texts, steps)
    if by_step:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    for hidden in (0, 7, 300):
        with Guards() as guards:
            found = kernels.turn(guards.input(x), guards.input(length), hidden)
        assert_same(found, plumbing.turn(x, length, hidden))


@pytest.mark.parametrize("texts, steps, hidden", SHAPES)
@pytest.mark.parametrize("on", [False, True])
def test_join(texts, steps, hidden, on):
    """What lies behind a row's end is not read into the result, NaN or not."""
    directions, length = [draw(steps, texts, hidden, seed=i) for i in range(2)], lengths(texts, steps)
    behind = torch.arange(steps)[:, None] >= length
    for d in directions:
        d[behind] = torch.nan
    with Guards() as guards:
        length_in = guards.input(length)
        found = kernels.join(*map(guards.input, directions), length_in, on)
    assert_same(found, plumbing.join(*directions, length, on))
    assert all(f.isfinite().all() for f in found)
    grads = [draw(*f.shape, seed=5 + i) for i, f in enumerate(found)]
    for given in (grads, [None, grads[1]], [grads[0], None]) if on else ([grads[0], None],):
        with Guards() as guards:
            guarded = [None if g is None else guards.input(g) for g in given]
            back = kernels.join_backward(*guarded, guards.input(length), on)
        assert_same(back, plumbing.join_backward(*given, length, on))


@pytest.mark.parametrize("texts, steps, hidden", SHAPES)
@pytest.mark.parametrize("clear", [False, True])
def test_norm(texts, steps, hidden, clear, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    directions, length = [draw(steps, texts, hidden, seed=i) for i in range(2)], lengths(texts, steps)
    behind = torch.arange(steps)[:, None] >= length
    for d in directions:
        d[behind] = torch.nan
    weight, shift, grad = 1 + draw(hidden, seed=2), draw(hidden, seed=3), draw(texts, steps, hidden, seed=4)
    rest = (weight, shift)
    with Guards() as guards:
        given = [*map(guards.input, directions), guards.input(length), *map(guards.input, rest)]
        found = kernels.norm(*given, 1e-6, clear)
        back = kernels.norm_backward(guards.input(grad), *given, 1e-6, clear)
    clean = [d.masked_fill(behind[..., None], 0.5) for d in directions]
    arguments = (*clean, length, *rest, 1e-6, clear)
    torch.testing.assert_close(found, plumbing.norm(*arguments), rtol=2e-5, atol=2e-5)
    if hidden > 1:  # LayerNorm of one number amplifies rounding by 1 / sqrt(eps)
        for f, e in zip(back, plumbing.norm_backward(grad, *arguments), strict=True):
            torch.testing.assert_close(f, e, rtol=2e-4, atol=2e-4)


def test_longer_lengths_are_those_of_whole_rows():
    """Nothing beyond a row is read. The host does not look at lengths on a GPU."""
    x, y = draw(3, 7, 5), draw(7, 3, 5)
    long, whole = torch.tensor([9, 7, 4000]), torch.full((3,), 7)
    with Guards() as guards:
        length, given = guards.input(long), [guards.input(y), guards.input(y)]
        turned, joined = kernels.turn(guards.input(x), length, 2), kernels.join(*given, length, True)
    assert_same(turned, plumbing.turn(x, whole, 2))
    assert_same(joined, plumbing.join(y, y, whole, True))


def test_lengths_need_not_be_contiguous():
    weights = op.parameters(torch.nn.GRU(5, 4, 2, bidirectional=True, batch_first=True))
    x, columns = draw(3, 7, 5), torch.tensor([[2, 7], [7, 1], [5, 1]])
    with use_backend("triton"), torch.no_grad():
        found, expected = (cudnn.bidirectional(x, n, weights, "gru") for n in (columns[:, 0], columns[:, 0].clone()))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_through_the_module(kind):
    runs = []
    for backend in ("triton", "cpu"):
        with use_backend(backend):
            runs.append(between_recurrences(kind))
    for f, e in zip(*runs, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)
