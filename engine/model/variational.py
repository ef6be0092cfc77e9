"""Bounds of mutual information by a learned conditional q(y|x): CLUB, leave-one-out and Barber-Agakov. Nats.

A conditional is a small network that predicts y from x. It learns by likelihood. The bounds compare the likelihood of
each row's own y with that of other rows' y:

- `club`: mean log q(y_i|x_i) - mean over i != j of log q(y_j|x_i). Cheng et al. 2020 average over all B² pairs; that
  mean is (B - 1)/B of this one. An upper bound where q is near p(y|x).
- `club_sample`: the same with one other row per row.
- `l1out`: mean of log q(y_i|x_i) - log of the mean over j != i of q(y_i|x_j) (Poole et al. 2019). An upper bound where
  q is p(y|x).
- `ba`: mean of log q(y|x) - log r(y) with a learned marginal r (Barber & Agakov 2003, with the entropy of y by r). Its
  expectation is I - KL(p(y|x)|q) + KL(p(y)|r): a lower bound where r is p(y).

CLUB depends on y_j only through moments, so that it takes O(B) steps. All arithmetic is fp32 (fp64 for fp64 features).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.errors import EstimatorError
from engine.kernels.compiling import as_read
from engine.kernels.gradients import update_buffer
from engine.kernels.mi_bounds.reference import full_precision
from engine.model.mlps import Initialise, build_mlp, run_mlp
from engine.vocabulary import VARIATIONAL_BOUNDS

LOG_VARIANCE_LIMIT = 5.0
"""The log-variance of a Gaussian conditional of standardised features lies within ± this.

Without a limit, a confident conditional has larger gradients than anything else. A model that minimises CLUB then moves
faster than the conditional can follow.
"""

RATE = 0.01
"""Rate of the moving mean and variance by which a Gaussian conditional standardises y."""

LOG_2PI = math.log(2 * math.pi)


@dataclass
class Gaussian:
    """q(y|x_j) for every row j: a normal distribution with mean [B, d] and a diagonal covariance.

    It is the density of (y - centre) / scale. All bounds are the same for y and for its standardised form, because they
    compare densities of one y.

    >>> q = Gaussian(torch.zeros(3, 1), torch.zeros(3, 1))
    >>> q.log_prob(torch.zeros(3, 1))[0]  # -log(2 pi) / 2
    tensor(-0.9189)
    """

    mean: Tensor
    log_var: Tensor
    centre: Tensor | float = 0.0
    scale: Tensor | float = 1.0

    def targets(self, y: Tensor) -> Tensor:
        """y as `log_prob` and the bounds take it, standardised."""
        return (full_precision(y) - self.centre) / self.scale

    def log_prob(self, y: Tensor) -> Tensor:
        """log q(y_i|x_i), [B]."""
        squares = (y - self.mean).square() * (-self.log_var).exp()
        return -0.5 * (squares + self.log_var + LOG_2PI).sum(1)

    def excess(self, y: Tensor, moments: tuple[Tensor, Tensor]) -> Tensor:
        """log q(y_i|x_i) minus the mean of log q(y_j|x_i) over the rows j that `moments` describe, [B].

        With c = y_i - mean of y and m = q's mean - mean of y, the difference of the squares is c² - 2 c m - variance.
        The log-variances cancel, and no large numbers are subtracted.
        """
        centre, variance = moments
        apart = y - centre
        squares = apart * (apart - 2 * (self.mean - centre)) - variance
        return -0.5 * (squares * (-self.log_var).exp()).sum(1)

    def pairs(self, y: Tensor) -> Tensor:
        """log q(y_i|x_j) for every pair, [B, B]. In fp64, because the squares are expanded."""
        wide = torch.float32 if y.device.type == "mps" else torch.float64
        centre = y.detach().mean(0)
        y, mean = (y - centre).to(wide), (self.mean - centre).to(wide)
        log_var = self.log_var.to(wide)
        precision = (-log_var).exp()
        squares = y.square() @ precision.T - 2 * y @ (mean * precision).T + (mean.square() * precision).sum(1)
        return -0.5 * (squares + (log_var + LOG_2PI).sum(1))

    @staticmethod
    def moments(y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the rows of y, [1, d] each."""
        return y.mean(0, keepdim=True), y.var(0, correction=0, keepdim=True)


@dataclass
class Categorical:
    """q(y|x_j) for every row j: logarithms of the probabilities of K classes, [B, K].

    >>> q = Categorical(torch.full((3, 2), 0.5).log())
    >>> q.log_prob(q.targets(torch.tensor([[0.0], [1.0], [1.0]])))[0]  # -log 2
    tensor(-0.6931)
    """

    log_probs: Tensor

    def targets(self, y: Tensor) -> Tensor:
        """One-hot rows [B, K] of classes [B, 1]; what already is [B, K] stays as it is."""
        return one_hot(y, self.log_probs.shape[1])

    def log_prob(self, y: Tensor) -> Tensor:
        """log q(y_i|x_i), [B], of one-hot rows or of probabilities."""
        return (y * self.log_probs).sum(1)

    def excess(self, y: Tensor, moments: tuple[Tensor, ...]) -> Tensor:
        """As `Gaussian.excess`."""
        return ((y - moments[0]) * self.log_probs).sum(1)

    def pairs(self, y: Tensor) -> Tensor:
        """log q(y_i|x_j) for every pair, [B, B]."""
        return y @ self.log_probs.T

    @staticmethod
    def moments(y: Tensor) -> tuple[Tensor, ...]:
        """The shares of the classes, [1, K]."""
        return (y.mean(0, keepdim=True),)


Conditional = Gaussian | Categorical


def one_hot(y: Tensor, classes: int) -> Tensor:
    """Classes [B, 1] as rows [B, classes]. A number that is no class gives NaN. [B, classes] stays as it is."""
    y = full_precision(y)
    if y.shape[1] != 1:
        return y
    found = (y == torch.arange(classes, device=y.device)).to(y.dtype)
    return found / found.sum(1, keepdim=True)


# -- bounds --------------------------------------------------------------------------------------------------


def club(q: Conditional, y: Tensor) -> Tensor:
    """CLUB over all pairs of different rows, 0-d.

    >>> y = torch.tensor([[-1.0], [1.0]])
    >>> club(Gaussian(y, torch.zeros(2, 1)), y)  # own y: 0, the other: -2
    tensor(2.)

    Args:
        q: the conditional of B >= 2 rows.
        y: [B, d], as `q.targets` gives it.
    """
    count = len(y)
    return q.excess(y, q.moments(y)).mean() * (count / (count - 1))


def club_sample(q: Conditional, y: Tensor, other: Tensor) -> Tensor:
    """CLUB with one other row per row, 0-d. `other`: int64 [B], with other[i] != i."""
    return (q.log_prob(y) - q.log_prob(y.index_select(0, other))).mean()


def leave_one_out_bound(q: Conditional, y: Tensor) -> Tensor:
    """L1Out, 0-d: the marginal of y_i is the mixture of the other rows' conditionals. Takes O(B²) memory."""
    count = len(y)
    pairs = q.pairs(y)
    own = torch.eye(count, dtype=torch.bool, device=y.device)
    mixture = pairs.masked_fill(own, -math.inf).logsumexp(1) - math.log(count - 1)
    return (q.log_prob(y) - mixture.to(y.dtype)).mean()


def other_rows(count: int, number: Tensor) -> Tensor:
    """A permutation without fixed points, int64 [count], that an integer 0-d tensor determines.

    The rows are put in a pseudo-random order, and each is paired with the next one. So every row is paired with any
    other one equally often. The result does not depend on the device, and a captured graph gives a new one for every
    number.

    >>> other_rows(4, torch.tensor(0))
    tensor([2, 3, 1, 0])
    """
    rows = torch.arange(count, device=number.device)
    order = _hashed(_hashed(number) ^ rows).argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, order.roll(-1))


def _hashed(x: Tensor) -> Tensor:
    """A 32-bit hash of integers. Products stay below 2^63."""
    x = (x + 0x1E3779B9) & 0xFFFFFFFF
    for shift, factor in ((17, 0x2D5AD4BB), (11, 0x2C4C1B51), (15, 0x31848BAB)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 14)


# -- networks ------------------------------------------------------------------------------------------------


class GaussianNet(nn.Module):
    """x [B, dim_x] -> `Gaussian` of y [B, dim_y]: one MLP for the mean, one for the log-variance.

    The log-variance is L tanh(output / L) with L = `LOG_VARIANCE_LIMIT`. Both are of standardised y. Buffers hold the
    moving mean and variance of y, which `observe` updates.
    """

    def __init__(
        self, dim_x: int, dim_y: int, hidden: int, layers: int, activation: str, initialise: Initialise | None = None
    ):
        super().__init__()
        self.activation = activation
        self.mean = build_mlp(dim_x, dim_y, hidden, layers, activation, initialise)
        self.log_var = build_mlp(dim_x, dim_y, hidden, layers, activation, initialise)
        self.register_buffer("y_mean", torch.zeros(dim_y))
        self.register_buffer("y_variance", torch.ones(dim_y))
        self.register_buffer("begun", torch.zeros(()))

    def forward(self, x: Tensor) -> Gaussian:
        mean, raw = (run_mlp(tower, x, self.activation) for tower in (self.mean, self.log_var))
        log_var = LOG_VARIANCE_LIMIT * torch.tanh(raw / LOG_VARIANCE_LIMIT)
        buffers = self.y_mean, self.y_variance
        centre, variance = (as_read("the moving mean of y", buffer, learns(self)) for buffer in buffers)
        return Gaussian(mean, log_var, centre, variance.sqrt())

    @torch.no_grad()
    def observe(self, y: Tensor) -> None:
        """Let the moving mean and variance follow a batch of y. The first batch starts them.

        A column that is constant or not finite in this batch changes nothing.
        """
        y = full_precision(y.detach())
        mean, variance = y.mean(0), y.var(0, correction=0)
        varies = (y != y[:1]).any(0)  # the variance of equal numbers may be above 0, by the rounding of their mean
        used = varies & mean.isfinite() & variance.isfinite() & (variance > 0)
        rate = torch.where(used, torch.where(self.begun > 0, RATE, 1.0), 0.0)
        for buffer, value in ((self.y_mean, mean), (self.y_variance, variance)):
            moved = buffer + rate * (torch.where(used, value, buffer) - buffer)
            update_buffer("the moving mean of y", buffer, moved)
        update_buffer("the moving mean of y", self.begun, self.begun.maximum(used.any().to(self.begun.dtype)))


class CategoricalNet(nn.Module):
    """x [B, dim_x] -> `Categorical` of `classes` classes: an MLP that gives logits."""

    def __init__(
        self, dim_x: int, classes: int, hidden: int, layers: int, activation: str, initialise: Initialise | None = None
    ):
        super().__init__()
        self.activation = activation
        self.logits = build_mlp(dim_x, classes, hidden, layers, activation, initialise)

    def forward(self, x: Tensor) -> Categorical:
        return Categorical(run_mlp(self.logits, x, self.activation).log_softmax(1))

    def observe(self, y: Tensor) -> None:
        """Classes are not standardised."""


def conditional_net(
    dim_x: int,
    dim_y: int,
    classes: int | None,
    hidden: int,
    layers: int,
    activation: str,
    initialise: Initialise | None = None,
) -> GaussianNet | CategoricalNet:
    """The network of q(y|x): categorical where y holds one of `classes` classes, Gaussian otherwise."""
    if classes is None:
        return GaussianNet(dim_x, dim_y, hidden, layers, activation, initialise)
    return CategoricalNet(dim_x, classes, hidden, layers, activation, initialise)


class GaussianMarginal(nn.Module):
    """r(y): a normal distribution with any covariance, log r(y) for y [B, d] -> [B].

    `lower` and `log_scale` are the factor of the precision matrix, L with L L^T = covariance^-1: its part below the
    diagonal, and the logarithm of its diagonal. It starts as the standard normal distribution.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.mean, self.log_scale = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.lower = nn.Parameter(torch.zeros(dim, dim))

    def forward(self, y: Tensor) -> Tensor:
        # parameters may have 16 bits
        mean, lower, log_scale = (t.to(y.dtype) for t in (self.mean, self.lower, self.log_scale))
        white = (y - mean) @ (lower.tril(-1) + torch.diag(log_scale.exp()))
        return log_scale.sum() - 0.5 * (white.square() + LOG_2PI).sum(1)


class CategoricalMarginal(nn.Module):
    """r(y) over classes: log r(y) for one-hot rows [B, K] -> [B]. It starts uniform."""

    def __init__(self, classes: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(classes))

    def forward(self, y: Tensor) -> Tensor:
        return y @ self.logits.to(y.dtype).log_softmax(0)


# -- checks --------------------------------------------------------------------------------------------------


def learns(q: nn.Module) -> bool:
    """Whether a conditional is trained. A frozen one keeps its moving mean and variance, or it would be another one."""
    return q.training and any(parameter.requires_grad for parameter in q.parameters())


def check_conditional(bound: str, critic: str | nn.Module, dim_y: int, classes: int | None) -> None:
    """Refuse a custom critic or a number of classes that a bound cannot use."""
    conditional = bound in VARIATIONAL_BOUNDS
    if conditional and isinstance(critic, nn.Module):
        raise EstimatorError(
            f"bound {bound}", f"the critic {type(critic).__name__}", "no critic: a conditional q(y|x) takes its place",
            "Drop critic=.",
        )  # fmt: skip
    if classes is None:
        return
    if not conditional:
        raise EstimatorError(
            f"bound {bound}", f"classes={classes}", f"one of {', '.join(VARIATIONAL_BOUNDS)}", "Drop classes=."
        )
    if classes < 2 or dim_y not in (1, classes):
        raise EstimatorError(
            f"bound {bound}", f"classes={classes} for a y of width {dim_y}", "2 or more, and a y of width 1 or classes",
            "Give y as numbers of classes, or as one-hot rows.",
        )  # fmt: skip


def check_classes(where: str, y: Tensor, classes: int) -> None:
    """Refuse a value of y [B, 1] that is no class, and rows [B, classes] that are no probabilities."""
    if y.shape[1] != 1:
        if bool(((y < 0).any(1) | ~((y.float().sum(1) - 1).abs() < 0.01)).any()):
            raise EstimatorError(
                where, f"rows of {y.shape[1]} numbers that are no probabilities", "one-hot rows",
                "Convert the classes with torch.nn.functional.one_hot, or leave out the number of classes.",
            )  # fmt: skip
        return
    wrong = y[(y != y.round()) | (y < 0) | (y >= classes)]
    if len(wrong):
        raise EstimatorError(
            where, f"the class {wrong[0].item():g}", f"whole numbers from 0 to {classes - 1}", "Number the classes so."
        )
