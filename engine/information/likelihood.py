"""Held-out densities of a target given a condition: Gaussian regressions first, then networks that start from these.

Every row is read by models that have not seen it. Which regression, and which step of the networks, is used for a fold
is chosen on the other folds. Targets may be categories: their probabilities start from given ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

RIDGES = (1e-6, 1e-2, 1e-1)
MORE_RIDGES = (1.0, 10.0, 100.0)  # for as many columns as a tenth of the rows, and more
WIDE = 1200  # designs of more columns (and rows) are left out, but for the narrowest
SHRINKAGES = (0.0, 0.1)
CHECKS = 24  # of the held-out rows
LEAST_BETWEEN = 10  # steps from one check to the next
PATIENCE = 8
AVERAGE = 0.99
READ_ROWS = 2048
TRAINING_ROWS = 1500
OUTLIER_SHARE, OUTLIER_SD = 0.002, 4.0
LEAST_TAIL = 1e-9
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Settings:
    """Of the networks' training: the largest number of steps, rows a step, rate of Adam, width of the hidden layers."""

    steps: int
    batch_size: int
    lr: float
    hidden: int


@dataclass
class Density:
    """What was learnt of log p(target | condition), less a reference; nats.

    Attributes:
        regression: [N] float64, from the regression alone, on rows it has not seen.
        chosen: [N] float64, from the chosen model (the regression, or the network of one step), on unseen rows.
        training: mean of the chosen models on rows that they were trained on.
        degrees: degrees of freedom of the regression for each column of the target, mean over folds.
        spread: standard deviation of the regression's residual in the column where it is least, given those before.
        residual: [folds, N, ...] float64, for the model of each fold what the condition leaves unexplained: columns
            that are independent N(0, 1) whatever the condition, one for one with the target given the condition; or the
            categories with their probabilities, as in a target.
        steps: after which the networks were checked; 0 is the regression.
        curve, training_curve: mean at each check on unseen and on training rows.
        picks: the chosen check of each fold.
    """

    regression: Tensor
    chosen: Tensor
    training: float
    degrees: float
    spread: float
    residual: Tensor
    steps: list[int]
    curve: Tensor
    training_curve: Tensor
    picks: list[int]

    @property
    def overfit(self) -> float:
        """How much better training rows are predicted than unseen ones."""
        return max(0.0, self.training - self.chosen.mean().item())


def fit(
    target: Tensor,
    designs: list[Tensor],
    fold: Tensor,
    settings: Settings,
    generator: torch.Generator,
    *,
    categories: bool = False,
    reference: Tensor | None = None,
) -> Density:
    """Learn the density of a target given a condition, for each fold from the rows of the others.

    Args:
        target: [folds, N, d] float64 of about unit variance, as each fold sees it; or, with categories, their number
            followed by the log probabilities that are known already, [folds, N, 1 + categories].
        designs: columns to predict from, standardised, [folds, N, p] float64 each. The regression takes the one that
            predicts best; the networks see the first.
        fold: [N] integers from 0, the fold in which a row is held out.
        reference: [folds, N], subtracted from all log densities.
    """
    folds = range(len(target))
    held_out = [(fold == f).nonzero()[:, 0] for f in folds]
    training = [(fold != f).nonzero()[:, 0] for f in folds]
    if categories:
        regressions = [_known_probabilities(target[f]) for f in folds]
    else:
        regressions = _regressions(target, designs, training, held_out)
    if reference is None:
        reference = torch.zeros(target.shape[:2], dtype=torch.float64)
    # the networks see whitened residuals; this turns their log densities into those of the target
    shift = torch.stack([-regressions[f].log_volume - reference[f] for f in folds])

    start = torch.stack([r.residual for r in regressions])
    inputs = designs[0].float()
    kind = _Classes if categories else _Mixtures
    outputs = target.shape[2] - 1 if categories else target.shape[2]
    model = kind(len(target), outputs, inputs.shape[2], settings.hidden, generator)
    first = torch.stack([regressions[f].log_density - reference[f] for f in folds])
    run = _train(model, start.float(), inputs, training, held_out, first, shift, settings, generator)

    curves = torch.stack([torch.stack([values.mean() for values in check]) for check in run.held_out])
    picks = [_best_of_others(curves, f) for f in folds]
    regression, chosen = torch.empty(len(fold), dtype=torch.float64), torch.empty(len(fold), dtype=torch.float64)
    for f, rows in enumerate(held_out):
        regression[rows] = first[f, rows]
        chosen[rows] = run.held_out[picks[f]][f]
    training_curves = torch.stack(run.training)
    return Density(
        regression=regression,
        chosen=chosen,
        training=sum(training_curves[pick, f].item() for f, pick in enumerate(picks)) / len(folds),
        degrees=sum(r.degrees for r in regressions) / len(folds),
        spread=sum(r.spread for r in regressions) / len(folds),
        residual=_residual(model, start, inputs, run.parameters, picks),
        steps=run.steps,
        curve=curves.mean(1),
        training_curve=training_curves.mean(1),
        picks=picks,
    )


def _best_of_others(curve: Tensor, fold: int) -> int:
    """The candidate [candidates, folds] that is best on the mean of the other folds."""
    return int((curve.sum(1) - curve[:, fold]).argmax())


@torch.no_grad()
def _residual(
    model: _Mixtures | _Classes, start: Tensor, inputs: Tensor, parameters: list[list[Tensor]], picks: list[int]
) -> Tensor:
    """Residuals [folds, N, ...] under each fold's chosen parameters; those of the regression are given."""
    if not any(picks):
        return start
    # the parameters of check 0 are not kept; any others stand in, and what they give is not used
    chosen = [torch.stack([parameters[max(pick, 1) - 1][p][f] for f, pick in enumerate(picks)])
              for p in range(len(model.parameters))]  # fmt: skip
    parts = zip(start.split(READ_ROWS, 1), inputs.split(READ_ROWS, 1), strict=True)
    residual = torch.cat([model.residual(e, c, chosen) for e, c in parts], 1)
    for f, pick in enumerate(picks):
        if pick == 0:
            residual[f] = start[f]
    return residual


# -- Gaussian regressions ---------------------------------------------------------------------------------------------


@dataclass
class _Regression:
    """target = linear map of the design + N(0, L Lᵀ): residual is L⁻¹ (target − mean), [N, d]; log_volume log |L|."""

    residual: Tensor
    log_density: Tensor
    log_volume: Tensor
    degrees: float
    spread: float


def _known_probabilities(target: Tensor) -> _Regression:
    log_density = target[:, 1:].gather(1, target[:, :1].long())[:, 0]
    return _Regression(target, log_density, torch.zeros((), dtype=torch.float64), 0.0, 1.0)


def _regressions(
    target: Tensor, designs: list[Tensor], training: list[Tensor], held_out: list[Tensor]
) -> list[_Regression]:
    """For each fold the ridge regression whose kind (design, ridge, shrinkage) is best on the other folds."""
    candidates: dict[tuple[int, float, float], dict[int, _Regression]] = {}
    sizes = [min(design.shape[1:]) for design in designs]
    designs = [design for design, size in zip(designs, sizes, strict=True) if size <= max(WIDE, min(sizes))]
    for d, design in enumerate([designs[0][..., :0], *designs]):  # without any column first: the mean
        for f, rows in enumerate(training):
            for kind, regression in _ridge_regressions(target[f], design[f], rows):
                candidates.setdefault((d, *kind), {})[f] = regression
    complete = [by_fold for by_fold in candidates.values() if len(by_fold) == len(training)]
    score = torch.tensor([[r[f].log_density[held_out[f]].mean() for f in range(len(training))] for r in complete])
    return [complete[_best_of_others(score, f)][f] for f in range(len(training))]


def _ridge_regressions(
    target: Tensor, design: Tensor, rows: Tensor
) -> Iterator[tuple[tuple[float, float], _Regression]]:
    """Yield ((ridge, shrinkage), regression) fitted on `rows`; those that would use up all degrees are passed over."""
    count, dims, columns = len(rows), target.shape[1], design.shape[1]
    mean = target[rows].mean(0)
    center = design[rows].mean(0)
    fitted, centred = design[rows] - center, target - mean
    if columns > count:
        value, left = torch.linalg.eigh(fitted @ fitted.T / count)
        kept = value > 1e-10
        value = value[kept]
        axes = fitted.T @ left[:, kept] / (count * value).sqrt()
    else:
        value, axes = torch.linalg.eigh(fitted.T @ fitted / count)
        value = value.clamp_min(0)
    scores = (design - center) @ axes
    covariance = scores[rows].T @ centred[rows] / count
    identity = torch.eye(dims, dtype=target.dtype)
    for ridge in RIDGES if 10 * columns < count else RIDGES + MORE_RIDGES:
        degrees = (value / (value + ridge)).sum().item()
        if degrees > 0.9 * (count - 2):
            continue
        error = centred - scores @ (covariance / (value + ridge)[:, None])
        spread = error[rows].T @ error[rows] / (count - 1 - degrees)
        for shrinkage in SHRINKAGES if dims > 1 else (0.0,):
            shrunk = (1 - shrinkage) * spread + shrinkage * spread.diag().diag() + 1e-10 * identity
            if dims >= 0.9 * (count - 1 - degrees) and not shrinkage:
                continue  # singular, or nearly so
            factor = torch.linalg.cholesky(shrunk)
            residual = torch.linalg.solve_triangular(factor, error.T, upper=False).T
            volume = factor.diagonal().log().sum()
            log_density = -0.5 * residual.square().sum(1) - dims * HALF_LOG_2PI - volume
            yield (
                (ridge, shrinkage),
                _Regression(residual, log_density, volume, degrees, factor.diagonal().min().item()),
            )


# -- networks ---------------------------------------------------------------------------------------------------------


def _uniform(shape: tuple[int, ...], inputs: int, generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=generator) * 2 - 1) * math.sqrt(3 / max(inputs, 1))


class _Classes:
    """A batch of M networks, each changing probabilities of categories by a condition c [p]; at the start not at all.

    e [1 + categories] is a category's number and the log probabilities to start from.
    """

    def __init__(self, networks: int, categories: int, inputs: int, hidden: int, generator: torch.Generator):
        self.parameters = [
            _uniform((networks, inputs, hidden), inputs, generator),
            torch.zeros(networks, 1, hidden),
            _uniform((networks, hidden, hidden), hidden, generator),
            torch.zeros(networks, 1, hidden),
            torch.zeros(networks, hidden, categories),
            torch.zeros(networks, inputs, categories),
            torch.zeros(networks, 1, categories),
        ]
        for parameter in self.parameters:
            parameter.requires_grad_()

    def log_density(self, e: Tensor, c: Tensor, parameters: list[Tensor] | None = None) -> Tensor:
        """[M, B, 1 + categories] and [M, B, p] -> [M, B] nats."""
        return self._log_probabilities(e, c, parameters or self.parameters).gather(2, e[..., :1].long())[..., 0]

    def residual(self, e: Tensor, c: Tensor, parameters: list[Tensor]) -> Tensor:
        """e with the new probabilities."""
        return torch.cat([e[..., :1], self._log_probabilities(e.float(), c, parameters).double()], 2)

    def _log_probabilities(self, e: Tensor, c: Tensor, parameters: list[Tensor]) -> Tensor:
        first, bias, second, second_bias, last, linear, last_bias = parameters
        hidden = silu(torch.baddbmm(second_bias, silu(torch.baddbmm(bias, c, first)), second))
        change = torch.baddbmm(torch.baddbmm(last_bias, c, linear), hidden, last)
        return (e[..., 1:] + change).log_softmax(2)


class _Mixtures:
    """A batch of M networks, each giving a density of e [d] given a condition c [p]: column after column, given those
    before it, a mixture of normal densities. At the start nearly N(0, 1), whatever the condition.

    Hidden units and outputs are masked so that column i depends on e only through columns before i.
    """

    def __init__(self, networks: int, dims: int, inputs: int, hidden: int, generator: torch.Generator):
        self.dims = dims
        self.components = 8 if dims == 1 else 5 if dims <= 3 else 3 if dims <= 20 else 2
        outputs = dims * 3 * self.components
        start = torch.zeros(3, self.components)  # logits of the weights, means, logs of the standard deviations
        start[0, 1:], start[1, 1:], start[2, 1:] = -3.5, torch.linspace(-1.5, 1.5, self.components - 1), -0.5
        self.parameters = [
            _uniform((networks, dims, hidden), dims + inputs, generator),
            _uniform((networks, inputs, hidden), dims + inputs, generator),
            torch.zeros(networks, 1, hidden),
            _uniform((networks, hidden, hidden), hidden, generator),
            torch.zeros(networks, 1, hidden),
            torch.zeros(networks, hidden, outputs),
            start.flatten().repeat(dims).expand(networks, 1, outputs).clone(),
        ]
        for parameter in self.parameters:
            parameter.requires_grad_()
        sees = torch.arange(hidden) % dims  # a hidden unit sees so many columns of e
        column = torch.arange(dims)
        self.first = (column[:, None] < sees).float()
        self.second = (sees[:, None] <= sees).float()
        self.last = (sees[:, None] <= column).float().repeat_interleave(3 * self.components, 1)

    def log_density(self, e: Tensor, c: Tensor, parameters: list[Tensor] | None = None) -> Tensor:
        """[M, B, d] and [M, B, p] -> [M, B] nats."""
        log_weight, mean, log_sd = self._mixture(e, c, parameters or self.parameters)
        distance = (e[..., None] - mean) * (-log_sd).exp()
        log_mixture = (log_weight - log_sd - 0.5 * distance.square()).logsumexp(3)
        log_outlier = -0.5 * (e / OUTLIER_SD).square() - math.log(OUTLIER_SD)
        log_mixture = torch.logaddexp(log_mixture + math.log1p(-OUTLIER_SHARE), log_outlier + math.log(OUTLIER_SHARE))
        return (log_mixture - HALF_LOG_2PI).sum(2)

    def residual(self, e: Tensor, c: Tensor, parameters: list[Tensor]) -> Tensor:
        """Normal scores of each column under its own density: independent N(0, 1) where the density is right."""
        log_weight, mean, log_sd = (part.double() for part in self._mixture(e.float(), c, parameters))
        below = (log_weight.exp() * torch.special.ndtr((e[..., None] - mean) * (-log_sd).exp())).sum(3)
        below = (1 - OUTLIER_SHARE) * below + OUTLIER_SHARE * torch.special.ndtr(e / OUTLIER_SD)
        return torch.special.ndtri(below.clamp(LEAST_TAIL, 1 - LEAST_TAIL))

    def _mixture(self, e: Tensor, c: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logs of the weights, means and logs of the standard deviations, [M, B, d, components] each."""
        of_e, of_c, bias, second, second_bias, last, last_bias = parameters
        if self.dims > 1:
            second, last = second * self.second, last * self.last
        hidden = torch.baddbmm(bias, c, of_c)
        if self.dims > 1:
            hidden = torch.baddbmm(hidden, e, of_e * self.first)
        hidden = silu(torch.baddbmm(second_bias, silu(hidden), second))
        out = torch.baddbmm(last_bias, hidden, last).unflatten(2, (self.dims, 3, self.components))
        log_weight, mean, log_sd = out.unbind(3)
        return log_weight.log_softmax(3), mean, log_sd.clamp(-7, 3)


@dataclass
class _Run:
    """Of each check: held-out log densities of every network, their means over training rows [M], averaged parameters.

    The first check, before any step, has no parameters.
    """

    held_out: list[list[Tensor]]
    training: list[Tensor]
    parameters: list[list[Tensor]]
    steps: list[int]


def _train(
    model: _Mixtures | _Classes,
    residuals: Tensor,
    inputs: Tensor,
    training: list[Tensor],
    held_out: list[Tensor],
    first: Tensor,
    shift: Tensor,
    settings: Settings,
    generator: torch.Generator,
) -> _Run:
    """Train M networks at once, on residuals [M, N, d] given inputs [M, N, p], each on its own rows.

    `first` [M, N] are the log densities before any step, `shift` [M, N] is added to those of the networks.
    """
    optimizer = torch.optim.AdamW(model.parameters, lr=settings.lr, weight_decay=1e-4, foreach=True)
    average = [parameter.detach().clone() for parameter in model.parameters]
    network = torch.arange(len(residuals))[:, None]
    rows = min(len(part) for part in training)
    size = min(settings.batch_size, rows)

    def shuffled() -> Tensor:
        return torch.stack([part[torch.randperm(len(part), generator=generator)[:rows]] for part in training])

    @torch.no_grad()
    def read(index: Tensor) -> Tensor:
        parts = [
            model.log_density(residuals[network, i], inputs[network, i], average) for i in index.split(READ_ROWS, 1)
        ]
        return torch.cat(parts, 1).double() + shift[network, index]

    longest = max(len(part) for part in held_out)
    padded = torch.stack([torch.cat([part, part[:1].expand(longest - len(part))]) for part in held_out])
    known = shuffled()[:, :TRAINING_ROWS]
    run = _Run([[first[m, part] for m, part in enumerate(held_out)]], [first[network, known].mean(1)], [], [0])
    best, waited = torch.stack([part.mean() for part in run.held_out[0]]), 0
    order, position = shuffled(), 0
    for step in range(1, settings.steps + 1):
        if position + size > rows:
            order, position = shuffled(), 0
        batch = order[:, position : position + size]
        position += size
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * step / (settings.steps + 1))) * min(1, step / 20)
        loss = -model.log_density(residuals[network, batch], inputs[network, batch]).mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in model.parameters], max(1 - AVERAGE, 1 / (step + 1)))
        if step % max(LEAST_BETWEEN, settings.steps // CHECKS) and step != settings.steps:
            continue
        values = read(padded)
        run.held_out.append([values[m, : len(part)] for m, part in enumerate(held_out)])
        run.training.append(read(known).mean(1))
        run.parameters.append([parameter.clone() for parameter in average])
        run.steps.append(step)
        score = torch.stack([part.mean() for part in run.held_out[-1]])
        waited = 0 if (score > best + 1e-4).any() else waited + 1
        best = torch.maximum(best, score)
        if waited == PATIENCE:
            break
    return run
