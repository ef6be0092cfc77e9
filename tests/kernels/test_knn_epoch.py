"""Product rows of a whole epoch: the rows of one draw a batch, found at once and taken without the host."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from engine.errors import EstimatorError
from engine.kernels import registry
from engine.kernels.knn_product import Bank, ProductSampler, draw_epoch, reference
from engine.kernels.knn_product import epoch as module
from engine.kernels.knn_product.op import Line
from engine.kernels.registry import use_backend
from engine.mimrl.settings import MIMRLObjectiveConfig as ObjectiveConfig
from engine.mimrl.terms import mimrl_objective
from engine.objective import Term
from tests.kernels.test_knn_cmi_op import TERMS, features, seeded, spread

KINDS = ["normal", "grid", "constant", "clusters"]
SETTINGS = [(True, ("C",)), (False, ()), (True, ())]


def same_rows(a, b) -> None:
    assert list(a) == list(b)
    for name in a:
        for one, other in zip(a[name], b[name], strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), name


# -- queries ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 200), share=st.floats(0, 1), draws=st.integers(1, 5), seed=st.integers(0, 9999))
def test_queries_of_a_draw_are_distinct(n, share, draws, seed):
    m = max(1, round(share * n))
    query, key = module._queries_and_keys(n, draws, m, seeded(seed), torch.device("cpu"))
    assert query.shape == key.shape == (draws, m) and query.dtype == key.dtype == torch.int64
    assert query.min() >= 0 and query.max() < n and key.min() >= 0 and key.max() < 1 << 32
    assert all(len(q.unique()) == m for q in query)


@pytest.mark.parametrize("m", [3, 12])
def test_numbers_drawn_in_parts(m, monkeypatch):
    whole = module._queries_and_keys(20, 50, m, seeded(1), torch.device("cpu"))
    monkeypatch.setattr(module, "DRAWN", 300)
    parts = module._queries_and_keys(20, 50, m, seeded(1), torch.device("cpu"))
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


@pytest.mark.parametrize("n, m", [(20, 3), (20, 12)])
def test_queries_are_uniform(n, m):
    """Every row as often as another, in every place, by either way of drawing; pairs are as often as chance has it."""
    draws = 6000
    query, _ = module._queries_and_keys(n, draws, m, seeded(1), torch.device("cpu"))
    expected = draws / n
    for place in range(m):
        assert (query[:, place].bincount(minlength=n) - expected).abs().max() < 5 * expected**0.5
    pairs = (query[:, 0] * n + query[:, 1]).bincount(minlength=n * n)
    expected = draws / (n * (n - 1))
    assert (pairs - expected).square().sum() / expected < 2 * n * n


def test_in_parts(monkeypatch):
    monkeypatch.setattr(module, "DRAWN", 300)
    query, _ = module._queries_and_keys(50, 20, 5, seeded(2), torch.device("cpu"))
    assert query.shape == (20, 5) and len(query.unique(dim=0)) == 20


# -- rows -------------------------------------------------------------------------------------------------------------


def expected_neighbours(bank, discrete, term, query, key, k):
    """By the specification, batch by batch."""
    z = bank[term.given]
    line = Line(z) if z.numel() == len(z) else None
    found = []
    for q, s in zip(query, key, strict=True):
        q, s = q[None], s[None]
        if term.given in discrete:
            g = line.strata(k)
            found.append(reference.within_strata(line.ascending, line.order, g.group, g.start, g.stop, q, s, k))
        elif line is not None:
            found.append(reference.nearest_on_line(line.ascending, line.order, q, s, k))
        else:
            found.append(reference.nearest(z, q, s, k, False))
    return torch.cat(found)


@settings(max_examples=120, deadline=None)
@given(
    n=st.integers(4, 60),
    k=st.integers(1, 4),
    share=st.floats(0, 1),
    steps=st.integers(1, 4),
    kind=st.sampled_from(KINDS),
    setting=st.sampled_from(SETTINGS),
    backend=st.sampled_from(["cpu", "reference"]),
    lists=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_rows_are_those_of_a_draw_a_batch(n, k, share, steps, kind, setting, backend, lists, seed):
    """Isolated, exact, tied rows by the same chance: whichever way they are found."""
    if n <= k:
        return
    m, (shared, discrete) = max(1, round(share * (n - k))), setting
    rows = {name: spread(n, 3, kind, seed + ord(name)) for name in "TA"}
    rows["C"] = torch.randint(5, (n, 1), generator=seeded(seed)).float()
    terms = [Term("A", "C", "T"), Term("T", "A", "C"), Term("C", "A", "T")]
    with pytest.MonkeyPatch.context() as patch, use_backend(backend):
        patch.setattr(module, "lists_pay", lambda *_: lists)
        patch.setattr(module, "QUERIES", 2 * m)
        epoch = draw_epoch(ProductSampler(Bank(rows), k, discrete, shared), terms, [m * k] * steps, seeded(seed))
    draws = 2 if shared else 3
    query, key = module._queries_and_keys(n, steps * draws, m, seeded(seed), torch.device("cpu"))
    query, key = query.view(steps, draws, m), key.view(steps, draws, m)
    assert torch.equal(epoch.query, query) and epoch.neighbour.shape == (steps, draws, m, k)
    order = {"I(A;C|T)": 0, "I(C;A|T)": 0 if shared else 1, "I(T;A|C)": draws - 1}
    for term in terms:
        draw = order[str(term)]
        found = expected_neighbours(rows, discrete, term, query[:, draw], key[:, draw], k)
        assert torch.equal(epoch.neighbour[:, draw], found)
        for step in range(steps):
            x, y, z = epoch.take(step)[str(term)]
            repeated = query[step, draw].repeat_interleave(k)
            assert torch.equal(x, rows[term.x][found[step].flatten()])
            assert torch.equal(y, rows[term.y][repeated]) and torch.equal(z, rows[term.given][repeated])


@pytest.mark.parametrize("kind, again", [("normal", False), ("grid", True), ("constant", True)])
def test_lists_that_do_not_decide_are_searched_again(kind, again, monkeypatch):
    space, k = Bank({"T": spread(200, 4, kind, 3)}).space("T"), 2
    query, key = module._queries_and_keys(200, 12, 10, seeded(4), torch.device("cpu"))
    searched = []
    monkeypatch.setattr(module, "_searched", lambda search, n, q, s: searched.append(len(q)) or search(q, s))
    found = module.from_lists(space, query, key, k)
    assert torch.equal(found, reference.nearest(space.z, query, key, k, False))
    assert bool(searched) == again


def test_a_list_ends_before_a_tie():
    """Rows 0, 1, 3, 3, 3, 6: of row 0's list of four the last is tied with rows that it leaves out."""
    z = torch.tensor([0.0, 1.0, 3.0, 3.0, 3.0, 6.0])[:, None]
    rows = reference.nearest(z, torch.arange(6)[None], torch.zeros(1, 6).long(), 4, True, False)[0]
    distance = (z[rows] - z[:, None]).square().sum(-1)
    query, key = torch.tensor([[0], [5]]), torch.tensor([[1], [2]])
    assert reference.select(rows, distance, query, key, 1)[1].tolist() == [False, True]
    assert reference.select(rows, distance, query, key, 2)[1].tolist() == [True, True]
    found, undecided = reference.select(rows, distance, torch.tensor([[0, 1]]), torch.tensor([[1, 2]]), 1)
    assert undecided.tolist() == [True] and not torch.isin(found, torch.tensor([0, 1])).any()


def test_by_cost():
    assert not module.lists_pay(16_326, 255, 64, "cpu") and not module.lists_pay(16_326, 255, 64, "triton")
    assert module.lists_pay(16_326, 9 * 255, 64, "cpu") and module.lists_pay(16_326, 3 * 255, 64, "triton")
    assert module.lists_pay(16_326, 3 * 511, 16, "triton")
    assert not module.lists_pay(1_284, 82, 16, "triton")  # an epoch of MOSI: launches cost more than the searches


def test_a_bank_takes_over_the_labels_of_an_earlier_one():
    """Only where their values are the same, and the rows are those of a bank of its own."""
    rows = features()
    earlier, later = Bank(rows), Bank({name: value.clone() + (name != "C") for name, value in rows.items()})
    draw_epoch(ProductSampler(earlier, 2, ("C",)), TERMS, [32], seeded(1))
    alone = draw_epoch(ProductSampler(Bank(dict(later)), 2, ("C",)), TERMS, [32, 32, 9], seeded(5))
    later.take_over(earlier)
    assert later.line("C") is earlier.line("C") and set(later._spaces) == set()
    taken = draw_epoch(ProductSampler(later, 2, ("C",)), TERMS, [32, 32, 9], seeded(5))
    assert torch.equal(alone.neighbour, taken.neighbour) and torch.equal(alone.features, taken.features)
    other = rows["C"].clone()
    other[3] += 1
    nan = torch.full_like(rows["C"], float("nan"))
    for changed in (other, rows["C"][:-1], rows["C"].flip(0), nan, rows["C"].reshape(-1, 2)):
        bank = Bank({"C": changed})
        bank.take_over(earlier)
        assert "C" not in bank._lines


@pytest.mark.parametrize("shared, discrete", SETTINGS)
def test_both_ways_give_one_epoch(shared, discrete, monkeypatch):
    monkeypatch.setattr(module, "SLICE", 200)  # less than the bank's rows: one draw at a time
    epochs = []
    for lists in (False, True):
        monkeypatch.setattr(module, "lists_pay", lambda *_, lists=lists: lists)
        sampler = ProductSampler(Bank(features()), 2, discrete, shared)
        epochs.append(draw_epoch(sampler, TERMS, [32] * 9 + [12], seeded(5)))
    assert torch.equal(epochs[0].neighbour, epochs[1].neighbour) and torch.equal(epochs[0].query, epochs[1].query)


def test_distribution_is_that_of_a_draw_a_batch():
    """How often each row is a neighbour, by the sampler and over an epoch; the label has few values, so ties abound."""
    rows = {"C": (torch.arange(40) % 4).float()[:, None], "X": torch.arange(40.0)[:, None]}
    terms, steps = [Term("X", "X", "C")], 1500
    for discrete in ((), ("C",)):
        sampler, generator = ProductSampler(Bank(rows), 2, discrete), seeded(6)
        drawn = [sampler.draw(terms, 12, generator)["I(X;X|C)"].x for _ in range(steps)]
        counts = torch.stack([
            torch.cat(drawn).long().flatten().bincount(minlength=40),
            draw_epoch(sampler, terms, [12] * steps, seeded(7)).neighbour.flatten().bincount(minlength=40),
        ]).double()  # fmt: skip
        assert (counts.sum(1) == steps * 12).all()
        assert (counts - steps * 12 / 40).abs().max() < 5 * (steps * 12 / 40) ** 0.5
        assert ((counts[0] - counts[1]).square() / counts.sum(0)).sum() < 80  # chi-square, 39 degrees of freedom


def test_a_seed_gives_the_same_epoch():
    sampler = ProductSampler(Bank(features()), 2, ("C",))
    first, again, other = (draw_epoch(sampler, TERMS, [32, 32, 9], seeded(s)) for s in (8, 8, 9))
    assert torch.equal(first.query, again.query) and torch.equal(first.neighbour, again.neighbour)
    assert not torch.equal(first.query, other.query)
    assert not torch.equal(first.query[0], first.query[1])


# -- taking -----------------------------------------------------------------------------------------------------------


def test_batches_of_several_sizes():
    """Of each its own number of queries; below k none. Any number of passes is one longer list."""
    sizes = [32, 32, 9, 1, 32, 32, 9, 1]
    epoch = draw_epoch(ProductSampler(Bank(features()), 2, ("C",)), TERMS, sizes, seeded(10))
    for number, size in enumerate(sizes):
        rows = epoch.take(number)
        assert list(rows) == ([str(t) for t in TERMS] if size >= 2 else [])
        assert all(len(part) == size // 2 * 2 for three in rows.values() for part in three)
        for x, *_ in rows.values():
            assert x.data_ptr() % 16 == 0 and x.is_contiguous()
    query, neighbour = epoch.query[2, :, :4], epoch.neighbour[2, :, :4]
    for q, near in zip(query, neighbour, strict=True):
        assert len(q.unique()) == 4 and not torch.isin(near, q).any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_by_a_counter(backend):
    epoch = draw_epoch(ProductSampler(Bank(features()), 2, ("C",)), TERMS, [32, 32, 32, 9], seeded(11))
    with use_backend(backend):
        counter = torch.tensor(0)
        for number, size in enumerate(epoch.batch_sizes):
            same_rows(epoch.take(counter, size), epoch.take(number))
            counter += 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_types_and_shapes_of_the_bank_are_kept(dtype):
    rows = {"T": torch.randn(40, 3, 2, dtype=dtype), "A": torch.randn(40), "C": torch.randn(40, 1, dtype=torch.float64)}
    terms = [Term("A", "C", "T"), Term("T", "A", "C")]
    epoch = draw_epoch(ProductSampler(Bank(rows), 2), terms, [10, 10], seeded(12))
    x, y, z = epoch.take(1)["I(T;A|C)"]
    query, near = epoch.query[1, 1].repeat_interleave(2), epoch.neighbour[1, 1].flatten()
    for part, name, index in ((x, "T", near), (y, "A", query), (z, "C", query)):
        assert part.dtype == rows[name].dtype and torch.equal(part, rows[name][index])


def test_another_epoch_in_place():
    rows = [features(), {name: value + 1 for name, value in features().items()}]
    sizes = [32, 32, 9]
    epoch, other = (draw_epoch(ProductSampler(Bank(r), 2, ("C",)), TERMS, sizes, seeded(s)) for s, r in enumerate(rows))
    addresses = [t.data_ptr() for t in (epoch.query, epoch.neighbour, epoch.features)]
    epoch.load(other)
    assert addresses == [t.data_ptr() for t in (epoch.query, epoch.neighbour, epoch.features)]
    for number in range(3):
        same_rows(epoch.take(number), other.take(number))
    other.features += 1
    assert not torch.equal(epoch.features, other.features)
    turned = draw_epoch(ProductSampler(Bank(rows[1]), 2, ("C",)), TERMS, [9, 32, 32], seeded(2))
    epoch.load(turned)  # as many batches, of sizes in another order
    for number in range(3):
        same_rows(epoch.take(number), turned.take(number))
    shorter = draw_epoch(ProductSampler(Bank(rows[0]), 2, ("C",)), TERMS, sizes[:2], seeded())
    fewer = draw_epoch(ProductSampler(Bank(rows[0]), 2, ("C",)), TERMS[:2], sizes, seeded())
    turned = draw_epoch(ProductSampler(Bank(rows[0]), 2, ("C",)), TERMS[::-1], sizes, seeded())
    wide = {name: value.double() for name, value in rows[0].items()}
    double = draw_epoch(ProductSampler(Bank(wide), 2, ("C",)), TERMS, sizes, seeded())
    for wrong in (shorter, fewer, turned, double):
        with pytest.raises(EstimatorError, match=r"EpochProducts\.load"):
            epoch.load(wrong)


def test_take_says_what_is_wrong():
    epoch = draw_epoch(ProductSampler(Bank(features()), 2), TERMS, [32, 9], seeded())
    for number, size in ((2, None), (-1, None), (0, 9), (torch.tensor(0), 31), (torch.tensor(0), None)):
        with pytest.raises(EstimatorError, match=r"EpochProducts\.take.*sizes \[9, 32\]"):
            epoch.take(number, size)
    for number in (2, -1):
        with pytest.raises(EstimatorError, match=rf"EpochProducts\.take.*batch {number}"):
            epoch.take(torch.tensor(number), 32)


def test_epoch_says_what_is_wrong():
    bank = Bank(features(20))
    with pytest.raises(EstimatorError, match="k_neighbor 0"):
        draw_epoch(ProductSampler(bank, 0), TERMS, [8])
    with pytest.raises(EstimatorError, match="bank of 20 rows of which 19 are queries"):
        draw_epoch(ProductSampler(bank, 2), TERMS, [8, 38])
    with pytest.raises(EstimatorError, match=r"T.*16 columns"):
        draw_epoch(ProductSampler(bank, 2, ("T",)), TERMS, [8])
    spoiled = features(20)
    spoiled["A"][3, 2] = torch.inf
    with pytest.raises(EstimatorError, match="NaN or infinite in the bank"):
        draw_epoch(ProductSampler(Bank(spoiled), 2), TERMS, [8])
    numbers = {name: value.long() for name, value in features(20).items()}
    with pytest.raises(EstimatorError, match=r"torch\.int64"):
        draw_epoch(ProductSampler(Bank(numbers), 2), TERMS, [8])
    assert draw_epoch(ProductSampler(bank, 2), [], [8, 1]).take(0) == {}
    assert draw_epoch(ProductSampler(bank, 9), TERMS, [8]).take(0) == {}
    assert draw_epoch(ProductSampler(bank, 2), TERMS, []).batch_sizes == []


@pytest.mark.parametrize("compat", ["none", "mimrl"])
def test_objective(compat):
    """With compat="none" terms of equal condition share their draw, else each has its own."""
    bank = {**features(100), "F": torch.randn(100, 4)}
    objective = mimrl_objective(ObjectiveConfig(compat=compat, hidden=8, embed=4), 4, 16)
    epoch = objective.sample_epoch(bank, [32, 32, 4], seeded(13))
    assert epoch.query.shape == (3, 4 if compat == "none" else 6, 16)
    rows = epoch.take(1)
    assert list(rows) == list(objective.sample_products(bank, 32, seeded(13)))
    assert torch.equal(rows["I(A;C|T)"].z, rows["I(V;C|T)"].z) == (compat == "none")
    joint = {name: value[:32] for name, value in bank.items()}
    assert objective.estimator_loss(joint, rows).loss.isfinite()


# -- on a GPU ---------------------------------------------------------------------------------------------------------

VIEWS = {
    "view", "expand", "slice", "select", "unsqueeze", "alias", "as_strided", "detach", "reshape", "empty", "new_empty",
    "empty_like", "scalar_tensor", "_unsafe_view", "narrow", "device",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Names of the operations that compute; of ours as often as they declare to launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if func.namespace == "engine":
            self.names += [name] * registry.launches(name, *args)
        elif name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def on_cuda(epoch: module.EpochProducts) -> None:
    """Take CUDA tensors without data for the epoch's own."""
    for name in ("features", "query", "neighbour", "_plan", "_counters"):
        own = getattr(epoch, name)
        setattr(epoch, name, torch.empty(own.shape, dtype=own.dtype, device="cuda"))


@pytest.mark.parametrize("shared, discrete", SETTINGS)
def test_rows_of_all_terms_are_one_launch_on_a_gpu(shared, discrete, monkeypatch):
    """And nothing is copied, nor read by the host: fake tensors have no values to read."""
    monkeypatch.setattr(registry, "has_triton", lambda: True)
    epoch = draw_epoch(ProductSampler(Bank(features()), 2, discrete, shared), TERMS, [32, 32, 9], seeded())
    with FakeTensorMode():
        on_cuda(epoch)
        counter = torch.zeros((), dtype=torch.int64, device="cuda")
        for arguments in ((counter, 32), (counter, 9), (1,)):
            with Launches() as counted:
                rows = epoch.take(*arguments)
            assert counted.names == ["knn_take"], set(counted.names)
            assert all(t.device.type == "cuda" for r in rows.values() for t in (r.x, r.y, r.z))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_searches_of_scalars_launch_what_they_declare(k):
    """However many draws there are. On a GPU they are the specification's operations."""
    line = Line(torch.randint(7, (300,), generator=seeded()).float())
    s = line.strata(k)
    strata = line.ascending, line.order, s.group, s.start, s.stop
    for draws in (1, 50):
        query, key = module._queries_and_keys(300, draws, 16, seeded(1), torch.device("cpu"))
        for name, function, prepared in (
            ("knn_nearest_on_line", reference.nearest_on_line, strata[:2]),
            ("knn_within_strata", reference.within_strata, strata),
        ):
            with Launches() as counted:
                function(*prepared, query, key, k)
            assert len(counted.names) == registry.launches(name, *prepared, query, key, k)


def test_operations_pass_opcheck():
    epoch = draw_epoch(ProductSampler(Bank(features()), 2, ("C",)), TERMS, [32, 32], seeded())
    arguments = epoch.features, epoch.query, epoch.neighbour, torch.tensor(1), epoch._plan, 16, 16 * epoch._size
    opcheck(torch.ops.engine.knn_take, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda c: epoch.take(c, 32)["I(T;A|C)"].x, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.tensor(1)), epoch.take(1)["I(T;A|C)"].x)
