"""The recurrences on a GPU: cuDNN, without the host having to know the lengths.

Packing a batch needs its lengths on the host, for which a GPU would have to be waited for. Here every direction runs
over the padded batch instead, the backward one over rows reversed within their lengths, so that padding comes after a
row's end in both, where it can change nothing that counts. Works on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def bidirectional(x: Tensor, length: Tensor, weights: Sequence[Tensor], cell: str) -> Tensor:
    """As `reference.bidirectional`; differentiable by autograd."""
    run = torch._VF.gru if cell == "gru" else torch._VF.lstm
    hidden = weights[1].shape[1]
    column = torch.arange(x.shape[1], device=x.device)
    inside = column < length[:, None]
    reverse = torch.where(inside, length[:, None] - 1 - column, column)
    start = x.new_zeros(1, x.shape[0], hidden)
    state = start if cell == "gru" else (start, start)
    training = torch.is_grad_enabled()
    for layer in range(len(weights) // 8):
        found = []
        for direction in range(2):
            rows = _reordered(x, reverse) if direction else x
            own = list(weights[4 * (2 * layer + direction) :][:4])
            # biased, one layer, no dropout, one direction, batch first
            h = run(rows, state, own, True, 1, 0.0, training, False, True)[0]
            found.append(_reordered(h, reverse) if direction else h)
        x = torch.cat(found, -1) * inside[..., None]
    return x


def _reordered(x: Tensor, place: Tensor) -> Tensor:
    return x.gather(1, place[..., None].expand(-1, -1, x.shape[2]))


def forward(x: Tensor, length: Tensor, weights: Sequence[Tensor], cell: str, tokens: int) -> tuple[Tensor, Tensor]:
    """Host function of the operation in a compiled graph: out [B, L, 2H]; nothing is kept for the backward pass."""
    with torch.no_grad():
        return bidirectional(x, length, weights, cell), x.new_empty(0)


def backward(
    gradient: Tensor,
    x: Tensor,
    length: Tensor,
    weights: Sequence[Tensor],
    out: Tensor,
    state: Tensor,
    cell: str,
    input_gradient: bool,
) -> list[Tensor]:
    """Gradients of the weights, then of x where `input_gradient`. The forward pass is run again: cuDNN's own reserve
    cannot be an output of an operation."""
    with torch.enable_grad():
        leaves = [w.detach().requires_grad_() for w in weights]
        wanted = list(leaves)
        x = x.detach()
        if input_gradient:
            wanted.append(x.requires_grad_())
        y = bidirectional(x, length, leaves, cell)
    return list(torch.autograd.grad(y, wanted, gradient))
