"""The estimators of bmi (PyPI `benchmark-mi`), with its defaults: python -m bench.mi.peers.bmi_estimators NAME."""

from __future__ import annotations

import sys

import bmi

from bench.mi.peers.serving import serve

SEEDED = {
    "infonce": bmi.estimators.InfoNCEEstimator,
    "mine": bmi.estimators.MINEEstimator,
    "nwj": bmi.estimators.NWJEstimator,
    "dv": bmi.estimators.DonskerVaradhanEstimator,
}
PLAIN = {"ksg": bmi.estimators.KSGEnsembleFirstEstimator, "cca": bmi.estimators.CCAMutualInformationEstimator}


def estimate(name, arrays, seed):
    estimator = SEEDED[name](seed=seed, verbose=False) if name in SEEDED else PLAIN[name]()
    return {"value": float(estimator.estimate(arrays["x"], arrays["y"]))}


if __name__ == "__main__":
    serve(lambda arrays, seed: estimate(sys.argv[1], arrays, seed), ["benchmark-mi", "jax", "numpy"])
