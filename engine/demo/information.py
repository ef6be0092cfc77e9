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
from engine.information.cmi import estimate_cmi

BOUNDS = ("infonce", "nwj", "smile")
SAMPLES = 20_000
BATCH = 128


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
    """Train estimators on raw latents and read them on rows that were held out.

    Returns:
        One row a term, in nats: {"name", "true", "estimates": {estimator: value}, "ceiling"}; InfoNCE, NWJ and SMILE
        for mutual information, DV for conditional information. The ceiling log B is InfoNCE's.
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
        return {"dv": estimate_cmi(latents[x], latents[y], latents[given], steps=steps, seed=seed).value}
    settings = {"hidden": 64, "steps": steps, "batch_size": BATCH, "lr": 1e-3, "seed": seed}
    return {bound: estimate_mi(latents[x], latents[y], bound=bound, **settings)["value"] for bound in BOUNDS}
