"""Samples whose information is known: I(X;Y) in closed form, or one integral over a line or a plane.

Each task draws its samples with numpy alone and names where its true value comes from. An invertible map of x alone, or
of y alone, changes no information; that is what the transformed tasks rest on.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.special import digamma, gammaln, logsumexp, ndtr

Array = np.ndarray
Draw = Callable[[int, np.random.Generator], tuple[Array, ...]]


@dataclass(frozen=True)
class Task:
    """A distribution with known information.

    Attributes:
        truth: I(X;Y), or I(X;Y|Z) where `draw` gives three arrays, in nats.
        draw: (rows, generator) -> x, y or x, y, z, each [rows, d] float64.
        source: where the truth comes from.
    """

    name: str
    truth: float
    draw: Draw
    source: str

    def sample(self, rows: int, seed: int) -> dict[str, Array]:
        """{"x", "y", ("z",) "truth"}; equal rows and seeds give equal samples, and no two tasks share their draws."""
        generator = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        arrays = dict(zip("xyz", self.draw(rows, generator), strict=False))
        return arrays | {"truth": np.float64(self.truth)}


# -- truths ---------------------------------------------------------------------------------------


def correlation(information: float, dim: int = 1) -> float:
    """The rho of `dim` pairs of standard Gaussians that share `information` nats in all."""
    return math.sqrt(-math.expm1(-2 * information / dim))


def gaussian_information(covariance: Array, dim_x: int) -> float:
    """I(X;Y) of a joint Gaussian, X being the first `dim_x` columns: half of log |S_X| |S_Y| / |S|."""
    parts = covariance[:dim_x, :dim_x], covariance[dim_x:, dim_x:], covariance
    x, y, both = (float(np.linalg.slogdet(part)[1]) for part in parts)
    return 0.5 * (x + y - both)


def student_information(covariance: Array, dim_x: int, freedom: float) -> float:
    """I(X;Y) of a multivariate Student with this dispersion: the Gaussian's plus what the shared scale tells."""

    def f(d: float) -> float:
        return float(gammaln(d / 2) - d / 2 * digamma(d / 2))

    dim = len(covariance)
    scale = f(freedom) + f(freedom + dim) - f(freedom + dim_x) - f(freedom + dim - dim_x)
    return gaussian_information(covariance, dim_x) + scale


def additive_information(width: float) -> float:
    """I(X;X+N) of X uniform on [0, 1] and N uniform on [-width, width]."""
    return width - math.log(2 * width) if width <= 0.5 else 1 / (4 * width)


def binary_entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log1p(-p)


def line_entropy(log_density: Callable[[Array], Array], low: float, high: float, points: int = 20_001) -> float:
    """Differential entropy by the trapezoid rule; the density must be smooth and vanish at both ends."""
    at = np.linspace(low, high, points)
    log_p = log_density(at)
    return float(-(np.exp(log_p) * log_p).sum() * (at[1] - at[0]))


def normal_log_density(at: Array, mean: float | Array, sd: float) -> Array:
    return -0.5 * ((at - mean) / sd) ** 2 - math.log(sd * math.sqrt(2 * math.pi))


def mixture_information(parts: list[tuple[float, tuple[float, float], Array]], points: int = 601) -> float:
    """I(X;Y) of a mixture of Gaussians of the plane: (weight, mean, covariance) each; by the trapezoid rule.

    The integrand is smooth and falls off like a Gaussian, for which the rule's error falls faster than any power of the
    step. The grid reaches ten standard deviations beyond every mean.
    """
    reach = max(10 * math.sqrt(float(c.max())) + max(map(abs, m)) for _, m, c in parts)
    at = np.linspace(-reach, reach, points)
    step = at[1] - at[0]
    x, y = np.meshgrid(at, at, indexing="ij")
    joint = logsumexp([math.log(w) + _plane_log_density(x, y, m, c) for w, m, c in parts], axis=0)
    marginals = [
        logsumexp(
            [math.log(w) + normal_log_density(at, m[axis], math.sqrt(c[axis, axis])) for w, m, c in parts], axis=0
        )
        for axis in (0, 1)
    ]
    ratio = joint - marginals[0][:, None] - marginals[1][None, :]
    return float((np.exp(joint) * ratio).sum() * step**2)


def _plane_log_density(x: Array, y: Array, mean: tuple[float, float], covariance: Array) -> Array:
    precision = np.linalg.inv(covariance)
    dx, dy = x - mean[0], y - mean[1]
    square = precision[0, 0] * dx**2 + 2 * precision[0, 1] * dx * dy + precision[1, 1] * dy**2
    return -0.5 * square - math.log(2 * math.pi) - 0.5 * float(np.linalg.slogdet(covariance)[1])


# -- draws ----------------------------------------------------------------------------------------


def pairs(rho: float, dim: int) -> Draw:
    """`dim` independent pairs of standard Gaussians of correlation rho."""

    def draw(rows: int, generator: np.random.Generator) -> tuple[Array, Array]:
        x, noise = generator.standard_normal((2, rows, dim))
        return x, rho * x + math.sqrt(1 - rho**2) * noise

    return draw


def gaussian(covariance: Array, dim_x: int) -> Draw:
    root = np.linalg.cholesky(covariance)

    def draw(rows: int, generator: np.random.Generator) -> tuple[Array, Array]:
        both = generator.standard_normal((rows, len(covariance))) @ root.T
        return both[:, :dim_x], both[:, dim_x:]

    return draw


def student(covariance: Array, dim_x: int, freedom: float) -> Draw:
    inner = gaussian(covariance, dim_x)

    def draw(rows: int, generator: np.random.Generator) -> tuple[Array, Array]:
        x, y = inner(rows, generator)
        scale = np.sqrt(freedom / generator.chisquare(freedom, (rows, 1)))
        return x * scale, y * scale

    return draw


def mixture(parts: list[tuple[float, tuple[float, float], Array]]) -> Draw:
    roots = np.stack([np.linalg.cholesky(c) for _, _, c in parts])
    means = np.array([m for _, m, _ in parts])
    weights = [w for w, _, _ in parts]

    def draw(rows: int, generator: np.random.Generator) -> tuple[Array, Array]:
        part = generator.choice(len(parts), rows, p=weights)
        both = means[part] + np.einsum("nij,nj->ni", roots[part], generator.standard_normal((rows, 2)))
        return both[:, :1], both[:, 1:]

    return draw


def transformed(draw: Draw, of_x: Callable[[Array], Array], of_y: Callable[[Array], Array] | None = None) -> Draw:
    """Invertible maps of x and of y (of_x where None)."""

    def changed(rows: int, generator: np.random.Generator) -> tuple[Array, Array]:
        x, y = draw(rows, generator)
        return of_x(x), (of_y or of_x)(y)

    return changed


def independent(columns: Callable[[np.random.Generator, tuple[int, int]], Array], dim: int) -> Draw:
    return lambda rows, generator: (columns(generator, (rows, dim)), columns(generator, (rows, dim)))


# -- maps that lose nothing -----------------------------------------------------------------------


def half_cube(v: Array) -> Array:
    return v * np.sqrt(np.abs(v))


def spiral(v: Array) -> Array:
    """Turns the plane of columns 1 and 2 by the squared length of the row (which turning leaves as it is)."""
    angle = (v**2).sum(1)
    cos, sin = np.cos(angle), np.sin(angle)
    turned = v.copy()
    turned[:, 0], turned[:, 1] = cos * v[:, 0] - sin * v[:, 1], sin * v[:, 0] + cos * v[:, 1]
    return turned


def swiss_roll(u: Array) -> Array:
    """A column of numbers in [0, 1], rolled up in the plane."""
    t = 1.5 * math.pi * (1 + 2 * u)
    return np.concatenate([t * np.cos(t), t * np.sin(t)], 1) / 21


def identity(v: Array) -> Array:
    return v


# -- the tasks ------------------------------------------------------------------------------------


@cache
def tasks() -> dict[str, Task]:
    """{name: task} of all closed-form tasks of I(X;Y)."""
    every = [*_gaussians(), *_transforms(), *_heavy_and_additive(), *_shapes(), *_discrete(), *_independent()]
    return {task.name: task for task in every}


GAUSS = "-(d/2) log(1 - rho²)"
UNCHANGED = f"{GAUSS}; the map loses nothing"


def _gaussians() -> list[Task]:
    gaussians = [
        Task(f"own-gauss-{dim}d-{nats}", float(nats), pairs(correlation(nats, dim), dim), GAUSS)
        for dim, nats in ((1, 5), (5, 5), (20, 10))
    ]
    # ten columns against forty noisy mixtures of them
    mixing = np.random.default_rng(0).standard_normal((40, 10)) / math.sqrt(10)
    covariance = np.block([[np.eye(10), mixing.T], [mixing, mixing @ mixing.T + 4 * np.eye(40)]])
    truth = gaussian_information(covariance, 10)
    return [*gaussians, Task("own-gauss-10-40", truth, gaussian(covariance, 10), "determinants of the covariance")]


def _transforms() -> list[Task]:
    def task(name: str, nats: float, dim: int, *maps: Callable[[Array], Array]) -> Task:
        return Task(name, nats, transformed(pairs(correlation(nats, dim), dim), *maps), UNCHANGED)

    return [
        task("own-cube-5d-2", 2.0, 5, lambda v: v**3),
        task("own-half-cube-10d-3", 3.0, 10, half_cube),
        task("own-cdf-5d-2", 2.0, 5, ndtr),
        task("own-spiral-4d-2", 2.0, 4, spiral),
        task("own-swiss-roll-1", 1.0, 1, lambda v: swiss_roll(ndtr(v)), ndtr),
    ]


def _heavy_and_additive() -> list[Task]:
    shared = _equicorrelated(8, 0.4)
    heavy = student(shared, 4, 2.0)
    truth = student_information(shared, 4, 2.0)
    source = "the Gaussian's plus f(v) + f(v+m+n) - f(v+m) - f(v+n), f(d) = log Γ(d/2) - d/2 ψ(d/2)"

    def additive(rows: int, generator: np.random.Generator) -> tuple[Array, Array]:
        x = generator.uniform(0, 1, (rows, 1))
        return x, x + generator.uniform(-0.3, 0.3, (rows, 1))

    return [
        Task("own-student-4-4-2", truth, heavy, source),
        Task("own-asinh-student-4-4-2", truth, transformed(heavy, np.arcsinh), source),
        Task("own-additive-0.3", additive_information(0.3), additive, "w - log 2w for noise on [-w, w]"),
    ]


CROSS = [(0.5, (0.0, 0.0), np.array([[1, s * 0.9], [s * 0.9, 1]])) for s in (1, -1)]
CLUSTERS = [
    (w, m, np.diag([0.25, 0.16]))
    for w, m in ((0.4, (-1.5, -1.5)), (0.3, (1.5, 1.5)), (0.2, (-1.5, 1.5)), (0.1, (1.5, -1.5)))
]
PLANE = "integral over the plane, trapezoid rule, error below 1e-6"
LINE = "integral over a line, trapezoid rule, error below 1e-6"
SQUARE_NOISE = 0.5


def _shapes() -> list[Task]:
    def square(rows: int, generator: np.random.Generator) -> tuple[Array, Array]:
        x = generator.standard_normal((rows, 1))
        return x, x**2 + SQUARE_NOISE * generator.standard_normal((rows, 1))

    return [
        Task("own-cross", mixture_information(CROSS), mixture(CROSS), PLANE),
        Task("own-clusters", mixture_information(CLUSTERS), mixture(CLUSTERS), PLANE),
        Task("own-square", square_information(), square, LINE),
    ]


def square_information() -> float:
    """I(X;X²+noise), X standard Gaussian: the entropy of the sum less the noise's."""
    x = np.linspace(-12, 12, 4801)
    log_weight = normal_log_density(x, 0, 1) + math.log(x[1] - x[0])

    def log_density(y: Array) -> Array:
        return np.concatenate(
            [
                logsumexp(normal_log_density(part[:, None], x**2, SQUARE_NOISE) + log_weight, axis=1)
                for part in np.array_split(y, 40)
            ]
        )

    noise = 0.5 * math.log(2 * math.pi * math.e * SQUARE_NOISE**2)
    return line_entropy(log_density, -6, 70, 3801) - noise


SHIFTS = np.array([-2.0, 0.0, 1.0, 3.0])
FLIP = 0.1


def _discrete() -> list[Task]:
    def shifted(rows: int, generator: np.random.Generator) -> tuple[Array, Array]:
        label = generator.integers(4, size=(rows, 1))
        return label.astype(float), SHIFTS[label] + generator.standard_normal((rows, 1))

    def sign(rows: int, generator: np.random.Generator) -> tuple[Array, Array]:
        x = generator.standard_normal((rows, 5))
        kept = generator.random((rows, 1)) >= FLIP
        return x, np.where(kept, 1.0, -1.0) * np.sign(x[:, :1] * x[:, 1:2])

    def channel(rows: int, generator: np.random.Generator) -> tuple[Array, Array]:
        x = generator.integers(8, size=(rows, 1))
        other = (x + generator.integers(1, 8, size=(rows, 1))) % 8
        return x.astype(float), np.where(generator.random((rows, 1)) < 0.3, other, x).astype(float)

    def wider(rows: int, generator: np.random.Generator) -> tuple[Array, Array]:
        x = generator.integers(5, size=(rows, 1))
        return x.astype(float), x + generator.uniform(0, 2, (rows, 1))

    def density(at: Array) -> Array:
        return logsumexp([normal_log_density(at, shift, 1) for shift in SHIFTS], axis=0) - math.log(4)

    shift = line_entropy(density, -15, 16) - 0.5 * math.log(2 * math.pi * math.e)
    flips = math.log(2) - binary_entropy(FLIP)
    noisy = math.log(8) - binary_entropy(0.3) - 0.3 * math.log(7)
    return [
        Task("own-label-shift", shift, shifted, LINE),
        Task("own-sign-of-product", flips, sign, "log 2 - H(flips)"),
        Task("own-channel-8", noisy, channel, "log 8 - H(Y|X)"),
        Task("own-label-uniform", math.log(5) - 0.8 * math.log(2), wider, "log m - (m-1)/m log 2"),
    ]


def _independent() -> list[Task]:
    def heavy(generator: np.random.Generator, shape: tuple[int, int]) -> Array:
        return generator.standard_t(1.5, shape)

    def uniform(generator: np.random.Generator, shape: tuple[int, int]) -> Array:
        return generator.uniform(size=shape)

    def normal(generator: np.random.Generator, shape: tuple[int, int]) -> Array:
        return generator.standard_normal(shape)

    columns = (("uniform", 1, uniform), ("gauss", 5, normal), ("heavy", 25, heavy))
    return [
        Task(f"own-independent-{name}-{dim}d", 0.0, independent(draw, dim), "independent")
        for name, dim, draw in columns
    ]


def _equicorrelated(dim: int, rho: float) -> Array:
    return np.full((dim, dim), rho) + (1 - rho) * np.eye(dim)
