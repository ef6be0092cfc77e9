"""The neighbour kernels in Triton's interpreter: the rows of the specification, within the memory that is theirs."""

import pytest
import torch

from tests.interpret.guards import Guards, require_interpreter

require_interpreter()

from engine.kernels.knn_product import Bank, ProductSampler, product_indices, reference
from engine.kernels.knn_product import triton as kernels


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bank(n: int, d: int, kind: str, seed: int = 0) -> torch.Tensor:
    z = torch.randn(n, d, generator=seeded(seed))
    if kind == "offset":
        return z + 1e4
    if kind == "grid":  # many ties: the certificate fails
        return z.mul(0.7).round()
    if kind == "constant":
        return torch.ones_like(z)
    if kind == "clusters":  # distances within clusters drown in the product's rounding
        return z * 1e-4 + 1e4 * torch.randint(3, (n, 1), generator=seeded(seed)).float()
    if kind == "huge":
        return z * 1e30
    return z


CASES = [
    (2, 1, 1, 1, 1, "normal"),
    (7, 3, 2, 3, 2, "normal"),
    (63, 17, 1, 20, 3, "grid"),
    (64, 128, 2, 31, 2, "normal"),
    (65, 16, 1, 33, 1, "offset"),
    (100, 31, 1, 40, 5, "clusters"),
    (257, 128, 1, 64, 2, "normal"),
    (257, 8, 2, 9, 4, "constant"),
    (300, 200, 1, 5, 17, "normal"),
    (300, 5, 1, 12, 2, "huge"),
]


@pytest.mark.parametrize("n, d, draws, m, k, kind", CASES)
@pytest.mark.parametrize("first", [False, True])
def test_nearest(n, d, draws, m, k, kind, first):
    z = bank(n, d, kind)
    query = torch.stack([torch.randperm(n, generator=seeded(s))[:m] for s in range(draws)])
    key = torch.randint(1 << 32, (draws, m), generator=seeded(9))
    expected = reference.nearest(z, query, key, k, first)
    with Guards() as guards:
        z, query, key = guards.input(z), guards.input(query), guards.input(key)
        coarse, bounds, unit = (guards.input(t) for t in kernels.prepare(z))
        found = kernels.nearest(z, coarse, bounds, unit, query, key, k, first)
    assert torch.equal(found, expected)


def test_parts_of_the_bank(monkeypatch):
    """More tiles than parts, and a last part that begins past the end."""
    monkeypatch.setattr(kernels, "MOST_PARTS", 3)
    z = bank(7 * 64 + 3, 8, "normal")
    query, key = torch.randperm(len(z), generator=seeded(1))[None, :7], torch.arange(7)[None]
    found = kernels.nearest(z, *kernels.prepare(z), query, key, 3, False)
    assert torch.equal(found, reference.nearest(z, query, key, 3, False))


def test_bitwise_the_same_three_times():
    z = bank(200, 16, "grid")
    draws = [product_indices(z, 30, 3, seeded(2))[0] for _ in range(3)]
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])


def test_draws_are_those_of_the_cpu():
    """All three kinds of condition through the sampler: the same rows from the same seed on either backend."""
    from engine.kernels.registry import use_backend
    from engine.objective import Term

    rows = {name: torch.randn(150, 16, generator=seeded(ord(name))) for name in "TAV"}
    rows["C"] = torch.randint(7, (150, 1), generator=seeded(3)).float()
    terms = [Term("A", "C", "T"), Term("T", "A", "C"), Term("T", "C", "A"), Term("T", "V", "C")]
    for shared, discrete in ((True, ("C",)), (False, ())):
        drawn = []
        for backend in ("triton", "cpu", "reference"):
            with use_backend(backend):
                drawn.append(ProductSampler(Bank(rows), 2, discrete, shared).draw(terms, 32, seeded(4)))
        for other in drawn[1:]:
            for name, part in drawn[0].items():
                assert all(torch.equal(a, b) for a, b in zip(part, other[name], strict=True)), name


# -- a whole epoch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, d, m, length, kind", [(65, 16, 9, 11, "normal"), (40, 3, 3, 17, "grid")])
def test_lists_of_the_bank(n, d, m, length, kind):
    """No row is isolated: the query itself is among its nearest."""
    z, query = bank(n, d, kind), torch.arange(m)[None]
    key = torch.zeros_like(query)
    with Guards() as guards:
        z, query, key = guards.input(z), guards.input(query), guards.input(key)
        coarse, bounds, unit = (guards.input(t) for t in kernels.prepare(z))
        found = kernels.nearest(z, coarse, bounds, unit, query, key, length, True, False)
    assert torch.equal(found, reference.nearest(z, query, key, length, True, False))
    if kind == "normal":
        assert torch.equal(found[0, :, 0], torch.arange(m))


@pytest.mark.parametrize("width, dtype", [(128, torch.float32), (131, torch.float32), (5, torch.bfloat16)])
@pytest.mark.parametrize("m, most, k", [(1, 1, 1), (7, 9, 3), (16, 16, 2), (17, 20, 1)])
def test_take(width, dtype, m, most, k):
    """Rows of wide and narrow pieces, of neighbours and of queries, of the batch that the counter says."""
    n, steps, draws = 30, 3, 2
    features = torch.randn(n, width + 3, generator=seeded(5)).to(dtype)
    query = torch.randint(n, (steps, draws, most), generator=seeded(6))
    neighbour = torch.randint(n, (steps, draws, most, k), generator=seeded(7))
    pieces = [
        reference.Piece(1, 1, width, 0, True), reference.Piece(0, 0, 1, width * k, False),
        reference.Piece(0, 2, width, width * k + 8, False),
    ]  # fmt: skip
    size = m * (width * (k + 1) + 8)
    plan = torch.tensor([[p.draw, p.column, p.width, p.offset, p.near] for p in pieces], dtype=torch.int64)
    for step in range(steps):
        counter = torch.tensor(step)
        expected = reference.take(features, query, neighbour, counter, pieces, m, size)
        with Guards() as guards:
            given = [guards.input(t) for t in (features, query, neighbour, counter, plan)]
            found = kernels.take(*given, m, size)
        for p in pieces:
            part = slice(p.offset * m, p.offset * m + p.width * m * (k if p.near else 1))
            assert torch.equal(found[part], expected[part]), p
        unset = found[width * k * m + m : (width * k + 8) * m]
        assert unset.isnan().all()  # nothing is written between pieces


@pytest.mark.parametrize("lists, shared, discrete", [(False, True, ("C",)), (True, True, ("C",)), (False, False, ())])
def test_an_epoch_is_that_of_the_cpu(lists, shared, discrete, monkeypatch):
    """All kinds of condition, ties among them, two sizes of batches, both ways of searching."""
    from engine.kernels.knn_product import draw_epoch, epoch
    from engine.kernels.registry import use_backend
    from engine.objective import Term

    monkeypatch.setattr(epoch, "lists_pay", lambda *_: lists)
    rows = {name: bank(24, 3, kind, ord(name)) for name, kind in (("T", "normal"), ("A", "grid"))}
    rows["C"] = torch.randint(4, (24, 1), generator=seeded(3)).float()
    terms = [Term("A", "C", "T"), Term("T", "A", "C"), Term("T", "C", "A")]
    epochs = []
    for backend in ("triton", "cpu", "reference"):
        with use_backend(backend):
            drawn = draw_epoch(ProductSampler(Bank(rows), 1, discrete, shared), terms, [4, 4, 3], seeded(4))
            epochs.append((drawn, [drawn.take(i) for i in range(3)]))
    for drawn, taken in epochs[1:]:
        assert torch.equal(drawn.query, epochs[0][0].query) and torch.equal(drawn.neighbour, epochs[0][0].neighbour)
        for own, other in zip(epochs[0][1], taken, strict=True):
            for name, part in own.items():
                assert all(torch.equal(a, b) for a, b in zip(part, other[name], strict=True)), name
