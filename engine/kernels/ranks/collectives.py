"""Rows gathered and sums taken over ranks, with gradients.

Their gradients are those of the sum over ranks of all that is computed from them. They can be differentiated again.
All ranks must call them in one order; in a backward pass the order is that of the graph, which must be the same on all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.kernels.ranks.group import Ranks


def _named(*names: str) -> Any:
    """The first of these collectives that torch has. It may have none at all, and renamed some in 2.13."""
    return next((getattr(dist, name) for name in names if hasattr(dist, name)), None)


_all_gather = _named("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _named("reduce_scatter_single", "reduce_scatter_tensor")


def gather_rows(x: Tensor, ranks: Ranks, counts: Sequence[int], dim: int = 0) -> Tensor:
    """The rows of all ranks in their order, rank 0's first.

    Args:
        x: this rank's rows, along `dim`.
        ranks: the ranks.
        counts: the number of rows of every rank. One that all share takes the fast path.
        dim: the dimension of the rows.
    """
    return _Gather.apply(x.movedim(dim, 0), ranks, tuple(counts)).movedim(0, dim)


def own_first(x: Tensor, ranks: Ranks, counts: Sequence[int], dim: int = 0) -> Tensor:
    """`gather_rows` with this rank's rows before those of the ranks that follow it in a circle."""
    return gather_rows(x, ranks, counts, dim).roll(-sum(counts[: ranks.rank]), dim)


def sum_over_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum of x over all ranks."""
    return _Sum.apply(x, ranks)


def stack_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """x of all ranks, [ranks, ...], without gradients. The same bits on every rank."""
    own = x.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(ranks.size)]
    dist.all_gather(parts, own, group=ranks.group)
    return torch.stack(parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks, counts):
        ctx.arguments = ranks, counts
        return _gathered(x, ranks, counts)

    @staticmethod
    def backward(ctx, grad):
        return _Scatter.apply(grad, *ctx.arguments), None, None


class _Scatter(torch.autograd.Function):
    """The sum over ranks of all rows [sum of counts, ...], of which every rank gets its own."""

    @staticmethod
    def forward(ctx, x, ranks, counts):
        ctx.arguments = ranks, counts
        return _scattered(x, ranks, counts)

    @staticmethod
    def backward(ctx, grad):
        return _Gather.apply(grad, *ctx.arguments), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ranks.group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad, ctx.ranks), None


def _gathered(x: Tensor, ranks: Ranks, counts: Sequence[int]) -> Tensor:
    x, most = x.contiguous(), max(counts)
    if most * math.prod(x.shape[1:]) == 0:
        return x.new_empty(sum(counts), *x.shape[1:])
    equal = min(counts) == most
    if not equal:
        x = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    out = x.new_empty(ranks.size * most, *x.shape[1:])
    # bytes: not every backend knows every dtype
    _all_gather(as_bytes(out), as_bytes(x), group=ranks.group)
    if equal:
        return out
    return torch.cat([part[:count] for part, count in zip(out.split(most), counts, strict=True)])


def as_bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor as uint8."""
    return x.view(-1).view(torch.uint8)


def _scattered(x: Tensor, ranks: Ranks, counts: Sequence[int]) -> Tensor:
    # sums in fp32: sixteen bits would lose digits with every rank
    total = x.to(torch.promote_types(x.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format)
    if min(counts) == max(counts) and f"{x.device.type}:nccl" in str(dist.get_backend_config(ranks.group)):
        out = total.new_empty(counts[0], *x.shape[1:])
        _reduce_scatter(out, total, group=ranks.group)
        return out.to(x.dtype)
    dist.all_reduce(total, group=ranks.group)
    begin = sum(counts[: ranks.rank])
    return total[begin : begin + counts[ranks.rank]].to(x.dtype, copy=True)
