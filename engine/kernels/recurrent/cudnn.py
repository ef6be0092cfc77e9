"""The recurrences on a GPU: cuDNN, without the host having to know the lengths.

Packing a batch needs its lengths on the host, for which a GPU would have to be waited for. Here every direction runs
over the padded batch instead, the backward one over rows turned round within their lengths, so that padding comes after
a row's end in both, where it can change nothing that counts. cuDNN's persistent kernels want it so as well: they take
padded input only, of hidden sizes up to 128 in the backward pass. What lies between the recurrences is in plumbing.py.

cuDNN rounds to TF32 where torch's matrix products do, in the backward pass too, and under autocast, which would have it
round to 16 bits. Works on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.gradients import differentiable_once
from engine.kernels.recurrent.plumbing import Join, Norm, Turn
from engine.precision import cudnn_as_matmul
from engine.streams import run_parallel

# Launches of one layer and direction, as an H200 runs them. Forward: a fill, the product of the input, its biases, the
# recurrence, and another fill. Backward: the recurrence and its gates, products and their split sums for the input and
# both matrices, biases, and fills.
FORWARD, BACKWARD = 5, 14
PREPARATION = 2  # joining the weights; turning the input round


class Normed(NamedTuple):
    """relu(LayerNorm(both directions' sum)) of the last layer in place of both side by side.

    Attributes:
        eps: LayerNorm's.
        clear: 0 behind a row's length.
    """

    eps: float
    clear: bool


def bidirectional(
    x: Tensor, length: Tensor, weights: Sequence[Tensor], cell: str, tf32: bool = False, normed: Normed | None = None
) -> Tensor:  # fmt: skip
    """As `reference.bidirectional`; differentiable once. `tf32`: round to it whatever torch's products do.

    normed: then [B, L, H]. LayerNorm's weight and shift are the last two of `weights`.
    """
    if torch.is_grad_enabled():
        return _Governed.apply(x, length, cell, tf32, normed, *weights)
    with cudnn_as_matmul(tf32):
        return _layers(x, length, _joined(weights, normed), cell, normed)


class _Governed(torch.autograd.Function):
    """`_layers`, differentiated by autograd, with both passes under `cudnn_as_matmul`.

    cuDNN reads its setting when a pass begins: one that only spans the forward pass would not reach the other.
    """

    @staticmethod
    def forward(ctx, x: Tensor, length: Tensor, cell: str, tf32: bool, normed: Normed | None, *weights: Tensor):
        given = x.detach(), *_joined(weights, normed)
        tensors = [t.requires_grad_(need) for t, need in zip(given, _needed(ctx), strict=True)]
        with torch.enable_grad(), cudnn_as_matmul(tf32):
            y = _layers(tensors[0], length, tensors[1:], cell, normed)
        ctx.inner, ctx.tf32 = (y, [t for t in tensors if t.requires_grad]), tf32
        return y.detach()

    @staticmethod
    @differentiable_once("the recurrence")
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, wanted = ctx.inner
        with cudnn_as_matmul(ctx.tf32):
            retain = torch._C._autograd._get_current_graph_task_keep_graph()
            gradients = iter(torch.autograd.grad(y, wanted, gradient, retain_graph=retain))
        of_x, *of_weights = (next(gradients) if need else None for need in _needed(ctx))
        return of_x, None, None, None, None, *of_weights


def _needed(ctx) -> tuple[bool, ...]:
    """Whether x and each of the weights need gradients."""
    return ctx.needs_input_grad[:1] + ctx.needs_input_grad[5:]


def _joined(weights: Sequence[Tensor], normed: Normed | None) -> list[Tensor]:
    """The same weights, detached; those of each layer and direction as views of one fresh buffer, laid out as cuDNN
    reads them: matrices, then biases. From tensors of their own it would copy them one by one, with a warning."""
    end = len(weights) - (0 if normed is None else 2)
    views = []
    for first in range(0, end, 4):
        own = weights[first : first + 4]
        buffer = own[0].new_empty(sum(w.numel() for w in own))
        parts = buffer.split([w.numel() for w in own])
        views += [part.view_as(w).detach() for part, w in zip(parts, own, strict=True)]
    torch._foreach_copy_(views, [w.detach() for w in weights[:end]])
    return [*views, *(w.detach() for w in weights[end:])]


def _layers(x: Tensor, length: Tensor, weights: Sequence[Tensor], cell: str, normed: Normed | None = None) -> Tensor:
    """`weights`: from `_joined`."""
    layers, length = len(weights) // 8, length.contiguous()
    plain, turned, start = Turn.apply(x, length, weights[1].shape[1])
    for layer in range(layers):
        forward, backward = list(weights[8 * layer :][:4]), list(weights[8 * layer + 4 :][:4])
        h = run_parallel([(_direction, (plain, start, forward, cell)), (_direction, (turned, start, backward, cell))])
        if layer + 1 < layers:
            plain, turned = Join.apply(*h, length, True)
    if normed is not None:
        return Norm.apply(*h, length, *weights[-2:], *normed)
    return Join.apply(*h, length, False)[0]


def _direction(x: Tensor, start: Tensor, weights: list[Tensor], cell: str) -> Tensor:
    """Hidden states of x [L, B, d], [L, B, H]."""
    run, state = (torch._VF.gru, start) if cell == "gru" else (torch._VF.lstm, (start, start))
    # biased, one layer, no dropout, one direction, ordered by step
    return run(x, state, weights, True, 1, 0.0, torch.is_grad_enabled(), False, False)[0]


def forward(x: Tensor, length: Tensor, weights: Sequence[Tensor], cell: str, tokens: int) -> tuple[Tensor, Tensor]:
    """Host function of the operation in a compiled graph: out [B, L, 2H]; nothing is kept for the backward pass."""
    with torch.no_grad():
        return bidirectional(x, length, weights, cell), x.new_empty(0)


def backward(
    gradient: Tensor, x: Tensor, length: Tensor, weights: Sequence[Tensor], out: Tensor, state: Tensor, cell: str,
    input_gradient: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the weights, then of x where `input_gradient`. The forward pass is run again: cuDNN's own reserve
    cannot be an output of an operation, because a graph must know the sizes of those."""
    with torch.enable_grad(), cudnn_as_matmul():
        leaves = [w.requires_grad_() for w in _joined(weights, None)]
        wanted = list(leaves)
        x = x.detach()
        if input_gradient:
            wanted.append(x.requires_grad_())
        y = _layers(x, length, leaves, cell)
        return list(torch.autograd.grad(y, wanted, gradient))


def forward_launches(x: Tensor, length: Tensor, weights: Sequence[Tensor], *_: object) -> int:
    """Beside both directions, every layer joins its halves."""
    return PREPARATION + len(weights) // 8 * (2 * FORWARD + 1)


def backward_launches(gradient: Tensor, x: Tensor, length: Tensor, weights: Sequence[Tensor], *rest: object) -> int:
    """Without the second forward pass, which a step does without: it runs no compiled graph around a recurrence.

    Beside both directions, every layer takes its halves apart; the input's gradient is turned round and added up."""
    return len(weights) // 8 * (2 * BACKWARD + 1) + (2 if rest[-1] else 0)
