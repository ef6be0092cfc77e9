"""The fused update against torch's optimisers and torch's clipping."""

import itertools
import math

import pytest
import torch

from engine.errors import ConfigError
from engine.kernels.update import Settings, Table, inspect, move, reference
from engine.kernels.update.reference import Weight
from engine.kernels.update.tables import BLOCK, layout

SHAPES = [(3,), (BLOCK + 1,), (5, 7), (0,), (2 * BLOCK,), (), (4, 1, 3)]


def weights(dtype=torch.float32, steps=(0, 4), make=torch.clone):
    """Weights of two groups with gradients; every second one has no average. `make` gives the memory that changes."""
    generator = torch.Generator().manual_seed(1)

    def draw(shape):
        return torch.randn(shape, generator=generator).to(dtype)

    found, gradients = [], []
    for i, shape in enumerate(SHAPES):
        step = torch.tensor(float(steps[i % 2]))
        first, second = (draw(shape), draw(shape).abs()) if step else (torch.zeros(shape, dtype=dtype),) * 2
        average = None if i % 2 else make(draw(shape))
        found.append(Weight(make(draw(shape)), make(first), make(second), make(step), average, i % 2))
        gradients.append(draw(shape) * 3)
    turned = torch.empty(6, 4).t()  # of a layout of its own
    found.append(
        Weight(*(make(turned.clone().to(dtype).copy_(draw((4, 6)).abs())) for _ in range(3)), make(step), None, 0)
    )
    gradients.append(turned.clone().to(dtype).copy_(draw((4, 6))))
    found[-1].step.fill_(steps[0])
    return found, gradients


GROUPS = (Settings(weight_decay=0.1), Settings(0.8, 0.99, 1e-6, 0.2, decoupled=True))
RATES = (0.1, 0.01)
CLOSE = {"rtol": 2e-6, "atol": 5e-7}  # weights are of about 1, so that this is a few times what float32 rounds


def by_torch(found, gradients, groups, rates, limit, norm, scale, average):
    """The same by torch's separate passes, on copies: the values of every weight as tuples."""
    found = [Weight(*(None if t is None else t.clone() for t in w[:5]), w.group) for w in found]
    for w, gradient in zip(found, gradients, strict=True):
        w.parameter.requires_grad_(True).grad = gradient / scale
    parameters = [w.parameter for w in found]
    if math.isfinite(limit):
        torch.nn.utils.clip_grad_value_(parameters, limit)
    if math.isfinite(norm):
        torch.nn.utils.clip_grad_norm_(parameters, norm)
    for number, (s, rate) in enumerate(zip(groups, rates, strict=True)):
        of_group = [w for w in found if w.group == number]
        kind = torch.optim.AdamW if s.decoupled else torch.optim.Adam
        optimizer = kind(
            [w.parameter for w in of_group], rate, (s.beta1, s.beta2), s.eps, weight_decay=s.weight_decay, foreach=False
        )
        for w in of_group:
            optimizer.state[w.parameter] = {"step": w.step, "exp_avg": w.first, "exp_avg_sq": w.second}
        optimizer.step()
    for w in found:
        if average is not None and w.average is not None:
            w.average.lerp_(w.parameter.detach(), average)
    return [tuple(None if t is None else t.detach() for t in w[:5]) for w in found]


CASES = [
    {"limit": limit, "norm": norm, "scale": scale, "average": average, "steps": steps}
    for limit, norm, scale, average, steps in itertools.product(
        (math.inf, 0.5), (math.inf, 2.0), (1.0, 8.0), (None, 0.3), ((0, 4), (1000, 1))
    )
]


def name(case):
    return " ".join(f"{key}={value}" for key, value in case.items())


def assert_same(found, expected, **tolerance):
    for w, values in zip(found, expected, strict=True):
        for a, b in zip(w[:5], values, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, **tolerance)


def with_copies(found, low, make=torch.empty_like):
    """The weights, of which the first of any three has no copy; a copy has the memory of `make` of such a tensor."""
    copies = [None if i % 3 == 0 else make(w.parameter.to(low)) for i, w in enumerate(found)]
    return [w._replace(low=copy) for w, copy in zip(found, copies, strict=True)]


def assert_copied(found, low):
    """Bit for bit what torch casts, of weights with a copy."""
    copied = [w for w in found if w.low is not None]
    assert len(copied) > 4
    for w in copied:
        assert w.low.dtype == low and torch.equal(w.low.view(torch.int16), w.parameter.to(low).view(torch.int16))


def run(found, gradients, limit, norm, scale, average, steps, dtype=torch.float32, skip=None, low=None):
    """`inspect` and `move` through a table; the statistics and what `move` returns."""
    inverse = None if scale == 1 else torch.tensor(1 / scale)
    rate = None if average is None else torch.tensor(average)
    table = Table(found, GROUPS, low)
    stats = inspect(table, gradients, limit=limit, inverse=inverse)
    out = move(
        table, gradients, torch.tensor(RATES), limit=limit, norm=norm, stats=stats, inverse=inverse, skip=skip,
        average=rate,
    )  # fmt: skip
    return stats, out


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_formula_is_what_torch_computes(case):
    """In float64 to rounding, in float32 as closely as torch's own passes agree."""
    found, gradients = weights(torch.float64, case["steps"])
    limit, norm, scale, average = (case[k] for k in ("limit", "norm", "scale", "average"))
    expected = by_torch(found, gradients, GROUPS, RATES, limit, norm, scale, average)
    inverse = torch.tensor(1 / scale, dtype=torch.float64)
    stats = reference.inspect(gradients, limit, inverse)
    rate = None if average is None else torch.tensor(average, dtype=torch.float64)
    reference.move(
        found, gradients, GROUPS, torch.tensor(RATES, dtype=torch.float64), limit, norm,
        stats if math.isfinite(norm) else None, inverse, None, rate,
    )  # fmt: skip
    assert_same(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", CASES[::3], ids=name)
def test_memory_at_addresses_moves_as_torch_moves_it(case):
    found, gradients = weights(steps=case["steps"])
    expected = by_torch(found, gradients, GROUPS, RATES, *(case[k] for k in ("limit", "norm", "scale", "average")))
    kept = [g.clone() for g in gradients]
    run(found, gradients, **case)
    assert_same(found, expected, **CLOSE)
    assert all(map(torch.equal, gradients, kept))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_copies_are_the_new_weights_as_torch_casts_them(low):
    found, gradients = weights()
    found = with_copies(found, low)
    expected = by_torch(found, gradients, GROUPS, RATES, 0.5, math.inf, 1.0, 0.3)
    run(found, gradients, 0.5, math.inf, 1.0, 0.3, None, low=low)
    assert_same(found, expected, **CLOSE)
    assert_copied(found, low)
    before = [None if w.low is None else w.low.clone() for w in found]
    run(found, gradients, 0.5, math.inf, 1.0, 0.3, None, low=low, skip=torch.tensor(1.0))
    assert all(w.low is None or torch.equal(w.low, b) for w, b in zip(found, before, strict=True))


def test_a_table_takes_copies_of_one_type():
    found, _ = weights()
    with pytest.raises(ConfigError, match=r"a copy of torch.bfloat16 with low=None"):
        Table(with_copies(found, torch.bfloat16), GROUPS)


def test_a_step_that_is_skipped_changes_nothing():
    found, gradients = weights()
    before = [tuple(None if t is None else t.clone() for t in w[:5]) for w in found]
    gradients[0][0] = math.inf
    stats, out = run(found, gradients, math.inf, 1.0, 1.0, 0.3, None, skip=torch.tensor(1.0))
    assert_same(found, before, rtol=0, atol=0)
    assert stats[0] == 1 and out[0] == 1


@pytest.mark.parametrize("value, clipped, expected", [(math.inf, False, 1), (math.inf, True, 0), (math.nan, True, 1)])
def test_what_is_not_finite_is_found_after_clipping(value, clipped, expected):
    """As torch's own passes: clipping makes the limit of infinity, and leaves NaN."""
    found, gradients = weights()
    gradients[1][-1] = value
    stats = inspect(Table(found, GROUPS), gradients, limit=0.5 if clipped else math.inf)
    assert stats[0] == expected
    move(Table(found, GROUPS), gradients, torch.tensor(RATES), limit=0.5 if clipped else math.inf)
    moved = found[1].parameter[-1].isfinite().item()
    assert moved == (clipped and not math.isnan(value))


def test_layouts():
    x = torch.empty(3, 4, 5)
    assert layout(x) == layout(x.clone()) and layout(x.mT) != layout(x.mT.contiguous())
    assert layout(x.mT) == layout(torch.empty(3, 4, 5).mT)
    assert layout(torch.empty(4, 1, 3)) == layout(torch.empty(4, 3)[:, None])
    assert layout(x[:, ::2]) is None and layout(x[:1].expand(3, 4, 5)) is None and layout(x[:, :2]) is None
