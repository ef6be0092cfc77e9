"""MIMRL's six sets of product rows from a bank of features, against scikit-learn on the host."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from bench.baselines import mimrl
from bench.runner import Setting, Work
from engine.kernels.knn_product import Bank, ProductSampler, product_indices
from engine.mimrl.terms import MIMRL_ESTIMATORS

TITLE = "six kNN product samples, N=16,326, d=128, B=128, k=2, against scikit-learn on the host"
GOALS = {"ratio": (50.0, 100.0)}
# "engine" draws as mode fast does: terms with the same condition share a draw, the label's draws are within strata.
# "engine_faithful" makes all six draws by nearest neighbours, as the baseline does. The bank is prepared once an epoch:
# its time is `bank_seconds`, apart.
SIDES = ("engine", "baseline", "engine_faithful")
ROUNDS = 5
WIDTH, BATCH, NEIGHBOURS, BANK = 128, 128, 2, 16326
TERMS = tuple(term for term in MIMRL_ESTIMATORS if term.given is not None)
MODES = {"engine": {"shared": True, "discrete": ("C",)}, "engine_faithful": {"shared": False}}


def bank(n: int, setting: Setting) -> dict[str, Tensor]:
    """Features of n samples and their labels: continuous features, labels of MOSI's scale in steps of 0.2."""
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(n, WIDTH, generator=generator) for name in "FTAV"}
    rows["C"] = (1.6 * torch.randn(n, 1, generator=generator)).clamp(-3, 3).mul(5).round() / 5
    return {name: value.to(setting.device) for name, value in rows.items()}


def size(setting: Setting) -> int:
    return 1284 if setting.quick else BANK


def build(side: str, setting: Setting) -> Work:
    rows = bank(size(setting), setting)
    if side == "baseline":
        np.random.seed(0)

        def run() -> None:
            for triple in mimrl.CMI_TRIPLES:
                x, y, z = (rows[triple[i].upper()] for i in (0, 1, 3))
                mimrl.knn_product(x, y, z, BATCH, NEIGHBOURS)

        return Work(run)
    sampler = ProductSampler(Bank(rows), NEIGHBOURS, **MODES[side])
    generator = torch.Generator().manual_seed(0)
    # the triples are read, as the estimators do: y and z are repeated then
    return Work(lambda: [tuple(three) for three in sampler.draw(TERMS, BATCH, generator).values()])


def details(setting: Setting, works: dict, numbers: dict) -> dict[str, float]:
    """Extra seconds of the first draw from a new bank, for sorting, norms and rounding, once per epoch."""
    rows, seconds = bank(size(setting), setting), []
    for _ in range(3):
        sampler = ProductSampler(Bank(rows), NEIGHBOURS, **MODES["engine"])
        start = time.perf_counter()
        for value in sampler.draw(TERMS, BATCH, torch.Generator().manual_seed(0)).values():
            float(value.x.sum())
        seconds.append(time.perf_counter() - start)
    return {"bank_seconds": min(seconds) - min(numbers["engine"])}


def gate(setting: Setting) -> None:
    """Equal queries give equal rows. No neighbour is a query, and no row mixes the y and z of two samples."""
    rows = bank(400, setting)
    query = np.random.default_rng(0).permutation(400)[:32].tolist()
    expected = mimrl.knn_product(rows["A"], rows["V"], rows["T"], 64, NEIGHBOURS, query)
    neighbour, _ = product_indices(rows["T"], 32, NEIGHBOURS, query=torch.tensor(query))
    repeated = torch.tensor(query).repeat_interleave(NEIGHBOURS)
    drawn = (rows["A"][neighbour], rows["V"][repeated], rows["T"][repeated])
    for a, b in zip(drawn, expected, strict=True):
        assert torch.equal(a.cpu(), b), "product rows differ from scikit-learn's"
    index = torch.arange(400.0, device=setting.device)[:, None]
    for mode in MODES.values():
        # rows told by their number: x and y of the terms, not their conditions
        traced = {**rows, "X": index, "Y": index}
        terms = [type(TERMS[0])("X", "Y", given) for given in "TAVC"]
        for term, (x, y, z) in zip(
            terms, ProductSampler(Bank(traced), NEIGHBOURS, **mode).draw(terms, 64, torch.Generator().manual_seed(1))
            .values(), strict=True,
        ):  # fmt: skip
            query, given = y[::NEIGHBOURS, 0].long().cpu(), rows[term.given]
            assert not torch.isin(x, y).any(), "a neighbour that is a query"
            assert torch.equal(given[y[:, 0].long()], z), "y and z of different samples"
            if term.given == "C":
                far = (given[x[:, 0].long()] - z).abs().mean()
                assert far < 0.2, f"neighbours {far:.2f} away in a label of 31 values"
            else:
                three = mimrl.knn_product(index, index, given, 64, NEIGHBOURS, query.tolist())
                assert torch.equal(three[0][:, :1], x.cpu()), "product rows differ from scikit-learn's"
