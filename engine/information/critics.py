"""Critics of several folds, trained together. Each is a Gaussian log ratio plus a network that starts at zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, relu, silu

from engine.allocator import settle
from engine.information.folds import FoldTrainer, Readings, TrainingSettings, batches_of
from engine.information.gaussian import Canonical
from engine.kernels.mi_bounds import bound_value

EMBED = 32
LAYERS = 3
CHECK_STEPS = 50
TRIAL_STEPS = 100
WARM_UP = 20
PATIENCE = 2  # checks without a better one before the learning rate falls
DECAY = 0.3  # factor by which it falls
DECAYS = 3  # times that it falls before training ends
CHECK_ROWS = 1024
READ_ROWS = 4096
# rows that each row is paired with by a critic of pairs: in training, at a check, at the end
TRAINED_PAIRS, CHECKED_PAIRS, READ_PAIRS = 16, 63, 255
CHECKED_PAIR_ROWS = 512
CHUNK_PAIRS = 32
WORTH_PAIRS = 0.01  # nats that a separate critic must have gained before a critic of pairs is tried


@dataclass(frozen=True)
class CriticSettings(TrainingSettings):
    """Settings of the training of critics: `bound` is the one to maximise, `alpha` and `smile_tau` belong to it."""

    bound: str
    alpha: float
    smile_tau: float


class Tower(nn.Module):
    """One network per fold, [folds, B, inputs] -> [folds, B, EMBED]. The weights of all folds are stacked."""

    def __init__(self, folds: int, inputs: int, hidden: int, zero: bool, generator: torch.Generator):
        super().__init__()
        widths = [inputs] + [hidden] * LAYERS + [EMBED]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
            weight = torch.randn(fan_in, fan_out, generator=generator) * math.sqrt(2 / fan_in)
            if layer == LAYERS:
                weight *= 0 if zero else 0.5
            self.weights.append(nn.Parameter(weight.expand(folds, -1, -1).clone()))
            self.biases.append(nn.Parameter(torch.zeros(folds, 1, fan_out)))

    def forward(self, values: Tensor) -> Tensor:
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            values = torch.baddbmm(bias, silu(values) if layer else values, weight)
        return values

    def of_fold(self, fold: int, values: Tensor) -> Tensor:
        """[B, inputs] -> [B, EMBED] of one fold."""
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            values = torch.addmm(bias[fold], silu(values) if layer else values, weight[fold])
        return values


@dataclass
class Inputs:
    """Inputs of the networks: x [folds, N, dx] and y [folds, N, dy], float32."""

    x: Tensor
    y: Tensor


class Base:
    """The scores that critics start from: each fold's Gaussian log ratio of its training rows, or zero without fits."""

    def __init__(
        self,
        name: str,
        samples: int,
        fits: list[tuple[Canonical, Tensor, Tensor]],
        folds: int,
        group: Tensor | None = None,
    ):
        parts = [fit.log_ratio(x, y) for fit, x, y in fits]
        parts = parts or [(torch.zeros(samples, 1), torch.zeros(samples, 1), *torch.zeros(2, samples))] * folds
        rank = max(u.shape[1] for u, *_ in parts)
        self.name, self.group = name, group
        self.u, self.v = (torch.stack([pad(p[i], (0, rank - p[i].shape[1])) for p in parts]) for i in (0, 1))
        self.a, self.b = (torch.stack([p[i] for p in parts]) for i in (2, 3))

    def scores(self, rows: Tensor) -> Tensor:
        """[folds, B, B] of rows [folds, B]: [k, i, j] for x of row i and y of row j."""
        at = torch.arange(len(rows))[:, None]
        offset = self.a[at, rows][:, :, None] + self.b[at, rows][:, None, :]
        return torch.baddbmm(offset, self.u[at, rows], self.v[at, rows].mT)

    def of_fold(self, fold: int, rows: Tensor) -> Tensor:
        """[B, B] of one fold."""
        offset = self.a[fold, rows][:, None] + self.b[fold, rows]
        return torch.addmm(offset, self.u[fold, rows], self.v[fold, rows].T)

    def same(self, rows: Tensor) -> Tensor | None:
        """[..., B, B] of rows [..., B]: pairs of different rows of one group, which are not independent."""
        if self.group is None:
            return None
        group = self.group[rows]
        return (group[..., :, None] == group[..., None, :]) & ~torch.eye(rows.shape[-1], dtype=torch.bool)

    def pairs(self, at: Tensor, rows: Tensor, partner: Tensor) -> Tensor:
        """[folds, B, S] of rows [folds, B] of the folds `at` [folds, 1]: for x of row i and y of row partner[i, s]."""
        u, v = self.u[at, rows], self.v[at, rows]
        return (u[:, :, None] * v[:, partner]).sum(-1) + self.a[at, rows][:, :, None] + self.b[at, rows][:, partner]

    def shares(self, fold: int, rows: Tensor) -> Tensor:
        return infonce_shares(self.of_fold(fold, rows), self.same(rows))


class Separate(nn.Module):
    """Base plus the product of two networks, one of x and one of y. Scores of all pairs of a batch are cheap."""

    name = "separate"
    rate = 1.0  # of Adam, as a multiple of the one that is set

    def __init__(self, base: Base, inputs: Inputs, hidden: int, generator: torch.Generator):
        super().__init__()
        self.base, self.inputs = base, inputs
        folds = len(inputs.x)
        self.tower_x = Tower(folds, inputs.x.shape[2], hidden, False, generator)
        self.tower_y = Tower(folds, inputs.y.shape[2], hidden, True, generator)

    def scores(self, rows: Tensor) -> Tensor:
        at = torch.arange(len(rows))[:, None]
        x, y = self.tower_x(self.inputs.x[at, rows]), self.tower_y(self.inputs.y[at, rows])
        return torch.baddbmm(self.base.scores(rows), x, y.mT)

    def of_fold(self, fold: int, rows: Tensor) -> Tensor:
        """[B, B] of one fold."""
        x = self.tower_x.of_fold(fold, self.inputs.x[fold, rows])
        y = self.tower_y.of_fold(fold, self.inputs.y[fold, rows])
        return torch.addmm(self.base.of_fold(fold, rows), x, y.T)

    def loss(self, rows: Tensor, settings: CriticSettings) -> Tensor:
        """Sum over the folds, so that no fold changes the steps of another."""
        scores, same = self.scores(rows), self.base.same(rows)
        if settings.bound == "infonce":
            scores = scores if same is None else scores.masked_fill(same, -math.inf)
            target = torch.arange(scores.shape[1]).repeat(len(scores))
            by_row = cross_entropy(scores.flatten(0, 1), target)
            by_column = cross_entropy(scores.mT.flatten(0, 1), target)
            return (by_row + by_column) * len(scores) / 2
        return -sum(bound_of(fold, settings)[1] for fold in scores)

    def shares(self, fold: int, rows: Tensor) -> Tensor:
        return infonce_shares(self.of_fold(fold, rows), self.base.same(rows))

    def log_normaliser(self, fold: int, rows: Tensor) -> float:
        return log_mean_product(self.of_fold(fold, rows), self.base.same(rows))

    def read(
        self, fold: int, rows: Tensor, normaliser: float, settings: CriticSettings
    ) -> tuple[Tensor, dict[str, float]]:
        """Shares of InfoNCE [B], and the mean of each reading on these rows, nats."""
        scores, same = self.of_fold(fold, rows), self.base.same(rows)
        shares = infonce_shares(scores, same)
        joint = scores.diagonal().mean().item()
        readings = {"infonce": shares.mean().item(), "ldr": joint, "dv": joint - log_mean_product(scores, same)}
        if settings.bound not in readings:
            readings[settings.bound] = bound_of(scores - normaliser, settings)[0].item()
        return shares, readings


class Concatenated(nn.Module):
    """Base plus one network of x and y together. It can learn sharp edges, but it scores only some pairs of a batch.

    Each row is paired with itself and with the rows that follow it at some distances. The last rows are followed by the
    first ones.
    """

    name = "concatenated"
    rate = 2.5

    def __init__(self, base: Base, inputs: Inputs, hidden: int, generator: torch.Generator):
        super().__init__()
        self.base, self.inputs, self.generator = base, inputs, generator
        folds, dx, dy = len(inputs.x), inputs.x.shape[2], inputs.y.shape[2]

        def weight(fan_in: int, fan_out: int, scale: float) -> nn.Parameter:
            drawn = torch.randn(fan_in, fan_out, generator=generator) * scale
            return nn.Parameter(drawn.expand(folds, -1, -1).clone())

        self.first_x, self.first_y = (weight(d, hidden, math.sqrt(2 / (dx + dy))) for d in (dx, dy))
        self.second, self.last = weight(hidden, hidden, math.sqrt(2 / hidden)), weight(hidden, 1, 0.0)
        self.first_bias, self.second_bias = (nn.Parameter(torch.zeros(folds, 1, hidden)) for _ in range(2))

    def pairs(self, rows: Tensor, distances: Tensor, fold: int | None = None) -> Tensor:
        """[folds, B, S] of rows [folds, B] (of one fold: rows [1, B]), for S distances."""
        count = rows.shape[1]
        partner = (torch.arange(count)[:, None] + distances) % count
        own = slice(None) if fold is None else slice(fold, fold + 1)
        at = torch.arange(len(self.inputs.x))[own, None]
        x = torch.baddbmm(self.first_bias[own], self.inputs.x[at, rows], self.first_x[own])
        y = self.inputs.y[at, rows] @ self.first_y[own]
        values = relu(x[:, :, None] + y[:, partner]).flatten(1, 2)
        values = relu(torch.baddbmm(self.second_bias[own], values, self.second[own]))
        scores = (values @ self.last[own]).view(len(rows), count, -1) + self.base.pairs(at, rows, partner)
        if self.base.group is None:
            return scores
        group = self.base.group[rows]
        same = (group[:, :, None] == group[:, partner]) & (distances > 0)
        return scores.masked_fill(same, -math.inf)

    def loss(self, rows: Tensor, settings: CriticSettings) -> Tensor:
        """Sum over the folds."""
        rows = rows[:, : max(2, rows.shape[1] // 2)]
        distances = self._distances(rows.shape[1], TRAINED_PAIRS)
        scores = self.pairs(rows, distances)
        return -sum(pair_shares(fold, distances).mean() for fold in scores)

    def shares(self, fold: int, rows: Tensor) -> Tensor:
        rows = rows[:CHECKED_PAIR_ROWS]
        distances = self._distances(len(rows), CHECKED_PAIRS, even=True)
        return pair_shares(self.pairs(rows[None], distances, fold)[0], distances)

    def log_normaliser(self, fold: int, rows: Tensor) -> float:
        return 0.0  # for bounds that this critic is not trained by

    def read(
        self, fold: int, rows: Tensor, normaliser: float, settings: CriticSettings
    ) -> tuple[Tensor, dict[str, float]]:
        """Shares of InfoNCE [B], and the mean of each reading on these rows, nats."""
        distances = self._distances(len(rows), READ_PAIRS, even=True)
        scores = torch.cat([self.pairs(rows[None], part, fold)[0] for part in distances.split(CHUNK_PAIRS)], 1)
        shares, joint = pair_shares(scores, distances), scores[:, 0].mean().item()
        others = scores[:, 1:].logsumexp((0, 1)).item() - math.log(int((scores[:, 1:] != -math.inf).sum()))
        return shares, {"infonce": shares.mean().item(), "ldr": joint, "dv": joint - others}

    def _distances(self, count: int, pairs: int, even: bool = False) -> Tensor:
        """0 and up to `pairs` distances: random ones for training, evenly spaced ones for readings."""
        pairs = min(pairs, count - 1)
        if even:
            return torch.linspace(0, count - 1, pairs + 1).long()
        drawn = torch.randperm(count - 1, generator=self.generator)[:pairs] + 1
        return torch.cat([torch.zeros(1, dtype=torch.long), drawn])


Critics = Separate | Concatenated


class CriticTraining:
    """The folds of the rows, and how critics are trained on them.

    Args:
        fold: [N] integers from 0: the fold in which each row is held out.
    """

    def __init__(self, fold: Tensor, settings: CriticSettings, generator: torch.Generator):
        self.settings, self.generator = settings, generator
        settle()
        self.folds = int(fold.max()) + 1
        order = torch.randperm(len(fold), generator=generator)
        self.held_out = [order[fold[order] == f] for f in range(self.folds)]
        self.training = [order[fold[order] != f] for f in range(self.folds)]
        self.batch_size = max(2, min(settings.batch_size, min(map(len, self.training)) // 4))
        rows = min(CHECK_ROWS, min(map(len, self.held_out)))
        self.checked_held_out = torch.stack([part[:rows] for part in self.held_out])
        self.checked_training = torch.stack([part[:rows] for part in self.training])

    @torch.no_grad()
    def readings(self, critics: Critics | Base) -> Readings:
        """InfoNCE of each fold on training and on held-out rows."""
        training, held_out = (
            torch.stack([critics.shares(f, rows).mean() for f, rows in enumerate(part)])
            for part in (self.checked_training, self.checked_held_out)
        )
        return training, held_out

    def train(self, base: Base, candidates: list[tuple[type[Critics], Inputs]]) -> tuple[Critics, FoldTrainer]:
        """Try each candidate for a while, then train on with the best one until it no longer improves."""
        tried: list[tuple[Critics, FoldTrainer]] = []
        for kind, inputs in candidates:
            gain = max((trainer.gain() for _, trainer in tried), default=0.0)
            if kind is Concatenated and gain < WORTH_PAIRS:
                continue
            critics = kind(base, inputs, self.settings.hidden, self.generator)
            trainer = self._trainer(critics)
            trainer.train(min(TRIAL_STEPS, self.settings.steps))
            tried.append((critics, trainer))
        critics, trainer = max(tried, key=lambda pair: pair[1].gain())
        waited, decays = 0, 0
        while trainer.checks[-1].step < self.settings.steps and decays < DECAYS:
            before = trainer.best()
            trainer.train(min(CHECK_STEPS, self.settings.steps - trainer.checks[-1].step))
            waited = 0 if trainer.best() != before else waited + 1
            if waited == PATIENCE or trainer.best() == 0:
                trainer.load([trainer.best()] * self.folds)
                trainer.rate.decay()
                waited, decays = 0, decays + 1
        return critics, trainer

    def _trainer(self, critics: Critics) -> FoldTrainer:
        return FoldTrainer(
            list(critics.parameters()),
            loss=lambda rows: critics.loss(rows, self.settings),
            read=lambda weights: self.readings(critics),
            batches=batches_of(self.training, self.batch_size, self.generator),
            rate=PlateauRate(self.settings.lr * critics.rate),
            every=CHECK_STEPS,
            weight_decay=0.01,
            most_gradient=10.0 * self.folds,
        )


class PlateauRate:
    """A learning rate that rises in the first steps, and falls each time that held-out rows gain nothing."""

    def __init__(self, lr: float):
        self.lr = lr

    def __call__(self, step: int) -> float:
        return self.lr * step / WARM_UP if step <= WARM_UP else self.lr

    def decay(self) -> None:
        self.lr *= DECAY


def bound_of(scores: Tensor, settings: CriticSettings) -> tuple[Tensor, Tensor]:
    """Value and surrogate of a bound, for scores [B, B] that tend to the log ratio (NWJ's optimum lies 1 above)."""
    shift = 1.0 if settings.bound == "nwj" else 0.0
    return bound_value(scores.T + shift, settings.bound, alpha=settings.alpha, smile_tau=settings.smile_tau)


def infonce_shares(scores: Tensor, same: Tensor | None = None) -> Tensor:
    """[..., B, B] -> [..., B]: what each row adds to InfoNCE, the mean of asking for its y and for its x, nats.

    Args:
        same: [..., B, B] bool, pairs that are left out, as they are of one group.
    """
    diagonal = scores.diagonal(dim1=-2, dim2=-1)
    if same is not None:
        scores = scores.masked_fill(same, -math.inf)
        compared = (~same).sum(-1).log()
        return diagonal - 0.5 * (scores.logsumexp(-1) + scores.logsumexp(-2)) + compared
    return diagonal - 0.5 * (scores.logsumexp(-1) + scores.logsumexp(-2)) + math.log(scores.shape[-1])


def pair_shares(scores: Tensor, distances: Tensor) -> Tensor:
    """The same from scores [B, S] of each row with the rows at S distances, of which the first is 0."""
    at = torch.arange(len(scores))[:, None]
    by_column = scores[(at - distances) % len(scores), torch.arange(len(distances))]
    lse = 0.5 * (scores.logsumexp(1) + by_column.logsumexp(1))
    left_out = scores == -math.inf  # pairs of one group
    if left_out.any():
        counts = [(~side).sum(1).log() for side in (left_out, by_column == -math.inf)]
        return scores[:, 0] - lse + 0.5 * (counts[0] + counts[1])
    return scores[:, 0] - lse + math.log(len(distances))


def log_mean_product(scores: Tensor, same: Tensor | None = None) -> float:
    """log of the mean of e^score over pairs of different rows; what DV subtracts, nats.

    Args:
        same: pairs of one group, which are left out.
    """
    own = torch.eye(len(scores), dtype=torch.bool)
    left_out = own if same is None else own | same
    off = scores.masked_fill(left_out, -math.inf)
    return (off.logsumexp((0, 1)) - math.log(int((~left_out).sum()))).item()


def blocks(rows: Tensor) -> list[Tensor]:
    """Rows in equal parts of at most READ_ROWS."""
    return list(rows.tensor_split(-(-len(rows) // READ_ROWS)))
