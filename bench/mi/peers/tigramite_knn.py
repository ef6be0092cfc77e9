"""tigramite's nearest-neighbour I(X;Y|Z) (Frenzel and Pompe 2007), 5 neighbours, on ranks (its default)."""

from __future__ import annotations

import numpy as np
from tigramite.independence_tests.cmiknn import CMIknn

from bench.mi.peers.serving import serve


def estimate(arrays, seed):
    estimator = CMIknn(knn=5, workers=1, seed=seed)
    columns = [arrays[k] for k in "xyz"]
    which = np.repeat(np.arange(3), [c.shape[1] for c in columns])
    data = np.concatenate(columns, 1).T.astype(np.float64)
    return {"value": float(estimator.get_dependence_measure(data, which))}


if __name__ == "__main__":
    serve(estimate, ["tigramite", "numpy"])
