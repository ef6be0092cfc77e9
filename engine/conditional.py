"""Conditional mutual information between arrays of samples: train a classifier on one part, read it on the other."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.errors import EstimatorError
from engine.kernels.arguments import check_count, check_number
from engine.kernels.cmi import LOGIT_LIMIT, classifier_loss, cmi_values
from engine.kernels.critics import mlp
from engine.kernels.knn_product import label_strata, product_indices, stratified_product_indices
from engine.model.estimators import build_mlp, mlp_layers
from engine.samples import as_samples

WHERE = "estimate_cmi"
CHECKS = 20
SHUFFLES = 10
READ_ROWS = 1 << 16

Pairs = tuple[Tensor, Tensor]


def estimate_cmi(
    x: Any,
    y: Any,
    z: Any,
    *,
    discrete: bool = False,
    method: Literal["product", "difference"] = "product",
    k: int = 10,
    hidden: int = 64,
    steps: int = 2000,
    batch_size: int = 512,
    lr: float = 2e-3,
    held_out: float = 1 / 3,
    seed: int = 0,
) -> dict[str, float]:
    """Estimate I(X;Y|Z) in nats from samples of (x, y, z).

    A part of the samples is held out and only read at the end. Of the rest, four fifths train the classifier (Adam,
    equal numbers of joint and product rows a step, learning rate falling to 0 along a cosine) and one fifth chooses the
    step whose classifier is kept. Columns are standardised by the training part, which changes no information.

    Product rows p(x|z) p(y,z) are drawn within each part, isolated (see `engine.kernels.knn_product`): the rows take
    turns as queries, k neighbours each. In many dimensions the nearest neighbours in z are not near, and what is
    estimated drifts from I(X;Y|Z) towards I(X;Y,Z); `method="difference"` suits such z.

    Args:
        x, y, z: [N, d] or [N]: arrays, data frames, tensors or sequences of numbers; row i of all three is one sample,
            whatever an index says.
        discrete: z is one column of categories or few-valued labels: product rows are drawn within strata of equal
            label, and the classifier is told the stratum (one-hot). Strata of <= k rows are merged with the nearest
            label, which conditions on less.
        method: "product": classify joint against product rows. "difference": I(X;Y,Z) − I(X;Z), each by classifying
            pairs against shuffled pairs; needs no neighbours.
        k: neighbours a query (method="product"), and the size that strata must exceed.
        hidden: width of the classifier's three hidden layers.
        steps, batch_size, lr: of the training; batch_size counts joint rows.
        held_out: share of the samples that the result is read from.
        seed: makes the split, the classifier's start and all draws; equal seeds give equal results on one CPU.

    Returns:
        {"ldr", "dv", "nwj"}: the three readings of the classifier on the held-out rows (see `engine.kernels.cmi`),
        never clipped, so they may be negative.

    Raises:
        EstimatorError: arrays that do not pair up or hold no numbers (text, objects), non-finite entries, an option out
            of range, too few samples for k.
    """
    x, y, z = as_samples(WHERE, "x", x), as_samples(WHERE, "y", y), as_samples(WHERE, "z", z)
    if not len(x) == len(y) == len(z):
        raise EstimatorError(
            WHERE,
            f"{len(x)}, {len(y)} and {len(z)} rows of x, y, z",
            "as many of each",
            "Give rows of the same samples.",
        )
    if method not in ("product", "difference"):
        raise EstimatorError(WHERE, f"method {method!r}", '"product" or "difference"', "Choose one of these.")
    if not 0 < held_out < 1:
        raise EstimatorError(WHERE, f"held_out {held_out}", "a share between 0 and 1", "Choose e.g. 1/3.")
    for name, value in {"steps": steps, "batch_size": batch_size, "hidden": hidden, "k": k}.items():
        check_count(WHERE, name, value)
    check_number(WHERE, "lr", lr, 0, above=True)

    generator = torch.Generator().manual_seed(seed)
    parts = _split(torch.randperm(len(x), generator=generator), held_out)
    least = max(k, 2) + 1
    if min(len(part) for part in parts) < least:
        raise EstimatorError(
            WHERE,
            f"{len(x)} samples, in parts of {', '.join(str(len(part)) for part in parts)}",
            f"at least k + 1 = {least} in each of training, validation and held-out part",
            "Give more samples or lower k.",
        )
    label = z if discrete else None
    x, y = _standardise(x, parts[0]), _standardise(y, parts[0])
    z = _one_hot_strata(z, k) if discrete else _standardise(z, parts[0])

    def product_pairs(rows: Tensor) -> Pairs:
        return _product_pairs(z, label, rows, k, generator)

    def shuffled_pairs(rows: Tensor) -> Pairs:
        return _shuffled_pairs(rows, generator)

    def read(rest: Tensor, pairs: Any) -> dict[str, Tensor]:
        fitted = _fit(x, rest, parts, pairs, hidden, steps, batch_size, lr, generator)
        return cmi_values(*_log_ratios(fitted, x, rest, parts[2], pairs(parts[2])))

    yz = torch.cat([y, z], 1)
    if method == "product":
        values = read(yz, product_pairs)
    else:
        both, given = read(yz, shuffled_pairs), read(z, shuffled_pairs)
        values = {name: both[name] - given[name] for name in both}
    return {name: value.item() for name, value in values.items()}


# -- product rows, as pairs of indices: x of the first, (y, z) of the second ------------------------------------------


def _product_pairs(z: Tensor, label: Tensor | None, rows: Tensor, k: int, generator: torch.Generator) -> Pairs:
    """Every row is a query once: in turn one of max(k, 2) groups of rows is isolated, the others give neighbours."""
    order = torch.randperm(len(rows), generator=generator)
    strata = None if label is None else label_strata(label[rows], k)
    first, second = [], []
    for query in order.tensor_split(max(k, 2)):
        if len(rows) - len(query) < k:
            query = query[: len(rows) - k]
        if label is None:
            neighbour, query = product_indices(z[rows], len(query), k, generator, query)
        else:
            neighbour, query = stratified_product_indices(label[rows], len(query), k, generator, query, strata)
        first.append(rows[neighbour])
        second.append(rows[query].repeat_interleave(k))
    return torch.cat(first), torch.cat(second)


def _shuffled_pairs(rows: Tensor, generator: torch.Generator) -> Pairs:
    """Each row with SHUFFLES others: cyclic shifts of one random order, so that no row meets itself."""
    order = rows[torch.randperm(len(rows), generator=generator)]
    shifts = torch.randperm(len(rows) - 1, generator=generator)[:SHUFFLES] + 1
    return torch.cat([order.roll(shift) for shift in shifts.tolist()]), order.repeat(len(shifts))


# -- the classifier ---------------------------------------------------------------------------------------------------


def _fit(
    x: Tensor,
    rest: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    pairs: Any,
    hidden: int,
    steps: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
) -> nn.Sequential:
    """The classifier of [x; rest] rows against product pairs, as it was where the validation loss was least."""
    training, validation, _ = parts
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        classifier = build_mlp(x.shape[1] + rest.shape[1], 1, hidden, 2, "relu")
    optimizer = torch.optim.Adam(classifier.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    first, second = pairs(training)
    checked = pairs(validation)
    best, best_state = math.inf, None
    for step in range(1, steps + 1):
        joint = training[torch.randint(len(training), (batch_size,), generator=generator)]
        drawn = torch.randint(len(first), (batch_size,), generator=generator)
        i, j = torch.cat([joint, first[drawn]]), torch.cat([joint, second[drawn]])
        logits = mlp(torch.cat([x[i], rest[j]], 1), mlp_layers(classifier))[:, 0]
        loss = classifier_loss(logits[:batch_size], logits[batch_size:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            score = classifier_loss(*_log_ratios(classifier, x, rest, validation, checked, clamp=False)).item()
            if best_state is None or score < best:
                best, best_state = score, copy.deepcopy(classifier.state_dict())
    classifier.load_state_dict(best_state)
    return classifier


@torch.no_grad()
def _log_ratios(
    classifier: nn.Sequential, x: Tensor, rest: Tensor, rows: Tensor, product: Pairs, clamp: bool = True
) -> Pairs:
    """Log ratios at the joint rows and at the product pairs."""

    def read(i: Tensor, j: Tensor) -> Tensor:
        logits = torch.cat(
            [
                mlp(torch.cat([x[a], rest[b]], 1), mlp_layers(classifier))[:, 0]
                for a, b in zip(i.split(READ_ROWS), j.split(READ_ROWS), strict=True)
            ]
        )
        return logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT) if clamp else logits

    return read(rows, rows), read(*product)


# -- samples ----------------------------------------------------------------------------------------------------------


def _split(order: Tensor, held_out: float) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation (a fifth of what is not held out) and held-out rows."""
    test = round(len(order) * held_out)
    validation = (len(order) - test) // 5
    return order[test + validation :], order[test : test + validation], order[:test]


def _standardise(values: Tensor, rows: Tensor) -> Tensor:
    """float32 columns of mean 0 and standard deviation 1 over `rows`."""
    mean, std = values[rows].mean(0), values[rows].std(0)
    return ((values - mean) / torch.where(std > 0, std, 1.0)).float()


def _one_hot_strata(label: Tensor, k: int) -> Tensor:
    if label.shape[1] != 1:
        raise EstimatorError(
            WHERE, f"a discrete z of {label.shape[1]} columns", "one column", "Number the joint values of z."
        )
    return nn.functional.one_hot(label_strata(label, k).group).float()
