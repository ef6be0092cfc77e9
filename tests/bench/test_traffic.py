"""The tables of docs/kernels_inside.md are what the code gives, and the model counts what it says."""

import pytest
import torch

from bench import guard, traffic
from engine.kernels.mlp import plan
from tests.aot import budgets

PAGE = traffic.PAGE.read_text(encoding="utf-8")


def test_table_of_kernels_is_that_of_the_budgets():
    table = traffic.kernel_table(budgets.newest())
    assert table in PAGE, "run python -m bench.traffic --update"
    assert all(line.endswith("| 0 |") for line in table.splitlines()[2:]), "a kernel spills"


def test_candidates_that_no_gpu_has_measured_are_modelled():
    """The layer to which the model is fitted has its time, and slabs have the launches that were counted."""
    assert traffic.layer_microseconds(plan.WIDE["tf32x3"]) == traffic.LAYER
    # twice the steps ahead: 2.5 + 8.5 / 2; half the steps as well: 2.5 + 8.5 / 4
    assert traffic.layer_microseconds(plan.WIDE["tf32"]) == pytest.approx(6.75)
    assert traffic.layer_microseconds(plan.DEEP["tf32"]) == pytest.approx(4.625)
    tables = traffic.tile_table(), traffic.slab_table()
    assert all(table in PAGE for table in tables), "run python -m bench.traffic --update"
    (before, slabs, half), counted = tables[1].splitlines()[2:5], "| 77.4 | 1,883 | 74 | tf32 |"
    assert "| 1,879 | 74 | 0.78 |" in before and "| 1,879 | 74 | 0.78 |" in slabs and counted in PAGE
    assert "| 34 | 1,879 |" in half


def test_table_of_traffic_is_that_of_the_model():
    counted = traffic.measure()
    for name, (eager, ours) in counted.items():
        assert ours.launches < eager.launches and ours.bytes < eager.bytes, name
    if others := guard.other_environment(guard.load()):
        pytest.skip("the counts on record hold elsewhere: " + ", ".join(others))
    assert traffic.traffic_table(counted) in PAGE, "run python -m bench.traffic --update"


def test_views_cost_nothing_and_in_place_operations_write():
    x, y = torch.ones(4, 8), torch.ones(8)
    with traffic.Counter() as counter:
        z = x.t()[:2].reshape(-1)  # the copy is one
        x.add_(y)
        torch.add(x, 1, out=x)
        z.sum().item()
    assert counter.count == traffic.Count(launches=4, bytes=4 * (2 * 8 + (2 * 32 + 8) + 2 * 32 + 9), syncs=1)
