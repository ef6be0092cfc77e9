"""The Gaussian part of information: canonical correlations, their log ratio, and its closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.information.columns import normal_scores
from engine.information.estimate import SIGMAS

LARGEST_CORRELATION = 1 - 1e-6  # float32 scores still tell rows apart
LEAST_SHARE = 1e-6  # of the largest variance; a direction of less is a copy of others
NORMALISED = 0.05  # a log ratio whose log normaliser is below this share of (1 nat + the information) is taken as one
CHECKED_ROWS = 1000
SIGNIFICANT = 3.0  # standard errors


@dataclass(frozen=True)
class Canonical:
    """Canonical correlation analysis of two sets of columns, in float64.

    Attributes:
        mean_x, mean_y: [dx], [dy].
        x, y: [dx, rx], [dy, ry], directions as columns: the variates (x - mean_x) @ x have variance 1 and are
            uncorrelated with each other; only variates of the same number are correlated across x and y.
        correlation: [min(rx, ry)], falling.
    """

    mean_x: Tensor
    mean_y: Tensor
    x: Tensor
    y: Tensor
    correlation: Tensor

    @property
    def information(self) -> float:
        """-1/2 sum log(1 - correlation²) in nats: the information of a Gaussian with these correlations."""
        return -0.5 * torch.log1p(-self.correlation.square()).sum().item()

    def variates(self, x: Tensor, y: Tensor, least: float) -> tuple[Tensor, Tensor]:
        """Variates scaled by their correlation over the largest one, at least `least`: [N, rx] and [N, ry], float32.

        A network learns first from large inputs, so this tells it where to look.
        """
        relevance = self.correlation.clamp(min=least)
        relevance = relevance / relevance.max()

        def scaled(columns: Tensor, mean: Tensor, directions: Tensor) -> Tensor:
            scale = relevance.new_full((directions.shape[1],), (least / self.correlation.max().clamp(min=least)).item())
            scale[: len(relevance)] = relevance
            return ((columns - mean) @ (directions * scale)).float()

        return scaled(x, self.mean_x, self.x), scaled(y, self.mean_y, self.y)

    def log_ratio(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The log ratio p(x,y) / p(x)p(y) of the Gaussian, in parts: float32 (u [N, r], v [N, r], a [N], b [N]).

        The score of x_i and y_j is u_i · v_j + a_i + b_j.
        """
        rho, count = self.correlation, len(self.correlation)
        u = (x - self.mean_x) @ self.x[:, :count]
        v = (y - self.mean_y) @ self.y[:, :count]
        slope = rho / (1 - rho.square())
        a = -0.5 * (u.square() @ (rho * slope))
        b = -0.5 * (v.square() @ (rho * slope)) + self.information
        return (u * slope).float(), v.float(), a.float(), b.float()


def canonical(x: Tensor, y: Tensor, shrinkage: float = 0.0) -> Canonical:
    """Canonical correlations of x [N, dx] and y [N, dy], float64.

    Args:
        shrinkage: weight in [0, 1) of uncorrelated columns in each side's covariance. With more than a few columns per
            hundred rows the largest correlations are due to chance. A positive shrinkage also subtracts that part.

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
        >>> canonical(x, torch.tensor([[1.0], [1.0], [2.0], [2.0]], dtype=torch.float64)).correlation
        tensor([0.8944], dtype=torch.float64)
    """
    mean_x, mean_y = x.mean(0), y.mean(0)
    whitening_x, whitening_y = _whitening(x - mean_x, shrinkage), _whitening(y - mean_y, shrinkage)
    cross = ((x - mean_x) @ whitening_x).T @ ((y - mean_y) @ whitening_y) / len(x)
    left, correlation, right = torch.linalg.svd(cross, full_matrices=True)
    if shrinkage:
        chance = min(0.99, (x.shape[1] + y.shape[1]) / len(x))
        correlation = ((correlation.square() - chance) / (1 - chance)).clamp(min=0).sqrt()
    correlation = correlation.clamp(max=LARGEST_CORRELATION)
    return Canonical(mean_x, mean_y, whitening_x @ left, whitening_y @ right.T, correlation)


def sampling_bias(samples: int, dx: int, dy: int) -> float:
    """By how much `Canonical.information` of Gaussian samples exceeds the truth on average, in nats.

    Exact, from the expected log determinant of a Wishart matrix; about dx dy / 2N for many samples.
    """

    def log_determinant(dim: int) -> Tensor:
        return torch.digamma((samples - 1 - torch.arange(dim, dtype=torch.float64)) / 2).sum()

    return 0.5 * (log_determinant(dx) + log_determinant(dy) - log_determinant(dx + dy)).item()


@dataclass(frozen=True)
class ClosedForm:
    """The information of Gaussian samples with the correlations of x and y, nats.

    Attributes:
        information: free of sampling bias; NaN where there are no more rows than columns.
        error: its standard error, for Gaussian samples.
        chance: its standard deviation where x and y are independent.
    """

    information: float
    error: float
    chance: float

    @property
    def exists(self) -> bool:
        """Whether there are more rows than columns."""
        return not math.isnan(self.information)

    @property
    def high(self) -> float:
        """The upper end of its 95 % interval."""
        return self.information + SIGMAS * self.error

    def shows_more_than(self, high: float) -> bool:
        """Whether the columns seem to share more than `high`, as independent ones hardly would.

        Also True where there are so few rows that no correlation shows what they share.
        """
        return not self.information <= SIGNIFICANT * self.chance and not self.high <= high


def closed_form(x: Tensor, y: Tensor) -> ClosedForm:
    """For x [N, dx] and y [N, dy], float64.

    >>> x, noise = torch.randn(2, 500, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> closed = closed_form(x, x + noise)  # 10 log 2 = 6.93
    >>> abs(closed.information - 6.93) < 2 * closed.error, closed.shows_more_than(6.0)
    (True, True)
    """
    fit = canonical(x, y)
    count, (dx, dy) = len(x), (fit.x.shape[1], fit.y.shape[1])
    free = count - dx - dy - 1
    if free < 1:
        return ClosedForm(math.nan, math.nan, math.nan)
    information = fit.information - sampling_bias(count, dx, dy)
    chance = math.sqrt(dx * dy / 2) / free
    return ClosedForm(information, math.sqrt(fit.correlation.square().sum().item() / free + chance**2), chance)


def lost_by_ranks(x: Tensor, y: Tensor) -> float:
    """By how much the closed form of normal scores falls short of that of the values themselves, nats.

    Ranks know values only to within their distance from the next ones. It is measured on as many Gaussian samples with
    the covariance of x [N, dx] and y [N, dy].

    >>> x, noise = torch.randn(2, 300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> lost_by_ranks(x, x + noise) < 0.02 < 0.4 < lost_by_ranks(x, x + 0.01 * noise)
    True
    """
    columns = torch.cat([x, y], 1)
    variances, directions = torch.linalg.eigh(torch.cov(columns.T))
    drawn = torch.randn(columns.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = drawn * variances.clamp(min=0).sqrt() @ directions.T
    scores, dx = normal_scores(drawn).double(), x.shape[1]
    values, ranks = (closed_form(t[:, :dx], t[:, dx:]) for t in (drawn, scores))
    return max(0.0, values.information - ranks.information)


def looks_gaussian(x: Tensor, y: Tensor) -> bool:
    """Whether the canonical variates of x and y look Gaussian, each pair for itself.

    Then the mean of its ratio p(u,v) / p(u)p(v) over pairs of different rows is 1. Of all of them together, few rows
    cannot show that mean.

    >>> x = torch.randn(500, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> looks_gaussian(x, x + x.flip(0)), looks_gaussian(x.sign(), x.sign() + x)
    (True, False)
    """
    fit = canonical(x, y)
    rows = torch.linspace(0, len(x) - 1, min(len(x), CHECKED_ROWS), dtype=torch.float64).round().long()
    count, total = len(fit.correlation), 0.0
    us, vs = (x[rows] - fit.mean_x) @ fit.x[:, :count], (y[rows] - fit.mean_y) @ fit.y[:, :count]
    for u, v, rho in zip(us.T, vs.T, fit.correlation.tolist(), strict=True):
        slope = rho / (1 - rho * rho)
        ratio = slope * (u[:, None] * v - rho / 2 * (u.square()[:, None] + v.square())) - math.log1p(-rho * rho) / 2
        ratio.fill_diagonal_(-math.inf)
        total += ratio.logsumexp((0, 1)).item() - math.log(len(u) * (len(u) - 1))
    return abs(total) < NORMALISED * (1 + fit.information)


def _whitening(centred: Tensor, shrinkage: float) -> Tensor:
    """[d, r]: centred @ this has the covariance I; directions without variance of their own are left out."""
    covariance = centred.T @ centred / len(centred)
    covariance = (1 - shrinkage) * covariance + shrinkage * covariance.diagonal().diag()
    variance, direction = torch.linalg.eigh(covariance)
    kept = variance > LEAST_SHARE * variance[-1]
    return direction[:, kept] / variance[kept].sqrt()


def least_correlation(samples: int, dx: int, dy: int) -> float:
    """About the correlation that independent columns of this many samples reach by chance."""
    return min(0.5, math.sqrt((dx + dy) / samples))
