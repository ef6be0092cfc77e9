"""Held-out densities of a target given a condition: Gaussian regressions, and networks that start from them.

Every row is read by models that have not seen it. The other folds choose the regression of a fold, and the checkpoint
of its network. A target may be categories, whose probabilities start from given ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from engine.information.folds import FoldTrainer, Readings, TrainingSettings, batches_of, best_on_others

RIDGES = (1e-6, 1e-2, 1e-1)
MORE_RIDGES = (1.0, 10.0, 100.0)  # are tried, too, if there is a column for every ten rows or fewer
WIDE = 1200  # designs with more columns are left out; the narrowest one is always kept
SHRINKAGES = (0.0, 0.1)
CHECKS = 24  # how often the held-out rows are read during training
LEAST_BETWEEN = 10  # at least so many steps lie between two checks
PATIENCE = 8
AVERAGE = 0.99
READ_ROWS = 2048
TRAINING_ROWS = 1500
OUTLIER_SHARE, OUTLIER_SD = 0.002, 4.0
LEAST_TAIL = 1e-9
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass
class Density:
    """log p(target | condition) as it was learnt, minus a reference; nats.

    Attributes:
        regression: [N] float64, from the regression alone, on rows it has not seen.
        chosen: [N] float64, from the chosen model (the regression, or the network of one step), on unseen rows.
        training: mean of the chosen models on rows that they were trained on.
        degrees: degrees of freedom of the regression for each column of the target, mean over folds.
        spread: standard deviation of the regression's residual in the column where it is least, given those before.
        residual: [folds, N, ...] float64, what the condition leaves unexplained in the model of each fold. Columns are
            independent N(0, 1) for every condition; given the condition, they and the target determine each other. Or
            the categories with their probabilities, as in a target.
        history: one record per check of the networks, as in `Estimate.history`; the first is the regression.
        picks: the chosen check of each fold.
    """

    regression: Tensor
    chosen: Tensor
    training: float
    degrees: float
    spread: float
    residual: Tensor
    history: list[dict[str, float]]
    picks: list[int]

    @property
    def overfit(self) -> float:
        """How much better training rows are predicted than unseen ones."""
        return max(0.0, self.training - self.chosen.mean().item())


def fit(
    target: Tensor,
    designs: list[Tensor],
    fold: Tensor,
    settings: TrainingSettings,
    generator: torch.Generator,
    *,
    categories: bool = False,
    reference: Tensor | None = None,
) -> Density:
    """Learn the density of a target given a condition, for each fold from the rows of the others.

    Args:
        target: [folds, N, d] float64 of about unit variance, as each fold sees it. With categories: their number
            followed by the log probabilities that are already known, [folds, N, 1 + categories].
        designs: standardised columns to predict from, [folds, N, p] float64 each. The regression uses the design that
            predicts best; the networks use the first.
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
    # The networks see whitened residuals. The shift turns their log densities into those of the target.
    shift = torch.stack([-regressions[f].log_volume - reference[f] for f in folds])

    start = torch.stack([r.residual for r in regressions])
    first = torch.stack([regressions[f].log_density - reference[f] for f in folds])
    kind, outputs = (_Classes, target.shape[2] - 1) if categories else (_Mixtures, target.shape[2])
    network = kind(len(target), outputs, designs[0].shape[2], settings.hidden, generator)
    networks = _Networks(network, start, designs[0].float(), shift)
    trainer = _train(networks, training, held_out, first, settings, generator)

    picks = best_on_others(trainer.held_out)
    weights = trainer.chosen(picks)
    regression, chosen = torch.empty(len(fold), dtype=torch.float64), torch.empty(len(fold), dtype=torch.float64)
    read = networks.log_density(_padded(held_out), weights)
    for f, rows in enumerate(held_out):
        regression[rows] = first[f, rows]
        chosen[rows] = read[f, : len(rows)] if picks[f] else first[f, rows]
    return Density(
        regression=regression,
        chosen=chosen,
        training=sum(trainer.checks[pick].training[f].item() for f, pick in enumerate(picks)) / len(folds),
        degrees=sum(r.degrees for r in regressions) / len(folds),
        spread=sum(r.spread for r in regressions) / len(folds),
        residual=networks.residual(weights, picks),
        history=trainer.history(),
        picks=picks,
    )


class _Networks:
    """The networks of all folds with what they see.

    Args:
        start: [folds, N, ...] float64, residuals of the regressions, from which the networks start.
        inputs: [folds, N, p] float32, the condition.
        shift: [folds, N], added to the networks' log densities.
    """

    def __init__(self, network: _Mixtures | _Classes, start: Tensor, inputs: Tensor, shift: Tensor):
        self.network, self.start, self.inputs, self.shift = network, start, inputs, shift
        self.residuals = start.float()
        self.fold = torch.arange(len(start))[:, None]

    def loss(self, rows: Tensor) -> Tensor:
        """Of rows [folds, B]."""
        return -self.network.log_density(self.residuals[self.fold, rows], self.inputs[self.fold, rows]).mean(1).sum()

    @torch.no_grad()
    def log_density(self, rows: Tensor, weights: list[Tensor]) -> Tensor:
        """[folds, B] float64 of rows [folds, B]."""
        parts = [
            self.network.log_density(self.residuals[self.fold, r], self.inputs[self.fold, r], weights)
            for r in rows.split(READ_ROWS, 1)
        ]
        return torch.cat(parts, 1).double() + self.shift[self.fold, rows]

    @torch.no_grad()
    def residual(self, weights: list[Tensor], picks: list[int]) -> Tensor:
        """What the condition leaves unexplained, [folds, N, ...]. A fold that picks check 0 takes its regression's."""
        if not any(picks):
            return self.start
        parts = zip(self.start.split(READ_ROWS, 1), self.inputs.split(READ_ROWS, 1), strict=True)
        residual = torch.cat([self.network.residual(e, c, weights) for e, c in parts], 1)
        for f, pick in enumerate(picks):
            if pick == 0:
                residual[f] = self.start[f]
        return residual


def _train(
    networks: _Networks,
    training: list[Tensor],
    held_out: list[Tensor],
    first: Tensor,
    settings: TrainingSettings,
    generator: torch.Generator,
) -> FoldTrainer:
    """Train the networks until no fold gains any more on held-out rows.

    Args:
        first: [folds, N] log densities of the regressions, which are the readings before any step.
    """
    rows, every = min(map(len, training)), max(LEAST_BETWEEN, settings.steps // CHECKS)
    order = [part[torch.randperm(len(part), generator=generator)[:rows]] for part in training]
    known, padded = torch.stack(order)[:, :TRAINING_ROWS], _padded(held_out)

    def read(weights: list[Tensor]) -> Readings:
        values = networks.log_density(padded, weights)
        unseen = torch.stack([values[f, : len(part)].mean() for f, part in enumerate(held_out)])
        return networks.log_density(known, weights).mean(1), unseen

    def rate(step: int) -> float:
        return settings.lr * 0.5 * (1 + math.cos(math.pi * step / (settings.steps + 1))) * min(1, step / 20)

    trainer = FoldTrainer(
        networks.network.parameters,
        networks.loss,
        read,
        batches_of(training, min(settings.batch_size, rows), generator),
        rate,
        every,
        weight_decay=1e-4,
        average=AVERAGE,
        before=(first[networks.fold, known].mean(1), torch.stack([first[f, p].mean() for f, p in enumerate(held_out)])),
    )
    best, waited = trainer.checks[0].held_out, 0
    while trainer.checks[-1].step < settings.steps and waited < PATIENCE:
        trainer.train(min(every, settings.steps - trainer.checks[-1].step))
        score = trainer.checks[-1].held_out
        waited = 0 if (score > best + 1e-4).any() else waited + 1
        best = torch.maximum(best, score)
    return trainer


def _padded(parts: list[Tensor]) -> Tensor:
    """Rows of parts of several lengths as one tensor; shorter parts repeat their first row."""
    longest = max(map(len, parts))
    return torch.stack([torch.cat([part, part[:1].expand(longest - len(part))]) for part in parts])


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
    return [complete[pick][f] for f, pick in enumerate(best_on_others(score))]


def _ridge_regressions(
    target: Tensor, design: Tensor, rows: Tensor
) -> Iterator[tuple[tuple[float, float], _Regression]]:
    """Yield ((ridge, shrinkage), regression) fitted on `rows`, but none that would use up the degrees of freedom."""
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
    """M networks, each of which changes the probabilities of categories by a condition c [p]. At the start none does.

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
    """M networks, each of which gives a density of e [d] given a condition c [p].

    The density of each column given the columns before it is a mixture of normal densities. At the start it is nearly
    N(0, 1) for every condition. Hidden units and outputs are masked so that column i depends on e only through the
    columns before i.
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
        sees = torch.arange(hidden) % dims  # how many columns of e each hidden unit sees
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
