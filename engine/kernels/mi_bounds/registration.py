"""The bounds' operations in torch: schemas, shapes of the results, launches on a GPU.

mi_infonce and the two that follow it are InfoNCE by rows. mi_statistics and mi_gradients serve every bound but the
interpolated one, whose operations are mi_mixture and mi_mixture_gradients. mi_score_* take scores that are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.mi_bounds import plan
from engine.kernels.registry import register_from

_PAIR = "Tensor q, Tensor k, Tensor scale"
_SOURCE = f"{_PAIR}, Tensor? positives, bool exclude_self"


def _exact(tensor: Tensor, *shape: int) -> Tensor:
    """Room for statistics: fp32, or fp64 for fp64."""
    return tensor.new_empty(shape, dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def _rows(count: int):
    """The shapes of `count` statistics [G, B] of the first argument's rows."""
    return lambda first, *rest: tuple(_exact(first, *first.shape[:2]) for _ in range(count))


def _infonce(q, k, scale, positives, exclude_self, algorithm, gradients):
    dq = q.shape if gradients in ("rows", "both") else (0,)
    dk = k.shape if gradients == "both" else (0,)
    return _exact(q, *q.shape[:2]), _exact(q, 4, *q.shape[:2]), _exact(q, *dq), _exact(k, *dk)


def _fused(q, k, *rest):
    return *_rows(2)(q), _exact(q, q.shape[0]), _exact(q, *q.shape), _exact(k, *k.shape)


def _like_both(q, k, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _like_keys(q, k, *rest):
    return k.new_empty(k.shape)


def _like_scores(scores, *rest):
    return scores.new_empty(scores.shape)


_add = register_from("engine.kernels.mi_bounds", "mi_")

_add(
    "infonce",
    f"({_SOURCE}, str algorithm, str gradients) -> (Tensor, Tensor, Tensor, Tensor)",
    "cuda", _infonce, plan.infonce_launches,
)  # fmt: skip
_add(
    "infonce_keys",
    f"({_SOURCE}, Tensor weight, Tensor state) -> Tensor",
    "cuda", _like_keys, plan.infonce_keys_launches,
)  # fmt: skip
_add(
    "infonce_gradients",
    f"({_SOURCE}, Tensor weight, Tensor state) -> (Tensor, Tensor)",
    "cuda", _like_both, plan.infonce_gradients_launches,
)  # fmt: skip
_add(
    "symmetric_statistics",
    f"({_PAIR}) -> (Tensor, Tensor, Tensor)",
    "cuda", _rows(3), plan.symmetric_launches,
)  # fmt: skip
_add(
    "statistics",
    f"({_SOURCE}, str kind, float tau) -> (Tensor, Tensor)",
    "cuda", _rows(2), plan.statistics_launches,
)  # fmt: skip
_add(
    "gradients",
    f"({_SOURCE}, Tensor row_weight, Tensor? row_shift, Tensor? col_weight, Tensor? col_shift, Tensor diagonal)"
    " -> (Tensor, Tensor)",
    "cuda", _like_both, plan.gradients_launches,
)  # fmt: skip
# No GPU kernel: a program that owns all rows of a group would not fit in its registers. There mi_infonce does this.
_add(
    "fused",
    f"({_SOURCE}, str kind, float tau, str weighting, Tensor? offset) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    None, _fused, 1,
)  # fmt: skip
_add(
    "mixture",
    f"({_PAIR}, Tensor log_baseline, float alpha) -> (Tensor, Tensor, Tensor, Tensor)",
    "chunked", _rows(4), plan.mixture_launches,
)  # fmt: skip
_add(
    "mixture_gradients",
    f"({_PAIR}, Tensor log_baseline, float alpha, Tensor rest, Tensor weight, Tensor grad) -> (Tensor, Tensor)",
    "chunked", _like_both, plan.mixture_gradient_launches,
)  # fmt: skip
_add(
    "score_statistics",
    "(Tensor scores, str kind, float tau) -> (Tensor, Tensor)",
    "scores", _rows(2), 1,
)  # fmt: skip
_add(
    "score_gradients",
    "(Tensor scores, Tensor row_weight, Tensor? row_shift, Tensor diagonal) -> Tensor",
    "scores", _like_scores, 1,
)  # fmt: skip
_add(
    "score_mixture",
    "(Tensor scores, Tensor log_baseline, float alpha) -> (Tensor, Tensor, Tensor, Tensor)",
    "scores", _rows(4), 1,
)  # fmt: skip
_add(
    "score_mixture_gradients",
    "(Tensor scores, Tensor log_baseline, float alpha, Tensor rest, Tensor weight, Tensor grad) -> Tensor",
    "scores", _like_scores, 2,
)  # fmt: skip
