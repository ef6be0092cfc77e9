"""Streaming statistics and gradients of score matrices on the CPU: blocks of rows in one reused buffer.

Statistics that are exponentials of embeddings' scores are computed by mi_bounds.cpp, if it can be compiled.

Scores are S = scale * q k^T, q [G, B, d], k [G, C, d]; they exist one block of rows at a time, O(B · block) memory.
For scores that are given as a matrix, the functions beginning with `score_` do the same. Host functions: plain tensors
in and out, fp32 or fp64, no autograd. The same number of threads gives bitwise the same result every time.

Row i's positive is column `positives[i]` (i if None); it is left out of every statistic and has a gradient of its own.
With `exclude_self`, column i does not exist for row i.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from engine.kernels import build
from engine.kernels.mi_bounds.reference import MOST_OF_ONE, check_positives
from engine.kernels.mi_bounds.statistics import LSE, SHARE, add_positives_, log_weights

# (first row, scores of a block of rows), over all rows
Blocks = Iterator[tuple[int, Tensor]]

# Bytes of one block of scores. Larger blocks make better matrix products, smaller ones stay in the caches.
BLOCK_BYTES = 8 << 20
SOURCE = Path(__file__).with_name("mi_bounds.cpp")
PANEL = 64  # blocks are multiples of so many rows, which are whole panels of mi_bounds.cpp on every processor
WHOLE = 16  # widths that are multiples of so many numbers are whole vectors in mi_bounds.cpp


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernel for float32 or float64, compiled at its first use; None (logged once) if it cannot be compiled."""
    pointer, size, count = build.POINTER, build.SIZE, build.INT
    functions = {
        "mi_exponentials": [pointer, pointer, *[size] * 3, pointer, size, *[pointer] * 4, count],
        "mi_sums": [*[pointer] * 3, *[size] * 3, pointer, pointer, count],
    }
    return build.library(SOURCE, dtype, functions, "torch's products run")


def statistics(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, kind: str, tau: float
) -> tuple[Tensor, Tensor]:
    """Score of each row's positive, and one statistic of the row's other scores.

    Args:
        q: [G, B, d]. k: [G, C, d]. scale: 0-d.
        positives: int64 [B], or None for the diagonal.
        kind: "lse", "clipped" (LSE of scores clipped to ±tau) or "softplus" (sum of softplus).

    Returns:
        joint [G, B], rest [G, B].
    """
    groups, rows, _ = q.shape
    joint, rest = q.new_empty(groups, rows), q.new_empty(groups, rows)
    if kind == "lse":
        for group, block in _exponential_blocks((q * scale).contiguous(), k.contiguous(), positives, exclude_self):
            at = group, slice(block.begin, block.begin + block.joint.shape[1])
            joint[at], rest[at] = block.joint, block.lse
        return joint, rest
    for begin, scores in _embedding_blocks(q * scale, k):
        mask = _Mask(scores, begin, positives, exclude_self)
        end = begin + scores.shape[1]
        joint[:, begin:end] = mask.remove(scores)
        rest[:, begin:end] = _statistic_(scores, kind, tau, mask)
    return joint, rest


def gradients(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, row_weight: Tensor,
    row_shift: Tensor | None, col_weight: Tensor | None, col_shift: Tensor | None, diagonal: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of q and k, recomputing the scores.

    With dS_ij = -row_weight_i e^(S_ij - row_shift_i) - col_weight_j e^(S_ij - col_shift_j) (the second term only where
    given; -row_weight_i sigmoid(S_ij) where row_shift is None), and dS_ij = diagonal_i at the positives.

    Shifts are log-sum-exps of scores, so no difference is above 0. Products of another shape are rounded otherwise,
    though: of scores near 1e8 a difference could be 40, and its exponential 1e17. Those above 0 are taken as 0.

    Args: row_weight, row_shift, diagonal [G, B]; col_weight, col_shift [G, C]; else as for `statistics`.

    Returns:
        dq [G, B, d], dk [G, C, d].
    """
    q = q * scale
    dq, dk = q.new_empty(q.shape), k.new_zeros(k.shape)
    other = None
    for begin, scores in _embedding_blocks(q, k):
        end = begin + scores.shape[1]
        mask = _Mask(scores, begin, positives, exclude_self)
        mask.remove(scores)
        if col_shift is not None:
            other = torch.empty_like(scores) if other is None else other[:, : end - begin]
            torch.sub(scores, col_shift[:, None], out=other).clamp_(max=0).exp_().mul_(-col_weight[:, None])
        if row_shift is None:
            scores.sigmoid_()
        else:
            scores.sub_(row_shift[:, begin:end, None]).clamp_(max=0).exp_()
        scores.mul_(-row_weight[:, begin:end, None])
        if other is not None:
            scores.add_(other)
        torch.bmm(scores, k, out=dq[:, begin:end])
        dk.baddbmm_(scores.transpose(1, 2), q[:, begin:end])
    add_positives_(dq, dk, q, k, positives, diagonal)
    return dq.mul_(scale), dk


def fused(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, kind: str, tau: float,
    weighting: str, offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Statistics and, from the same scores, the products that the gradients consist of: no score is computed twice.

    The gradient of row i's other scores is proportional to e^(S_ij - R_i) e^(rho_i - M), with R_i the LSE of the row
    and M a running maximum of rho, or to sigmoid(S_ij). Its factor, one per group, is known only when all rows are.

    Args:
        weighting: "softmax": rho_i = R_i - logaddexp(R_i, D_i) (InfoNCE); "offset": rho_i = R_i - offset_i;
            "sigmoid".
        offset: [G, B] or None for 0.

    Returns:
        joint [G, B], rest [G, B], maximum M [G] (0 for "sigmoid"), and the sums over the other scores: for the rows
        [G, B, d] and for the columns [G, C, d], without the factor scale that the first still needs.
    """
    q, k = (q * scale).contiguous(), k.contiguous()
    groups, rows, _ = q.shape
    joint, rest = q.new_empty(groups, rows), q.new_empty(groups, rows)
    sum_q, sum_k = q.new_empty(q.shape), k.new_zeros(k.shape)
    log_row = q.new_zeros(groups, rows)  # rho
    maximum = q.new_full((groups,), -math.inf if weighting == "offset" else 0.0)
    if weighting == "sigmoid":
        for begin, scores in _embedding_blocks(q, k):
            end = begin + scores.shape[1]
            mask = _Mask(scores, begin, positives, exclude_self)
            joint[:, begin:end] = mask.remove(scores)
            rest[:, begin:end] = _statistic_(scores.clone(), kind, tau, mask)
            torch.bmm(scores.sigmoid_(), k, out=sum_q[:, begin:end])
            sum_k.baddbmm_(scores.transpose(1, 2), q[:, begin:end])
        return joint, rest, maximum, sum_q, sum_k
    for group, block in _exponential_blocks(q, k, positives, exclude_self):
        at = group, slice(block.begin, block.begin + block.joint.shape[1])
        joint[at], rest[at] = block.joint, block.lse
        if weighting == "softmax":
            rho = logsigmoid(block.lse - block.joint)
        else:
            rho = block.lse if offset is None else block.lse - offset[at]
            highest = torch.maximum(maximum[group], rho.amax(1))
            sum_k[group].mul_(_exp_of_difference(maximum[group], highest)[:, None, None])
            maximum[group] = highest
        log_row[at] = rho
        weight = _exp_of_difference(rho, maximum[group][:, None]) / block.total
        sum_q[at] = block.sums(q[at] * weight[..., None], sum_k[group]).div_(block.total[..., None])
    sum_q.mul_(_exp_of_difference(log_row, maximum[:, None])[..., None])
    return joint, rest, maximum, sum_q, sum_k


def infonce(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, algorithm: str, gradients: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """InfoNCE's losses, its state, and the gradients of the sum of the losses that are asked for.

    Args:
        algorithm: one of the GPU's; not used here.
        gradients: "none", "rows" (dq) or "both".

    Returns:
        losses [G, B]; state [4, G, B], see `statistics.JOINT`; dq [G, B, d] and dk [G, C, d], or empty.
    """
    joint, rest = statistics(q, k, scale, positives, exclude_self, "lse", 0.0)
    state = torch.stack([joint, rest, torch.logaddexp(rest, joint), torch.sigmoid(rest - joint)])
    dq = dk = None
    if gradients != "none":
        dq, dk = infonce_gradients(q, k, scale, positives, exclude_self, torch.ones_like(joint), state)
    return (
        -logsigmoid(joint - rest),
        state,
        q.new_empty(0) if dq is None else dq,
        dk if gradients == "both" else k.new_empty(0),
    )


def infonce_gradients(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, weight: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """dq and dk from the gradient of InfoNCE's losses, `weight` [G, B], and its state."""
    weight = -weight
    diagonal = weight * state[SHARE]
    return gradients(q, k, scale, positives, exclude_self, weight, state[LSE], None, None, diagonal)


def infonce_keys(
    q: Tensor, k: Tensor, scale: Tensor, positives: Tensor | None, exclude_self: bool, weight: Tensor, state: Tensor
) -> Tensor:
    """dk alone."""
    return infonce_gradients(q, k, scale, positives, exclude_self, weight, state)[1]


def symmetric_statistics(q: Tensor, k: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Score of each row's positive; LSE of the other scores of every row, and of every column, [G, B] each."""
    joint, rest = statistics(q, k, scale, None, False, "lse", 0.0)
    return joint, rest, statistics(k, q, scale, None, False, "lse", 0.0)[1]


def mixture(
    q: Tensor, k: Tensor, scale: Tensor, log_baseline: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row statistics of the interpolated bound: joint D, rest R, excess and shares, [G, B] each.

    See `statistics.interpolated`. Square scores only.
    """
    return _mixture(_embedding_blocks(q * scale, k), log_baseline, alpha)


def mixture_gradients(
    q: Tensor, k: Tensor, scale: Tensor, log_baseline: Tensor, alpha: float, rest: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k for the interpolated bound.

    Args:
        rest: [G, B], R_i. weight: [G, B], log-weight of each row in the marginal term (`statistics.interpolated`).
        grad: [G], gradient of the value.
    """
    q = q * scale
    dq, dk = q.new_empty(q.shape), k.new_zeros(k.shape)
    for begin, scores in _embedding_blocks(q, k):
        end = begin + scores.shape[1]
        gradient = _mixture_gradient(scores, begin, log_baseline, alpha, rest, weight).mul_(grad[:, None, None])
        torch.bmm(gradient, k, out=dq[:, begin:end])
        dk.baddbmm_(gradient.transpose(1, 2), q[:, begin:end])
    return dq.mul_(scale), dk


def score_statistics(scores: Tensor, kind: str, tau: float) -> tuple[Tensor, Tensor]:
    """`statistics` of scores [G, B, B] that are given."""
    joint = scores.diagonal(dim1=1, dim2=2).clone(memory_format=torch.contiguous_format)
    rest = joint.new_empty(joint.shape)
    for begin, block in _score_blocks(scores):
        mask = _Mask(block, begin, None, False)
        mask.remove(block)
        rest[:, begin : begin + block.shape[1]] = _statistic_(block, kind, tau, mask)
    return joint, rest


def score_gradients(scores: Tensor, row_weight: Tensor, row_shift: Tensor | None, diagonal: Tensor) -> Tensor:
    """`gradients` with respect to scores [G, B, B] that are given."""
    gradient = scores.new_empty(scores.shape)
    if row_shift is None:
        torch.sigmoid(scores, out=gradient)
    else:
        torch.sub(scores, row_shift[..., None], out=gradient).exp_()
    gradient.mul_(-row_weight[..., None])
    gradient.diagonal(dim1=1, dim2=2).copy_(diagonal)
    return gradient


def score_mixture(scores: Tensor, log_baseline: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`mixture` of scores [G, B, B] that are given."""
    return _mixture(_score_blocks(scores), log_baseline, alpha)


def score_mixture_gradients(
    scores: Tensor, log_baseline: Tensor, alpha: float, rest: Tensor, weight: Tensor, grad: Tensor
) -> Tensor:
    """`mixture_gradients` with respect to scores [G, B, B] that are given."""
    gradient = scores.new_empty(scores.shape)
    for begin, block in _score_blocks(scores):
        gradient[:, begin : begin + block.shape[1]] = _mixture_gradient(
            block, begin, log_baseline, alpha, rest, weight
        ).mul_(grad[:, None, None])
    return gradient


class _Exponentials:
    """e^(S - max of the row) of a block of rows, 0 where a column takes no part.

    Attributes:
        begin: the first row. joint, lse, total: [G, rows]: the positives' scores, of the other ones the LSE and the sum
            of the exponentials (1 where there is none).
    """

    def __init__(self, begin: int, scores: Tensor, k: Tensor, mask: _Mask):
        self.begin, self._scores, self._k = begin, scores, k
        self.joint = mask.remove(scores)
        self.lse, self.total = _exponentials_(scores)

    def sums(self, weighted: Tensor, of_columns: Tensor) -> Tensor:
        """Exponentials times k [G, rows, d]; their transpose times `weighted` [G, rows, d] is added to `of_columns`."""
        of_columns.baddbmm_(self._scores.transpose(1, 2), weighted)
        return torch.bmm(self._scores, self._k)


class _CompiledExponentials:
    """The same of one group, by mi_bounds.cpp. `scores`: memory for whole panels of rows, times columns."""

    def __init__(self, begin: int, q: Tensor, k: Tensor, positives: Tensor, own: int, scores: Tensor):
        self.begin, self._scores, self._k = begin, scores, k
        self._sizes = q.shape[0], k.shape[0], q.shape[1]
        joint, highest, total = q.new_empty(3, len(q)).unbind()
        library(q.dtype).mi_exponentials(
            q.data_ptr(), k.data_ptr(), *self._sizes, positives.data_ptr(), own, scores.data_ptr(), joint.data_ptr(),
            highest.data_ptr(), total.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        self.joint, self.lse = joint[None], (highest + total.log())[None]
        self.total = total.masked_fill(total == 0, 1)[None]

    def sums(self, weighted: Tensor, of_columns: Tensor) -> Tensor:
        """As there; both are contiguous."""
        of_rows = torch.empty_like(weighted)
        library(of_rows.dtype).mi_sums(
            self._scores.data_ptr(), self._k.data_ptr(), weighted.data_ptr(), *self._sizes, of_rows.data_ptr(),
            of_columns.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return of_rows


def _exponential_blocks(
    q: Tensor, k: Tensor, positives: Tensor | None, exclude_self: bool
) -> Iterator[tuple[slice, _Exponentials | _CompiledExponentials]]:
    """Blocks of rows of contiguous q and k, and the groups that they are of. All use one buffer.

    Raises:
        EstimatorError: positives out of range, or excluded.
    """
    groups, rows, d = q.shape
    columns = k.shape[1]
    if positives is not None:
        check_positives(positives, columns, exclude_self)
    if library(q.dtype) is None or d % WHOLE:
        for begin, scores in _embedding_blocks(q, k):
            yield slice(None), _Exponentials(begin, scores, k, _Mask(scores, begin, positives, exclude_self))
        return
    positives = torch.arange(rows, device=q.device) if positives is None else positives.contiguous()
    # scores, and every thread's sums for the rows
    a_row = max(columns, torch.get_num_threads() * d) * q.element_size()
    fitting = BLOCK_BYTES // a_row // PANEL * PANEL
    step = max(PANEL, min(fitting, -(-rows // PANEL) * PANEL))
    buffer = q.new_empty(step * columns)
    for group in range(groups):
        for begin in range(0, rows, step):
            block = q[group, begin : begin + step]
            own = begin if exclude_self else -1
            exponentials = _CompiledExponentials(begin, block, k[group], positives[begin : begin + step], own, buffer)
            yield slice(group, group + 1), exponentials


class _Mask:
    """The columns of a block of rows that take no part in its statistics."""

    def __init__(self, scores: Tensor, begin: int, positives: Tensor | None, exclude_self: bool):
        groups, rows, _ = scores.shape
        own = torch.arange(begin, begin + rows, device=scores.device)
        self.own = own[: max(0, scores.shape[2] - begin)].expand(groups, -1)[..., None] if exclude_self else None
        columns = own if positives is None else positives[begin : begin + rows]
        self.columns = columns.expand(groups, rows)[..., None]

    def remove(self, scores: Tensor) -> Tensor:
        """Fill the masked scores with -inf; returns the positives' scores [G, rows]."""
        joint = scores.gather(2, self.columns)[..., 0]
        scores.scatter_(2, self.columns, -math.inf)
        if self.own is not None:
            scores[:, : self.own.shape[1]].scatter_(2, self.own, -math.inf)
        return joint


def _embedding_blocks(q: Tensor, k: Tensor) -> Blocks:
    """Scores of one block of rows after the other, all in one buffer, which callers may overwrite."""
    groups, rows, _ = q.shape
    columns = k.shape[1]
    step = max(1, min(rows, BLOCK_BYTES // (groups * columns * q.element_size())))
    buffer = q.new_empty(groups, step, columns)
    transposed = k.transpose(1, 2)
    for begin in range(0, rows, step):
        block = q[:, begin : begin + step]
        scores = buffer[:, : block.shape[1]]
        torch.bmm(block, transposed, out=scores)
        yield begin, scores


def _score_blocks(scores: Tensor) -> Blocks:
    """The same over scores that are given: copies, which callers may overwrite."""
    groups, rows, columns = scores.shape
    step = max(1, min(rows, BLOCK_BYTES // (groups * columns * scores.element_size())))
    for begin in range(0, rows, step):
        yield begin, scores[:, begin : begin + step].clone(memory_format=torch.contiguous_format)


def _exponentials_(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Turn scores into e^(S - max of the row); returns the LSE and the sum of each row (1 where there is none)."""
    highest = scores.amax(2, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    total = scores.sub_(highest).exp_().sum(2)
    return highest[..., 0] + total.log(), total.masked_fill(total == 0, 1)


def _statistic_(scores: Tensor, kind: str, tau: float, mask: _Mask) -> Tensor:
    """One statistic of each row; overwrites the scores."""
    if kind == "softplus":
        return softplus(scores).sum(2)
    if kind == "clipped":
        scores.clamp_(-tau, tau)
        mask.remove(scores)
    return _exponentials_(scores)[0]


def _exp_of_difference(a: Tensor, b: Tensor) -> Tensor:
    """e^(a - b), 0 where a is -inf, whatever b is."""
    return torch.where(a == -math.inf, 0.0, (a - b).exp())


def _leave_one_out(scores: Tensor) -> Tensor:
    """LSE over l != j of scores[..., l], for every j; -inf where nothing is left. See reference.leave_one_out."""
    largest_value, argmax = scores.max(2, keepdim=True)
    rest = scores.scatter(2, argmax, -math.inf)
    without_largest = rest.logsumexp(2, keepdim=True)
    total = torch.logaddexp(largest_value, without_largest)
    # the largest has share 0 here, and its own entry is written last
    rest.sub_(total.clamp(min=torch.finfo(scores.dtype).min)).exp_().clamp_(max=MOST_OF_ONE).neg_().log1p_().add_(total)
    return rest.scatter_(2, argmax, without_largest)


def _mixture(blocks: Blocks, log_baseline: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    joint, rest, excess, shares = (log_baseline.new_empty(log_baseline.shape) for _ in range(4))
    log_alpha, log_beta = log_weights(alpha)
    for begin, scores in blocks:
        end = begin + scores.shape[1]
        mask = _Mask(scores, begin, None, False)
        diagonal = scores.gather(2, mask.columns)
        a = log_baseline[:, begin:end, None]
        log_others = math.log(scores.shape[2] - 1)
        # Relative to the joint score: what is summed is then small, however large the joint score.
        loo = _leave_one_out(scores - diagonal)
        joint[:, begin:end] = diagonal[..., 0]
        rest[:, begin:end] = scores.scatter_(2, mask.columns, -math.inf).logsumexp(2)
        loo.sub_(log_others)
        logit = loo + (diagonal - a + (log_alpha - log_beta))
        excess_block = torch.logaddexp(loo + log_alpha, log_beta + a - diagonal)
        excess[:, begin:end] = excess_block.scatter_(2, mask.columns, 0).sum(2)
        shares[:, begin:end] = logit.neg_().sigmoid_().scatter_(2, mask.columns, 0).sum(2)
    return joint, rest, excess, shares


def _mixture_gradient(
    scores: Tensor, begin: int, log_baseline: Tensor, alpha: float, rest: Tensor, weight: Tensor
) -> Tensor:
    """dV / dS of a block of rows: the derivative of the reference's interpolated bound."""
    end = begin + scores.shape[1]
    count = scores.shape[2]
    pairs = count * (count - 1)
    log_alpha, log_beta = log_weights(alpha)
    columns = _Mask(scores, begin, None, False).columns
    # No score is above a log-sum-exp that it is part of.
    marginal, weight = scores + (weight - rest)[:, begin:end, None], weight[:, begin:end, None]
    marginal = torch.minimum(marginal, weight, out=marginal).exp_().scatter_(2, columns, 0)
    joint = scores.gather(2, columns)
    # Relative to the joint score, as in the value: e^(S - L) keeps the more digits the smaller S is.
    scores = scores.sub_(joint)
    loo = _leave_one_out(scores)
    constant = log_alpha - log_beta - math.log(count - 1)
    odds = loo + (joint - log_baseline[:, begin:end, None] + constant)
    mixed = _leave_one_out((logsigmoid(odds) - loo).scatter_(2, columns, -math.inf))
    mixed = mixed.add_(scores).clamp_(max=math.log(count - 1)).exp_()
    gradient = mixed.mul_(-1 / pairs).sub_(marginal, alpha=1 / count)
    return gradient.scatter_add_(2, columns, torch.full_like(columns, 1, dtype=scores.dtype) / count)
