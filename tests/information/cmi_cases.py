"""Samples (x, y, z) with their I(X;Y|Z) in nats: {name, columns of z: (samples(n, seed), truth)}."""

import math
from collections.abc import Callable

import numpy as np

Samples = tuple[np.ndarray, np.ndarray, np.ndarray]


def _normal(z_columns: int, form: Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple]) -> Callable:
    """Samples of a form (z, two noises [2, n], generator) -> (x, y), z of independent N(0, 1)."""

    def samples(n: int, seed: int) -> Samples:
        generator = np.random.default_rng(seed)
        z, noise = generator.normal(size=(n, z_columns)), generator.normal(size=(2, n))
        x, y = form(z, noise, generator)
        return x, y, z

    return samples


def _mean(z: np.ndarray) -> np.ndarray:
    """One N(0, 1) of all columns of z."""
    return z.sum(1) / math.sqrt(z.shape[1])


def _correlated(e: np.ndarray, rho: np.ndarray | float) -> np.ndarray:
    return rho * e[0] + np.sqrt(1 - rho**2) * e[1]


# -- conditionally independent ----------------------------------------------------------------------------------------


def linear(z, e, _):
    return _mean(z) + 0.5 * e[0], _mean(z) + 0.5 * e[1]


def sine(z, e, _):
    return np.sin(2 * _mean(z)) + 0.3 * e[0], np.cos(2 * _mean(z)) + _mean(z) + 0.3 * e[1]


def shared_sine(z, e, _):
    return np.sin(2 * _mean(z)) + 0.3 * e[0], np.sin(2 * _mean(z)) + 0.3 * e[1]


def spread(z, e, _):
    return np.exp(0.7 * _mean(z)) * e


def post_nonlinear_null(z, e, _):
    return np.tanh(_mean(z) + 0.5 * e[0]) ** 3, np.exp(_mean(z) + 0.5 * e[1])


# -- dependent --------------------------------------------------------------------------------------------------------


def post_nonlinear(z, e, _):
    return np.exp(np.sin(z.sum(1)) + e[0]), (np.sin(z.sum(1)) + _correlated(e, 0.8)) ** 3


def sign(z, e, _):
    """The sign of z decides the sign of the correlation."""
    return e[0], _correlated(e, 0.9 * np.sign(z[:, 0]))


def mixture(z, e, generator):
    """A hidden coin decides the sign of the correlation."""
    return z[:, 0] + e[0], z[:, 0] + _correlated(e, 0.9 * generator.choice([-1, 1], len(z)))


def label(z, e, generator):
    """y is a binary label."""
    y = generator.integers(0, 2, len(z))
    return 1.5 * y + z[:, 0] + e[0], y


def published_f(columns: int) -> Callable[[int, int], Samples]:
    """Model F of Mukherjee, Asnani and Kannan (2019), "CCMI"."""

    def samples(n: int, seed: int) -> Samples:
        generator = np.random.default_rng(seed)
        x, noise = generator.normal(size=(2, n))
        z = generator.uniform(-0.5, 0.5, size=(n, columns))
        return x, x + z[:, 0] + 0.1 * noise, z

    return samples


def _of_correlation(rho: float) -> float:
    return -0.5 * math.log(1 - rho**2)


def _of_mixture(rho: float) -> float:
    """By quadrature on a grid."""
    grid, step = np.linspace(-6, 6, 1201, retstep=True)
    x, y = np.meshgrid(grid, grid)

    def density(r):
        return np.exp(-(x * x - 2 * r * x * y + y * y) / (2 * (1 - r * r))) / (2 * math.pi * math.sqrt(1 - r * r))

    joint = (density(rho) + density(-rho)) / 2
    return float((joint * np.log(joint / density(0))).sum() * step**2)


def _of_label(shift: float) -> float:
    """By quadrature: entropy of a mixture of two unit normals, less that of one."""
    grid, step = np.linspace(-8, 8 + shift, 100_001, retstep=True)
    joint = (np.exp(-(grid**2) / 2) + np.exp(-((grid - shift) ** 2) / 2)) / math.sqrt(8 * math.pi)
    return float(-(joint * np.log(joint)).sum() * step - 0.5 * math.log(2 * math.pi * math.e))


CASES = {
    f"{name}, {columns}": (_normal(columns, form), 0.0)
    for name, form in {
        "linear": linear, "sine": sine, "shared sine": shared_sine, "spread": spread,
        "post-nonlinear null": post_nonlinear_null,
    }.items()
    for columns in (1, 2, 5, 10, 20)
} | {
    f"{name}, {columns}": (_normal(columns, form), truth)
    for name, form, truth in (
        ("post-nonlinear", post_nonlinear, _of_correlation(0.8)), ("sign", sign, _of_correlation(0.9)),
        ("mixture", mixture, _of_mixture(0.9)), ("label", label, _of_label(1.5)),
    )
    for columns in (1, 3, 5)
} | {
    f"published F, {columns}": (published_f(columns), 0.5 * math.log(101)) for columns in (1, 10, 20, 50, 100)
}  # fmt: skip
