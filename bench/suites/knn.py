"""MIMRL's six sets of product rows from a bank of features, against scikit-learn on the host."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bench.baselines import mimrl
from bench.runner import Setting, Work
from engine.config import ObjectiveConfig
from engine.kernels.knn_product import product_indices
from engine.objective import Objective, mimrl_objective

TITLE = "six kNN product samples, N=16,326, d=128, B=128, k=2, against scikit-learn on the host"
GOALS = {"ratio": (50.0, 100.0)}
# "engine" draws as mode fast does: terms with the same condition share a draw, the label's draws are within strata.
# "engine_faithful" makes all six draws by nearest neighbours, as the baseline does.
SIDES = ("engine", "baseline", "engine_faithful")
ROUNDS = 5
WIDTH, BATCH, NEIGHBOURS, BANK = 128, 128, 2, 16326


def bank(n: int, setting: Setting) -> dict[str, Tensor]:
    """Features of n samples and their labels: continuous features, labels of MOSI's scale in steps of 0.2."""
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(n, WIDTH, generator=generator) for name in "FTAV"}
    rows["C"] = (1.6 * torch.randn(n, 1, generator=generator)).clamp(-3, 3).mul(5).round() / 5
    return {name: value.to(setting.device) for name, value in rows.items()}


def objective(compat: str) -> Objective:
    return mimrl_objective(ObjectiveConfig(compat=compat, k_neighbor=NEIGHBOURS), WIDTH, WIDTH)


def build(side: str, setting: Setting) -> Work:
    rows = bank(1284 if setting.quick else BANK, setting)
    if side == "baseline":
        np.random.seed(0)

        def run() -> None:
            for triple in mimrl.CMI_TRIPLES:
                x, y, z = (rows[triple[i].upper()] for i in (0, 1, 3))
                mimrl.knn_product(x, y, z, BATCH, NEIGHBOURS)

        return Work(run)
    drawn = objective("none" if side == "engine" else "mimrl")
    generator = torch.Generator().manual_seed(0)
    return Work(lambda: drawn.sample_products(rows, BATCH, generator))


def gate(setting: Setting) -> None:
    """Equal rows for equal queries; and no neighbour that is a query, no row from another sample's y and z."""
    rows = bank(400, setting)
    query = np.random.default_rng(0).permutation(400)[:32].tolist()
    expected = mimrl.knn_product(rows["A"], rows["V"], rows["T"], 64, NEIGHBOURS, query)
    neighbour, _ = product_indices(rows["T"], 32, NEIGHBOURS, query=torch.tensor(query))
    repeated = torch.tensor(query).repeat_interleave(NEIGHBOURS)
    found = (rows["A"][neighbour], rows["V"][repeated], rows["T"][repeated])
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.cpu(), b), "product rows differ from scikit-learn's"
    index = torch.arange(400.0, device=setting.device)[:, None]
    traced = {"F": index, "T": index, "A": index, "V": index, "C": rows["C"]}
    for compat in ("none", "mimrl"):
        drawn = objective(compat).sample_products(traced, 64, torch.Generator().manual_seed(1))
        x, y, z = drawn["I(T;A|C)"]
        assert not set(x.flatten().tolist()) & set(y.flatten().tolist()), "a neighbour that is a query"
        assert torch.equal(traced["C"][y[:, 0].long()], z), "y and z of different samples"
        far = (traced["C"][x[:, 0].long()] - z).abs().mean()
        assert far < 0.2, f"neighbours {far:.2f} away in a label of 31 values"
