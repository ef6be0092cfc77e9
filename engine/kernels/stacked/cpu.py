"""Host functions on CPU tensors: the formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.dropout import reference as dropout
from engine.kernels.stacked import reference


def stack_sequences(
    first: Tensor, others: Sequence[Tensor], valid: Sequence[Tensor], size: int, fill: Sequence[bool],
    rates: Sequence[float], hidden: Sequence[float], seed: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The cube [B, size, K, D] and the means [B, D]."""
    return reference.stack([first, *others], valid, size, fill, rates, hidden, seed)


def stack_sequences_backward(
    grad: Tensor, mean_grads: Sequence[Tensor], valid: Sequence[Tensor], lengths: Sequence[int], fill: Sequence[bool],
    rates: Sequence[float], hidden: Sequence[float], seed: Tensor | None, types: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the sequences, [B, L, D] each. types: whether they are float32 (0), bfloat16 (1) or float16 (2)."""
    batch, size, kinds, d = grad.shape
    wide, results = max(size, *lengths), []
    for k, (length, kind) in enumerate(zip(lengths, types, strict=True)):
        own = max(size, length)
        ok = torch.nn.functional.pad(reference.valid_places(valid[k], length), (0, own - length))[..., None]
        count = ok.sum(1).clamp(min=1)
        g = torch.nn.functional.pad(grad[:, :, k], (0, 0, 0, own - size))
        if hidden[k] > 0:
            g = g * dropout.keep(batch, seed + kinds + k, hidden[k])[:, None, None]
        g = g + torch.where(ok, (mean_grads[k] / count)[:, None], 0.0)
        if rates[k] > 0:
            kept = dropout.keep(batch * wide * d, seed + k, rates[k]).view(batch, wide, d)[:, :own]
            g = torch.where(kept, g * (1 / (1 - rates[k])), 0.0)
        if fill[k]:
            g = g + (torch.where(ok, 0.0, g).sum(1) / count)[:, None]
        results.append(torch.where(ok, g, 0.0)[:, :length].to(TYPES[kind], copy=True).contiguous())
    return results


TYPES = (torch.float32, torch.bfloat16, torch.float16)
