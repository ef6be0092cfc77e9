"""What trained estimators read on the raw latents, beside the closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from engine.demo.latents import CMI_TERMS, MI_TERMS, LatentModel, split_name, true_information
from engine.information.cmi import estimate_cmi
from engine.information.mi import estimate_mi

SAMPLES = 20_000


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
    """Estimate the information of raw latents, as a user would.

    Returns:
        One row per term, in nats: {"name", "true", "estimates": {"estimate", "low", "high"}}; low and high are the
        interval's.
    """
    model = model or LatentModel()
    true = true_information(model)
    drawn = model.sample(samples, np.random.default_rng(seed))
    rows = []
    for name in MI_TERMS + CMI_TERMS:
        on_term(name)
        x, y, given = split_name(name)
        if given:
            estimate = estimate_cmi(drawn[x], drawn[y], drawn[given], steps=steps, seed=seed)
        else:
            estimate = estimate_mi(drawn[x], drawn[y], steps=steps, seed=seed)
        low, high = estimate.interval
        rows.append(
            {"name": name, "true": true[name], "estimates": {"estimate": estimate.value, "low": low, "high": high}}
        )
    return rows
