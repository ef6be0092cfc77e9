"""Conditional mutual information between arrays of samples, from held-out conditional densities."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.information.alone import alone
from engine.information.columns import (
    FEW_VALUES,
    column_flags,
    copies,
    indicators,
    normal_scores,
    robust,
)
from engine.information.estimate import SIGMAS, Estimate, value_flags
from engine.information.folds import TrainingSettings
from engine.information.inputs import (
    FEW_GROUPS,
    LEAST_PER_CATEGORY,
    Arguments,
    Discrete,
    Side,
    generator_of,
    read_inputs,
    varying_columns,
)
from engine.information.likelihood import HALF_LOG_2PI, Density, fit
from engine.kernels.arguments import check_count, check_number

WHERE = "estimate_cmi"
MANY_SAMPLES = 3000  # with so many samples or more, three folds are used instead of five
MANY_CATEGORIES = 50  # with more joint values than this, columns are not predicted as categories
SMALL = 0.15  # nats; smaller values are compared with a null
ERROR_SHARE = 0.75  # on problems of known information, this share of a network's optimism is error on unseen rows
LARGEST_ERROR = 0.1
_NAMES = ("dv", "ldr", "nwj")


@alone
def estimate_cmi(
    x: Any,
    y: Any,
    z: Any,
    *,
    discrete: Discrete = False,
    groups: Any = None,
    missing: str = "raise",
    steps: int = 1200,
    hidden: int = 64,
    batch_size: int = 256,
    lr: float = 3e-3,
    k: int = 5,
    seed: int = 0,
    **removed: Any,
) -> Estimate:
    """Estimate I(X;Y|Z) in nats from samples of (x, y, z).

    First x and y are freed from z. The density of each given z is learnt, and each value is replaced by its normal
    score under that density. Given z this map is one to one, so it changes no information. Where the density is right,
    these residuals do not depend on z. The estimate is the mean of log p(x|y,z) − log p(x|z) of the residuals, or the
    same with x and y exchanged, whichever is larger. All densities begin as Gaussian regressions with a full
    covariance. A network adds what is not linear or not Gaussian, and is used only where it predicts held-out rows
    better. Sides whose columns all have few values are categories, and have probabilities.

    Rows are split into folds. Each row is read by models that have not seen it, and trains the models of the other
    folds. Columns of x and y are read by rank, which changes no information, so that outliers and units do no harm.
    Ties are broken at random.

    Args:
        x, y, z: [N, d] or [N]: arrays, data frames, tensors or sequences of numbers; row i of all three is one sample,
            whatever an index says (two indexes of the same labels in another order are refused). At least 50 rows.
        discrete: the columns that are categories, whose order means nothing; they may hold text. True for all columns
            of z; "x", "y" or "z" for all of one side; names of columns of a data frame; or by side:
            {"x": [0, "job"], "z": True}. Columns of pandas' categorical type are categories without being named. If all
            columns of z are, they make one joint category.
        groups: [N], the subject or recording of each row, where several rows come from one. Only groups are then taken
            as independent: folds keep them together, and errors are by group. At least 20 groups.
        missing: "raise" refuses missing entries; "drop" leaves out their rows in all arguments and counts them in
            `dropped`.
        steps: most steps of training for each density. It ends sooner when held-out rows gain nothing.
        hidden: width of the networks' two hidden layers.
        batch_size: rows per step and fold.
        lr: highest learning rate of Adam; it falls to 0 along a cosine.
        k: neighbours in z among which y is shuffled for the null (see `readings` below).
        seed: decides the folds, the order of ties, the initial weights and the batches. Equal seeds give equal results
            on one CPU.

    Returns:
        `Estimate`, all of it in nats. Its `readings`:
            dv: the reading itself. The value is this reading, corrected for what networks left of z on both sides,
                minus the null below. Both densities integrate to 1, so "ldr", "dv" and "nwj" of their ratio are the
                same number. All three names give it.
            x given y, y given x: the two directions. They agree where both are learnt well.
            gaussian: from the regressions alone.
            training: on the rows that the models were trained on, too high by what they overfit.
            null: the estimate with y shuffled among rows of similar z, where the truth is 0. It is made only if dv is
                small (< 0.15) but larger than its sampling error, and is subtracted from the value if it is positive.
        The interval covers the sampling error. It reaches further down by what z may explain beyond what was learnt,
        and further up by what the other side may. Training and held-out rows are compared to judge both. The interval
        contains the reading and the value.

    Raises:
        EstimatorError: arrays that do not pair up or hold no numbers (text, objects), non-finite entries, fewer than
            50 rows or 20 groups, categories of fewer than 5 rows on average, an option out of range or no longer there.

    Example:
        >>> import math, numpy, engine
        >>> z, e, f = numpy.random.default_rng(0).normal(size=(3, 500))
        >>> estimate = engine.estimate_cmi(z + e, z + e + f, z, steps=20, hidden=8)  # log(2) / 2 = 0.347
        >>> estimate.interval[0] < math.log(2) / 2 < estimate.interval[1]
        True
    """
    if removed:
        raise EstimatorError(
            WHERE,
            f"option {', '.join(removed)}",
            "discrete, groups, missing, steps, hidden, batch_size, lr, k, seed",
            "Leave it out: every row is held out once, and the method is chosen on held-out rows.",
        )
    inputs = read_inputs(WHERE, {"x": x, "y": y, "z": z}, discrete, groups, missing, true_means=("z",))
    for name, value in {"steps": steps, "batch_size": batch_size, "hidden": hidden, "k": k}.items():
        check_count(WHERE, name, value)
    check_number(WHERE, "lr", lr, 0, above=True)
    settings = TrainingSettings(steps, batch_size, lr, hidden)
    estimate = _measure(inputs, settings, k, generator_of(WHERE, seed))
    return replace(estimate, dropped=inputs.dropped, groups=inputs.groups)


def _measure(inputs: Arguments, settings: TrainingSettings, k: int, generator: torch.Generator) -> Estimate:
    sides = list(inputs.sides.values())
    values, categories = (torch.cat([getattr(side, name) for side in sides], -1) for name in ("values", "discrete"))
    flags = column_flags(values, _read_by_rank(*sides), categories)
    flags += ["few groups"] * (inputs.groups is not None and inputs.groups < FEW_GROUPS)
    wholly_discrete = sides[2].wholly_discrete
    x, y, z = (varying_columns(side) for side in sides)
    if x.width == 0 or y.width == 0:
        readings = dict.fromkeys(_NAMES, 0.0)
        return Estimate(0.0, (0.0, 0.0), 0.0, "constant", readings, len(values), tuple(flags))

    condition = _categories(z.values) if wholly_discrete else _designs(z)
    group = copies(torch.cat([x.values, y.values, z.values], 1)) if inputs.group is None else inputs.group
    reading = _Reading(x, y, condition, group, settings, generator)

    readings = reading.readings()
    raw, error = readings["dv"], reading.standard_error
    value = reading.value
    if SIGMAS * error < raw < SMALL:
        order = _neighbour_shuffle(condition[0], k, generator, inputs.group)
        shuffled = Side(y.values[order], y.discrete)
        readings["null"] = _Reading(x, shuffled, condition, group, settings, generator).value
        value -= max(readings["null"], 0)
    flags += [*reading.flags(), *value_flags(raw, value, error)]
    low, high = reading.interval()
    low -= max(readings.get("null", 0.0), 0.0)
    return Estimate(
        value=max(value, 0.0),
        interval=(max(min(low, value), 0.0), max(high, 0.0)),
        standard_error=error,
        method=reading.method,
        readings=readings,
        samples=len(values),
        flags=tuple(flags),
        ceiling=reading.ceiling,
        pointwise=reading.pointwise,
        history=reading.best.density.history,
    )


# -- from densities to information ------------------------------------------------------------------------------------


class _Freed:
    """x or y: the columns that it is predicted from, and its residuals given z."""

    def __init__(
        self,
        side: Side,
        condition: list[Tensor],
        fold: Tensor,
        settings: TrainingSettings,
        generator: torch.Generator,
    ):
        folds = int(fold.max()) + 1
        self.designs = [_for_folds(design, folds) for design in _designs(side)]
        category = _as_categories(side)
        self.categories = category is not None
        target = _targets(side.values, generator) if category is None else _with_frequencies(category)
        self.given_z = fit(_for_folds(target, folds), condition, fold, settings, generator, categories=self.categories)
        self.residual = self.given_z.residual
        self.dims = 1 if self.categories else side.width

    @property
    def reference(self) -> Tensor:
        """Log densities of the residuals without the other side, [folds, N]."""
        if self.categories:
            return self.residual[..., 1:].gather(2, self.residual[..., :1].long())[..., 0]
        return -0.5 * self.residual.square().sum(2) - self.dims * HALF_LOG_2PI

    @property
    def columns(self) -> Tensor:
        """The residuals as columns to predict from, [folds, N, columns]."""
        if not self.categories:
            return self.residual
        probability = self.residual[..., 1:].exp()
        indicator = torch.nn.functional.one_hot(self.residual[..., 0].long(), probability.shape[2])
        return _standardise_folds((indicator - probability)[..., 1:])


class _Direction:
    """log p(target | other, z) − log p(target | z) on held-out rows, both sides freed from z before."""

    def __init__(
        self,
        target: _Freed,
        other: _Freed,
        condition: list[Tensor],
        fold: Tensor,
        settings: TrainingSettings,
        generator: torch.Generator,
    ):
        near, far = condition[0], condition[-1]
        freed = other.columns
        designs = [
            torch.cat([near, freed, other.designs[0]], 2),
            freed,
            torch.cat([near, freed], 2),
            torch.cat([far, freed, other.designs[-1]], 2),
        ]
        self.density = fit(
            target.residual,
            designs,
            fold,
            settings,
            generator,
            categories=target.categories,
            reference=target.reference,
        )
        # A Gaussian regression of p degrees, fitted to n rows, predicts new rows worse by p / 2n nats per column.
        # The columns of z were used before, and do not count again.
        extra = min(self.density.degrees, freed.shape[2])
        training_rows = len(fold) * (1 - 1 / len(target.residual))
        self.correction = target.dims * extra / (2 * training_rows)
        self.finest = target.given_z.spread * self.density.spread  # in units of the target's standard deviation
        self.pointwise = self.density.chosen
        self.value = self.pointwise.mean().item() + self.correction


class _Reading:
    """An estimate of I(x;y|z), before flags and null."""

    def __init__(
        self,
        x: Side,
        y: Side,
        z: list[Tensor],
        group: Tensor,
        settings: TrainingSettings,
        generator: torch.Generator,
    ):
        count = len(group)
        folds = 3 if count >= MANY_SAMPLES else 5
        fold = (torch.randperm(int(group.max()) + 1, generator=generator) % folds)[group]
        condition = [_for_folds(design, folds) for design in z]
        side_x, side_y = (_Freed(side, condition, fold, settings, generator) for side in (x, y))
        self.directions = {}
        if side_x.dims <= 3 * max(side_y.dims, 3):
            self.directions["x given y"] = _Direction(side_x, side_y, condition, fold, settings, generator)
        if side_y.dims <= 3 * max(side_x.dims, 3):
            self.directions["y given x"] = _Direction(side_y, side_x, condition, fold, settings, generator)

        # On average a density that is not quite learnt reads less, so the larger reading is the better one.
        self.direction = max(self.directions, key=lambda name: self.directions[name].value)
        self.best = self.directions[self.direction]
        self.pointwise = self.best.pointwise
        self.attenuation = _attenuation(self.best.value, side_x, side_y)
        self.value = self.best.value + self.attenuation
        error = torch.zeros(int(group.max()) + 1, dtype=torch.float64)
        error.index_add_(0, group, self.pointwise - self.pointwise.mean())  # repeated rows count as one
        self.standard_error = error.square().sum().sqrt().item() / count
        self.ceiling = min(x.width, y.width) * math.log(len(error))
        self.confounding = min(side_x.given_z.overfit, side_y.given_z.overfit)
        self.densities = [side_x.given_z, side_y.given_z, self.best.density]
        self.grain = 1 / count

    @property
    def method(self) -> str:
        network = any(any(density.picks) for density in self.densities)
        return f"gaussian{' + network' if network else ''}, {self.direction}"

    def readings(self) -> dict[str, float]:
        return dict.fromkeys(_NAMES, self.best.value) | {
            **{name: direction.value for name, direction in self.directions.items()},
            "gaussian": self.best.density.regression.mean().item() + self.best.correction,
            "training": self.best.density.training,
        }

    def interval(self) -> tuple[float, float]:
        """The sampling error on both sides, plus what z may still explain below and what the other side may above."""
        margin = SIGMAS * self.standard_error
        low = self.best.value - margin - self.confounding
        return low, self.value + margin + self.best.density.overfit + self.attenuation

    def flags(self) -> list[str]:
        flags = []
        if self.value > 0.8 * self.ceiling or (self.best.finest < 5 * self.grain and self.best.density.spread < 0.2):
            flags.append("saturated")
        if any(_unfinished(density) for density in self.densities):
            flags.append("not converged")
        if self.best.density.overfit > max(0.1, 0.5 * self.value):
            flags.append("overfitted")
        return flags


def _attenuation(value: float, *sides: _Freed) -> float:
    """What a reading misses because networks have not quite freed the sides from z, nats.

    Their errors are noise on both sides, which lowers a correlation (Spearman 1904, "The proof and measurement of
    association between two things"). The variance of an error, as a share of the noise, is judged by how much better
    training rows are predicted than unseen ones. Regressions need no such correction: they leave only linear effects of
    z, and the densities of the residuals see z again. A large optimism is not corrected, because less is known of it.
    """
    dims = min(side.dims for side in sides)
    kept = 1.0
    for side in sides:
        error = ERROR_SHARE * side.given_z.overfit / side.dims
        if any(side.given_z.picks) and error < LARGEST_ERROR:
            kept /= 1 + error
    squared = -math.expm1(-2 * max(value, 0.0) / dims)
    corrected = min(squared / kept, (1 + squared) / 2)
    return 0.5 * dims * (math.log1p(-squared) - math.log1p(-corrected)) if squared < 1 else 0.0


def _unfinished(density: Density) -> bool:
    """Whether held-out rows still gained in the last fifth of the training."""
    held_out = [check["held_out"] for check in density.history]
    late = int(0.8 * (len(held_out) - 1))
    return min(density.picks) > 0.8 * (len(held_out) - 1) and held_out[-1] - held_out[late] > 0.01


# -- columns ----------------------------------------------------------------------------------------------------------


def _targets(values: Tensor, generator: torch.Generator) -> Tensor:
    """Columns to predict: normal scores with ties broken at random, plus noise of about one rank.

    The scores determine the column, so no information is lost. The noise keeps the information of columns that
    determine each other finite, at about log N.
    """
    order = torch.randperm(len(values), generator=generator)
    rank = torch.empty(values.shape, dtype=torch.float64)
    rank[order] = values[order].argsort(dim=0, stable=True).argsort(dim=0).double()
    scores = _standardise(torch.special.ndtri((rank + 0.5) / len(values)))
    return scores + torch.randn(scores.shape, generator=generator, dtype=torch.float64) / len(values)


def _as_categories(side: Side) -> Tensor | None:
    """Numbers of the joint values, [N], if every column has few values and there are few joint values; else None.

    Columns that are said to be categories may have more values.
    """
    if any(len(column.unique()) > FEW_VALUES for column in side.values[:, ~side.discrete].T):
        return None
    distinct, category = side.values.unique(dim=0, return_inverse=True)
    rows = LEAST_PER_CATEGORY if side.wholly_discrete else 20
    return category if len(distinct) <= min(MANY_CATEGORIES, len(side.values) / rows) else None


def _with_frequencies(category: Tensor) -> Tensor:
    """Categories and the logs of their shares, as `fit` takes them."""
    share = torch.bincount(category).double() / len(category)
    return torch.cat([category[:, None].double(), share.log().expand(len(category), -1)], 1)


def _designs(side: Side) -> list[Tensor]:
    """Columns to predict from: normal scores and categories; these and the values, cut at five robust deviations."""
    values = side.values[:, ~side.discrete]
    scores = [_standardise(normal_scores(values).double()), indicators(side.values[:, side.discrete])]
    for column in values.T:
        distinct, index = column.unique(return_inverse=True)
        if 2 < len(distinct) <= FEW_VALUES:
            scores.append(_standardise(torch.nn.functional.one_hot(index)[:, 1:].double()))
    scores = torch.cat(scores, 1)
    return [scores, torch.cat([scores, _standardise(robust(values).clamp(-5, 5))], 1)]


def _categories(values: Tensor) -> list[Tensor]:
    """One design: an indicator for each distinct row but the first."""
    if values.shape[1] == 0:
        return [values]
    distinct, index = values.unique(dim=0, return_inverse=True)
    if len(distinct) > len(values) / 5:
        raise EstimatorError(
            WHERE,
            f"a discrete z of {len(distinct)} categories in {len(values)} rows",
            "five rows per category or more",
            "Merge categories, or leave out discrete.",
        )
    return [_standardise(torch.nn.functional.one_hot(index)[:, 1:].double())]


def _for_folds(values: Tensor, folds: int) -> Tensor:
    return values.expand(folds, *values.shape)


def _standardise_folds(values: Tensor) -> Tensor:
    return torch.stack([_standardise(part) for part in values])


def _standardise(values: Tensor) -> Tensor:
    if values.shape[1] == 0:
        return values
    deviation = values.std(0, correction=0)
    return (values - values.mean(0)) / torch.where(deviation > 0, deviation, 1.0)


def _read_by_rank(x: Side, y: Side, z: Side) -> Tensor:
    """The columns that are not read as categories: all of x or y unless all of it is, and those of z of many values."""
    sides = [side.values[:, ~side.discrete] for side in (x, y) if _as_categories(side) is None]
    measured = z.values[:, ~z.discrete]
    many = [len(column.unique()) > FEW_VALUES for column in measured.T]
    return torch.cat([*sides, measured[:, many]], 1)


# -- null -------------------------------------------------------------------------------------------------------------


def _neighbour_shuffle(z: Tensor, k: int, generator: torch.Generator, group: Tensor | None = None) -> Tensor:
    """A permutation of the rows in which each row gets one of its k nearest rows in z, of another group if need be.

    Rows choose in random order (Runge 2018, "Conditional independence testing based on a nearest-neighbor estimator").
    A row whose neighbours are all taken gets one of the rows that are left at the end.
    """
    count = len(z)
    if z.shape[1] == 0:
        return torch.randperm(count, generator=generator)
    noise = 1e-6 * torch.randn(z.shape, generator=generator, dtype=torch.float64)  # among rows of equal z, any
    z = z + noise  # in float32 the distances of equal rows would be rounding errors
    near = []
    for rows in torch.arange(count).split(1024):
        distance = torch.cdist(z[rows], z)
        if group is not None:
            distance.masked_fill_(group[rows, None] == group, math.inf)
        near.append(distance.topk(min(k + 1, count), largest=False).indices)
    near = torch.cat(near)
    free, taken = [True] * count, [-1] * count
    for row in torch.randperm(count, generator=generator).tolist():
        candidates = [j for j in near[row].tolist() if j != row and free[j]]
        if candidates:
            taken[row] = candidates[int(torch.randint(len(candidates), (1,), generator=generator))]
            free[taken[row]] = False
    left = [j for j in range(count) if free[j]]
    rest = iter(torch.randperm(len(left), generator=generator).tolist())
    return torch.tensor([j if j >= 0 else left[next(rest)] for j in taken])
