"""The GPU's host functions: each operation runs fused (triton.py) or chunked (chunked.py), as the dispatch table says.

What goes through here is opaque to torch.compile, so that the choice is made when it runs. The third candidate, eager
torch, is differentiated by autograd and is chosen before (op.py); here it counts as chunked.
"""

from __future__ import annotations

from torch import Tensor

from engine.kernels.mi_bounds import chunked, plan
from engine.kernels.mi_bounds import triton as fused


def statistics(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, kind: str, tau: float
) -> tuple[Tensor, Tensor]:
    plain = positives is None and not exclude_self
    home = fused if plain and is_fused("mi_bound", q, k) else chunked
    return home.statistics(q, k, scale, positives, exclude_self, kind, tau)


def gradients(q: Tensor, k: Tensor, *rest: Tensor | bool | None) -> tuple[Tensor, Tensor]:
    return (fused if is_fused("mi_bound", q, k) else chunked).gradients(q, k, *rest)


def symmetric_statistics(q: Tensor, k: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (fused if is_fused("mi_bound", q, k) else chunked).symmetric_statistics(q, k, scale)


def infonce(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, algorithm: str, gradients: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    home = fused if algorithm == "fused" else chunked
    return home.infonce(q, k, scale, positives, exclude_self, gradients)


def infonce_keys(*arguments: Tensor | bool | None) -> Tensor:
    return fused.infonce_keys(*arguments)


def infonce_gradients(*arguments: Tensor | bool | None) -> tuple[Tensor, Tensor]:
    return chunked.infonce_gradients(*arguments)


def is_fused(operation: str, q: Tensor, k: Tensor) -> bool:
    return plan.choose(operation, q, k) == "fused"
