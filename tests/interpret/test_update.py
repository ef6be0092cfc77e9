"""The update's kernels in Triton's interpreter: torch's numbers, within the memory that is theirs."""

import math

import pytest
import torch

from tests.interpret.guards import Guards, require_interpreter

require_interpreter()

from engine.kernels import registry
from engine.kernels.registry import use_backend
from engine.kernels.update import Settings, Table, inspect, move, tables
from engine.kernels.update import triton as kernels
from engine.kernels.update.reference import Weight
from engine.kernels.update.tables import BLOCK
from tests.interpret.launches import launches
from tests.kernels.test_update import (
    CASES,
    CLOSE,
    GROUPS,
    RATES,
    assert_copied,
    assert_same,
    by_torch,
    name,
    run,
    weights,
    with_copies,
)


def canaried(tensor):
    """A copy that kernels may change, between canaries; to be called within `Guards`."""
    if tensor.layout == torch.strided and not tensor.is_contiguous():
        return canaried(tensor.t()).t()
    return torch.empty(tensor.shape).copy_(tensor)


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


@pytest.mark.parametrize("case", CASES[::3], ids=name)
def test_the_kernels_move_as_torch_does(case):
    with Guards() as guards:
        found, gradients = weights(steps=case["steps"], make=canaried)
        gradients = [guards.input(g) for g in gradients]
        expected = by_torch(found, gradients, GROUPS, RATES, *(case[k] for k in ("limit", "norm", "scale", "average")))
        stats, out = run(found, gradients, **case)
    assert_same(found, expected, **CLOSE)
    assert stats.isfinite().all() and out[0] == 0


# halfway between two neighbours, past the largest, below the smallest, infinite, and the first numbers that round up
EDGES = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 65504.0, 65519.9, 65520.0, 3.39e38, 6e-8, 2e-8, 1e-40, math.inf, 0.0]


@pytest.mark.parametrize("size", [1, BLOCK - 1, 2 * BLOCK + 5])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_copies_are_the_new_weights_rounded_as_torch_rounds(low, size):
    """Bit for bit, of weights of all magnitudes that a rate of 0 leaves as they are; and of those that move."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(size, generator=generator) * 10 ** (6 * torch.randn(size, generator=generator))
    values[: len(EDGES)] = torch.tensor(EDGES[:size])
    values[len(EDGES) : 2 * len(EDGES)] = -torch.tensor(EDGES)[: max(0, size - len(EDGES))]
    with Guards():
        still, moving = (
            Weight(
                canaried(start), canaried(torch.zeros(size)), canaried(torch.zeros(size)), canaried(torch.zeros(())),
                None, group, torch.empty(size, dtype=low),
            )
            for group, start in enumerate((values, torch.randn(size, generator=generator)))
        )  # fmt: skip
        table = Table([still, moving], [Settings(), Settings()], low)
        move(table, [torch.ones(size), torch.randn(size, generator=generator)], torch.tensor([0.0, 0.1]))
    assert torch.equal(still.parameter, values)
    for w in (still, moving):
        assert torch.equal(w.low.view(torch.int16), w.parameter.to(low).view(torch.int16))


def test_a_copy_of_nan_is_nan():
    for low in (torch.bfloat16, torch.float16):
        copy = torch.zeros(3, dtype=low)
        weight = Weight(torch.ones(3), torch.zeros(3), torch.zeros(3), torch.tensor(0.0), None, 0, copy)
        move(Table([weight], [Settings()], low), [torch.tensor([1.0, math.nan, 1.0])], torch.tensor([0.1]))
        assert copy.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("case", CASES[::7], ids=name)
def test_copies_beside_everything_else(case, aligned):
    """Slices of one copy, as of query, key and value; with averages and without; nothing where a weight has none."""
    low = torch.bfloat16 if aligned else torch.float16
    with Guards():
        found, gradients = weights(steps=case["steps"], make=canaried)
        step, whole = (8 if aligned else 1), torch.empty(sum(w.parameter.numel() + 8 for w in found), dtype=low)
        whole.fill_(7.0)
        end = whole.storage_offset() + (0 if aligned else 1)

        def next_slice(like):
            nonlocal end
            begin, end = end, end + -(-like.numel() // step) * step
            return whole.as_strided(like.shape, like.stride(), begin)

        found = with_copies(found, low, next_slice)
        assert Table(found, GROUPS, low).aligned == aligned
        expected = by_torch(found, gradients, GROUPS, RATES, *(case[k] for k in ("limit", "norm", "scale", "average")))
        run(found, gradients, low=low, **case)
    assert_same(found, expected, **CLOSE)
    assert_copied(found, low)
    for w in found:
        if w.low is not None:
            w.low.fill_(7.0)
    assert (whole == 7.0).all()


@pytest.mark.parametrize("offset", [1, 4])
def test_gradients_in_a_bucket_need_not_be_aligned(offset):
    """As those of DistributedDataParallel, which lie end to end."""
    found, gradients = weights()
    expected = by_torch(found, gradients, GROUPS, RATES, 0.5, 2.0, 1.0, 0.3)
    bucket = torch.full((offset + sum(g.numel() for g in gradients),), math.nan)
    views, start = [], offset
    for g in gradients:
        views.append(bucket[start : start + g.numel()].as_strided(g.shape, g.stride()).copy_(g))
        start += g.numel()
    assert not Table(found, GROUPS).gradients(views)[1]
    run(found, views, 0.5, 2.0, 1.0, 0.3, None)
    assert_same(found, expected, **CLOSE)


def test_a_step_that_is_skipped_changes_nothing():
    found, gradients = weights()
    before = [tuple(None if t is None else t.clone() for t in w[:5]) for w in found]
    gradients[2][0, 0] = math.nan
    stats, out = run(found, gradients, math.inf, 1.0, 1.0, 0.3, None, skip=torch.tensor(1.0))
    assert_same(found, before, rtol=0, atol=0)
    assert stats[0] == 1 and out[0] == 1


@pytest.mark.parametrize("value, limit, expected", [(math.inf, math.inf, 1), (-math.inf, 0.5, 0), (math.nan, 0.5, 1)])
def test_what_is_not_finite_is_found_after_clipping(value, limit, expected):
    found, gradients = weights()
    gradients[1][-1] = value
    assert inspect(Table(found, GROUPS), gradients, limit=limit)[0] == expected
    move(Table(found, GROUPS), gradients, torch.tensor(RATES), limit=limit)
    assert found[1].parameter[-1].isfinite().item() == (not expected)


def test_more_weights_and_blocks_than_one_program_takes_at_once(monkeypatch):
    monkeypatch.setattr(tables, "BLOCK", 8)
    for constant, value in (("BLOCK", 8), ("WEIGHTS", 4), ("MANY", 8)):
        monkeypatch.setattr(kernels, constant, value)
    generator = torch.Generator().manual_seed(0)
    found, gradients = [], []
    for i in range(9):
        values = [torch.randn(40 if i == 0 else 9, generator=generator).abs() for _ in range(4)]
        found.append(Weight(*values[:3], torch.tensor(float(i)), values[3].clone(), 0))
        gradients.append(values[3] - 1)
    groups = [Settings()]
    expected = by_torch(found, gradients, groups, RATES[:1], math.inf, 0.5, 1.0, 0.3)
    table = Table(found, groups)
    assert table.blocks.shape[1] == 5 + 8 * 2
    stats = inspect(table, gradients)
    move(table, gradients, torch.tensor(RATES[:1]), norm=0.5, stats=stats, average=torch.tensor(0.3))
    assert_same(found, expected, **CLOSE)


def test_each_is_two_launches():
    found, gradients = weights()
    table = Table(found, GROUPS)
    addresses, aligned = table.gradients(gradients)
    rates = torch.tensor(RATES)
    with launches() as seen:
        stats = registry.call("update_inspect", table.sizes, table.blocks, addresses, aligned, 1.0, None)
    assert seen.count == 2 == registry.operation("update_inspect").launches
    with launches() as seen:
        registry.call(
            "update_move", table.addresses, table.sizes, table.blocks, table.group, table.settings, addresses, aligned,
            rates, 1.0, 1.0, stats, None, None, None, None,
        )  # fmt: skip
    assert seen.count == 2 == registry.operation("update_move").launches
