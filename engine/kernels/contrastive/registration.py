"""The contrastive losses' operations in torch: schemas, shapes of the results, launches on a GPU."""

from __future__ import annotations

from torch import Tensor

from engine.kernels.contrastive import plan
from engine.kernels.contrastive.losses import ROWS
from engine.kernels.mi_bounds.registration import _exact
from engine.kernels.registry import register_from

_EMBEDDINGS = "Tensor q, Tensor k, Tensor scale, Tensor? bias, float hardness"
_PAIRS = (
    "Tensor? positives, Tensor? labels, Tensor? key_labels, Tensor? row_ids, Tensor? key_ids, Tensor? mask, "
    "bool exclude_self"
)


def _statistics(q: Tensor, *rest) -> Tensor:
    return _exact(q, ROWS, *q.shape[:2])


def _gradients(q: Tensor, k: Tensor, scale, bias, hardness, with_keys: bool, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape if with_keys else 0), _exact(q, *q.shape[:2])


def _fused(q: Tensor, k: Tensor, scale, bias, joint, decoupled, hardness, smoothing, with_keys: bool, *rest):
    rows = [_exact(q, *q.shape[:2]) for _ in range(3)]
    return *rows[:2], q.new_empty(q.shape), k.new_empty(k.shape if with_keys else 0), rows[2]


_add = register_from("engine.kernels.contrastive", "contrastive_")

_add(
    "statistics", f"({_EMBEDDINGS}, bool with_total, {_PAIRS}) -> Tensor", "triton", _statistics,
    plan.statistics_launches,
)  # fmt: skip
_add(
    "gradients",
    f"({_EMBEDDINGS}, bool with_keys, Tensor grads, Tensor state, {_PAIRS}) -> (Tensor, Tensor, Tensor)",
    "triton", _gradients, plan.gradients_launches,
)  # fmt: skip
# No GPU kernel: there the statistics and the gradients are two passes.
_add(
    "fused",
    "(Tensor q, Tensor k, Tensor scale, Tensor? bias, Tensor? joint, bool decoupled, float hardness, float smoothing, "
    f"bool with_keys, {_PAIRS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    None, _fused, 1,
)  # fmt: skip
