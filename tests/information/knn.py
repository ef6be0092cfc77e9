"""The nearest-neighbour estimate of I(X;Y|Z) by Frenzel and Pompe (2007), for comparison."""

import numpy as np
from scipy.spatial import cKDTree
from scipy.special import digamma


def frenzel_pompe(x: np.ndarray, y: np.ndarray, z: np.ndarray, k: int = 5) -> float:
    """In nats, with the maximum norm on standardised columns."""
    x, y, z = (np.reshape(v, (len(v), -1)).astype(float) for v in (x, y, z))
    x, y, z = ((v - v.mean(0)) / v.std(0) for v in (x, y, z))
    distance = cKDTree(np.hstack([x, y, z])).query(np.hstack([x, y, z]), k + 1, p=np.inf)[0][:, -1]

    def count(*parts: np.ndarray) -> np.ndarray:
        rows = np.hstack(parts)
        return cKDTree(rows).query_ball_point(rows, distance * (1 - 1e-12), p=np.inf, return_length=True)

    return float(digamma(k) + np.mean(digamma(count(z)) - digamma(count(x, z)) - digamma(count(y, z))))
