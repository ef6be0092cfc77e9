"""What trained estimators read on the raw latents, beside the closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.demo.latents import CMI_TERMS, MI_TERMS, LatentModel, split_name, true_information
from engine.estimate import estimate_mi
from engine.kernels.knn_product import product_indices
from engine.model.cmi import CMIEstimator

BOUNDS = ("infonce", "nwj", "smile")
SAMPLES = 20_000
BATCH = 128
DRAWS = 4  # draws of product rows, of a quarter of the rows each

Rows = tuple[Tensor, Tensor, Tensor]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads, and far slower where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def compare_with_truth(
    seed: int = 0,
    samples: int = SAMPLES,
    steps: int = 600,
    model: LatentModel | None = None,
    on_term: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """Train estimators on raw latents, half of them held out, and read them on that half.

    Returns:
        One row a term, in nats: {"name", "true", "estimates": {estimator: value}, "ceiling"}; InfoNCE, NWJ and SMILE
        for mutual information, LDR, DV and NWJ of one classifier for conditional information. The ceiling log B is
        InfoNCE's.
    """
    model = model or LatentModel()
    true = true_information(model)
    drawn = model.sample(samples, np.random.default_rng(seed))
    latents = {name: torch.from_numpy(value).float() for name, value in drawn.items()}
    rows = []
    for name in MI_TERMS + CMI_TERMS:
        on_term(name)
        ceiling = math.log(BATCH) if name in MI_TERMS else None
        estimates = _estimates(name, latents, steps, seed)
        rows.append({"name": name, "true": true[name], "estimates": estimates, "ceiling": ceiling})
    return rows


def _estimates(name: str, latents: dict[str, Tensor], steps: int, seed: int) -> dict[str, float]:
    x, y, given = split_name(name)
    if given:
        return estimate_conditional(latents[x], latents[y], latents[given], steps=steps, seed=seed)
    settings = {"hidden": 64, "steps": steps, "batch_size": BATCH, "lr": 1e-3, "seed": seed}
    return {bound: estimate_mi(latents[x], latents[y], bound=bound, **settings)["value"] for bound in BOUNDS}


@_one_thread()
def estimate_conditional(
    x: Tensor, y: Tensor, z: Tensor, steps: int = 600, seed: int = 0, batch_size: int = 2 * BATCH, lr: float = 2e-3
) -> dict[str, float]:
    """I(X;Y|Z) in nats of samples float32 [N, width] each: LDR, DV and NWJ of one classifier, on a held-out half.

    Product rows take x from the nearest neighbour in z among the rows that are not queries, in each half apart.
    """
    half = len(x) // 2
    training, held_out = (x[:half], y[:half], z[:half]), (x[half:], y[half:], z[half:])
    generator = torch.Generator().manual_seed(seed)
    training_product, held_out_product = (_product_rows(rows, generator) for rows in (training, held_out))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        estimator = CMIEstimator(dim=max(part.shape[1] for part in training), hidden=64)
    optimizer = torch.optim.Adam(estimator.parameters(), lr=lr)
    # A rate that falls to 0 averages the last steps' noise out of the classifier.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        estimate = estimator(_pick(training, batch_size, generator), _pick(training_product, batch_size, generator))
        optimizer.zero_grad()
        estimate.loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return {name: float(value) for name, value in estimator(held_out, held_out_product).details.items()}


def _product_rows(rows: Rows, generator: torch.Generator) -> Rows:
    x, y, z = rows
    drawn = [product_indices(z, len(z) // 4, 1, generator) for _ in range(DRAWS)]
    neighbour, query = (torch.cat(part) for part in zip(*drawn, strict=True))
    return x[neighbour], y[query], z[query]


def _pick(rows: Rows, count: int, generator: torch.Generator) -> Rows:
    chosen = torch.randint(len(rows[0]), (count,), generator=generator)
    x, y, z = (part[chosen] for part in rows)
    return x, y, z
