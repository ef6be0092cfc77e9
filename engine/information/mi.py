"""Mutual information between two arrays of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.information.alone import alone
from engine.information.columns import (
    column_flags,
    copies,
    indicators,
    normal_scores,
    robust,
    standard_error,
    untied_scores,
)
from engine.information.critics import (
    READ_PAIRS,
    Base,
    Concatenated,
    Critics,
    CriticSettings,
    CriticTraining,
    Inputs,
    Separate,
    blocks,
)
from engine.information.estimate import SIGMAS, Estimate, value_flags
from engine.information.folds import best_on_others
from engine.information.gaussian import (
    NORMALISED,
    canonical,
    closed_form,
    least_correlation,
    looks_gaussian,
    lost_by_ranks,
)
from engine.information.inputs import (
    FEW_GROUPS,
    LEAST_PER_CATEGORY,
    LEAST_SAMPLES,
    Arguments,
    Discrete,
    Side,
    generator_of,
    read_inputs,
    varying_columns,
)
from engine.information.neighbours import (
    Column,
    counted_information,
    jackknifed_information,
    merge_rare,
    mixed_information,
    neighbour_ceiling,
    neighbour_information,
)
from engine.kernels.arguments import check_count, check_number
from engine.vocabulary import BOUNDS as ALL_BOUNDS

WHERE = "estimate_mi"
BOUNDS = tuple(bound for bound in ALL_BOUNDS if bound != "js_fgan")  # js_fgan bounds another divergence
FOLDS = 5
GAUSSIAN = "gaussian"
# A network is used if its reading exceeds the one without it by this share of (1 nat + the reading).
MARGIN = 0.002
SATURATION = 3.0  # InfoNCE within so many nats of its ceiling is off by more than chance
OVERFITTED = 0.1
SHRINKAGES = (0.1, 0.5)
MANY_COLUMNS = 0.04  # with more columns per row than this, shrunk covariances are tried
# A Gaussian pair of columns with this information divided by N would read two standard errors above 0.
DETECTABLE = 8.0
UNLEARNT = 0.2  # on problems of known information, networks still miss about this share of what they found
PAIR_COLUMNS = 8  # critics of pairs are tried for up to so many columns of both sides together
NEIGHBOUR_NOISE = 1.2  # estimates vary more than independent shares would, by this factor; counted over 200 seeds
# A pair of values that occurs again and again is no copy of one row if it holds this share of the rows, and if for each
# such pair so many rows occur once.
ATOM_SHARE = 0.02
SINGLE_ROWS = 10

Candidate = tuple[type[Critics], Inputs]


@alone
def estimate_mi(
    x: Any,
    y: Any,
    *,
    bound: str = "auto",
    steps: int = 1500,
    batch_size: int = 256,
    lr: float = 4e-3,
    hidden: int = 64,
    alpha: float = 0.01,
    smile_tau: float = 5.0,
    discrete: Discrete = False,
    groups: Any = None,
    missing: str = "raise",
    seed: int = 0,
) -> Estimate:
    """Estimate I(X;Y) in nats from paired samples.

    Two continuous columns are measured by the distances of neighbours, and two discrete variables by counting.
    Everything else is measured by critics of log p(x,y) / p(x)p(y). They start from a Gaussian fitted to ranks. A
    network adds what is not Gaussian, and is used only where it reads more on rows it has not seen. Rows are split into
    folds. Each fold is read by a critic that was trained on the other folds. The critics of the other folds choose
    the checkpoint of that critic, so that its own held-out rows do not.

    Columns are taken by rank, which changes no information. Outliers, units and offsets do no harm.

    Args:
        x, y: [N, dx] and [N, dy], or [N]: arrays, data frames, tensors or sequences of numbers; row i of both is one
            sample, whatever an index says (two indexes of the same labels in another order are refused). At least 50
            rows.
        bound: "auto" for the method above. One of `BOUNDS` trains critics by that bound and reads them by it. "infonce"
            cannot exceed the log of the rows that are read together. "smile" is no lower bound. "nwj", "tuba" and "js"
            vary most. For all of them a constant of the critic is fitted on training rows.
        steps: most steps of training. It ends sooner when held-out rows gain nothing.
        batch_size: rows per step and fold.
        lr: Adam's learning rate; it falls when held-out rows gain nothing.
        hidden: width of the networks' hidden layers.
        alpha: of bound="interpolate", see `MIEstimator`.
        smile_tau: of bound="smile", see `MIEstimator`.
        discrete: the columns that are categories, whose order means nothing; they may hold text. True for all columns,
            "x" or "y" for all of one side, names of columns of a data frame, or by side: {"x": [0, "job"], "y": True}.
            Columns of pandas' categorical type are categories without being named.
        groups: [N], the subject or recording of each row, where several rows come from one. Only groups are then taken
            as independent: folds keep them together, and errors are by group. At least 20 groups. The bounds other than
            "auto" and "infonce" still compare rows of one group, and read too low.
        missing: "raise" refuses missing entries; "drop" leaves out their rows in all arguments and counts them in
            `dropped`.
        seed: decides the folds, the initial weights and the batches. Equal seeds give equal results on one CPU.

    Returns:
        `Estimate`, in nats. With critics, the value lies halfway between their reading on training rows,
        `readings["training"]`, and their reading on rows they have not seen. The first is too high by about as much as
        the second is too low. Where nothing beats the Gaussian, the value is the Gaussian's own, free of its sampling
        bias. The interval reaches from the held-out reading to the training reading. Both ends are moved out by the
        sampling error, and the upper one also by a share for what networks miss.

    Raises:
        EstimatorError: arrays that do not pair up or hold no numbers (text, objects), non-finite entries, fewer than 50
            rows or 20 groups, categories of fewer than 5 rows on average, an option out of range.

    Example:
        >>> import numpy, engine
        >>> x, noise = numpy.random.default_rng(0).normal(size=(2, 2000))
        >>> estimate = engine.estimate_mi(x, x + noise)  # log(2) / 2 = 0.347
        >>> print(estimate)
        0.346 nats, 95 % interval 0.287 to 0.419
    """
    inputs = read_inputs(WHERE, {"x": x, "y": y}, discrete, groups, missing, true_means=("x", "y"))
    if bound == "js_fgan":
        raise EstimatorError(
            WHERE, "bound 'js_fgan'", "a bound on information in nats", 'It bounds another divergence; use bound="js".'
        )
    if bound not in ("auto", *BOUNDS):
        raise EstimatorError(WHERE, f"bound {bound!r}", f"auto or one of {', '.join(BOUNDS)}", "Choose one of these.")
    for name, value in {"steps": steps, "hidden": hidden}.items():
        check_count(WHERE, name, value)
    check_count(WHERE, "batch_size", batch_size, 2)
    check_number(WHERE, "lr", lr, 0, above=True)
    check_number(WHERE, "alpha", alpha, 0, 1)
    check_number(WHERE, "smile_tau", smile_tau, 0, above=True)

    settings = CriticSettings(steps, batch_size, lr, hidden, "infonce" if bound == "auto" else bound, alpha, smile_tau)
    estimate = _measure(inputs, settings, bound == "auto", generator_of(WHERE, seed))
    return replace(estimate, dropped=inputs.dropped, groups=inputs.groups)


def _measure(inputs: Arguments, settings: CriticSettings, auto: bool, generator: torch.Generator) -> Estimate:
    """Choose the method by the columns."""
    sides, group = list(inputs.sides.values()), inputs.group
    both, categories = (torch.cat([getattr(side, name) for side in sides], -1) for name in ("values", "discrete"))
    flags = column_flags(both, both[:, ~categories], categories)
    if inputs.groups is not None and inputs.groups < FEW_GROUPS:
        flags.append("few groups")
    x, y = (varying_columns(side) for side in sides)
    if not x.width or not y.width:
        return Estimate(0.0, (0.0, 0.0), 0.0, "nothing", {}, len(both), tuple(flags))
    if auto and (codes := _codes(x.values, y.values)) is not None:
        return _count(*codes, flags, group)
    if auto and x.width == y.width == 1:
        some_discrete = x.wholly_discrete != y.wholly_discrete
        atoms = _equal_pairs(x.values, y.values, flags)
        if some_discrete or group is not None or atoms:
            return _measure_mixed(x, y, flags, group, generator, atoms)
        if not categories.any() and not {"discrete columns", "repeated rows"} & set(flags):
            return _measure_distances(x.values, y.values, flags, generator)
    return _train_critics(x, y, settings, auto, flags, group, generator)


# -- looking at the columns -------------------------------------------------------------------------------------------


def _equal_pairs(x: Tensor, y: Tensor, flags: list[str]) -> bool:
    """Whether rows repeat only because a few pairs of values, such as (0, 0), are frequent."""
    if "repeated rows" not in flags:
        return False
    counts = torch.cat([x, y], 1).unique(dim=0, return_counts=True)[1]
    repeated, single = counts[counts > 1], int((counts == 1).sum())
    return len(repeated) <= single / SINGLE_ROWS and bool((repeated >= ATOM_SHARE * len(x)).all())


def _codes(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
    """Numbers of the distinct rows of x and of y, where these are few enough for all pairs to be counted."""
    codes = [values.unique(dim=0, return_inverse=True)[1] for values in (x, y)]
    return codes if math.prod(int(code.max()) + 1 for code in codes) <= len(x) / 10 else None


def _folds(x: Tensor, y: Tensor, repeated: bool, group: Tensor | None, generator: torch.Generator) -> Tensor:
    """The fold of each row, [N]. Rows of a group share a fold, and so do copies of a row where `repeated`."""
    count = len(x)
    row = copies(torch.cat([x, y], 1)) if repeated else torch.arange(count)
    row = row if group is None else group
    fold = torch.randperm(int(row.max()) + 1, generator=generator)[row] % FOLDS
    if (least := int(fold.bincount(minlength=FOLDS).min())) < LEAST_SAMPLES / (2 * FOLDS):
        raise EstimatorError(
            WHERE,
            f"so many {'copies of rows' if group is None else 'rows in some groups'} that of {count} rows one of "
            f"{FOLDS} folds holds {least}",
            "rows that differ" if group is None else "groups of similar size",
            "Remove the copies." if group is None else "Take fewer rows of the largest groups.",
        )
    return fold


def _with_radius(values: Tensor) -> Tensor:
    """Normal scores of the columns and of the length of each row, float64."""
    scores = normal_scores(values).double()
    if values.shape[1] <= 1:
        return scores
    return torch.cat([scores, normal_scores(robust(values).square().sum(1, keepdim=True)).double()], 1)


# -- without training -------------------------------------------------------------------------------------------------


def _count(x: Tensor, y: Tensor, flags: list[str], group: Tensor | None) -> Estimate:
    if group is None:
        shares, bias = counted_information(x, y)
        error = standard_error(shares)
    else:
        shares, bias, error = jackknifed_information(x, y, group)
    raw = shares.mean().item()
    flags = [flag for flag in flags if flag != "discrete columns"]  # not read by rank
    return _estimate(raw - bias, raw - bias, raw, error, "counts", {"counts": raw}, shares, flags)


def _measure_distances(x: Tensor, y: Tensor, flags: list[str], generator: torch.Generator) -> Estimate:
    few, many = neighbour_information(*(untied_scores(values, generator) for values in (x, y))).values()
    error = NEIGHBOUR_NOISE * standard_error(few)
    value, other = few.mean().item(), many.mean().item()
    ceiling = neighbour_ceiling(len(x))
    flags = flags + ["saturated"] * (value > ceiling - 1)
    readings = {"neighbours": value, "more neighbours": other}
    # with more neighbours the estimate is less noisy and more biased: their difference shows the bias
    high = value + 2 * max(0.0, value - other)
    return _estimate(value, min(value, other), high, error, "neighbours", readings, few, flags, ceiling)


def _measure_mixed(
    x: Side, y: Side, flags: list[str], group: Tensor | None, generator: torch.Generator, atoms: bool
) -> Estimate:
    """`atoms`: whether rows coincide that are no copies, which are then counted; other ties are broken."""
    flags, columns = [flag for flag in flags if flag != "repeated rows"], []
    for side in (x, y):
        values, merged = side.values[:, 0], False
        if side.wholly_discrete:
            values, merged = merge_rare(values, LEAST_PER_CATEGORY)
        elif atoms:
            values = normal_scores(side.values)[:, 0].double()
        else:
            values = untied_scores(side.values, generator)
        flags += ["rare categories"] * (merged and "rare categories" not in flags)
        columns.append(Column(values, side.wholly_discrete))
    few, many = mixed_information(columns[0], columns[1], group, generator).values()
    value, other, error = few.mean().item(), many.mean().item(), NEIGHBOUR_NOISE * standard_error(few, group)
    ceiling = None
    if not x.wholly_discrete and not y.wholly_discrete:
        ceiling = neighbour_ceiling(len(few) if group is None else int(group.max()) + 1)
        flags += ["saturated"] * (value > ceiling - 1)
    readings = {"neighbours": value, "more neighbours": other}
    high = value + 2 * max(0.0, value - other)
    name = (
        "neighbours"
        + " within categories" * (x.wholly_discrete or y.wholly_discrete)
        + " of other groups" * (group is not None)
    )
    return _estimate(value, min(value, other), high, error, name, readings, few, flags, ceiling)


# -- with critics -----------------------------------------------------------------------------------------------------


def _train_critics(
    x: Side,
    y: Side,
    settings: CriticSettings,
    auto: bool,
    flags: list[str],
    group: Tensor | None,
    generator: torch.Generator,
) -> Estimate:
    fold = _folds(x.values, y.values, "repeated rows" in flags, group, generator)
    training = CriticTraining(fold, settings, generator)
    plain, radial, values = zip(_views(x), _views(y), strict=True)
    base = _best_base(training, plain, radial, group)
    candidates = _candidates(training, radial, values if settings.bound == "infonce" else None)
    critics, trainer = training.train(base, candidates)
    picks = best_on_others(trainer.held_out, MARGIN)
    trainer.load(picks)
    unseen, seen, shares = _read(training, critics, settings)
    networks = any(picks)

    count, columns = len(fold), (plain[0].shape[1], plain[1].shape[1])
    rows = min(len(block) for part in training.held_out for block in blocks(part))
    if networks and isinstance(critics, Concatenated):
        rows = min(rows, READ_PAIRS + 1)
    closed = closed_form(*plain)
    saturated = unseen["infonce"] > math.log(rows) - SATURATION
    reading = "dv" if auto and saturated else settings.bound
    value, error = (unseen[reading] + seen[reading]) / 2, max(standard_error(shares, group), _spread(training, shares))
    continuous, lost = not (x.discrete.any() or y.discrete.any()), 0.0
    if auto and group is None and continuous and GAUSSIAN in base.name and closed.exists:
        overfitted = seen[reading] - unseen[reading] > OVERFITTED * (1 + value)
        is_gaussian = base.name == GAUSSIAN and not networks and abs(_excess(unseen)) < NORMALISED
        if not is_gaussian and saturated and (overfitted or not networks) and _excess(unseen) < NORMALISED:
            is_gaussian = looks_gaussian(*plain)
        if is_gaussian:
            reading, value, error = "ldr", closed.information, max(error, closed.error)
            lost = lost_by_ranks(*plain)
    optimism = max(0.0, seen[reading] - unseen[reading])
    gain = max(0.0, unseen["infonce"] - trainer.held_out[0].mean().item())
    low = min(unseen[reading], value)
    if reading == "ldr" and saturated:  # many columns on few rows: the other reading is a lower bound, too
        low = min(max(low, unseen["infonce"]), value)
    detectable = DETECTABLE * math.sqrt(columns[0] * columns[1]) / (count if group is None else int(group.max()) + 1)
    # the same critic's InfoNCE is a bound, too, and the one that needs no normaliser
    high = max(unseen[reading], unseen["infonce"], value, detectable) + optimism + UNLEARNT * gain + lost
    missed = auto and group is None and sum(columns) > MANY_COLUMNS * count and closed.shows_more_than(high)
    high = closed.high if missed and closed.exists else high
    unfinished = networks and trainer.checks[max(picks)].step == settings.steps
    overfitted = missed or optimism > OVERFITTED * (1 + value)
    flags = flags + ["saturated"] * saturated + ["not converged"] * unfinished + ["overfitted"] * overfitted
    readings = {name: unseen[name] for name in dict.fromkeys(("infonce", "dv", settings.bound))}
    readings |= {"training": seen[reading], "gaussian": closed.information}
    ceilings = {"infonce": math.log(rows), "interpolate": 1 + math.log((rows - 1) / settings.alpha)}
    return _estimate(
        value,
        low,
        high,
        error,
        base.name + f" + {critics.name} network" * networks,
        readings,
        shares,
        flags,
        ceilings.get(reading),
        trainer.history(),
        missed,
    )


def _excess(unseen: dict[str, float]) -> float:
    """The log of the mean of a ratio over pairs of different rows, as DV measures it, as a share of what is read.

    0: normalised. Beyond some nats few pairs make the mean too low, but never too high. It is too high where a Gaussian
    counts the same information several times: columns that do not correlate may still depend on each other.
    """
    return (unseen["ldr"] - unseen["dv"]) / max(1 + unseen["ldr"], 1e-9)


def _views(side: Side) -> tuple[Tensor, Tensor, Tensor]:
    """Columns for critics: scores; the same with the length of each row; and with the values, for critics of pairs.

    Edges lie straight in the values themselves, which ranks bend. Categories are indicators.
    """
    if not side.discrete.any():
        radial = _with_radius(side.values)
        return normal_scores(side.values).double(), radial, torch.cat([radial, robust(side.values).asinh()], 1)
    measured, names = side.values[:, ~side.discrete], indicators(side.values[:, side.discrete])
    radial = torch.cat([_with_radius(measured), names], 1)
    plain = torch.cat([normal_scores(measured).double(), names], 1)
    return plain, radial, torch.cat([radial, robust(measured).asinh()], 1)


def _spread(training: CriticTraining, shares: Tensor) -> float:
    """Standard error of the mean over folds."""
    means = torch.stack([shares[rows].mean() for rows in training.held_out])
    return (means.std() / math.sqrt(training.folds)).item()


def _best_base(
    training: CriticTraining, plain: tuple[Tensor, Tensor], radial: tuple[Tensor, Tensor], group: Tensor | None
) -> Base:
    """The Gaussian that reads most on held-out rows, or nothing."""
    samples, dims = len(plain[0]), plain[0].shape[1] + plain[1].shape[1]
    shrinkages = (0.0, *SHRINKAGES) if dims > MANY_COLUMNS * samples else (0.0,)
    bases = [Base("nothing", samples, [], training.folds, group)]
    for name, (x, y) in {GAUSSIAN: plain, GAUSSIAN + " with radii": radial}.items():
        if name != GAUSSIAN and x.shape[1] + y.shape[1] == dims:
            continue
        for shrinkage in shrinkages:
            fits = [(canonical(x[rows], y[rows], shrinkage), x, y) for rows in training.training]
            bases.append(Base(f"shrunk {name}" if shrinkage else name, samples, fits, training.folds, group))
    return max(bases, key=lambda base: training.readings(base)[1].mean().item())


def _each_fold(columns: Tensor, training: CriticTraining) -> Tensor:
    return columns.float().expand(training.folds, -1, -1)


def _candidates(
    training: CriticTraining, columns: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor] | None
) -> list[Candidate]:
    """Kinds of critics and their inputs.

    Args:
        columns: of x and y, which separate critics see as they are, or turned and scaled by how much they correlate.
        values: what critics of pairs see besides; None if there shall be none.
    """
    x, y = columns
    plain = Inputs(_each_fold(x, training), _each_fold(y, training))
    candidates: list[Candidate] = [(Separate, plain)]
    if x.shape[1] + y.shape[1] > 2:
        turned = []
        for rows in training.training:
            fit = canonical(x[rows], y[rows])
            turned.append(fit.variates(x, y, least_correlation(len(rows), x.shape[1], y.shape[1])))
        candidates.append((Separate, Inputs(*(_stacked(side) for side in zip(*turned, strict=True)))))
    if values is not None and x.shape[1] + y.shape[1] <= PAIR_COLUMNS:
        candidates.append((Concatenated, Inputs(*(_each_fold(side, training) for side in values))))
    return candidates


def _stacked(folds: Sequence[Tensor]) -> Tensor:
    """[folds, N, columns]. A rare category may not occur in a fold, which then has fewer directions; zeros stand in."""
    widest = max(fold.shape[1] for fold in folds)
    return torch.stack([torch.nn.functional.pad(fold, (0, widest - fold.shape[1])) for fold in folds])


@torch.no_grad()
def _read(
    training: CriticTraining, critics: Critics, settings: CriticSettings
) -> tuple[dict[str, float], dict[str, float], Tensor]:
    """Mean readings by critics that have not seen a row, and by critics that have; and unseen rows' InfoNCE shares [N].

    Both means are over all rows, so that their difference comes from the critics and not from the rows.
    """
    shares = torch.empty(sum(map(len, training.held_out)), dtype=torch.float64)
    sums: list[dict[str, float]] = [{}, {}]
    for f in range(training.folds):
        normaliser = critics.log_normaliser(f, training.checked_training[f])
        for side, part in enumerate((f, (f + 1) % training.folds)):
            for block in blocks(training.held_out[part]):
                single, record = critics.read(f, block, normaliser, settings)
                if side == 0:
                    shares[block] = single.double()
                for name, value in record.items():
                    sums[side][name] = sums[side].get(name, 0.0) + value * len(block) / len(shares)
    return sums[0], sums[1], shares


def _estimate(
    value: float,
    low: float,
    high: float,
    error: float,
    method: str,
    readings: dict[str, float],
    shares: Tensor,
    flags: list[str],
    ceiling: float | None = None,
    history: list[dict[str, Any]] | None = None,
    missed: bool = False,
) -> Estimate:
    """The result.

    Args:
        low, high: readings that would lie below and above the truth if there were no sampling error.
        missed: whether a low value may come from too few rows, and so is no sign of noise.
    """
    interval = max(0.0, low - SIGMAS * error), max(0.0, high + SIGMAS * error)
    flags = (*flags, *(flag for flag in value_flags(value, low, error) if not (missed and flag == "noise")))
    return Estimate(
        max(0.0, value), interval, error, method, readings, len(shares), flags, ceiling, shares, history or []
    )
