"""Streaming statistics of rows and their gradients on the CPU: one block of rows after the other in a reused buffer.

Host functions: plain tensors in and out, fp32 or fp64, no autograd. The same number of threads gives bitwise the same
result every time. Memory beside the results is a few blocks of `mi_bounds.cpu.BLOCK_BYTES`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from engine.kernels.contrastive.losses import (
    NEGATIVE_COUNT,
    NEGATIVES,
    POSITIVE_COUNT,
    POSITIVES,
    ROWS,
    SPREAD,
    TOTAL,
    WEIGHTS,
)
from engine.kernels.contrastive.pairs import Pairs
from engine.kernels.mi_bounds.cpu import _embedding_blocks, _exponentials_


class _Block:
    """The roles of the pairs of a block of rows.

    Attributes:
        column: int64 [G, n, 1], where every row has one positive; else None.
        positive: bool [n, M], where rows have any number; else None.
        left_out: bool [n, M], pairs that are neither; None if there are none.
    """

    def __init__(self, pairs: Pairs, begin: int, scores: Tensor):
        groups, height, keys = scores.shape
        rows = begin, begin + height, keys, scores.device
        column = pairs.single(*rows)
        self.left_out = pairs.left_out(*rows)
        self.positive = pairs.positive(*rows) if column is None else None
        self.column = None if column is None else column.expand(groups, -1)[..., None]
        if self.left_out is not None:
            if column is None:
                self.left_out &= ~self.positive
            else:
                self.left_out.scatter_(1, column[:, None], False)

    def positive_count(self) -> Tensor | int:
        return 1 if self.positive is None else self.positive.sum(1)

    def negative_count(self, keys: int) -> Tensor | int:
        return keys - self.positive_count() - (0 if self.left_out is None else self.left_out.sum(1))

    def fill_others_(self, scores: Tensor, value: float) -> None:
        """Fill in everything but the negatives."""
        if self.left_out is not None:
            scores.masked_fill_(self.left_out, value)
        if self.positive is None:
            scores.scatter_(2, self.column, value)
        else:
            scores.masked_fill_(self.positive, value)


def statistics(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor | None, hardness: float, with_total: bool, *pairs: Tensor | bool | None
) -> Tensor:
    """Statistics of every row, see `losses.Statistics`, [7, G, B].

    Args:
        q: [G, B, d]. k: [G, M, d]. scale: 0-d.
        bias: 0-d, for the sigmoid loss: then the first row is the sum of softplus(-(S + bias)) over the positives and of
            softplus(S + bias) over the negatives, and the others are undefined.
        hardness: as in `losses.Options`.
        with_total: whether the sum over the negatives is wanted. Their number is counted for that and for hardness.
        pairs: the fields of `pairs.Pairs`.
    """
    groups, rows, _ = q.shape
    out = q.new_zeros(ROWS, groups, rows)
    for begin, scores in _embedding_blocks(q * scale, k):
        block = _Block(Pairs(*pairs), begin, scores)
        found = out[:, :, begin : begin + scores.shape[1]]
        if bias is None:
            found[POSITIVE_COUNT] = block.positive_count()
            if hardness or with_total:
                found[NEGATIVE_COUNT] = block.negative_count(scores.shape[2])
            _softmax_statistics(scores, block, hardness, with_total, found)
        else:
            found[0] = _sigmoid_statistic(scores.add_(bias), block)
    return out


def _softmax_statistics(scores: Tensor, block: _Block, hardness: float, with_total: bool, found: Tensor) -> None:
    """Write the statistics of a block of rows into `found` [7, G, n]; overwrites the scores."""
    if block.positive is None:
        found[POSITIVES] = scores.gather(2, block.column)[..., 0]
    else:
        count = found[POSITIVE_COUNT].clamp(min=1)
        mean = scores.masked_fill(~block.positive, 0).sum(2).div_(count)
        lse = _exponentials_(scores.masked_fill(~block.positive, -math.inf))[0]
        found[POSITIVES] = lse
        found[SPREAD] = torch.where(found[POSITIVE_COUNT] > 0, lse - mean, 0.0)
    if with_total:
        others = scores.clone()
        block.fill_others_(others, 0.0)
        found[TOTAL] = others.sum(2)
    block.fill_others_(scores, -math.inf)
    if hardness:
        found[WEIGHTS] = _exponentials_(scores * hardness)[0]
        scores.mul_(1 + hardness)
    found[NEGATIVES] = _exponentials_(scores)[0]


def _sigmoid_statistic(scores: Tensor, block: _Block) -> Tensor:
    _turn_positives_(scores, block)
    found = softplus(scores)
    if block.left_out is not None:
        found.masked_fill_(block.left_out, 0)
    return found.sum(2)


def _turn_positives_(scores: Tensor, block: _Block) -> None:
    """Change the sign at the positives."""
    if block.positive is None:
        scores.scatter_(2, block.column, -scores.gather(2, block.column))
    else:
        scores.copy_(torch.where(block.positive, -scores, scores))


def gradients(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor | None, hardness: float, with_keys: bool, grads: Tensor,
    state: Tensor, *pairs: Tensor | bool | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients from those of the statistics, `grads` [7, G, B], recomputing the scores.

    Args:
        with_keys: whether dk is wanted.
        state: the statistics.

    Returns:
        dq [G, B, d]; dk [G, M, d], or empty; the sums of the scores' gradients over the keys, [G, B].
    """
    q = q * scale
    dq = q.new_empty(q.shape)
    dk = k.new_zeros(k.shape if with_keys else 0)
    sums = q.new_empty(q.shape[:2])
    for begin, scores in _embedding_blocks(q, k):
        part = slice(begin, begin + scores.shape[1])
        block = _Block(Pairs(*pairs), begin, scores)
        if bias is None:
            _softmax_gradient_(scores, block, hardness, grads[:, :, part], state[:, :, part])
        else:
            _turn_positives_(scores.add_(bias), block)
            scores.sigmoid_()
            _turn_positives_(scores, block)
            if block.left_out is not None:
                scores.masked_fill_(block.left_out, 0)
            scores.mul_(grads[0, :, part, None])
        sums[:, part] = scores.sum(2) if bias is not None else 0
        torch.bmm(scores, k, out=dq[:, part])
        if with_keys:
            dk.baddbmm_(scores.transpose(1, 2), q[:, part])
    return dq.mul_(scale), dk, sums


def _softmax_gradient_(scores: Tensor, block: _Block, hardness: float, grads: Tensor, state: Tensor) -> None:
    """Turn scores of a block into their gradient. grads, state: [7, G, n]."""
    grads, state, positive = grads[..., None], state[..., None], block.positive
    weight, lse, of_weights = grads[NEGATIVES], state[NEGATIVES], None
    if hardness:
        weight = weight * (1 + hardness)
        of_weights = (scores * hardness).sub_(state[WEIGHTS]).exp_().mul_(grads[WEIGHTS] * hardness)
        negative = scores * (1 + hardness)
        scores.copy_(negative if positive is None else torch.where(positive, scores, negative))
    if positive is None:
        scores.sub_(lse).exp_().mul_(weight)
    else:
        scores.sub_(torch.where(positive, state[POSITIVES], lse)).exp_()
        # with one positive e^(S - LSE) - 1 is 0, and the gradient keeps its digits
        spread = (scores - 1 / state[POSITIVE_COUNT].clamp(min=1)).mul_(grads[SPREAD])
        scores.mul_(torch.where(positive, grads[POSITIVES], weight))
    others = grads[TOTAL] if of_weights is None else of_weights.add_(grads[TOTAL])
    if positive is None:
        scores.add_(others)
    else:
        scores.add_(torch.where(positive, spread, others))
    if block.left_out is not None:
        scores.masked_fill_(block.left_out, 0)
    if positive is None:
        scores.scatter_(2, block.column, grads[POSITIVES])
