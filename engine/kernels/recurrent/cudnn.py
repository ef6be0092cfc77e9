"""The recurrences on a GPU: cuDNN, without the host having to know the lengths.

Packing a batch needs its lengths on the host, for which a GPU would have to be waited for. Here every direction runs
over the padded batch instead, the backward one over rows reversed within their lengths, so that padding comes after a
row's end in both, where it can change nothing that counts. cuDNN's persistent kernels want it so as well: they take
padded input only, of hidden sizes up to 128 in the backward pass.

cuDNN rounds to TF32 where torch's matrix products do, in the backward pass too, and under autocast, which would have it
round to 16 bits. Works on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.gradients import differentiable_once
from engine.precision import cudnn_as_matmul
from engine.streams import run_parallel

# Launches of one layer and direction, as an H200 runs them. Forward: joining the weights, a fill, the product of the
# input, its biases, the recurrence. Backward: the recurrence and its gates, products and their split sums for the input
# and both matrices, biases, fills, and the gradients of the joined weights.
FORWARD, BACKWARD = 5, 15
PREPARATION = 6  # places, masks and first states


def bidirectional(x: Tensor, length: Tensor, weights: Sequence[Tensor], cell: str, tf32: bool = False) -> Tensor:
    """As `reference.bidirectional`; differentiable once. `tf32`: round to it whatever torch's products do."""
    if torch.is_grad_enabled():
        return _Governed.apply(x, length, cell, tf32, *weights)
    with cudnn_as_matmul(tf32):
        return _layers(x, length, weights, cell)


class _Governed(torch.autograd.Function):
    """`_layers`, differentiated by autograd, with both passes under `cudnn_as_matmul`.

    cuDNN reads its setting when a pass begins: one that only spans the forward pass would not reach the other.
    """

    @staticmethod
    def forward(ctx, x: Tensor, length: Tensor, cell: str, tf32: bool, *weights: Tensor) -> Tensor:
        tensors = [t.detach().requires_grad_(need) for t, need in zip((x, *weights), _needed(ctx), strict=True)]
        with torch.enable_grad(), cudnn_as_matmul(tf32):
            y = _layers(tensors[0], length, tensors[1:], cell)
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
        return of_x, None, None, None, *of_weights


def _needed(ctx) -> tuple[bool, ...]:
    """Whether x and each of the weights need gradients."""
    return ctx.needs_input_grad[:1] + ctx.needs_input_grad[4:]


def _layers(x: Tensor, length: Tensor, weights: Sequence[Tensor], cell: str) -> Tensor:
    hidden = weights[1].shape[1]
    column = torch.arange(x.shape[1], device=x.device)
    inside = column < length[:, None]
    reverse = torch.where(inside, length[:, None] - 1 - column, column)
    start = x.new_zeros(1, x.shape[0], hidden)
    for layer in range(len(weights) // 8):
        forward, backward = weights[8 * layer :][:4], weights[8 * layer + 4 :][:4]
        h = run_parallel(
            [(_direction, (x, start, forward, cell)), (_backward_direction, (x, start, backward, cell, reverse))]
        )
        x = torch.cat(h, -1) * inside[..., None]
    return x


def _direction(x: Tensor, start: Tensor, weights: Sequence[Tensor], cell: str) -> Tensor:
    run, state = (torch._VF.gru, start) if cell == "gru" else (torch._VF.lstm, (start, start))
    # biased, one layer, no dropout, one direction, batch first
    return run(x, state, _joined(weights), True, 1, 0.0, torch.is_grad_enabled(), False, True)[0]


def _backward_direction(x: Tensor, start: Tensor, weights: Sequence[Tensor], cell: str, reverse: Tensor) -> Tensor:
    return _Reordered.apply(_direction(_Reordered.apply(x, reverse), start, weights, cell), reverse)


def _joined(weights: Sequence[Tensor]) -> list[Tensor]:
    """The same weights as views of one fresh buffer, laid out as cuDNN reads them: matrices, then biases. From
    tensors of their own it would copy them one by one, with a warning."""
    buffer = torch.cat([w.flatten() for w in weights])
    parts = buffer.split([w.numel() for w in weights])
    return [part.view_as(w) for part, w in zip(parts, weights, strict=True)]


class _Reordered(torch.autograd.Function):
    """x [B, L, d] with row b's step place[b, l] at l. `place` undoes itself, so that the gradient is ordered alike."""

    @staticmethod
    def forward(ctx, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.gather(1, place[..., None].expand(-1, -1, x.shape[2]))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _Reordered.apply(gradient, *ctx.saved_tensors), None


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
        leaves = [w.detach().requires_grad_() for w in weights]
        wanted = list(leaves)
        x = x.detach()
        if input_gradient:
            wanted.append(x.requires_grad_())
        y = _layers(x, length, leaves, cell)
        return list(torch.autograd.grad(y, wanted, gradient))


def forward_launches(x: Tensor, length: Tensor, weights: Sequence[Tensor], *_: object) -> int:
    """Beside both directions, a layer reverses its input and its output, joins its halves and clears the padding."""
    return PREPARATION + len(weights) // 8 * (2 * FORWARD + 4)


def backward_launches(gradient: Tensor, x: Tensor, length: Tensor, weights: Sequence[Tensor], *_: object) -> int:
    """Without the second forward pass, which a step does without: it runs no compiled graph around a recurrence.

    Beside both directions, a layer clears the padding, takes its halves apart, reverses twice and adds up for its
    input."""
    return len(weights) // 8 * (2 * BACKWARD + 6)
