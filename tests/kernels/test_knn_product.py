"""Product sampling: exact neighbours, isolation, fair ties, strata."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from engine.errors import EstimatorError
from engine.kernels.knn_product import (
    Bank,
    label_strata,
    product_indices,
    product_rows,
    reference,
    stratified_product_indices,
)
from engine.kernels.knn_product.conditions import Space
from engine.kernels.knn_product.reference import distinct
from engine.kernels.registry import use_backend


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distances(z: torch.Tensor, query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    z = z.reshape(len(z), -1).double()
    return (z[rows] - z[query][:, None]).square().sum(-1)


def check_nearest(z: torch.Tensor, neighbour: torch.Tensor, query: torch.Tensor, k: int) -> None:
    """Distinct non-query rows whose sorted distances are those of the k nearest, nearest first."""
    rows = neighbour.reshape(len(query), k)
    others = torch.tensor([i for i in range(len(z)) if i not in set(query.tolist())])
    assert not torch.isin(rows, query).any()
    assert all(len(set(r)) == k for r in rows.tolist())
    everything = distances(z, query, others.expand(len(query), -1))
    assert torch.equal(distances(z, query, rows), everything.sort(1).values[:, :k])


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(2, 70),
    dz=st.sampled_from([1, 2, 3, 17]),
    k=st.integers(1, 6),
    share=st.floats(0, 1),
    kind=st.sampled_from(["normal", "offset", "spread", "grid", "constant", "clusters"]),
    ties=st.sampled_from(["random", "first"]),
    seed=st.integers(0, 10_000),
)
def test_neighbours_are_the_nearest_others(n, dz, k, share, kind, ties, seed):
    if n <= k:
        return
    m = round(share * (n - k))
    z = torch.randn(n, dz, generator=seeded(seed))
    if kind == "offset":
        z += 1e4
    elif kind == "spread":
        z = torch.exp(12 * z)
    elif kind == "grid":
        z = z.round()
    elif kind == "constant":
        z = torch.ones_like(z)
    elif kind == "clusters":  # cluster distances swamp the distances within clusters in float32
        z = z * 1e-4 + 1e4 * torch.randint(3, (n, 1), generator=seeded(seed)).float()
    neighbour, query = product_indices(z, m, k, seeded(seed), ties=ties)
    assert neighbour.shape == (m * k,) and query.shape == (m,) and neighbour.dtype == query.dtype == torch.int64
    assert len(set(query.tolist())) == m
    check_nearest(z, neighbour, query, k)


@pytest.mark.parametrize("n, dz, m, k", [(300, 1, 20, 3), (500, 16, 40, 4), (1284, 128, 64, 2)])
@pytest.mark.parametrize("ties", ["random", "first"])
def test_same_rows_as_scikit_learn(n, dz, m, k, ties):
    z = torch.randn(n, dz, generator=seeded(1))
    neighbour, query = product_indices(z, m, k, seeded(2), ties=ties)
    others = np.setdiff1d(np.arange(n), query.numpy())
    model = NearestNeighbors(n_neighbors=k).fit(z.numpy()[others])
    expected = others[model.kneighbors(z.numpy()[query.numpy()], return_distance=False)]
    assert np.array_equal(neighbour.reshape(m, k).numpy(), expected)


@pytest.mark.parametrize("shape", [(200,), (200, 1), (200, 3)])
def test_every_tied_row_is_drawn_equally_often(shape):
    """Seven-valued labels: each row of the query's value must come up, and none more often than chance allows."""
    value = torch.arange(200) % 7
    z = value.float().reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    k, calls = 2, 600
    query = torch.tensor([0, 1])
    generator = seeded(3)
    counts = torch.zeros(2, 200)
    for _ in range(calls):
        neighbour, _ = product_indices(z, 2, k, generator, query=query)
        for i in range(2):
            counts[i, neighbour.reshape(2, k)[i]] += 1
    for i in range(2):
        same = (value == i).nonzero()[:, 0]
        same = same[same != i]
        assert counts[i].sum() == counts[i, same].sum() == calls * k
        expected = calls * k / len(same)
        assert (counts[i, same] - expected).abs().max() < 5 * expected**0.5, counts[i, same]


def test_ties_at_the_kth_distance_only():
    """Query 0 of 0, 1, −1, 2, −2, 5 with k=3: ±1 always, then 2 and −2 equally often."""
    z = torch.tensor([0.0, 1.0, -1.0, 2.0, -2.0, 5.0])
    for bank in (z, torch.stack([z, torch.zeros(6)], 1)):
        generator, seen = seeded(4), []
        for _ in range(400):
            neighbour, _ = product_indices(bank, 1, 3, generator, query=torch.tensor([0]))
            assert sorted(neighbour[:2].tolist()) == [1, 2]
            seen.append(neighbour[2].item())
        assert set(seen) == {3, 4} and 150 < seen.count(3) < 250
        neighbour, _ = product_indices(bank, 1, 3, query=torch.tensor([0]), ties="first")
        assert neighbour.tolist() == [1, 2, 3]


@pytest.mark.parametrize("dz", [1, 8])
def test_a_seed_gives_the_same_draw(dz):
    z = torch.randn(400, dz, generator=seeded(5)).round()
    first, again, other = (product_indices(z, 16, 3, seeded(s)) for s in (6, 6, 7))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_no_query_more_often_than_another():
    z = torch.randn(20, 2, generator=seeded(8))
    generator = seeded(9)
    counts = torch.zeros(20)
    for _ in range(2000):
        counts[product_indices(z, 5, 2, generator)[1]] += 1
    assert (counts - 500).abs().max() < 5 * 500**0.5


def test_distances_ignore_the_training_precision():
    """Neither autocast nor TF32 may change the neighbours, and the precision setting is left as it was."""
    z = torch.randn(600, 64, generator=seeded(10))
    expected, _ = product_indices(z, 32, 3, seeded(11))
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            neighbour, _ = product_indices(z, 32, 3, seeded(11))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(neighbour, expected)


def test_in_blocks(monkeypatch):
    z = torch.randn(300, 4, generator=seeded(12)).round()
    expected, _ = product_indices(z, 50, 3, query=torch.arange(50), ties="first")
    monkeypatch.setattr("engine.kernels.knn_product.cpu.PRODUCTS", 2000)
    monkeypatch.setattr("engine.kernels.knn_product.cpu.ROWS", 70)
    neighbour, _ = product_indices(z, 50, 3, query=torch.arange(50), ties="first")
    assert torch.equal(neighbour, expected)
    query = torch.stack([torch.randperm(300, generator=seeded(s))[:50] for s in range(3)])  # blocks hold parts of draws
    key = torch.randint(1 << 32, query.shape, generator=seeded(13))
    assert torch.equal(Space(z).neighbours(query, key, 3), reference.nearest(z, query, key, 3, False))
    monkeypatch.setattr(reference, "BLOCK", 9000)
    with use_backend("reference"):
        assert torch.equal(Space(z).neighbours(query, key, 3), reference.nearest(z, query, key, 3, False))


@pytest.mark.parametrize("sample", [product_indices, stratified_product_indices])
def test_bank_too_small(sample):
    z = torch.arange(10.0)
    for m, k in [(8, 3), (11, 1), (0, 11)]:
        with pytest.raises(EstimatorError, match=r"k_neighbor.*bank of 10 rows"):
            sample(z, m, k)
    with pytest.raises(EstimatorError, match="k_neighbor"):
        sample(z, 2, 0)
    neighbour, query = sample(z, 8, 2, seeded())
    assert sorted(set(neighbour.tolist()) | set(query.tolist())) == list(range(10))


@pytest.mark.parametrize("sample", [product_indices, stratified_product_indices])
def test_no_queries_give_no_rows(sample):
    neighbour, query = sample(torch.randn(10, 1), 0, 2)
    assert neighbour.shape == query.shape == (0,) and neighbour.dtype == torch.int64


def test_queries_and_strata_that_do_not_fit():
    z = torch.arange(10.0)
    for query in ([0, -1], [0, 10], [3, 3]):
        for sample in (product_indices, stratified_product_indices):
            with pytest.raises(EstimatorError, match="rows that are out of range or given twice"):
                sample(z, 2, 1, query=torch.tensor(query))
    assert product_indices(z, 2, 1, query=torch.tensor([0, 9]))[0].tolist() == [1, 8]
    with pytest.raises(EstimatorError, match="strata of 9 rows for 10 labels"):
        stratified_product_indices(z, 2, 1, strata=label_strata(z[:9], 1))


def test_a_bank_holds_no_graph():
    z = torch.randn(10, 2, requires_grad=True)
    bank = Bank({"z": 2 * z})
    assert not bank["z"].requires_grad
    with pytest.raises(EstimatorError, match="features of a 3, b 4 rows"):
        Bank({"a": z[:3], "b": z[:4]})


def test_product_rows():
    x, y, z = torch.arange(6.0)[:, None], 10 * torch.arange(6.0)[:, None], 100 * torch.arange(6.0)[:, None]
    rows = product_rows(x, y, z, torch.tensor([4, 5, 3, 4]), torch.tensor([0, 2]), 2)
    assert [r[:, 0].tolist() for r in rows] == [[4, 5, 3, 4], [0, 0, 20, 20], [0, 0, 200, 200]]


# -- strata -----------------------------------------------------------------------------------------------------------


def test_neighbours_share_the_label():
    label = torch.randint(7, (500,), generator=seeded(13)).float() - 3
    neighbour, query = stratified_product_indices(label[:, None], 60, 4, seeded(14))
    rows = neighbour.reshape(60, 4)
    assert (label[rows] == label[query][:, None]).all()
    assert not torch.isin(rows, query).any()
    assert all(len(set(r)) == 4 for r in rows.tolist())


def test_draws_within_a_stratum_are_uniform():
    label = torch.tensor([0.0] * 12 + [1.0] * 40)
    generator = seeded(15)
    counts, total = torch.zeros(52), 0
    for _ in range(1000):
        neighbour, query = stratified_product_indices(label, 2, 3, generator)
        rows = neighbour.reshape(2, 3)[query < 12]
        counts[rows.flatten()] += 1
        total += rows.numel()
    assert counts[12:].sum() == 0
    assert (counts[:12] - total / 12).abs().max() < 5 * (total / 12) ** 0.5


def brute_force_strata(label: list[float], k: int) -> list[list[float]]:
    groups = [[v for v in label if v == u] for u in sorted(set(label))]
    while len(groups) > 1 and min(map(len, groups)) <= k:
        i = min(range(len(groups)), key=lambda g: len(groups[g]))
        below = groups[i][0] - groups[i - 1][-1] if i else float("inf")
        above = groups[i + 1][0] - groups[i][-1] if i + 1 < len(groups) else float("inf")
        a = i - 1 if below <= above else i
        groups[a : a + 2] = [groups[a] + groups[a + 1]]
    return groups


@settings(max_examples=200, deadline=None)
@given(label=st.lists(st.integers(-9, 9).map(lambda v: v / 4), min_size=1, max_size=40), k=st.integers(1, 5))
def test_small_strata_merge_with_the_nearest_label(label, k):
    strata = label_strata(torch.tensor(label), k)
    expected = brute_force_strata(label, k)
    assert (strata.stop - strata.start).tolist() == [len(g) for g in expected]
    for row, group in enumerate(strata.group.tolist()):
        assert label[row] in expected[group]
    assert sorted(strata.order.tolist()) == list(range(len(label)))


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(2, 60),
    values=st.integers(1, 12),
    k=st.integers(1, 5),
    share=st.floats(0, 1),
    seed=st.integers(0, 9999),
)
def test_short_strata_fall_back_to_the_nearest_labels(n, values, k, share, seed):
    if n <= k:
        return
    m = round(share * (n - k))
    label = torch.randint(values, (n,), generator=seeded(seed)).float()
    neighbour, query = stratified_product_indices(label, m, k, seeded(seed))
    rows, strata = neighbour.reshape(m, k), label_strata(label, k)
    assert len(set(query.tolist())) == m and not torch.isin(rows, query).any()
    free = torch.ones(n, dtype=torch.bool)
    free[query] = False
    for q, r in zip(query.tolist(), rows, strict=True):
        assert len(set(r.tolist())) == k
        if (free & (strata.group == strata.group[q])).sum() >= k:
            assert (strata.group[r] == strata.group[q]).all()
        else:
            far = (label - label[q]).abs()
            assert torch.equal(far[r].sort().values, far[free].sort().values[:k])


def test_given_strata_change_nothing():
    label = torch.randint(7, (300,), generator=seeded(16)).float()
    a = stratified_product_indices(label, 20, 3, seeded(17))
    b = stratified_product_indices(label, 20, 3, seeded(17), strata=label_strata(label, 3))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_labels_that_cannot_be_strata():
    with pytest.raises(EstimatorError, match="3 columns"):
        stratified_product_indices(torch.zeros(10, 3), 2, 1)
    with pytest.raises(EstimatorError, match="NaN"):
        stratified_product_indices(torch.tensor([0.0, float("nan"), 1.0, 2.0]), 1, 1)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), seed=st.integers(0, 9999))
def test_distinct_draws(sizes, seed):
    size = torch.tensor(sizes)
    count = torch.minimum(size, torch.randint(0, 6, size.shape, generator=seeded(seed)))
    key = torch.randint(1 << 32, size.shape, generator=seeded(seed))
    for draw, s, c in zip(distinct(size, count, 5, key).tolist(), sizes, count.tolist(), strict=True):
        assert draw[c:] == [-1] * (5 - c)
        assert len(set(draw[:c])) == c and all(0 <= d < s for d in draw[:c])


def test_fast_enough_for_every_step():
    """A bank of 16,326 rows, 64 queries: stratified draws within 10 ms."""
    label = (torch.randn(16_326, generator=seeded(18)) * 5).round() / 5
    generator, times, threads = seeded(19), [], torch.get_num_threads()
    torch.set_num_threads(1)  # what other processes do to a second thread is not the sampler's speed
    for _ in range(20):
        start = time.perf_counter()
        stratified_product_indices(label, 64, 2, generator)
        times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    assert min(times) < 0.010, f"{min(times) * 1e3:.1f} ms"
