"""Which algorithm the bounds take on a GPU, how it divides its work, and what it launches. Does not import triton.

fused    triton.py: embeddings of up to MAX_WIDTH, no memory beside the outputs
chunked  chunked.py: library products of CHUNK_BYTES of scores at a time, any width
eager    plain torch, all scores at once
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engine.kernels import dispatch

# Bytes of a chunk of the chunked algorithm: its scores in fp32, and their gradient where it does not take their place.
CHUNK_BYTES = 256 << 20
# How many numbers of bf16 hold one of fp32, and how many multiplications make splitting worthwhile.
PARTS = 3
LEAST_SPLIT = 1 << 31
# Of the parts of two numbers, largest first, those whose products are not below the numbers' own rounding.
KEPT = ((0, 0), (0, 1), (1, 0), (0, 2), (2, 0), (1, 1))
# With how many of the other number's parts, the largest first, each part is multiplied.
COUNTS = tuple(sum(i == part for i, _ in KEPT) for part in range(PARTS))
LEAST_ROWS = 128
# The most bytes of scores in fp32 that plain torch is given. It makes several tensors of that size.
EAGER_BYTES = 1 << 30
# The widest embeddings that a fused program holds whole, so that it computes no product twice.
MAX_WIDTH = 128
# Rows from which fused programs are as many as an H100 has processors, about.
LEAST_FUSED_ROWS = 1 << 13


def is_split(q: Tensor, k: Tensor) -> bool:
    """Whether chunked products of fp32 q [G, B, d] and k [G, M, d] are taken as products of parts in bf16."""
    work = q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2]
    has_bf16 = (dispatch.architecture(q.device) or 80) >= 80
    return q.dtype == torch.float32 and dispatch.precision_of(q.dtype) == "fp32" and work >= LEAST_SPLIT and has_bf16


def gradient_bytes(q: Tensor, k: Tensor) -> int:
    """Bytes that the gradient of one score takes beside the score; 0 where it takes the score's place."""
    if is_split(q, k):
        return 2 * PARTS
    return q.element_size() if q.element_size() < 4 else 0


def chunk_rows(groups: int, rows: int, columns: int, gradient: int) -> int:
    """Rows of a chunk: as many as CHUNK_BYTES hold, at least LEAST_ROWS; chunks are of one size.

    Args:
        gradient: bytes of a score's gradient, beside the 4 of the score.
    """
    most = max(1, CHUNK_BYTES // (groups * columns * (4 + gradient) * LEAST_ROWS))
    blocks = math.ceil(rows / LEAST_ROWS)
    return max(1, min(rows, math.ceil(blocks / max(1, math.ceil(blocks / most))) * LEAST_ROWS))


def chunks(groups: int, rows: int, columns: int, gradient: int) -> int:
    return math.ceil(rows / chunk_rows(groups, rows, columns, gradient))


def choose(operation: str, q: Tensor, k: Tensor) -> str:
    """The algorithm for q [G, B, d] and k [G, M, d]."""
    groups, rows, width = q.shape
    sizes = {"groups": groups, "rows": rows, "columns": k.shape[1], "width": width}
    return dispatch.choose(operation, dtype=q.dtype, device=q.device, sizes=sizes)


def has_kernels(sizes: Mapping[str, int]) -> bool:
    """Whether one launch takes all groups. Where there are more, plain torch computes them."""
    return sizes["groups"] <= dispatch.MOST_PROGRAMS


def rule(precision: str, sizes: Mapping[str, int]) -> str:
    """The rule without measurements: fused if its programs, one per MAX_WIDTH rows, occupy a GPU's processors.

    With fewer programs library products are faster. They are also faster for fp32, which a fused kernel multiplies as
    three products of tf32.
    """
    if not has_kernels(sizes):
        return "eager"
    many = sizes["groups"] * sizes["rows"] >= LEAST_FUSED_ROWS
    return "fused" if sizes["width"] <= MAX_WIDTH and precision in ("bf16", "fp16") and many else "chunked"


CANDIDATES = {
    "fused": lambda sizes: sizes["width"] <= MAX_WIDTH and has_kernels(sizes),
    "chunked": has_kernels,
    "eager": lambda sizes: 4 * sizes["groups"] * sizes["rows"] * sizes["columns"] <= EAGER_BYTES,
}

# The sizes that decide, and those that `dispatch.measure` takes.
ORDER = ("width", "rows")
CLASSES = tuple(
    {"groups": groups, "rows": rows, "columns": rows, "width": width}
    for width, all_rows in ((128, (128, 1024, 4096, 16384, 65536)), (512, (1024, 4096, 16384)), (768, (16384,)))
    for rows in all_rows
    for groups in [5 if rows == 128 else 1]
)


SPLITTING = 4  # launches that split q and k, and put their parts in order


def roundings(q: Tensor) -> int:
    """Launches that round operands to tf32."""
    return 2 if dispatch.precision_of(q.dtype) == "tf32" else 0


def scalings(q: Tensor, weights: int, more: int = 0) -> int:
    """Launches that bring `weights` weights of a gradient into the range of fp16."""
    return 3 * weights + 8 + more if dispatch.precision_of(q.dtype) == "fp16" else 0


def gradient_launches(q: Tensor, k: Tensor) -> int:
    """Of chunked gradients: three products and one kernel per chunk, then dq and dk are scaled.

    Split embeddings take a product for each of their parts, for dq and for dk, and the parts' sums.
    """
    if is_split(q, k):
        return SPLITTING + (2 + 2 * PARTS + 1) * _chunks(q, k, True) + 1 + 2
    return 4 * _chunks(q, k, True) + 2


def score_launches(q: Tensor, k: Tensor, kernels: int = 1) -> int:
    """Of a pass over the scores alone: one product and `kernels` kernels per chunk."""
    return (SPLITTING if is_split(q, k) else 0) + (1 + kernels) * _chunks(q, k, False)


def infonce_launches(q, k, scale, positives, exclude_self, algorithm, gradients) -> int:
    if algorithm == "fused":
        return 1 + roundings(q)
    if gradients == "both":
        return gradient_launches(q, k) + (dispatch.precision_of(q.dtype) == "fp16")
    return score_launches(q, k)


def infonce_keys_launches(q, *rest) -> int:
    return 1 + roundings(q) + scalings(q, 1)


def infonce_gradients_launches(q, k, *rest) -> int:
    return 2 + gradient_launches(q, k) + scalings(q, 2)


def statistics_launches(q, k, scale, positives, exclude_self, *rest) -> int:
    if choose("mi_bound", q, k) == "fused" and positives is None and not exclude_self:
        return 1 + roundings(q)
    return score_launches(q, k)


def symmetric_launches(q, k, scale) -> int:
    if choose("mi_bound", q, k) == "fused":
        return 2 * (1 + roundings(q))
    return score_launches(q, k, 2) + 1


def gradients_launches(q, k, scale, positives, exclude_self, row_weight, row_shift, col_weight, *rest) -> int:
    fused = choose("mi_bound", q, k) == "fused"
    return (2 + roundings(q) if fused else gradient_launches(q, k)) + scalings(q, 2 + (col_weight is not None))


def mixture_launches(q, k, *rest) -> int:
    return score_launches(q, k)


def mixture_gradient_launches(q, k, *rest) -> int:
    return gradient_launches(q, k) + _chunks(q, k, True) + scalings(q, 1, 5)


def _chunks(q: Tensor, k: Tensor, with_gradient: bool) -> int:
    return chunks(q.shape[0], q.shape[1], k.shape[1], gradient_bytes(q, k) if with_gradient else 0)


def _measured(operation: str) -> Callable[[torch.device, torch.dtype, dispatch.Sizes], Callable[[], None]]:
    """What `dispatch.measure` times."""

    def prepare(device: torch.device, dtype: torch.dtype, sizes: dispatch.Sizes) -> Callable[[], None]:
        from engine.kernels.mi_bounds.op import infonce, mi_lower_bound

        generator = torch.Generator(device).manual_seed(0)
        shape = sizes["groups"], sizes["rows"], sizes["width"]
        q = torch.randn(shape, generator=generator, device=device)
        k = (q + torch.randn(shape, generator=generator, device=device)) / math.sqrt(2)
        q, k = ((sizes["width"] ** -0.25 * x).to(dtype).requires_grad_() for x in (q, k))

        def run() -> None:
            result = infonce(q, k) if operation == "infonce" else mi_lower_bound(q, k, bound="dv")
            torch.autograd.grad(result.sum(), (q, k))

        return run

    return prepare


for _operation in ("infonce", "mi_bound"):
    dispatch.register(_operation, ORDER, CANDIDATES, rule, work=_measured(_operation), classes=CLASSES)
