"""Registered operations of product sampling and of the conditional classifiers, and the grouped estimators on them."""

import copy
import math

import pytest
import torch
from torch.library import opcheck

from engine.errors import EstimatorError
from engine.kernels.cmi import batched, classifier_logits, cmi, reference
from engine.kernels.knn_product import Bank, ProductRows, ProductSampler, knn_product_samples, product_indices
from engine.kernels.knn_product import cpu as knn_cpu
from engine.kernels.knn_product import reference as knn_reference
from engine.kernels.knn_product.op import Line, Space
from engine.kernels.registry import use_backend
from engine.mimrl.settings import MIMRLObjectiveConfig as ObjectiveConfig
from engine.mimrl.terms import mimrl_objective
from engine.model.cmi import CMIEstimator
from engine.model.groups import CMIGroup
from engine.objective import Term

TERMS = [
    Term("A", "C", "T"), Term("T", "A", "C"), Term("V", "C", "T"), Term("T", "V", "C"), Term("T", "C", "A"),
    Term("T", "C", "V"),
]  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- neighbours: the fast search against the specification ------------------------------------------------------------


def spread(n: int, d: int, kind: str, seed: int) -> torch.Tensor:
    z = torch.randn(n, d, generator=seeded(seed))
    if kind == "offset":
        return z + 1e4
    if kind == "orders":
        return torch.exp(12 * z)
    if kind == "grid":
        return z.mul(0.7).round()
    if kind == "constant":
        return torch.ones_like(z)
    if kind == "clusters":
        return z * 1e-4 + 1e4 * torch.randint(3, (n, 1), generator=seeded(seed)).float()
    if kind == "huge":
        return z * 1e30
    if kind == "tiny":
        return z * 1e-30
    if kind == "outlier":
        z[0] *= 1e6
    return z


EXACT = pytest.mark.skipif(not knn_cpu.int8_is_exact(), reason="torch's int8 products are not exact on this processor")
KINDS = ["normal", "offset", "orders", "grid", "constant", "clusters", "huge", "tiny", "outlier"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "n, d, draws, m, k", [(2, 2, 1, 1, 1), (65, 1, 2, 20, 3), (100, 3, 1, 50, 5), (257, 128, 2, 64, 2)]
)
def test_search_is_exact(n, d, draws, m, k, kind):
    """Bitwise the specification's rows, by int8 and by float32 products, ties at random and not."""
    z = spread(n, d, kind, seed=n)
    query = torch.stack([torch.randperm(n, generator=seeded(s))[:m] for s in range(draws)])
    key = torch.randint(1 << 32, (draws, m), generator=seeded(9))
    for first in (False, True):
        expected = knn_reference.nearest(z, query, key, k, first)
        for int8 in (False, True) if d > 1 and knn_cpu.int8_is_exact() else (False,):
            found = knn_cpu.nearest(z, *knn_cpu.prepare(z, int8), query, key, k, first)
            assert torch.equal(found, expected), (first, int8)


def test_products_that_saturate_are_not_taken(monkeypatch):
    """As those of a processor without VNNI: u8 times s8, with 16 bits for the sum of two."""

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        terms = (a.long() + 128)[:, :, None] * b.long()
        pairs = terms.reshape(len(a), -1, 2, b.shape[1]).sum(2).clamp(-(1 << 15), (1 << 15) - 1)
        return (pairs.sum(1) - 128 * b.long().sum(0)).int()

    small = torch.arange(-8, 8, dtype=torch.int8).reshape(2, 8)
    assert torch.equal(product(small, small.T), (small.long() @ small.long().T).int())
    monkeypatch.setattr(torch, "_int_mm", product, raising=False)
    assert not knn_cpu.int8_is_exact.__wrapped__()
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.long() @ b.long()).int())
    assert knn_cpu.int8_is_exact.__wrapped__()


@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=EXACT)])
def test_bounds_are_bounds(int8):
    """No lower bound above its distance, on rows of many sizes: what exactness rests on."""
    z = torch.randn(300, 24, generator=seeded(1)) * torch.logspace(-3, 3, 300)[:, None] + 50
    coarse, bounds, unit = knn_cpu.prepare(z, int8)
    scale, square, norm, residual, rounded = bounds.double()
    product = coarse.double() @ coarse.double().T * scale[:, None] * scale
    low = square[:, None] + square - 2 * (product + norm[:, None] * residual + residual[:, None] * rounded)
    exact = (z.double()[:, None] - z.double()).square().sum(-1) / unit**2
    assert (low <= exact).all()
    off = ~torch.eye(300, dtype=torch.bool)
    assert ((exact - low) / (square[:, None] + square))[off].max() < (0.05 if int8 else 1e-4)


@pytest.mark.parametrize("n, values, m, k", [(2, 1, 1, 1), (63, 5, 30, 4), (200, 200, 64, 2), (257, 31, 100, 3)])
def test_labels(n, values, m, k):
    """Scalars and strata: the specification's rows."""
    z = torch.randint(values, (n,), generator=seeded(n)).float()
    line, query = Line(z), torch.stack([torch.randperm(n, generator=seeded(s))[:m] for s in (1, 2)])
    key = torch.randint(1 << 32, (2, m), generator=seeded(3))
    fast = line.neighbours(query, key, k), line.within_strata(query, key, k)
    with use_backend("reference"):
        assert torch.equal(fast[0], line.neighbours(query, key, k))
        assert torch.equal(fast[1], line.within_strata(query, key, k))


def test_neighbour_operations_pass_opcheck():
    z, query, key = torch.randn(40, 16, generator=seeded()), torch.arange(6)[None], torch.arange(6)[None]
    tests = ("test_schema", "test_faketensor")
    opcheck(torch.ops.engine.knn_nearest, (z, *knn_cpu.prepare(z), query, key, 2, False), test_utils=tests)
    line = Line(z[:, 0].round())
    s = line.strata(2)
    opcheck(torch.ops.engine.knn_nearest_on_line, (line.ascending, line.order, query, key, 2), test_utils=tests)
    arguments = (line.ascending, line.order, s.group, s.start, s.stop, query, key, 2)
    opcheck(torch.ops.engine.knn_within_strata, arguments, test_utils=tests)


def test_a_bank_of_several_draws_isolates_each_draw_alone():
    """A row that is a query of one draw may be a neighbour in another."""
    space = Space(torch.arange(4.0)[:, None].repeat(1, 9))
    query = torch.tensor([[0, 1], [3, 2]])
    found = space.neighbours(query, torch.zeros_like(query), 1)
    assert found[:, :, 0].tolist() == [[2, 2], [1, 1]]


# -- the sampler ------------------------------------------------------------------------------------------------------


def features(n: int = 300, d: int = 16) -> dict[str, torch.Tensor]:
    rows = {name: torch.randn(n, d, generator=seeded(ord(name))) for name in "TAV"}
    rows["C"] = torch.randint(7, (n, 1), generator=seeded(3)).float()
    return rows


@pytest.mark.parametrize("shared, discrete", [(True, ("C",)), (False, ()), (True, ())])
def test_sampler(shared, discrete):
    """Rows of samples that exist: y and z of queries, x of k other rows near in z."""
    rows = features()
    index = torch.arange(300.0)[:, None]
    traced = {**rows, "X": index, "Y": index}
    terms = [Term("X", "Y", z) for z in "TAVC"] + [Term("Y", "X", "T")]
    drawn = ProductSampler(Bank(traced), 3, discrete, shared).draw(terms, 65, seeded(5))
    assert list(drawn) == [str(t) for t in terms]
    for term, (x, y, z) in zip(terms, drawn.values(), strict=True):
        assert len(x) == len(y) == len(z) == 63
        neighbour, query = x[:, 0].long(), y[:, 0].long()
        assert torch.equal(z, rows[term.given][query])
        assert torch.equal(query.reshape(21, 3), query[::3, None].expand(21, 3)) and len(query.unique()) == 21
        assert not torch.isin(neighbour, query).any()
        if term.given != "C":
            expected, _ = product_indices(rows[term.given], 21, 3, query=query[::3], ties="first")
            assert torch.equal(neighbour, expected)
        else:
            assert torch.equal(rows["C"][neighbour], z)
    same = torch.equal(drawn["I(X;Y|T)"][0], drawn["I(Y;X|T)"][0])
    assert same == shared


def test_a_seed_gives_the_same_rows_three_times():
    bank = Bank(features())
    draws = [ProductSampler(bank, 2, ("C",)).draw(TERMS, 64, seeded(6)) for _ in range(3)]
    for name in draws[0]:
        for other in draws[1:]:
            assert all(torch.equal(a, b) for a, b in zip(draws[0][name], other[name], strict=True))
    other = ProductSampler(bank, 2, ("C",)).draw(TERMS, 64, seeded(7))
    assert not torch.equal(draws[0]["I(A;C|T)"].z, other["I(A;C|T)"].z)


def test_queries_are_uniform():
    """Every row as often as another, and in every place as often as in another."""
    sampler, generator = ProductSampler(Bank({"T": torch.arange(20.0)}), 1), seeded(8)
    counts = torch.zeros(3, 20)
    for _ in range(1500):
        counts[torch.arange(3), sampler.draw([Term("T", "T", "T")], 3, generator)["I(T;T|T)"].z.long()] += 1
    assert (counts - 75).abs().max() < 5 * 75**0.5


def test_product_rows_are_a_triple():
    x, y, z = torch.arange(6.0)[:, None], torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    rows = ProductRows(x, y, z, 3)
    assert len(rows) == 3 and torch.equal(rows[0], x)
    assert rows[1][:, 0].tolist() == [1, 1, 1, 2, 2, 2] and tuple(rows)[2][:, 0].tolist() == [3, 3, 3, 4, 4, 4]
    with pytest.raises(IndexError):
        rows[3]


def test_three_lines():
    x, y, z = torch.randn(50, 2), torch.randn(50, 3), torch.randn(50, 4)
    rows = knn_product_samples(x, y, z, m=10, k=2, generator=seeded())
    assert [tuple(part.shape) for part in rows] == [(20, 2), (20, 3), (20, 4)]
    label = torch.arange(50)[:, None] % 5
    x, _, z = knn_product_samples(label, y, label, m=10, k=3, generator=seeded(), discrete=True)
    assert torch.equal(x, z)
    for wrong in ((y[:9], y, z), (y, y[:9], y), (y, y, y[:9])):
        with pytest.raises(EstimatorError, match="rows of x, y, z"):
            knn_product_samples(*wrong, m=4, k=2)


def test_terms_of_a_condition_share_their_draw_by_default():
    drawn = ProductSampler(Bank(features()), 2).draw(TERMS[:2] + TERMS[2:3], 20, seeded())
    assert torch.equal(drawn["I(A;C|T)"].z, drawn["I(V;C|T)"].z)


def test_int8_is_not_for_few_columns(monkeypatch):
    """torch's int8 product of a single column is wrong."""
    monkeypatch.setattr(knn_cpu, "int8_is_fast", lambda: True)
    for width, dtype in ((1, torch.float32), (7, torch.float32), (8, torch.int8)):
        assert knn_cpu.prepare(torch.randn(20, width))[0].dtype == dtype


def test_sampler_says_what_is_wrong():
    bank = Bank(features(20))
    with pytest.raises(EstimatorError, match="k_neighbor 9 with a batch of 8"):
        ProductSampler(bank, 9).draw(TERMS, 8)
    with pytest.raises(EstimatorError, match="bank of 20 rows of which 19 are queries"):
        ProductSampler(bank, 2).draw(TERMS, 38)
    with pytest.raises(EstimatorError, match=r"T.*16 columns"):
        ProductSampler(bank, 2, ("T",)).draw(TERMS, 8)
    spoiled = features(20)
    spoiled["A"][3, 2] = math.nan
    with pytest.raises(EstimatorError, match="NaN or infinite in the bank"):
        ProductSampler(Bank(spoiled), 2).draw(TERMS, 8)
    assert ProductSampler(bank, 2).draw([], 8) == {}


# -- classifiers ------------------------------------------------------------------------------------------------------


# rows of a batch: queries, product rows a query
SIZES = {
    1: (1, 1), 2: (1, 2), 7: (3, 2), 63: (31, 2), 64: (16, 4), 65: (65, 1), 100: (50, 2), 257: (64, 4)
}  # fmt: skip


def problem(widths=(4, 4, 1), b=5, m=3, k=2, dim=4, hidden=6, out=1, dtype=torch.float64, seed=0):
    """Three classifiers on features of the given widths, the label in every slot once."""
    generator = seeded(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    slots = [(0, 1, 2), (2, 0, 1), (1, 2, 0)]
    sizes = [(hidden, 3 * dim), (hidden, hidden), (hidden, hidden), (out, hidden)]
    layers = [(draw(3, o, i) / i**0.5, 0.1 * draw(3, o)) for o, i in sizes]
    joint = [draw(b, w) for w in widths]
    product = [tuple(draw(m * k if i == 0 else m, widths[s]) for i, s in enumerate(three)) for three in slots]
    return layers, joint, slots, product, k


def run(layers, joint, slots, product, k):
    return classifier_logits(layers[0], layers[1:], joint, slots, product, k)


def leaves(layers, joint):
    return [t.detach().clone().requires_grad_() for t in (*joint, *(t for layer in layers for t in layer))]


def rebuilt(flat, joint, layers):
    n = len(joint)
    return list(zip(flat[n::2], flat[n + 1 :: 2], strict=True)), flat[:n]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("widths, out", [((4, 4, 1), 1), ((4, 3, 2), 2)])
def test_classifiers_gradcheck(backend, widths, out):
    layers, joint, slots, product, k = problem(widths, b=3, m=2, hidden=3, out=out)

    def function(*flat):
        return run(*rebuilt(flat, joint, layers), slots, product, k)

    with use_backend(backend):
        assert torch.autograd.gradcheck(function, leaves(layers, joint))


@pytest.mark.parametrize("estimator", ["ldr", "dv", "nwj"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_reading_gradcheck(backend, estimator):
    """Rows beyond the limit included: they have no part in the value's gradient, but in the loss's."""
    joint = (3 * torch.randn(2, 5, generator=seeded(1), dtype=torch.float64)).requires_grad_()
    product = (3 * torch.randn(2, 4, generator=seeded(2), dtype=torch.float64)).requires_grad_()
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda a, b: cmi(a, b, estimator, 2.0)[:2], (joint, product))


@pytest.mark.parametrize("estimator", ["ldr", "dv", "nwj"])
def test_reading_is_the_formula(estimator):
    joint, product = 5 * torch.randn(3, 9, generator=seeded(3)), 5 * torch.randn(3, 4, generator=seeded(4))
    fast = cmi(joint, product, estimator)
    with use_backend("reference"):
        for a, b in zip(fast, cmi(joint, product, estimator), strict=True):
            torch.testing.assert_close(a, b)
    one = cmi(joint[0], product[0], estimator)
    assert one.loss.shape == one.value.shape == () and one.readings.shape == (3,)
    torch.testing.assert_close(one.value, fast.value[0])


@pytest.mark.parametrize("size", [1e4, -1e4, 100.0])
def test_large_logits_stay_finite(size):
    joint, product = (torch.full((1, 4), s, requires_grad=True) for s in (-size, size))
    reading = cmi(joint, product, "nwj")
    (reading.loss + reading.value).sum().backward()
    assert all(t.isfinite().all() for t in (*reading, joint.grad, product.grad))


@pytest.mark.parametrize("m, k, b", [(m, k, b) for b, (m, k) in SIZES.items()])
@pytest.mark.parametrize("dim", [1, 31, 128])
def test_no_worse_than_plain_fp32(b, m, k, dim):
    """|fast − fp64| <= |plain fp32 − fp64| + tolerance, elementwise: logits and all gradients."""
    layers, joint, slots, product, k = problem((dim, dim, 1), b, m, k, dim, 32, seed=b)
    results = []
    for backend, dtype in (("reference", torch.float64), ("reference", torch.float32), ("cpu", torch.float32)):
        flat = [t.detach().to(dtype).requires_grad_() for t in leaves(layers, joint)]
        wide = [tuple(part.to(dtype) for part in three) for three in product]
        with use_backend(backend):
            logits = run(*rebuilt(flat, joint, layers), slots, wide, k)
            loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=dtype).view_as(t)).sum() for t in logits)
            results.append([*logits, *torch.autograd.grad(loss, flat)])
    for exact, plain, fast in zip(*results, strict=True):
        tolerance = 2e-6 * exact.abs().max() + 1e-6
        assert ((fast - exact).abs() <= (plain - exact).abs() + tolerance).all()


def test_non_contiguous_features_and_weights():
    layers, joint, slots, product, k = problem(dim=4)
    expected = run(layers, joint, slots, product, k)
    odd = [torch.stack([j, j], 2)[:, :, 0] for j in joint]
    turned = [(w.mT.contiguous().mT, b) for w, b in layers]
    for a, b in zip(run(turned, odd, slots, product, k), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_is_computed_that_is_not_wanted(monkeypatch):
    """Frozen weights: no weight gradients. Detached rows: none of rows. LDR: product rows stay out of backward."""
    layers, joint, slots, product, k = problem(dtype=torch.float32)
    seen, backward = [], batched.backward
    monkeypatch.setattr(batched, "backward", lambda *a: seen.append((a[1] is not None, a[-2], a[-1])) or backward(*a))
    for rows, weights, which, expected in (
        (True, False, "value", (False, True, False)),
        (False, True, "loss", (True, False, True)),
        (True, True, "value", (False, True, True)),
    ):
        own = [tuple(t.clone().requires_grad_(weights) for t in layer) for layer in layers]
        logits = run(own, [j.clone().requires_grad_(rows) for j in joint], slots, product, k)
        getattr(cmi(*(t[..., 0] for t in logits)), which).sum().backward()
        assert seen.pop() == expected
        assert all((t.grad is not None) == weights for layer in own for t in layer)


def test_classifiers_are_deterministic():
    layers, joint, slots, product, k = problem((31, 31, 1), 65, 32, 2, 31, 64, dtype=torch.float32)
    found = []
    for _ in range(3):
        flat = leaves(layers, joint)
        joint_logits, product_logits = run(*rebuilt(flat, joint, layers), slots, product, k)
        found.append([joint_logits, *torch.autograd.grad(joint_logits.sum() + product_logits.square().sum(), flat)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_classifier_operations_pass_opcheck():
    layers, joint, slots, product, k = problem(dtype=torch.float32)
    (first, first_bias), *rest = layers
    places, flat = [s for three in slots for s in three], [part for three in product for part in three]
    tests = ("test_schema", "test_faketensor")
    forward = (first, first_bias, [t for layer in rest for t in layer], joint, places, flat, k)
    opcheck(torch.ops.engine.cmi_forward, forward, test_utils=tests)
    of_joint, of_product, *hidden = torch.ops.engine.cmi_forward(*forward)
    for grad, wanted in ((of_product, (True, True)), (None, (True, False)), (of_product, (False, True))):
        arguments = (of_joint, grad, first, [w for w, _ in rest], joint, places, flat, k, hidden, *wanted)
        opcheck(torch.ops.engine.cmi_backward, arguments, test_utils=tests)
    a, b, ones = of_joint[..., 0].contiguous(), of_product[..., 0].contiguous(), torch.ones(3)
    opcheck(torch.ops.engine.cmi_read, (a, b, 9.0), test_utils=tests)
    for loss_grad, value_grad, which in ((ones, None, 0), (None, ones, 0), (ones, ones, 2)):
        opcheck(torch.ops.engine.cmi_read_backward, (a, b, loss_grad, value_grad, which, 9.0), test_utils=tests)


def test_compiles_into_one_graph():
    layers, joint, slots, product, k = problem(dtype=torch.float32)

    def function(*flat):
        logits = run(*rebuilt(flat, joint, layers), slots, product, k)
        reading = cmi(*(t[..., 0] for t in logits), "dv")
        return (reading.loss + reading.value).sum()

    eager, compiled = leaves(layers, joint), leaves(layers, joint)
    function(*eager).backward()
    torch.compile(function, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_classifiers_say_what_does_not_fit():
    layers, joint, slots, product, k = problem()
    for change in (
        {"joint": [joint[0], joint[1][:3], joint[2]]},
        {"slots": [(0, 1, 5), *slots[1:]]},
        {"slots": slots[:2]},
        {"product": [product[1], *product[1:]]},
        {"k": 4},
    ):
        with pytest.raises(EstimatorError, match="classifier_logits"):
            run(**{"layers": layers, "joint": joint, "slots": slots, "product": product, "k": k} | change)
    with pytest.raises(EstimatorError, match="estimator 'other'"):
        cmi(torch.zeros(3), torch.zeros(3), "other")
    with pytest.raises(EstimatorError, match="logits"):
        cmi(torch.zeros(3), torch.zeros(0))


# -- the estimators together ------------------------------------------------------------------------------------------


def grouped(compat: str, **settings):
    """MIMRL's classifiers: the group in an objective, and each as a module of its own."""
    torch.manual_seed(0)
    objective = mimrl_objective(ObjectiveConfig(compat=compat, k_neighbor=2, hidden=32, **settings), 16, 16)
    (group,) = [g for g in objective.estimators.groups if isinstance(g, CMIGroup)]
    return group, {t.key: group.copy_of(t.key) for t in TERMS}


def one_by_one(modules, rows, products):
    return {t.key: modules[t.key]((rows[t.x], rows[t.y], rows[t.given]), tuple(products[t.key])) for t in TERMS}


def drawn(batch: int):
    products = ProductSampler(Bank(features()), 2, ("C",)).draw(TERMS, batch, seeded(1))
    return {t.key: products[str(t)] for t in TERMS}


@pytest.mark.parametrize("batch", [64, 33])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cmi_estimator": "dv"},
        {"cmi_estimator": "nwj"},
        {"compat": "mimrl"},
        {"compat": "mimrl", "cmi_last_activate": "hardtanh"},
    ],
)
def test_grouped_estimators_are_the_estimators(settings, batch):
    """Values, losses, details; stage-1 gradients of parameters, stage-2 gradients of features."""
    settings = {"compat": "none"} | settings
    group, modules = grouped(**settings)
    assert group.names == [t.key for t in TERMS] and len(list(group.parameters())) == 8
    products = drawn(batch)
    for stage in (1, 2):
        rows = {n: v[:batch].clone().requires_grad_(stage == 2) for n, v in features().items()}
        others = {n: v[:batch].clone().requires_grad_(stage == 2) for n, v in features().items()}
        for module in (group, *modules.values()):
            module.zero_grad()
            module.requires_grad_(stage == 1)
        found, expected = group(rows, products).apart(), one_by_one(modules, others, products)
        for result in (found, expected):
            sum(e.loss if stage == 1 else e.surrogate for e in result.values()).backward()
        assert list(found) == list(expected)
        for name, estimate in expected.items():
            assert not found[name].value.requires_grad and torch.equal(found[name].value, found[name].surrogate)
            for what in ("value", "loss"):
                torch.testing.assert_close(getattr(found[name], what), getattr(estimate, what), rtol=1e-4, atol=1e-5)
            assert set(found[name].details) == set(estimate.details)
            for reading in estimate.details:
                torch.testing.assert_close(
                    found[name].details[reading], estimate.details[reading], rtol=1e-4, atol=1e-5
                )
        if stage == 2:
            for name in "TAVC":
                torch.testing.assert_close(rows[name].grad, others[name].grad, rtol=1e-3, atol=1e-5)
            assert all(p.grad is None for p in group.parameters())
            continue
        for name, module in modules.items():
            gradients = group.tensors(name, grads=True)
            for part, p in module.named_parameters():
                torch.testing.assert_close(gradients[part], p.grad, rtol=1e-3, atol=1e-5)


def test_training_and_loading_through_the_group():
    group, _ = grouped("none")
    optimizer = torch.optim.Adam(group.parameters(), lr=1e-2)
    rows, products = {n: v[:64] for n, v in features().items()}, drawn(64)
    before = copy.deepcopy(group.state_dict())
    losses = []
    for _ in range(5):
        loss = group(rows, products).loss.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    group.load_state_dict(before)
    assert group(rows, products).loss.sum().item() == pytest.approx(losses[0], rel=1e-5)
    with torch.no_grad():
        group.tensors("TA_C")["classifier.6.bias"].add_(1)
    expected = one_by_one({name: group.copy_of(name) for name in group.names}, rows, products)
    for name, estimate in group(rows, products).apart().items():
        torch.testing.assert_close(estimate.value, expected[name].value, rtol=1e-4, atol=1e-5)


def test_only_equal_estimators_form_a_group():
    alike = [CMIGroup.alike(e) for e in (CMIEstimator(4, 8), CMIEstimator(4, 9), CMIEstimator(4, 8))]
    assert alike[0] == alike[2] != alike[1] and alike[0] != CMIGroup.alike(CMIEstimator(4, 8, "dv"))
    changed = CMIEstimator(4, 8)
    changed.classifier.append(torch.nn.Tanh())
    assert CMIGroup.alike(changed) is None


def test_product_rows_that_differ_in_number():
    torch.manual_seed(0)
    estimators = {n: CMIEstimator(4, 8) for n in "ab"}
    group = CMIGroup(estimators, dict.fromkeys("ab", ("x", "y", "z")))
    joint = {n: torch.randn(6, 4, generator=seeded(ord(n))) for n in "xyz"}
    products = {
        name: tuple(torch.randn(n, 4, generator=seeded(i)) for i in range(3)) for name, n in (("a", 4), ("b", 3))
    }
    for name, estimate in group(joint, products).apart().items():
        expected = estimators[name](tuple(joint.values()), products[name])
        torch.testing.assert_close(estimate.value, expected.value)
        torch.testing.assert_close(estimate.loss, expected.loss)


def test_product_rows_with_gradients_get_them():
    torch.manual_seed(0)
    group = CMIGroup({n: CMIEstimator(4, 8, "dv") for n in "ab"}, dict.fromkeys("ab", ("x", "y", "z")))
    joint = {n: torch.randn(6, 4) for n in "xyz"}
    product = tuple(torch.randn(4, 4, requires_grad=True) for _ in range(3))
    group(joint, dict.fromkeys("ab", product)).surrogate.sum().backward()
    assert all(part.grad.abs().sum() > 0 for part in product)
    assert all(p.grad is not None for p in group.parameters())


@pytest.mark.parametrize("on_degenerate", ["raise", "skip"])
@pytest.mark.parametrize("case", ["NaN", "one row", "no product rows"])
def test_degenerate_batches_as_the_estimators_have_it(case, on_degenerate):
    torch.manual_seed(0)
    estimators = {n: CMIEstimator(4, 8, on_degenerate=on_degenerate) for n in "ab"}
    group = CMIGroup(estimators, {"a": ("x", "y", "z"), "b": ("y", "x", "z")})
    joint = {n: torch.randn(1 if case == "one row" else 6, 4) for n in "xyz"}
    if case == "NaN":
        joint["x"][0, 0] = math.nan
    product = tuple(torch.randn(0 if case == "no product rows" else 4, 4) for _ in range(3))
    if on_degenerate == "raise":
        found = {"NaN": "non-finite logits", "one row": "a batch of 1", "no product rows": "no product rows"}[case]
        with pytest.raises(EstimatorError, match=found):
            group(joint, dict.fromkeys("ab", product))
    else:
        found = group(joint, dict.fromkeys("ab", product)).apart()
        assert all(e.details["skipped"] == 1 and e.loss == 0 for e in found.values())


def test_autocast_is_kept_out():
    group, _ = grouped("none")
    rows, products = {n: v[:64] for n, v in features().items()}, drawn(64)
    expected = group(rows, products)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = group(rows, products)
    assert torch.equal(found.loss, expected.loss)


def test_reference_backend_agrees():
    group, _ = grouped("none")
    rows, products = {n: v[:64] for n, v in features().items()}, drawn(64)
    found = group(rows, products)
    with use_backend("reference"):
        torch.testing.assert_close(found.surrogate, group(rows, products).surrogate, rtol=1e-4, atol=1e-5)
    assert reference.LOGIT_LIMIT > 9
