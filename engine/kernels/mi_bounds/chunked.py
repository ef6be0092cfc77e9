"""Statistics and gradients of embeddings' score matrices on the GPU by library products. Signatures: cpu.py.

A chunk of rows at a time: the library multiplies, one kernel (scores.py) turns the chunk's scores into what is kept of
them, and in backward passes into the scores' gradient, which the library multiplies again. Whatever the width of the
embeddings, that is one product in a forward pass and three in a backward pass; `infonce_mean` needs three in all. The
sums over the rows, dk, are taken in fp32 in the order of the chunks. Results are bitwise the same every time.

Memory: `plan.CHUNK_BYTES` for a chunk (or what `plan.LEAST_ROWS` rows need, if that is more), and fp32 copies of dq and
dk.

fp32 products follow `torch.backends.cuda.matmul.allow_tf32`; the library rounds to tf32 correctly. Embeddings of 16
bits are multiplied as they are, with fp32 sums and fp32 results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from engine.kernels.mi_bounds import plan
from engine.kernels.mi_bounds import scores as kernels
from engine.kernels.mi_bounds.statistics import LSE, SHARE

# fp16 has few small numbers: gradients are multiplied there so that the largest ones come close to this.
HALF_RANGE = 2.0**14
# torch before 2.8 has no products of 16 bits with fp32 results
HAS_MIXED = "dtype_out" in torch.ops.aten.bmm.overloads()


class _Chunks:
    """Iterates over (first row, scores [G, n, M] not yet scaled, memory for their gradient in the dtype of q)."""

    def __init__(self, q: Tensor, k: Tensor, with_gradient: bool):
        self.q, self.columns = q, k.transpose(1, 2)
        groups, rows, _ = q.shape
        count = k.shape[1]
        narrow = with_gradient and q.dtype != torch.float32
        self.height = plan.chunk_rows(groups, rows, count, q.element_size(), with_gradient)
        size = groups * self.height * count
        self.scores = torch.empty(size, dtype=torch.float32, device=q.device)
        self.narrow = torch.empty(size, dtype=q.dtype, device=q.device) if narrow else self.scores

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        groups, rows, _ = self.q.shape
        count = self.columns.shape[2]
        for begin in range(0, rows, self.height):
            part = self.q[:, begin : begin + self.height]
            shape = (groups, part.shape[1], count)
            scores = self.scores[: math.prod(shape)].view(shape)
            _product(part, self.columns, scores)
            yield begin, scores, self.narrow[: math.prod(shape)].view(shape)


class _Sums:
    """dq and dk from chunks of the scores' gradient, in fp32; `total` gives them scaled, in the embeddings' dtype."""

    def __init__(self, q: Tensor, k: Tensor):
        self.q, self.k = q, k
        self.dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        self.dk = torch.empty(k.shape, dtype=torch.float32, device=k.device)

    def add(self, begin: int, gradient: Tensor) -> None:
        part = slice(begin, begin + gradient.shape[1])
        _product(gradient, self.k, self.dq[:, part])
        _product(gradient.transpose(1, 2), self.q[:, part], self.dk, add=begin > 0)

    def scaled(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Times `factor`, 0-d or [G, 1, 1]."""
        if self.q.dtype == torch.float32:
            return self.dq.mul_(factor), self.dk.mul_(factor)
        dq, dk = torch.empty_like(self.q), torch.empty_like(self.k)
        return torch.mul(self.dq, factor, out=dq), torch.mul(self.dk, factor, out=dk)


def statistics(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, kind: str, tau: float
) -> tuple[Tensor, Tensor]:
    """One product."""
    q, k = q.contiguous(), k.contiguous()
    joint, rest = kernels.rows_like(q, 2)
    for begin, scores, _ in _Chunks(q, k, with_gradient=False):
        kernels.rows(scores, scale, positives, exclude_self, kind, tau, begin, joint, rest)
    return joint, rest


def symmetric_statistics(q: Tensor, k: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One product: joint [G, B], LSE of the other scores of every row and of every column."""
    q, k = q.contiguous(), k.contiguous()
    joint, rest, rest_columns = kernels.rows_like(q, 3)
    parts = torch.empty((2, q.shape[0], kernels.PARTS, k.shape[1]), dtype=torch.float32, device=q.device)
    for begin, scores, _ in _Chunks(q, k, with_gradient=False):
        kernels.rows(scores, scale, None, False, "lse", 0.0, begin, joint, rest)
        kernels.columns(scores, scale, begin, parts)
    kernels.merge_parts(parts, rest_columns)
    return joint, rest, rest_columns


def gradients(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    positives: Tensor | None,
    exclude_self: bool,
    row_weight: Tensor,
    row_shift: Tensor | None,
    col_weight: Tensor | None,
    col_shift: Tensor | None,
    diagonal: Tensor,
) -> tuple[Tensor, Tensor]:
    """Three products."""
    q, k = q.contiguous(), k.contiguous()
    factor, (row_weight, col_weight, diagonal) = in_range(q, scale, row_weight, col_weight, diagonal)
    row_shift, col_shift = contiguous(row_shift), contiguous(col_shift)
    sums = _Sums(q, k)
    for begin, scores, gradient in _Chunks(q, k, with_gradient=True):
        kernels.gradients(
            scores, scale, positives, exclude_self, row_weight, row_shift, col_weight, col_shift, diagonal, begin,
            gradient,
        )  # fmt: skip
        sums.add(begin, gradient)
    return sums.scaled(factor)


def infonce(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, gradients: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `op._InfoNCE` wants it. One product; three for `gradients` "both"."""
    q, k = q.contiguous(), k.contiguous()
    (losses,) = kernels.rows_like(q, 1)
    state = torch.empty((4, *losses.shape), dtype=torch.float32, device=q.device)
    if gradients != "both":
        for begin, scores, _ in _Chunks(q, k, with_gradient=False):
            kernels.infonce_rows(scores, scale, positives, exclude_self, begin, losses, state, None, 1.0)
        return losses, state, *(torch.empty(0, dtype=torch.float32, device=q.device) for _ in range(2))
    range_ = HALF_RANGE if q.dtype == torch.float16 else 1.0
    sums = _Sums(q, k)
    for begin, scores, gradient in _Chunks(q, k, with_gradient=True):
        kernels.infonce_rows(scores, scale, positives, exclude_self, begin, losses, state, gradient, range_)
        sums.add(begin, gradient)
    factor = scale / range_ if range_ != 1 else scale
    return losses, state, sums.dq.mul_(factor), sums.dk.mul_(factor)


def infonce_gradients(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, weight: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """dq and dk from the gradient of the losses, `weight` [G, B]. Three products."""
    weight = -weight
    return gradients(
        q, k, scale, positives, exclude_self, weight, state[LSE], None, None, weight * state[SHARE]
    )  # fmt: skip


def mixture(
    q: Tensor, k: Tensor, scale: Tensor, log_baseline: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One product."""
    q, k, a = q.contiguous(), k.contiguous(), log_baseline.contiguous()
    found, state = kernels.rows_like(q, 4), kernels.state_like(q)
    for begin, scores, _ in _Chunks(q, k, with_gradient=False):
        kernels.mixture(scores, scale, a, alpha, begin, found, state)
    return tuple(found)


def mixture_gradients(
    q: Tensor, k: Tensor, scale: Tensor, log_baseline: Tensor, alpha: float, rest: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Three products."""
    q, k, a = q.contiguous(), k.contiguous(), log_baseline.contiguous()
    marginal = weight - rest
    # the gradient of row i is at most |grad| (1 + e^weight_i) / B
    factor, (grad,) = in_range(q, scale, grad[:, None], share=lambda: (1 + weight.exp()) / q.shape[1])
    state, unused = kernels.state_like(q), kernels.rows_like(q, 4)
    sums = _Sums(q, k)
    for begin, scores, gradient in _Chunks(q, k, with_gradient=True):
        kernels.mixture(scores, scale, a, alpha, begin, unused, state)
        kernels.mixture_gradients(scores, scale, a, alpha, state, marginal, grad, begin, gradient)
        sums.add(begin, gradient)
    return sums.scaled(factor)


def in_range(
    q: Tensor, scale: Tensor, *weights: Tensor | None, share: Callable[[], Tensor] | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """Weights [G, n] of a gradient as they are to be used, contiguous, and the factor of the products of embeddings.

    The factor is `scale`. For fp16 weights are multiplied so that the largest gradient, the largest weight times the
    largest `share` [G, n], comes to HALF_RANGE, and the factor [G, 1, 1] undoes that: fp16 would lose the gradients of
    a large batch.
    """
    found = [contiguous(w) for w in weights]
    if q.dtype != torch.float16:
        return scale, found
    peak = torch.stack([w.abs().amax(1) for w in found if w is not None]).amax(0)
    if share is not None:
        peak = peak * share().amax(1)
    range_ = HALF_RANGE / torch.where(peak > 0, peak, HALF_RANGE)
    found = [None if w is None else w * range_[:, None] for w in found]
    return (scale / range_)[:, None, None], found


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """a b [G, m, n], or out + a b, into `out` in fp32."""
    if a.dtype != torch.float32 and not (a.is_cuda and HAS_MIXED):
        a, b = a.float(), b.float()
    mixed = (torch.float32,) if a.dtype != torch.float32 else ()
    if add:
        torch.baddbmm(out, a, b, *mixed, out=out)
    else:
        torch.bmm(a, b, *mixed, out=out)
