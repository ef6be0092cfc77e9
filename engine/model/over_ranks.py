"""Estimates from the batch that all ranks hold together.

Where it can, each rank runs the networks on its own rows. Separate critics gather embeddings; concat critics gather x,
and each rank scores its own y; classifiers of conditional terms gather their logits. Any other module gets the gathered
features and computes the joined batch on every rank.

Every decision that depends on values is taken from the same values on all ranks, so that no rank waits for another.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.kernels.cmi import READINGS
from engine.kernels.compiling import as_read
from engine.kernels.critics.op import entries, grouped_mlp
from engine.kernels.gradients import update_buffer
from engine.kernels.knn_product.op import ProductRows
from engine.kernels.mi_bounds.op import mi_lower_bound
from engine.kernels.ranks.agreement import agree, checked, like, true_on_all
from engine.kernels.ranks.autograd import BoundSettings
from engine.kernels.ranks.bounds import concat_bound
from engine.kernels.ranks.collectives import gather_rows
from engine.kernels.ranks.group import Ranks
from engine.model.cmi import CMIEstimator
from engine.model.estimators import (
    Estimate,
    Estimates,
    MIEstimator,
    finite,
    mlp_layers,
    or_zero,
    own_type,
    readable,
    run_mlp,
    scalars,
)

if TYPE_CHECKING:
    from engine.model.groups import CMIGroup, MIGroup

Rows = Sequence[Tensor]


# -- rows of all ranks -----------------------------------------------------------------------------


def gather_features(features: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Features [b, ...] of all ranks, rank 0's rows first, with gradients. b may be 0, and differ between ranks."""
    first = next(iter(features.values()))
    with checked(ranks, first):
        rows = {f"rows of {name}": len(value) for name, value in features.items()}
        same = {f"width of {name}": value.shape[1:].numel() for name, value in features.items()}
        same |= {f"bytes of a number of {name}": value.element_size() for name, value in features.items()}
        same |= {f"gradients of {name}": like(value) for name, value in features.items()}
    counts = agree("features with gather", ranks, first.device, rows, same, empty=True)
    return {name: gather_rows(value, ranks, counts[f"rows of {name}"]) for name, value in features.items()}


def gather_products(products: Mapping[str, Rows], ranks: Ranks) -> dict[str, ProductRows]:
    """Product rows of all ranks, rank 0's first."""
    with checked(ranks):
        kept = {n: rows if isinstance(rows, ProductRows) else ProductRows(*rows, k=1) for n, rows in products.items()}
    parts = {f"{name} {part}": getattr(rows, part) for name, rows in kept.items() for part in "xyz"}
    device = next(iter(parts.values())).device
    agree("product rows", ranks, device, {}, {f"{name} rows a query": rows.k for name, rows in kept.items()})
    gathered = gather_features(parts, ranks)
    return {name: ProductRows(*(gathered[f"{name} {p}"] for p in "xyz"), k=rows.k) for name, rows in kept.items()}


def all_finite(ranks: Ranks, *tensors: Tensor) -> bool:
    """`finite` on every rank, as far as values are `readable`."""
    return not readable(tensors[0]) or true_on_all(ranks, finite(*tensors), tensors[0].device)


# -- mutual information ----------------------------------------------------------------------------


def mi_estimate(estimator: MIEstimator, x: Tensor, y: Tensor, ranks: Ranks) -> Estimate:
    """`MIEstimator.forward` of the joined batch.

    Args:
        estimator: the estimator.
        x, y: this rank's rows.
        ranks: the ranks.
    """
    e, where = estimator, f"{estimator._where()} with gather"
    layers = None
    if e.group_key is not None and e.critic.kind == "concat":
        layers = mlp_layers(e.critic.f, e.critic.activation)
    if e.group_key is None or (e.critic.kind == "concat" and layers is None):
        return joined(e, (x, y), ranks)
    average = None
    with checked(ranks, x, y):
        if e.bound == "mine" and e.keeps_average:
            average = as_read("MINE's moving average", e.log_ema, e.training)
        e._check_shapes(x, y)
        x, y = own_type(where, e, x, y)
        baseline = e.baseline(y) if e.bound in ("tuba", "interpolate") else None
        if layers is None:
            q, k = run_mlp(e.critic.h, y, e.critic.activation), run_mlp(e.critic.g, x, e.critic.activation)
    if layers is not None:
        settings = BoundSettings(e.bound, e.alpha, e.smile_tau, 1.0 if average is None else e.ema_rate)
        value, new_average = concat_bound(
            x, y, layers, e.critic.activation, ranks, settings, transpose=e.critic.transpose, log_baseline=baseline,
            log_ema=average,
        )  # fmt: skip
        seen = (value,)
    else:
        value, new_average = _bound(e, q, k, baseline, average, ranks)
        seen = (value, q, k)
    if not all_finite(ranks, *seen):
        return e._degenerate("non-finite scores on a rank", "finite scores", x, y)
    if average is not None and e.training:
        update_buffer("MINE's moving average", e.log_ema, new_average, e.on_degenerate == "skip")
    value = or_zero(value, e.on_degenerate)
    return Estimate(value.detach(), value, -value)


def _bound(
    e: MIEstimator, q: Tensor, k: Tensor, baseline: Tensor | None, average: Tensor | None, ranks: Ranks
) -> tuple[Tensor, Tensor | None]:
    settings = {
        "bound": e.bound, "alpha": e.alpha, "smile_tau": e.smile_tau, "log_baseline": baseline,
        "gather": "ring" if ranks.ring else True, "group": ranks.group,
    }  # fmt: skip
    if average is None:
        return mi_lower_bound(q, k, **settings), None
    return mi_lower_bound(q, k, log_ema=average, ema_rate=e.ema_rate, **settings)


def mi_group_estimates(group: MIGroup, features: Mapping[str, Tensor], ranks: Ranks) -> Estimates:
    """`MIGroup.forward` of the joined batch."""
    e, inputs = group.example, [features[source] for source in group.sources]
    widths = [layer.weight.shape[2] for layer in group.first]
    average = None
    with checked(ranks, inputs[0]):
        if e.bound == "mine":
            average = as_read("MINE's moving average", group.log_ema, group.training)
    fits = all(x.dim() == 2 and x.shape == (len(inputs[0]), w) for x, w in zip(inputs, widths, strict=True))
    if not true_on_all(ranks, fits and len(inputs[0]) > 0, inputs[0].device):
        return group(gather_features({name: features[name] for name in group.sources}, ranks))
    first, rest = ([(layer.weight, layer.bias) for layer in layers] for layers in (group.first, group.rest))
    embedded = grouped_mlp(inputs, first, rest)
    value, new_average = _bound(
        e, entries(embedded, group.rows), entries(embedded, group.columns), None, average, ranks
    )
    if not all_finite(ranks, value, embedded):
        return group(gather_features({name: features[name] for name in group.sources}, ranks))
    if average is not None and group.training:
        update_buffer("MINE's moving average", group.log_ema, new_average, e.on_degenerate == "skip")
    return Estimates(group.names, or_zero(value, e.on_degenerate))


# -- conditional mutual information ----------------------------------------------------------------


def cmi_estimate(estimator: CMIEstimator, joint: Rows, product: Rows, ranks: Ranks) -> Estimate:
    """`CMIEstimator.forward` of the joint and the product rows of all ranks."""
    e, where = estimator, f"{estimator._where()} with gather"
    if type(e) is not CMIEstimator:
        return joined(e, (joint, product), ranks)
    with checked(ranks, joint[0]):
        e._check_shapes("joint", joint)
        e._check_shapes("product", product)
        parts = own_type(where, e, *joint, *product)
        joint, product = tuple(parts[:3]), tuple(parts[3:])
    sizes = {"joint rows": len(joint[0]), "product rows": len(product[0])}
    same = {"gradients": max(like(part) for part in (*joint, *product))}
    counts = agree(where, ranks, joint[0].device, sizes, same, empty=True)
    b, p = counts["joint rows"], counts["product rows"]
    if sum(b) < 2 or sum(p) == 0:
        return e._degenerate(f"{b} joint and {p} product rows on the ranks", "some of both", joint, product)
    logits = run_mlp(e.classifier, torch.cat([e._row(joint), e._row(product)]))
    of_joint, of_product = logits.split([len(joint[0]), len(product[0])])
    of_joint, of_product = gather_rows(of_joint, ranks, b), gather_rows(of_product, ranks, p)
    if not finite(of_joint, of_product):
        return e._degenerate("non-finite logits", "finite logits", joint, product)
    with torch.autocast(logits.device.type, enabled=False):
        loss, surrogate, readings = e.read_logits(of_joint, of_product)
    surrogate, loss = (or_zero(t, e.on_degenerate) for t in (surrogate, loss))
    return Estimate(surrogate.detach(), surrogate, loss, dict(zip(READINGS, scalars(readings), strict=True)))


def cmi_group_estimates(
    group: CMIGroup, features: Mapping[str, Tensor], products: Mapping[str, Rows], ranks: Ranks
) -> Estimates:
    """`CMIGroup.forward` of the joint and the product rows of all ranks."""
    with checked(ranks, features[group.sources[0]]):
        logits = group.logits(features, products) if type(group.example) is CMIEstimator else None
    device = features[group.sources[0]].device
    estimates = None
    if true_on_all(ranks, logits is not None, device):
        of_joint, of_product = logits or ()
        sizes = {"joint rows": of_joint.shape[1], "product rows": of_product.shape[1]}
        same = {"terms": len(of_joint), "gradients of joint rows": like(of_joint)}
        same["gradients of product rows"] = like(of_product)
        counts = agree("conditional terms with gather", ranks, device, sizes, same)
        of_joint = gather_rows(of_joint, ranks, counts["joint rows"], 1)
        estimates = group.read(of_joint, gather_rows(of_product, ranks, counts["product rows"], 1))
    if estimates is not None:
        return estimates
    needed = {name: features[name] for name in group.sources}
    own = {name: products[name] for name in group.names}
    return group(gather_features(needed, ranks), gather_products(own, ranks))


# -- any module ------------------------------------------------------------------------------------


def joined(module: nn.Module, arguments: tuple, ranks: Ranks) -> Estimate:
    """What a module gives for the gathered features: as x, y (and z), or as (x, y, z) of joint and of product rows."""
    if isinstance(arguments[0], Tensor):
        rows = gather_features(dict(zip("xyz", arguments, strict=False)), ranks)
        arguments = tuple(rows.values())
    else:
        joint = gather_features(dict(zip("xyz", arguments[0], strict=True)), ranks)
        product = gather_products({"term": arguments[1]}, ranks)["term"]
        arguments = tuple(joint.values()), tuple(product)
    if getattr(module, "gather", False) is not False:
        module = copy.copy(module)  # shares parameters and buffers
        module.gather, module.group = False, None
    return module(*arguments)


def estimate_of(module: nn.Module, arguments: tuple, ranks: Ranks) -> Estimate:
    """The estimate of a term's own module from the joined batch."""
    if isinstance(module, MIEstimator):
        x, y = arguments
        return mi_estimate(module, x, y, ranks)
    if isinstance(module, CMIEstimator):
        joint, product = arguments
        return cmi_estimate(module, joint, product, ranks)
    return joined(module, arguments, ranks)
