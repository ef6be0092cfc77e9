"""Sequences of several modalities as one cube: its formula, its gradients, and what it refuses."""

import pytest
import torch

from engine.errors import ConfigError
from engine.kernels.registry import use_backend
from engine.kernels.stacked import stack_sequences

LENGTHS = (5, 9, 3)


def sequences(batch=4, d=6, lengths=LENGTHS, types=(torch.float32,) * 3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(batch, n, d, generator=generator) for n in lengths]
    return [x.to(t).requires_grad_() for x, t in zip(drawn, types, strict=False)]


def validity(batch=4, lengths=LENGTHS):
    """A mask with a gap and a row without any; lengths of the others."""
    mask = (torch.arange(lengths[0]) < 1 + torch.arange(batch)[:, None] % lengths[0]).long() * 2
    mask[1, 0] = 0
    if batch > 2:
        mask[2] = 0
    return [mask, *(1 + torch.arange(batch) * 5 % n for n in lengths[1:])]


def seed():
    return torch.tensor([2**60 + 77])


SETTINGS = {
    "plain": {},
    "filled": {"fill": [True, False, True]},
    "training": {"fill": [True, False, False], "rates": [0.2, 0.0, 0.5], "hidden": [0.0, 0.5, 0.3]},
}


def run(given, valid, size=7, **settings):
    """Both results, and the sequences' gradients."""
    cube, means = stack_sequences(given, valid, size, seed=seed(), **settings)
    generator = torch.Generator().manual_seed(9)
    loss = sum((t * torch.randn(t.shape, generator=generator)).sum() for t in (cube, *means))
    return [cube, *means, *torch.autograd.grad(loss, given)]


def test_what_it_computes():
    """Written out place by place."""
    text, audio = [x.detach() for x in sequences(lengths=(3, 4))]
    mask, length = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]]), torch.tensor([4, 1, 2, 3])
    cube, means = stack_sequences([text, audio], [mask, length], 5, fill=[True, False])
    for b in range(4):
        places = [i for i in range(3) if mask[b, i]]
        mean = text[b, places].mean(0) if places else torch.zeros(6)
        torch.testing.assert_close(means[0][b], mean)
        torch.testing.assert_close(means[1][b], audio[b, : length[b]].mean(0))
        for i in range(5):
            assert torch.allclose(cube[b, i, 0], text[b, i] if i in places else mean, atol=1e-6)
            assert torch.equal(cube[b, i, 1], audio[b, i] if i < length[b] else torch.zeros(6))


def test_a_short_cube_cuts_but_means_are_of_all_places():
    x, length = torch.arange(4.0).view(1, 4, 1), torch.tensor([4])
    cube, means = stack_sequences([x], [length], 2)
    assert cube.flatten().tolist() == [0, 1] and means[0].item() == 1.5


@pytest.mark.parametrize("size", [2, 7, 12])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_operation_equals_its_formula(name, size):
    found, expected = [], []
    for backend, into in (("cpu", found), ("reference", expected)):
        with use_backend(backend):
            into += run(sequences(), validity(), size, **SETTINGS[name])
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)
    assert all(f.isfinite().all() for f in found)


def test_types():
    """16-bit sequences are read exactly, and their gradients have their type."""
    types = (torch.bfloat16, torch.float32, torch.float16)
    found = run(sequences(types=types), validity(), **SETTINGS["training"])
    whole = [x.detach().float().requires_grad_() for x in sequences(types=types)]
    expected = run(whole, validity(), **SETTINGS["training"])
    assert [f.dtype for f in found] == [torch.float32] * 4 + list(types)
    assert all(torch.equal(f, e.to(f.dtype)) for f, e in zip(found, expected, strict=True))


def test_what_is_not_valid_is_not_read():
    given, valid = sequences(), validity()
    expected = run(given, valid, **SETTINGS["training"])
    with torch.no_grad():
        for x, ok in zip(given, valid, strict=True):
            places = torch.arange(x.shape[1]) < ok[:, None] if ok.dim() == 1 else ok != 0
            x[~places] = torch.nan
    assert all(torch.equal(f, e) for f, e in zip(run(given, valid, **SETTINGS["training"]), expected, strict=True))


def test_dropout_and_hiding_are_random_and_seeded():
    x, length = torch.ones(2000, 3, 4), torch.full((2000,), 3)
    settings = {"rates": [0.25, 0.25], "hidden": [0.0, 0.4], "seed": seed()}
    cube, means = stack_sequences([x, x], [length, length], 3, **settings)
    again, _ = stack_sequences([x, x], [length, length], 3, **settings)
    assert torch.equal(cube, again)
    shown = cube[:, :, 1].flatten(1).any(1)
    assert 0.55 < shown.float().mean() < 0.65  # the share of rows where all of twelve are dropped is 6e-8
    kept = cube[:, :, 0] != 0
    torch.testing.assert_close(cube[:, :, 0][kept], torch.full((int(kept.sum()),), 1 / 0.75))
    assert 0.74 < kept.float().mean() < 0.76
    torch.testing.assert_close(means[0], cube[:, :, 0].mean(1))
    torch.testing.assert_close(means[1][shown], cube[shown][:, :, 1].mean(1))
    assert means[1][~shown].any() and not torch.equal(cube[shown][:, :, 0], cube[shown][:, :, 1])


def test_gradients_by_finite_differences():
    given = sequences(batch=2, d=2, lengths=(2, 3))
    valid = [torch.tensor([[1, 0], [1, 1]]), torch.tensor([3, 1])]
    settings = {"fill": [True, False], "rates": [0.3, 0.3], "hidden": [0.0, 0.3], "seed": seed()}
    assert torch.autograd.gradcheck(
        lambda *x: (lambda cube, means: (cube, *means))(*stack_sequences(x, valid, 4, **settings)),
        given,
        eps=1e-2,
        atol=1e-3,
        rtol=1e-3,
    )


def test_registered():
    given, valid = [x.detach() for x in sequences(types=(torch.bfloat16, torch.float32, torch.float16))], validity()
    settings = ([True, False, False], [0.2, 0.0, 0.1], [0.0, 0.5, 0.0], seed())
    torch.library.opcheck(torch.ops.engine.stack_sequences.default, (given[0], given[1:], valid, 7, *settings))
    grads = torch.randn(4, 7, 3, 6), [torch.randn(4, 6) for _ in range(3)]
    arguments = (*grads, valid, list(LENGTHS), *settings, [1, 0, 2])
    torch.library.opcheck(torch.ops.engine.stack_sequences_backward.default, arguments)


def test_second_gradients_are_refused():
    given = sequences(lengths=(2, 3))
    cube, _ = stack_sequences(given, [torch.ones(4, dtype=torch.int64)] * 2, 3)
    (first,) = torch.autograd.grad(cube.square().sum(), given[:1], create_graph=True)
    with pytest.raises(ConfigError, match="stack_sequences"):
        first.sum().backward()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sequences": sequences() + sequences()}, "1 to 3"),
        ({"rates": [0.1]}, "as many masks"),
        ({"size": 0}, "size 0"),
        ({"rates": [0.1, 0.0, 0.0], "seed": None}, "need a seed"),
        ({"hidden": [0.0, 1.0, 0.0]}, "in \\[0, 1\\)"),
        ({"valid": [torch.ones(4, 5), *validity()[1:]]}, "mask .* of torch.float32"),
        ({"valid": [torch.ones(4, 6).long(), *validity()[1:]]}, "a mask"),
        ({"sequences": [x.double() for x in sequences()]}, "float64"),
        ({"sequences": [*sequences()[:2], torch.zeros(4, 3, 7)]}, "a sequence"),
    ],
)
def test_bad_arguments(change, words):
    arguments = {"sequences": sequences(), "valid": validity(), "size": 7, "seed": seed()} | change
    given, valid, size = (arguments.pop(name) for name in ("sequences", "valid", "size"))
    with pytest.raises(ValueError, match=words):
        stack_sequences(given, valid, size, **arguments)
