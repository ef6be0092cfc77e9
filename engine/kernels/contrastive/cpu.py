"""Streaming statistics of rows and their gradients on the CPU: one block of rows after the other in a reused buffer.

Host functions: plain tensors in and out, fp32 or fp64, no autograd. The same number of threads gives bitwise the same
result every time. Memory beside the results is a few blocks of `mi_bounds.cpu.BLOCK_BYTES`, and about
thirty where nearly every pair is a positive, because positives are listed by their numbers.
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
    Options,
    Statistics,
    losses,
)
from engine.kernels.contrastive.losses import gradients as row_gradients
from engine.kernels.contrastive.pairs import Pairs, PositiveLists
from engine.kernels.mi_bounds.cpu import _embedding_blocks, _exponentials_


class _Block:
    """The roles of the pairs of a block of rows.

    Attributes:
        places: index of the positives in [G, n, M].
        count: int64 [n], how many positives each row has.
        left_out: bool [n, M], pairs that are neither; None if there are none.
    """

    def __init__(self, lists: PositiveLists, begin: int, scores: Tensor):
        height, keys = scores.shape[1:]
        rows, columns, self.count = lists.of(begin, begin + height)
        self.places = slice(None), rows, columns
        self.left_out = lists.pairs.left_out(begin, begin + height, keys, scores.device)
        if self.left_out is not None:
            self.left_out[rows, columns] = False

    def negative_count(self, keys: int) -> Tensor:
        return keys - self.count - (0 if self.left_out is None else self.left_out.sum(1))

    def keep_negatives_(self, scores: Tensor, value: float, at_positives: Tensor | float) -> Tensor:
        """Fill in everything but the negatives: `value`, and at the positives a number or [G, positives]."""
        if self.left_out is not None:
            scores.masked_fill_(self.left_out, value)
        scores[self.places] = scores.new_full((), at_positives) if isinstance(at_positives, float) else at_positives
        return scores

    def sums(self, values: Tensor) -> Tensor:
        """Sums of the positives' values [G, positives] over every row, [G, n]."""
        return self._reduced(values, "sum")

    def lse(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """LSE of the positives' values [G, positives] over every row, [G, n], and e^(value - LSE)."""
        rows, highest = self.places[1], self._reduced(values, "max")
        lse = highest + self.sums((values - highest[:, rows]).exp()).log()
        return lse, (values - lse[:, rows]).exp()

    def _reduced(self, values: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(values.T.contiguous(), how, lengths=self.count, unsafe=True).T


def statistics(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor | None, hardness: float, with_total: bool,
    *pairs: Tensor | bool | None,
) -> Tensor:  # fmt: skip
    """Statistics of every row, see `losses.Statistics`, [7, G, B].

    Args:
        q: [G, B, d]. k: [G, M, d]. scale: 0-d.
        bias: 0-d, for the sigmoid loss: then the first row is the sum of softplus(-(S + bias)) over the positives and
            of softplus(S + bias) over the negatives, and the others are undefined.
        hardness: as in `losses.Options`.
        with_total: whether the sum over the negatives is wanted.
        pairs: the fields of `pairs.Pairs`.
    """
    groups, rows, _ = q.shape
    out, lists = q.new_zeros(ROWS, groups, rows), PositiveLists(Pairs(*pairs))
    for begin, scores in _embedding_blocks(q * scale, k):
        found = out[:, :, begin : begin + scores.shape[1]]
        block = _Block(lists, begin, scores)
        if bias is None:
            _Softmax(scores, block, hardness, with_total, found)
        else:
            found[0] = _sigmoid_statistic(scores.add_(bias), block)
    return out


def gradients(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor | None, hardness: float, with_keys: bool, grads: Tensor,
    state: Tensor, *pairs: Tensor | bool | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients from those of the statistics, `grads` [7, G, B], recomputing the scores.

    Args:
        with_keys: whether dk is wanted.
        state: the statistics.

    Returns:
        dq [G, B, d]; dk [G, M, d], or empty; for the sigmoid loss the sums of the scores' gradients over the keys,
        [G, B].
    """
    q, lists, sums = q * scale, PositiveLists(Pairs(*pairs)), _Sums(q, k, with_keys)
    of_rows = q.new_zeros(q.shape[:2])
    for begin, scores in _embedding_blocks(q, k):
        part = slice(begin, begin + scores.shape[1])
        block = _Block(lists, begin, scores)
        if bias is None:
            _softmax_gradient_(scores, block, hardness, grads[:, :, part], state[:, :, part])
        else:
            _sigmoid_gradient_(scores.add_(bias), block)
            scores.mul_(grads[0, :, part, None])
            torch.sum(scores, 2, out=of_rows[:, part])
        sums.add(q, scores, part)
    return sums.dq.mul_(scale), sums.dk, of_rows


def fused(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor | None, joint: Tensor | None, decoupled: bool, hardness: float,
    smoothing: float, with_keys: bool, *pairs: Tensor | bool | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses, and from the same scores the gradients of their sum: no score is computed twice.

    Args:
        joint: [G, B], scores of positives that are not among the keys; then no key is a positive.
        decoupled, hardness, smoothing: `losses.Options`.

    Returns:
        losses [G, B]; for the softmax 1 for rows that have a loss, else 0, and for the sigmoid loss the sums of the
        scores' gradients over the keys, [G, B]; dq [G, B, d]; dk [G, M, d], or empty; the gradient of joint [G, B].
    """
    options = Options(decoupled, hardness, smoothing)
    lists, scaled = PositiveLists(Pairs(*pairs)), q * scale
    found, other, of_joint = q.new_zeros(3, *q.shape[:2]).unbind()
    sums = _Sums(scaled, k, with_keys)
    for begin, scores in _embedding_blocks(scaled, k):
        part = slice(begin, begin + scores.shape[1])
        block = _Block(lists, begin, scores)
        if bias is None:
            state = q.new_zeros(ROWS, *scores.shape[:2])
            softmax = _Softmax(scores, block, hardness, smoothing > 0, state)
            if joint is not None:
                state[POSITIVES], state[POSITIVE_COUNT] = joint[:, part], 1
                state[SPREAD] = joint[:, part] - joint[:, part]  # 0, or NaN where it is not finite
            rows = Statistics(*state)
            found[:, part], other[:, part] = losses(rows, options)
            grads = row_gradients(rows, options)
            of_joint[:, part] = grads.positives
            softmax.gradient_(grads)
        else:
            scores.add_(bias)
            found[:, part] = _sigmoid_statistic(scores.clone(), block)
            _sigmoid_gradient_(scores, block)
            other[:, part] = scores.sum(2)
        sums.add(scaled, scores, part)
    return found.clone(), other.clone(), sums.dq.mul_(scale), sums.dk, of_joint.clone()


class _Sums:
    """Products of the scores' gradient with the embeddings. dq lacks the factor `scale`."""

    def __init__(self, q: Tensor, k: Tensor, with_keys: bool):
        self.k, self.with_keys = k, with_keys
        self.dq, self.dk = q.new_empty(q.shape), k.new_zeros(k.shape if with_keys else 0)

    def add(self, q: Tensor, gradient: Tensor, part: slice) -> None:
        torch.bmm(gradient, self.k, out=self.dq[:, part])
        if self.with_keys:
            self.dk.baddbmm_(gradient.transpose(1, 2), q[:, part])


class _Softmax:
    """Statistics of a block of rows, written into `found` [7, G, n]. The scores become e^(S - max) of the negatives."""

    def __init__(self, scores: Tensor, block: _Block, hardness: float, with_total: bool, found: Tensor):
        self.scores, self.block, self.hardness = scores, block, hardness
        values = scores[block.places]
        lse, self.share = block.lse(values)
        found[POSITIVES], found[POSITIVE_COUNT] = lse, block.count
        mean = block.sums(values) / block.count.clamp(min=1)
        found[SPREAD] = torch.where(block.count > 0, lse - mean, 0.0)
        found[NEGATIVE_COUNT] = block.negative_count(scores.shape[2])
        if with_total:
            block.keep_negatives_(scores, 0.0, 0.0)
            found[TOTAL] = scores.sum(2)
        block.keep_negatives_(scores, -math.inf, -math.inf)
        self.weights = None
        if hardness:
            self.weights = scores * hardness
            found[WEIGHTS], self.weight_sum = _exponentials_(self.weights)
            scores.mul_(1 + hardness)
        found[NEGATIVES], self.sum = _exponentials_(scores)

    def gradient_(self, grads: Statistics) -> None:
        """Turn the scores into the gradient that `grads`, [G, n] each, make of them."""
        scores, block = self.scores, self.block
        scores.mul_((grads.negatives * (1 + self.hardness) / self.sum)[..., None])
        if self.weights is not None:
            scores.addcmul_(self.weights, (grads.weights * self.hardness / self.weight_sum)[..., None])
        if grads.total.any():
            scores.add_(grads.total[..., None])
        block.keep_negatives_(scores, 0.0, _at_positives(self.share, block, grads.positives, grads.spread))


def _softmax_gradient_(scores: Tensor, block: _Block, hardness: float, grads: Tensor, state: Tensor) -> None:
    """Turn scores of a block into their gradient. grads, state: [7, G, n].

    No score is above its log-sum-exp, but for products that are rounded otherwise here (`mi_bounds.cpu.gradients`).
    """
    share = (scores[block.places] - state[POSITIVES][:, block.places[1]]).clamp_(max=0).exp_()
    at_positives = _at_positives(share, block, grads[POSITIVES], grads[SPREAD])
    grads, state, weights = grads[..., None], state[..., None], None
    if hardness:
        weights = (scores * hardness).sub_(state[WEIGHTS]).clamp_(max=0).exp_().mul_(grads[WEIGHTS] * hardness)
        scores.mul_(1 + hardness)
    scores.sub_(state[NEGATIVES]).clamp_(max=0).exp_().mul_(grads[NEGATIVES] * (1 + hardness))
    if weights is not None:
        scores.add_(weights)
    if grads[TOTAL].any():
        scores.add_(grads[TOTAL])
    block.keep_negatives_(scores, 0.0, at_positives)


def _at_positives(share: Tensor, block: _Block, of_lse: Tensor, of_spread: Tensor) -> Tensor:
    """Gradient of the positives' scores, [G, positives], from their shares e^(S - LSE) and from [G, n]."""
    rows = block.places[1]
    # with one positive the share less 1 is 0, and the gradient keeps its digits
    return of_lse[:, rows] * share + of_spread[:, rows] * (share - (1 / block.count.to(share.dtype))[rows])


def _sigmoid_statistic(scores: Tensor, block: _Block) -> Tensor:
    scores[block.places] = -scores[block.places]
    found = softplus(scores)
    if block.left_out is not None:
        found.masked_fill_(block.left_out, 0)
    return found.sum(2)


def _sigmoid_gradient_(scores: Tensor, block: _Block) -> None:
    at_positives = -torch.sigmoid(-scores[block.places])
    block.keep_negatives_(scores.sigmoid_(), 0.0, at_positives)
