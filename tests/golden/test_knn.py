"""Isolated nearest-neighbour product rows against the recordings: exact rows."""

import pytest
import torch

from engine.kernels.knn_product import product_indices, product_rows
from tests.golden.common import cases, load


def tile(rows: torch.Tensor, widest: int) -> torch.Tensor:
    return rows.repeat(1, widest // rows.shape[1])


@cases("knn_")
@pytest.mark.parametrize("ties", ["first", "random"])
def test_rows(name, info, ties):
    recorded = load(name)
    bank = [recorded[key] for key in ("X", "Y", "Z")]
    k = info["k_neighbor"]
    given = recorded["query_index"]
    assert len(given) == info["batch_size"] // k
    generator = torch.Generator().manual_seed(0)
    neighbour, query = product_indices(bank[2], len(given), k, generator, query=given, ties=ties)
    widest = max(b.shape[1] for b in bank)
    for rows, key in zip(product_rows(*bank, neighbour, query, k), ("prod_x", "prod_y", "prod_z"), strict=True):
        assert torch.equal(tile(rows, widest), recorded[key]), key
