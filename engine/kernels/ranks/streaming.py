"""Statistics and gradients of this rank's rows of scores against the columns of all ranks, a block at a time.

Row i belongs to this rank. The columns are this rank's own, those of the other ranks, and perhaps further ones that
every rank has, such as a queue. Own and further columns are numbered [own; further], which is what `positives` mean.
Scores exist for one block of columns; the backward pass computes them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from engine.kernels.mi_bounds.reference import MOST_OF_ONE
from engine.kernels.mi_bounds.statistics import Rows, log_weights
from engine.kernels.ranks.collectives import stack_ranks
from engine.kernels.ranks.group import Ranks
from engine.kernels.ranks.ring import travel, travel_with_gradient

BLOCK_NUMBERS = 2**21
"""The most scores of a block, and the most numbers of its columns: 8 MiB in fp32. It has at least one column."""

Score = Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]
"""score(rows, columns, parameters) -> [G, rows, columns], in fp32 or fp64, differentiable."""


class AllRows(Rows):
    """Sums over the rows of all ranks; `total` is their number. The same bits on every rank."""

    def __init__(self, ranks: Ranks, total: int):
        self.ranks, self.total = ranks, total

    def count(self, x: Tensor) -> int:
        return self.total

    def mean(self, x: Tensor) -> Tensor:
        return self.sum(x) / self.total

    def sum(self, x: Tensor) -> Tensor:
        return stack_ranks(x.sum(-1), self.ranks).sum(0)

    def logsumexp(self, x: Tensor) -> Tensor:
        return stack_ranks(x.logsumexp(-1), self.ranks).logsumexp(0)


@dataclass
class Block:
    """A block of columns.

    Attributes:
        keys: [..., c, d].
        first: the number of the first column in [own; further]; None for those of other ranks.
        number: the number of the first column among all, in any order that stays the same.
        gradient: where the columns' gradient is added, as `keys`; None if it is not wanted.
        positive: bool [b, c], the rows' positives; None if there are none here.
        excluded: bool [b, c], pairs that `exclude_self` leaves out, or None.
    """

    keys: Tensor
    first: int | None
    number: int
    gradient: Tensor | None
    positive: Tensor | None = None
    excluded: Tensor | None = None

    def only_others(self, values: Tensor, fill: float) -> Tensor:
        """Values [G, b, c] with `fill` where they belong to no other: at positives and at what is left out."""
        for mask in (self.positive, self.excluded):
            if mask is not None:
                values = values.masked_fill(mask, fill)
        return values


@dataclass
class Scoring:
    """How this rank's rows meet the columns of all ranks.

    Attributes:
        score: see `Score`.
        ranks: the ranks. With `ranks.ring` columns travel; otherwise they were gathered, this rank's own first.
        counts: the number of columns of every rank.
        rows: the number of this rank's rows.
        total: the number of rows of all ranks.
        positives: int64 [b], numbers in [own; further]; None for a row's own number.
        exclude_self: leave out column i of row i.
    """

    score: Score
    ranks: Ranks
    counts: Sequence[int]
    rows: int
    total: int
    positives: Tensor | None = None
    exclude_self: bool = False

    def blocks(
        self, columns: Tensor, more: Tensor | None, groups: int, gradients: tuple[Tensor | None, Tensor | None]
    ) -> Iterator[Block]:
        """All blocks, this rank's own columns first.

        Args:
            columns: this rank's own columns; where they were gathered, those of all ranks.
            more: the further columns.
            groups: the scores' groups.
            gradients: of `columns` and of `more`, zeros to which the caller adds; None if not wanted.
        """
        for part in self._parts(columns, more, *gradients):
            yield from self._split(part, groups)

    def own_blocks(self, columns: Tensor, groups: int) -> Iterator[Block]:
        """The blocks of the first columns, one for each row."""
        yield from self._split(Block(columns.narrow(-2, 0, self.rows), 0, 0, None), groups)

    def _split(self, part: Block, groups: int) -> Iterator[Block]:
        width = max(1, BLOCK_NUMBERS // max(groups * self.rows, part.keys[..., :1, :].numel()))
        for begin in range(0, part.keys.shape[-2], width):
            keys = part.keys[..., begin : begin + width, :]
            gradient = None if part.gradient is None else part.gradient[..., begin : begin + width, :]
            first = None if part.first is None else part.first + begin
            yield self._marked(Block(keys, first, part.number + begin, gradient))

    def _parts(
        self, columns: Tensor, more: Tensor | None, of_columns: Tensor | None, of_more: Tensor | None
    ) -> Iterator[Block]:
        own, everything = self.counts[self.ranks.rank], sum(self.counts)
        if not self.ranks.ring:
            pieces = [None, None] if of_columns is None else of_columns.split([own, everything - own], -2)
            here, there = columns.split([own, everything - own], -2)
            yield Block(here, 0, 0, pieces[0])
            yield Block(there, None, own, pieces[1])
        elif of_columns is None:
            for source, keys in travel(columns, self.ranks, self.counts):
                yield Block(keys, self._first(source), sum(self.counts[:source]), None)
        else:
            for source, keys, passed in travel_with_gradient(columns, self.ranks, self.counts, of_columns):
                yield Block(keys, self._first(source), sum(self.counts[:source]), passed)
        if more is not None:
            yield Block(more, own, everything, of_more)

    def _first(self, source: int) -> int | None:
        return 0 if source == self.ranks.rank else None

    def _marked(self, block: Block) -> Block:
        if block.first is None:
            return block
        device = block.keys.device
        here = torch.arange(block.first, block.first + block.keys.shape[-2], device=device)
        itself = torch.arange(self.rows, device=device)
        positives = itself if self.positives is None else self.positives
        block.positive = here == positives[:, None]
        if self.exclude_self:
            block.excluded = here == itself[:, None]
        return block


class Statistics:
    """D_i, the score of each row's positive, and one statistic R_i of its other scores, [G, b] both.

    Args:
        kind: what R_i is: "lse", "clipped" (the LSE of scores clipped to ±tau) or "softplus" (the sum).
        like: [G, b], for dtype and device.
        tau: see `kind`.
    """

    def __init__(self, kind: str, like: Tensor, tau: float = 0.0):
        self.kind, self.tau = kind, tau
        self.joint = torch.full_like(like, math.nan)
        self.rest = torch.zeros_like(like) if kind == "softplus" else torch.full_like(like, -math.inf)

    def add(self, scores: Tensor, block: Block) -> None:
        self.joint = positive_scores(scores, block, self.joint)
        if self.kind == "softplus":
            self.rest = self.rest + block.only_others(softplus(scores), 0.0).sum(-1)
            return
        if self.kind == "clipped":
            scores = scores.clamp(-self.tau, self.tau)
        self.rest = torch.logaddexp(self.rest, block.only_others(scores, -math.inf).logsumexp(-1))


def positive_scores(scores: Tensor, block: Block, known: Tensor) -> Tensor:
    """D_i [G, b] of the rows whose positive is in the block; of the others what is known."""
    if block.positive is None:
        return known
    column = block.positive.to(torch.uint8).argmax(-1).expand(known.shape)[..., None]
    return torch.where(block.positive.any(-1), scores.gather(-1, column)[..., 0], known)


class Mixture:
    """Row statistics of the interpolated bound (`reference._interpolate`), in two passes over the blocks.

    T_ij = S_ij - D_i, L_ij is the LSE of T_il over l != j, and p_ij = sigmoid(log alpha + L_ij - log(N - 1)
    - log(1 - alpha) - a_i + D_i). L_ij of the row's largest score is summed without it, because a difference would have
    no digits left.

    Args:
        joint: D_i [G, b].
        a: log-baseline [G, b].
        alpha: the bound's alpha.
        total: N, the number of columns.
    """

    def __init__(self, joint: Tensor, a: Tensor, alpha: float, total: int):
        self.joint = joint
        log_alpha, log_beta = log_weights(alpha)
        self.log_alpha = log_alpha - math.log(total - 1)
        self.baseline = log_beta + a - joint
        self.rest = torch.full_like(joint, -math.inf)
        # The largest T of each row, its column, and the LSE of the others.
        self.top, self.below = self.rest, self.rest
        self.column = torch.full_like(joint, -1, dtype=torch.int64)
        self.excess, self.shares = torch.zeros_like(joint), torch.zeros_like(joint)
        # log of the sum over j of p_ij e^-L_ij, without the largest score's column, and of that column's part.
        self.others, self.largest = self.rest, self.rest

    def shifted(self, scores: Tensor, block: Block) -> Tensor:
        scores = scores - self.joint[..., None]
        return scores if block.positive is None else scores.masked_fill(block.positive, 0)

    def is_top(self, block: Block) -> Tensor:
        """Whether a column is its row's largest, bool [G, b, c]."""
        number = torch.arange(block.number, block.number + block.keys.shape[-2], device=block.keys.device)
        return self.column[..., None] == number

    def add(self, scores: Tensor, block: Block) -> None:
        """First pass: R_i, the largest score, and the LSE of the others."""
        self.rest = torch.logaddexp(self.rest, block.only_others(scores, -math.inf).logsumexp(-1))
        shifted = self.shifted(scores, block)
        top, place = shifted.max(-1)
        hidden = torch.arange(shifted.shape[-1], device=scores.device) == place[..., None]
        below = shifted.masked_fill(hidden, -math.inf).logsumexp(-1)
        higher = top > self.top
        lower = torch.where(higher, self.top, top)
        self.below = torch.logaddexp(torch.logaddexp(self.below, below), lower)
        self.column = torch.where(higher, place + block.number, self.column)
        self.top = torch.where(higher, top, self.top)

    def left_out(self, shifted: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """L_ij and log p_ij, [G, b, c]."""
        is_top = self.is_top(block)
        whole = torch.logaddexp(self.top, self.below)[..., None]
        share = (shifted - whole).exp().masked_fill(is_top, 0).clamp(max=MOST_OF_ONE)
        loo = torch.where(is_top, self.below[..., None], whole + torch.log1p(-share))
        return loo, logsigmoid(self.log_alpha + loo - self.baseline[..., None])

    def add_again(self, scores: Tensor, block: Block) -> None:
        """Second pass: sums of A_ij - D_i and of 1 - p_ij over j != i, and what the gradient needs."""
        loo, log_p = self.left_out(self.shifted(scores, block), block)
        baseline = self.baseline[..., None]
        self.excess = self.excess + block.only_others(torch.logaddexp(self.log_alpha + loo, baseline), 0).sum(-1)
        share = torch.sigmoid(baseline - self.log_alpha - loo)
        self.shares = self.shares + block.only_others(share, 0).sum(-1)
        weight, is_top = block.only_others(log_p - loo, -math.inf), self.is_top(block)
        self.others = torch.logaddexp(self.others, weight.masked_fill(is_top, -math.inf).logsumexp(-1))
        self.largest = torch.logaddexp(self.largest, weight.masked_fill(~is_top, -math.inf).logsumexp(-1))

    def gradient(self, scores: Tensor, block: Block, marginal: Tensor, total: int) -> Tensor:
        """dV / dS [G, b, c]. marginal: log of the weight of row i in the marginal term (`statistics.interpolated`)."""
        shifted = self.shifted(scores, block)
        loo, log_p = self.left_out(shifted, block)
        is_top = self.is_top(block)
        # No score is above a log-sum-exp that it is part of.
        pairs = (shifted + self.others[..., None]).clamp(max=math.log(total - 1)).exp()
        rest = (shifted + self.largest[..., None]).clamp(max=0).exp() - (shifted + log_p - loo).clamp(max=0).exp()
        pairs = pairs + rest.masked_fill(is_top, 0)
        of_row = ((scores - self.rest[..., None]).clamp(max=0) + marginal[..., None]).exp()
        gradient = -pairs / (total * (total - 1)) - of_row / total
        if block.positive is None:
            return gradient
        own = 1 / total - torch.logaddexp(self.others, self.largest).exp() / (total * (total - 1))
        return torch.where(block.positive, own[..., None], gradient)
