"""torch-mist's estimators, its defaults, read on a held-out fifth: python -m bench.mi.peers.mist_estimators NAME."""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch_mist.utils.estimation import estimate_mi

from bench.mi.peers.serving import serve

HIDDEN = [128, 128]  # it has no default


def estimate(name, arrays, seed):
    torch.manual_seed(seed)
    x, y = (_standardised(arrays[k]) for k in "xy")
    kept = len(x) * 4 // 5
    train, test = ({"x": x[rows], "y": y[rows]} for rows in (slice(kept), slice(kept, None)))
    value, _ = estimate_mi(data=train, test_data=test, estimator=name, hidden_dims=HIDDEN, verbose=False)
    return {"value": float(value)}


def _standardised(values):
    values = values.astype(np.float64)
    return torch.from_numpy(((values - values.mean(0)) / values.std(0)).astype(np.float32))


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(lambda arrays, seed: estimate(sys.argv[1], arrays, seed), ["torch-mist", "torch", "numpy"])
