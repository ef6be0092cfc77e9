"""Statistics and gradients of embeddings' score matrices on the GPU by library products. Signatures: cpu.py.

The work is done one chunk of rows at a time. The library multiplies. One kernel (scores.py) turns the chunk's scores
into statistics, or in backward passes into the scores' gradient, which the library multiplies again. Whatever the width
of the embeddings, that is one product in a forward pass and three in a backward pass; InfoNCE's mean needs three in
all. The sums over the rows, dk, are taken in fp32 in the order of the chunks. Results are bitwise the same every time.

Memory: `plan.CHUNK_BYTES` for a chunk (or what `plan.LEAST_ROWS` rows need, if that is more), and fp32 copies of dq and
dk.

fp32 products follow `torch.backends.cuda.matmul.allow_tf32`; the library rounds to tf32 correctly. Embeddings of 16
bits are multiplied as they are, with fp32 sums and fp32 results.

Tensor cores have no product of fp32, and the library's takes eight times as long as one of tf32. Large ones are split:
an fp32 number is the sum of three of bf16, and of the nine products of two numbers' parts, the six that fp32 would
notice are taken, with fp32 sums (`plan.KEPT`). Memory then has six more copies of dk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from engine.kernels.mi_bounds import plan, splitting
from engine.kernels.mi_bounds import scores as kernels
from engine.kernels.mi_bounds.statistics import LSE, SHARE

# fp16 has few small numbers: gradients are multiplied there so that the largest ones come close to this.
HALF_RANGE = 2.0**14
# torch before 2.8 has no products of 16 bits with fp32 results
HAS_MIXED = "dtype_out" in torch.ops.aten.bmm.overloads()


class _Pair:
    """Embeddings as the products are given them.

    Attributes:
        q, k: as they were, contiguous.
        rows, columns: what their scores are the product of, [G, B, d'] and [G, d', M].
        q_parts, k_parts: where they are split, [G, B, 3 d] and [G, M, 3 d], the largest parts first.
    """

    def __init__(self, q: Tensor, k: Tensor):
        self.q, self.k = q.contiguous(), k.contiguous()
        self.split = plan.is_split(q, k)
        self.rows, columns = self.q, self.k
        if self.split:
            self.q_parts, self.k_parts = splitting.split(self.q), splitting.split(self.k)
            width = q.shape[2]
            pieces = [x.split(width, 2) for x in (self.q_parts, self.k_parts)]
            self.rows, columns = (torch.cat([p[pair[i]] for pair in plan.KEPT], 2) for i, p in enumerate(pieces))
        self.columns = columns.transpose(1, 2)


class _Chunks:
    """Iterates over (first row, scores [G, n, M] not yet scaled, memory for their gradient).

    The gradient has the dtype of q, or where embeddings are split [3, G, n, M] its parts.
    """

    def __init__(self, pair: _Pair, with_gradient: bool):
        self.pair = pair
        groups, rows, _ = pair.q.shape
        count, device = pair.k.shape[1], pair.q.device
        beside = plan.gradient_bytes(pair.q, pair.k) if with_gradient else 0
        self.height = plan.chunk_rows(groups, rows, count, beside)
        size = groups * self.height * count
        self.planes = (plan.PARTS,) if beside and pair.split else ()
        dtype = torch.bfloat16 if pair.split else pair.q.dtype
        self.scores = torch.empty(size, dtype=torch.float32, device=device)
        self.gradient = (
            torch.empty(math.prod(self.planes) * size, dtype=dtype, device=device) if beside else self.scores
        )

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        groups, rows, _ = self.pair.q.shape
        for begin in range(0, rows, self.height):
            part = self.pair.rows[:, begin : begin + self.height]
            shape = (groups, part.shape[1], self.pair.k.shape[1])
            scores = self.scores[: math.prod(shape)].view(shape)
            _product(part, self.pair.columns, scores)
            shape = (*self.planes, *shape)
            yield begin, scores, self.gradient[: math.prod(shape)].view(shape)


class _Sums:
    """dq and dk from chunks of the scores' gradient, in fp32; `scaled` gives them in the embeddings' dtype."""

    def __init__(self, pair: _Pair):
        self.pair = pair
        self.dq, self.dk = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (pair.q, pair.k))
        if pair.split:
            # of each part of the gradient with the parts of q that it is multiplied with
            self.dk_parts = [_like(pair.k, pair.k, count) for count in plan.COUNTS]

    def add(self, begin: int, gradient: Tensor) -> None:
        if self.pair.split:
            self._add_parts(begin, gradient)
            return
        part = slice(begin, begin + gradient.shape[1])
        _product(gradient, self.pair.k, self.dq[:, part])
        _product(gradient.transpose(1, 2), self.pair.q[:, part], self.dk, add=begin > 0)

    def _add_parts(self, begin: int, gradient: Tensor) -> None:
        width, part = self.pair.q.shape[2], slice(begin, begin + gradient.shape[2])
        of_rows = [_like(gradient[0], self.pair.q, count) for count in plan.COUNTS]
        for piece, count, rows, columns in zip(gradient, plan.COUNTS, of_rows, self.dk_parts, strict=True):
            _product(piece, self.pair.k_parts[..., : count * width], rows)
            _product(piece.transpose(1, 2), self.pair.q_parts[:, part, : count * width], columns, add=begin > 0)
        splitting.fold(of_rows, self.dq[:, part])

    def total(self) -> tuple[Tensor, Tensor]:
        if self.pair.split:
            splitting.fold(self.dk_parts, self.dk)
        return self.dq, self.dk

    def scaled(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Times `factor`, 0-d or [G, 1, 1]."""
        q, k = self.pair.q, self.pair.k
        of_q, of_k = self.total()
        if q.dtype == torch.float32:
            return of_q.mul_(factor), of_k.mul_(factor)
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        return torch.mul(of_q, factor, out=dq), torch.mul(of_k, factor, out=dk)


def _like(rows: Tensor, width: Tensor, count: int) -> Tensor:
    """fp32 [G, n, count d] for the rows of one tensor and the width of another."""
    return torch.empty(*rows.shape[:2], count * width.shape[2], dtype=torch.float32, device=rows.device)


def statistics(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, kind: str, tau: float
) -> tuple[Tensor, Tensor]:
    """One product."""
    joint, rest = kernels.rows_like(q, 2)
    for begin, scores, _ in _Chunks(_Pair(q, k), with_gradient=False):
        kernels.rows(scores, scale, positives, exclude_self, kind, tau, begin, joint, rest)
    return joint, rest


def symmetric_statistics(q: Tensor, k: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One product: joint [G, B], LSE of the other scores of every row and of every column."""
    joint, rest, rest_columns = kernels.rows_like(q, 3)
    parts = torch.empty((2, q.shape[0], kernels.PARTS, k.shape[1]), dtype=torch.float32, device=q.device)
    for begin, scores, _ in _Chunks(_Pair(q, k), with_gradient=False):
        kernels.rows(scores, scale, None, False, "lse", 0.0, begin, joint, rest)
        kernels.columns(scores, scale, begin, parts)
    kernels.merge_parts(parts, rest_columns)
    return joint, rest, rest_columns


def gradients(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, row_weight: Tensor,
    row_shift: Tensor | None, col_weight: Tensor | None, col_shift: Tensor | None, diagonal: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Three products."""
    pair = _Pair(q, k)
    factor, (row_weight, col_weight, diagonal) = in_range(q, scale, row_weight, col_weight, diagonal)
    row_shift, col_shift = contiguous(row_shift), contiguous(col_shift)
    sums = _Sums(pair)
    for begin, scores, gradient in _Chunks(pair, with_gradient=True):
        kernels.gradients(
            scores, scale, positives, exclude_self, row_weight, row_shift, col_weight, col_shift, diagonal, begin,
            gradient,
        )  # fmt: skip
        sums.add(begin, gradient)
    return sums.scaled(factor)


def infonce(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, gradients: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `autograd.InfoNCE` wants it. One product; three for `gradients` "both"."""
    pair = _Pair(q, k)
    (losses,) = kernels.rows_like(q, 1)
    state = torch.empty((4, *losses.shape), dtype=torch.float32, device=q.device)
    if gradients != "both":
        for begin, scores, _ in _Chunks(pair, with_gradient=False):
            kernels.infonce_rows(scores, scale, positives, exclude_self, begin, losses, state, None, 1.0)
        return losses, state, *(torch.empty(0, dtype=torch.float32, device=q.device) for _ in range(2))
    range_ = HALF_RANGE if q.dtype == torch.float16 else 1.0
    sums = _Sums(pair)
    for begin, scores, gradient in _Chunks(pair, with_gradient=True):
        kernels.infonce_rows(scores, scale, positives, exclude_self, begin, losses, state, gradient, range_)
        sums.add(begin, gradient)
    factor = scale / range_ if range_ != 1 else scale
    dq, dk = sums.total()
    return losses, state, dq.mul_(factor), dk.mul_(factor)


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
    a = log_baseline.contiguous()
    statistics, state = kernels.rows_like(q, 4), kernels.state_like(q)
    for begin, scores, _ in _Chunks(_Pair(q, k), with_gradient=False):
        kernels.mixture(scores, scale, a, alpha, begin, statistics, state)
    return tuple(statistics)


def mixture_gradients(
    q: Tensor, k: Tensor, scale: Tensor, log_baseline: Tensor, alpha: float, rest: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Three products."""
    pair, a = _Pair(q, k), log_baseline.contiguous()
    rest, weight = rest.contiguous(), weight.contiguous()
    # the gradient of row i is at most |grad| (1 + e^weight_i) / B
    factor, (grad,) = in_range(q, scale, grad[:, None], share=lambda: (1 + weight.exp()) / q.shape[1])
    state, unused = kernels.state_like(q), kernels.rows_like(q, 4)
    sums = _Sums(pair)
    for begin, scores, gradient in _Chunks(pair, with_gradient=True):
        kernels.mixture(scores, scale, a, alpha, begin, unused, state)
        kernels.mixture_gradients(scores, scale, a, alpha, state, rest, weight, grad, begin, gradient)
        sums.add(begin, gradient)
    return sums.scaled(factor)


def in_range(
    q: Tensor, scale: Tensor, *weights: Tensor | None, share: Callable[[], Tensor] | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """Weights [G, n] of a gradient, contiguous and in range, and the factor of the products of embeddings.

    The factor is `scale`. For fp16 weights are multiplied so that the largest gradient, the largest weight times the
    largest `share` [G, n], comes to HALF_RANGE, and the factor [G, 1, 1] undoes that: fp16 would lose the gradients of
    a large batch.
    """
    scaled = [contiguous(w) for w in weights]
    if q.dtype != torch.float16:
        return scale, scaled
    peak = torch.stack([w.abs().amax(1) for w in scaled if w is not None]).amax(0)
    if share is not None:
        peak = peak * share().amax(1)
    range_ = HALF_RANGE / torch.where(peak > 0, peak, HALF_RANGE)
    scaled = [None if w is None else w * range_[:, None] for w in scaled]
    return (scale / range_)[:, None, None], scaled


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
