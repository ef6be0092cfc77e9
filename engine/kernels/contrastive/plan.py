"""Which algorithm the contrastive losses take on a GPU, and what it launches. Does not import triton.

chunked  triton.py: library products of a bounded chunk of scores, one kernel for its statistics or its gradient
eager    plain torch, all scores at once
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engine.kernels import dispatch
from engine.kernels.mi_bounds import plan as bounds


def choose(q: Tensor, k: Tensor) -> str:
    """The algorithm for q [G, B, d] and k [G, M, d]."""
    groups, rows, width = q.shape
    sizes = {"groups": groups, "rows": rows, "columns": k.shape[1], "width": width}
    return dispatch.choose("contrastive", dtype=q.dtype, device=q.device, sizes=sizes)


def rule(precision: str, sizes: Mapping[str, int]) -> str:
    """Nothing was measured. Plain torch makes several tensors of the size of the scores, in fewer launches."""
    return "chunked" if bounds.has_kernels(sizes) else "eager"


def statistics_launches(q: Tensor, k: Tensor, *rest) -> int:
    return bounds.score_launches(q, k)


def gradients_launches(q: Tensor, k: Tensor, scale, bias, hardness, with_keys, grads, *rest) -> int:
    """As those of the bounds. The rows' weights of several groups are put in order."""
    turned_back = 2 if bias is not None and q.dtype == torch.float16 else 0
    return bounds.gradient_launches(q, k) + bounds.scalings(q, 1, 3 if hardness else 0) + (q.shape[0] > 1) + turned_back


def _measured(device: torch.device, dtype: torch.dtype, sizes: dispatch.Sizes) -> Callable[[], None]:
    """What `dispatch.measure` times: supervised contrastive learning."""
    from engine.kernels.mi_bounds.op import infonce

    generator = torch.Generator(device).manual_seed(0)
    shape = sizes["groups"], sizes["rows"], sizes["width"]
    q, k = (torch.randn(shape, generator=generator, device=device) / math.sqrt(shape[2]) for _ in range(2))
    q, k = (x.to(dtype).requires_grad_() for x in (q, k))
    labels = torch.arange(shape[1], device=device) % 100

    def run() -> None:
        torch.autograd.grad(infonce(q, k, labels=labels).sum(), (q, k))

    return run


dispatch.register(
    "contrastive",
    bounds.ORDER,
    {"chunked": bounds.CANDIDATES["chunked"], "eager": bounds.CANDIDATES["eager"]},
    rule,
    work=_measured,
    classes=bounds.CLASSES,
)
