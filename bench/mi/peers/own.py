"""The engine's own estimates: python -m bench.mi.peers.own [BOUND]."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import engine
from bench.mi.peers.serving import serve


def estimate(arrays: dict[str, np.ndarray], seed: int, bound: str | None = None) -> dict[str, Any]:
    """estimate_mi of x and y, or estimate_cmi where there is a z; with the defaults unless a bound is named."""
    options = {"seed": seed} if bound is None else {"seed": seed, "bound": bound}
    if "z" in arrays:
        return entries(engine.estimate_cmi(arrays["x"], arrays["y"], arrays["z"], seed=seed))
    return entries(engine.estimate_mi(arrays["x"], arrays["y"], **options))


def entries(result: Any) -> dict[str, Any]:
    """{"value", "interval", "flags"} of a result object, or of the mapping that earlier versions return."""
    if isinstance(result, Mapping) and not hasattr(result, "value"):
        entry = {"value": float(result["value"] if "value" in result else result["dv"])}
        if error := result.get("standard_error"):
            entry["interval"] = [entry["value"] - 1.96 * error, entry["value"] + 1.96 * error]
        return entry
    entry = {"value": float(result.value), "flags": sorted(str(flag) for flag in result.flags)}
    if result.interval is not None:
        entry["interval"] = [float(end) for end in result.interval]
    return entry


def main() -> None:
    torch.set_num_threads(1)
    bound = sys.argv[1] if len(sys.argv) > 1 else None
    serve(lambda arrays, seed: estimate(arrays, seed, bound), ["torch", "numpy"])


if __name__ == "__main__":
    main()
