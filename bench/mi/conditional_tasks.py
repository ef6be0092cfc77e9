"""Samples whose conditional information I(X;Y|Z) is known.

Where x and y are functions of z plus, or around, a pair (a, b) that is drawn independently of z, I(X;Y|Z) = I(A;B):
given z, x and y are invertible maps of a and b.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from bench.mi.tasks import CROSS, PLANE, Array, Draw, Task, mixture, mixture_information, pairs

UNIT, WIDE = (1.0, 1.0, 1.0), (10.0, 1.0, 5.0)
CHAIN = "d/2 log of a ratio of variances"
SHARED = "-(d/2) log(1 - rho²) of what x and y share besides z"
NULL_DIMS = (1, 2, 5, 10, 20)
FEATURES = 12


@cache
def tasks() -> dict[str, Task]:
    """{name: task} of all tasks of I(X;Y|Z)."""
    every = [*_chains(), *_nulls(), *_discrete(), *_shared()]
    return {task.name: task for task in every}


def chain_information(sigma: tuple[float, float, float], dim: int) -> float:
    """I(X;Y|Z) of the chain X -> Y -> Z with steps of these standard deviations."""
    x, y, z = (s * s for s in sigma)
    return dim / 2 * math.log((x + y) * (y + z) / (y * (x + y + z)))


def _chain(sigma: tuple[float, float, float], dim: int) -> Draw:
    def draw(rows: int, generator: np.random.Generator) -> tuple[Array, ...]:
        steps = np.array(sigma)[:, None, None] * generator.standard_normal((3, rows, dim))
        return tuple(steps.cumsum(0))

    return draw


def _chains() -> list[Task]:
    def turned(rows: int, generator: np.random.Generator) -> tuple[Array, ...]:
        x, y, z = _chain(WIDE, 1)(rows, generator)
        return x, z, y

    chains = [
        Task(f"cmi-chain-{dim}d", chain_information(UNIT, dim), _chain(UNIT, dim), CHAIN) for dim in (1, 2, 5, 10, 20)
    ]
    chains += [Task(f"cmi-wide-chain-{dim}d", chain_information(WIDE, dim), _chain(WIDE, dim), CHAIN) for dim in (1, 2)]
    return [*chains, Task("cmi-wide-chain-1d-ends", 0.0, turned, "the middle of a chain parts its ends")]


def _around(inner: Draw, dim: int, of_z: str, change=lambda v: v, change_y=None) -> Draw:
    """x and y from z [rows, dim] and the pair that `inner` draws: change(function of z + its half of the pair)."""

    def draw(rows: int, generator: np.random.Generator) -> tuple[Array, ...]:
        z = generator.standard_normal((rows, dim))
        a, b = inner(rows, generator)
        mean = linear if of_z == "linear" else bent
        x, y = (mean(z, half.shape[1], which) for which, half in enumerate((a, b)))
        return change(x + a), (change_y or change)(y + b), z

    return draw


def linear(z: Array, columns: int, which: int) -> Array:
    """Fixed random weights of unit length; x and y (`which` 0 and 1) have different ones."""
    return z @ _weights(z.shape[1], columns, which)


def bent(z: Array, columns: int, which: int) -> Array:
    """A fixed sum of sines of random directions, of about unit variance."""
    phases = np.sin(1.5 * z @ _weights(z.shape[1], FEATURES, 2 + which) + np.arange(FEATURES))
    return math.sqrt(2) * phases @ _weights(FEATURES, columns, 4 + which)


def _weights(rows: int, columns: int, which: int) -> Array:
    weights = np.random.default_rng(which).standard_normal((rows, columns))
    return weights / np.linalg.norm(weights, axis=0)


def _nulls() -> list[Task]:
    return [
        Task(f"cmi-null-{shape}-{dim}d", 0.0, _around(pairs(0.0, 1), dim, shape), "x and y share only z")
        for shape in ("linear", "bent")
        for dim in NULL_DIMS
    ]


def _discrete() -> list[Task]:
    def seven(rows: int, generator: np.random.Generator) -> tuple[Array, ...]:
        z = generator.integers(-3, 4, size=(rows, 1)).astype(float)
        a, b = pairs(0.6, 1)(rows, generator)
        return z + a, z + b, z

    def switched(rows: int, generator: np.random.Generator) -> tuple[Array, ...]:
        z = generator.integers(2, size=(rows, 1)).astype(float)
        x, noise = generator.standard_normal((2, rows, 1))
        rho = np.where(z > 0, 0.95, 0.0)
        return x + z, rho * x + np.sqrt(1 - rho**2) * noise - z, z

    return [
        Task("cmi-seven-labels", _shared_nats(0.6), seven, SHARED),
        Task("cmi-switch", 0.5 * _shared_nats(0.95), switched, "mean over the two values of z"),
    ]


def _shared_nats(rho: float, dim: int = 1) -> float:
    return -dim / 2 * math.log(1 - rho**2)


OUTLIER_SHARE = 0.001


def _shared() -> list[Task]:
    def sided(rows: int, generator: np.random.Generator) -> tuple[Array, ...]:
        z = generator.standard_normal((rows, 3))
        x, noise = generator.standard_normal((2, rows, 1))
        rho = np.where(z[:, :1] > 0, 0.9, -0.9)
        return x, rho * x + math.sqrt(1 - 0.9**2) * noise, z

    def outliers(rows: int, generator: np.random.Generator) -> tuple[Array, ...]:
        x, y, z = _around(pairs(0.756, 1), 1, "linear")(rows, generator)
        far = generator.random((rows, 1)) < OUTLIER_SHARE
        return tuple(np.where(far, 1e4 + generator.standard_normal(v.shape), v) for v in (x, y, z))

    def around(name: str, nats: float, dim: int, inner: Draw, shape: str, *maps, source: str = SHARED) -> Task:
        return Task(f"cmi-{name}", nats, _around(inner, dim, shape, *maps), source)

    shared = [around(f"linear-{dz}d", _shared_nats(0.8), dz, pairs(0.8, 1), "linear") for dz in (1, 5, 20)]
    shared += [around(f"bent-{dz}d", _shared_nats(0.8), dz, pairs(0.8, 1), "bent") for dz in (1, 5)]
    shared += [
        around(f"post-nonlinear-{dz}d", _shared_nats(0.8, dx), dz, pairs(0.8, dx), "bent", *maps)
        for dz, dx, maps in ((1, 1, (np.exp, np.tanh)), (5, 2, (lambda v: v**3, np.exp)))
    ]
    cross = mixture_information(CROSS)
    shared += [
        around(f"cross-{dz}d", cross, dz, mixture(CROSS), shape, source=PLANE)
        for dz, shape in ((1, "linear"), (3, "bent"))
    ]
    return [
        *shared,
        Task("cmi-sided-3d", _shared_nats(0.9), sided, "the same on both sides of z"),
        # given z, one knows whether a row is an outlier; outliers share nothing
        Task("cmi-outliers", (1 - OUTLIER_SHARE) * _shared_nats(0.756), outliers, f"share of the rest · {SHARED}"),
    ]
