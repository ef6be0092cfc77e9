"""How much of a target can still be predicted from features, on rows that the predictors have not seen.

A bound that was minimised says little about what is left: a critic that failed reads 0 as well. These probes know
nothing of the training. Nearest neighbours find any relation in few dimensions, ridge regression finds a linear one in
many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import DataError

MOST_ROWS = 8192
"""The most rows of each part that are used, evenly spread."""

RIDGE = 1e-3
"""Ridge penalty per known row, for standardised features."""

BLOCK = 1024
"""Rows whose neighbours are searched at once."""


@dataclass(frozen=True)
class Probe:
    """What predictors reach on unseen rows.

    Attributes:
        kind: "r2", the coefficient of determination of all columns together, or "accuracy".
        knn: by nearest neighbours. Of independent features R² is about -1/neighbours.
        linear: by ridge regression, for classes on one-hot targets.
        chance: what needs no features: 0 for R², and for classes the accuracy of always naming the commonest one.
        rows: number of unseen rows.
        neighbours: number of neighbours.
        balanced: for classes: the mean over the classes of the share of rows that are recognised, above the chance
            1/classes, by the better of both predictors. They then weigh all classes alike. Accuracy hardly sees a rare
            class, even if it is recognised without fail. None for R².
    """

    kind: str
    knn: float
    linear: float
    chance: float
    rows: int
    neighbours: int
    balanced: float | None = None

    @property
    def left(self) -> float:
        """The better of the two predictors, above chance.

        >>> Probe("accuracy", knn=0.75, linear=0.5, chance=0.5, rows=80, neighbours=10).left
        0.25
        """
        return max(self.knn, self.linear) - self.chance

    def to_dict(self) -> dict[str, Any]:
        """The attributes and `left`, for JSON."""
        return asdict(self) | {"left": self.left}


def probe(
    features: Any,
    target: Any,
    *,
    known: tuple[Any, Any] | None = None,
    discrete: bool = False,
    neighbours: int = 10,
    seed: int = 0,
) -> Probe:
    """Measure how well `target` can be predicted from `features`, on unseen rows.

    >>> z = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    >>> probe(z, z[:, :1].abs()).left > 0.4, probe(z, z.flip(0)).left < 0.1
    (True, True)

    Args:
        features: [N, d] or [N], of rows that the model was not trained on: tensors, arrays or data frames of finite
            numbers.
        target: [N, n] or [N] of the same rows.
        known: (features, target) of other rows, from which the predictors learn; such as the training rows. None: the
            rows are split at random into halves, and each half is predicted from the other.
        discrete: the target holds classes. A target of several columns holds one-hot rows.
        neighbours: number of nearest neighbours whose mean (or commonest class) is the prediction.
        seed: of the split.

    Returns:
        `knn` and `linear` are the scores of two predictors, R² or for classes the accuracy. `left` is the better of the
        two, minus chance. For classes, `balanced` weighs every class alike, so that rare ones count.

    Raises:
        DataError: shapes that do not fit, numbers that are not finite, a constant target, classes of about one row
            each, or too few rows.
    """
    x, y = _columns("features", features), _columns("target", target)
    _check(x, y, 2 * neighbours if known is None else 2)
    if known is None:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
        halves = order[: len(x) // 2], order[len(x) // 2 :]
        parts = [((x[b], y[b]), (x[a], y[a])) for a, b in (halves, halves[::-1])]
    else:
        seen = _columns("known features", known[0]).to(x.device), _columns("known target", known[1]).to(x.device)
        _check(*seen, neighbours)
        if seen[0].shape[1] != x.shape[1] or seen[1].shape[1] != y.shape[1]:
            shapes = f"{list(seen[0].shape)} and {list(seen[1].shape)}"
            raise DataError("probe, known", shapes, f"{x.shape[1]} and {y.shape[1]} columns", "Give the same columns.")
        parts = [(seen, (x, y))]
    parts = [tuple(tuple(t[_spread(len(t))] for t in pair) for pair in part) for part in parts]
    return _classes(parts, neighbours) if discrete else _numbers(parts, neighbours)


def _numbers(parts: list[Any], k: int) -> Probe:
    """R² over all parts: 1 - (squared error) / (squared distance from the mean), both summed over the columns.

    Columns are standardised by the rows that the predictors know, so that none counts more for its unit, and none for
    hardly varying in the unseen rows.
    """
    errors = {"knn": 0.0, "linear": 0.0}
    spread, count = 0.0, 0
    for (x, y), (unseen, wanted) in parts:
        x, unseen = _standardised(x, unseen)
        y, wanted = _standardised(y, wanted)
        errors["knn"] += (wanted - _neighbour_means(x, y, unseen, k)).square().sum().item()
        errors["linear"] += (wanted - _ridge(x, y, unseen)).square().sum().item()
        spread += (wanted - wanted.mean(0)).square().sum().item()
        count += len(wanted)
    if spread <= 1e-12 * count:
        raise DataError("probe, target", "a constant", "a target that varies", "Give another target.")
    return Probe("r2", 1 - errors["knn"] / spread, 1 - errors["linear"] / spread, 0.0, count, k)


def _classes(parts: list[Any], k: int) -> Probe:
    """Accuracy over all parts."""
    labels = torch.cat([_label(y) for part in parts for _, y in part])
    values = labels.unique()
    if len(values) < 2:
        raise DataError("probe, target", "a single class", "two or more", "Give another target.")
    rows = max(sum(len(pair[i][1]) for pair in parts) for i in (0, 1))
    if len(values) > rows / 2:
        found = f"{len(values)} classes in {rows} rows"
        raise DataError("probe, target", found, "several rows of each", "Leave out discrete=True for numbers.")
    scores: dict[str, list[Tensor]] = {"knn": [], "linear": [], "chance": []}
    truths, shares = [], []
    for (x, y), (unseen, wanted) in parts:
        x, unseen = _standardised(x, unseen)
        known, truth = (torch.searchsorted(values, _label(t)) for t in (y, wanted))
        one_hot = torch.nn.functional.one_hot(known, len(values)).to(x.dtype)
        scores["knn"].append(_neighbour_means(x, one_hot, unseen, k))
        scores["linear"].append(_ridge(x, one_hot, unseen))
        scores["chance"].append(one_hot.mean(0).expand(len(truth), -1))
        shares.append(scores["chance"][-1].clamp(min=1e-12))
        truths.append(truth)
    truth, share, joined = torch.cat(truths), torch.cat(shares), {n: torch.cat(parts) for n, parts in scores.items()}
    knn, linear, chance = ((score.argmax(1) == truth).double().mean().item() for score in joined.values())
    recognised = []
    for score in (joined["knn"] / share, (joined["linear"] - share) / (share * (1 - share)).sqrt()):
        right = (score.argmax(1) == truth).double()
        recognised.append(torch.stack([right[truth == c].mean() for c in truth.unique()]).mean().item())
    return Probe("accuracy", knn, linear, chance, len(truth), k, max(recognised) - 1 / len(truth.unique()))


def _neighbour_means(x: Tensor, y: Tensor, unseen: Tensor, k: int) -> Tensor:
    """The mean y of the k nearest rows of x, for every unseen row."""
    means = [y[torch.cdist(block, x).topk(k, largest=False).indices].mean(1) for block in _blocks(unseen)]
    return torch.cat(means)


def _ridge(x: Tensor, y: Tensor, unseen: Tensor) -> Tensor:
    """Predictions of a ridge regression with an intercept. x is standardised."""
    mean = y.mean(0)
    gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return unseen @ torch.linalg.solve(gram, x.T @ (y - mean)) + mean


def _blocks(x: Tensor) -> Iterator[Tensor]:
    yield from x.split(BLOCK)


def _standardised(x: Tensor, unseen: Tensor) -> tuple[Tensor, Tensor]:
    """Both by the mean and the deviation of x. Columns that do not vary become 0."""
    mean, deviation = x.mean(0), x.std(0, correction=0)
    scale = torch.where(deviation > 1e-12 * x.abs().amax(0), 1 / deviation, 0.0)
    return (x - mean) * scale, (unseen - mean) * scale


def _label(y: Tensor) -> Tensor:
    """Classes [N]: the number of the largest column of one-hot rows."""
    return y[:, 0] if y.shape[1] == 1 else y.argmax(1).to(y.dtype)


def _columns(what: str, values: Any) -> Tensor:
    """Numbers as float64 [N, columns]."""
    try:
        tensor = torch.as_tensor(np.array(values) if hasattr(values, "to_numpy") else values).detach()
    except (TypeError, ValueError, RuntimeError) as cause:  # such as names of classes
        raise DataError(
            f"probe, {what}", f"a {type(values).__name__} that is no table of numbers", "real numbers [N, d] or [N]",
            "Convert it; number the classes.",
        ) from cause  # fmt: skip
    if tensor.is_complex() or tensor.dim() not in (1, 2):
        raise DataError(
            f"probe, {what}", f"{tensor.dtype} {list(tensor.shape)}", "real numbers [N, d] or [N]", "Reshape them."
        )
    tensor = tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)
    if not tensor.isfinite().all():
        raise DataError(f"probe, {what}", "numbers that are not finite", "finite numbers", "Leave such rows out.")
    return tensor[:, None] if tensor.dim() == 1 else tensor


def _check(x: Tensor, y: Tensor, least: int) -> None:
    if len(x) != len(y):
        raise DataError(
            "probe", f"{len(x)} rows of features and {len(y)} of target", "as many of both", "Give the same rows."
        )
    if len(x) < least or not x.shape[1] or not y.shape[1]:
        raise DataError(
            "probe", f"features {list(x.shape)} and target {list(y.shape)}", f"{least} rows or more, and columns",
            "Give more rows, or fewer neighbours.",
        )  # fmt: skip


def _spread(count: int) -> slice | list[int]:
    """All rows, or `MOST_ROWS` evenly spread ones."""
    if count <= MOST_ROWS:
        return slice(None)
    return torch.linspace(0, count - 1, MOST_ROWS, dtype=torch.float64).round().long().tolist()
