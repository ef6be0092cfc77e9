"""The operation by formula, in plain torch, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.dropout import reference as dropout


def valid_places(valid: Tensor, length: int) -> Tensor:
    """bool [B, length], from lengths [B] or a mask [B, length]."""
    return torch.arange(length, device=valid.device) < valid[:, None] if valid.dim() == 1 else valid != 0


def stack(
    sequences: Sequence[Tensor], valid: Sequence[Tensor], size: int, fill: Sequence[bool], rates: Sequence[float],
    hidden: Sequence[float], seed: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """See `op.stack_sequences`."""
    batch, _, d = sequences[0].shape
    wide = max(size, *(x.shape[1] for x in sequences))
    slices, means = [], []
    for k, x in enumerate(sequences):
        own = max(size, x.shape[1])
        ok = F.pad(valid_places(valid[k], x.shape[1]), (0, own - x.shape[1]))[..., None]
        v = torch.where(ok, F.pad(x.float(), (0, 0, 0, own - x.shape[1])), 0.0)
        count = ok.sum(1).clamp(min=1)
        if fill[k]:
            v = torch.where(ok, v, (v.sum(1) / count)[:, None])
        if rates[k] > 0:
            kept = dropout.keep(batch * wide * d, seed + k, rates[k]).view(batch, wide, d)[:, :own]
            v = torch.where(kept, v * (1 / (1 - rates[k])), 0.0)
        means.append(torch.where(ok, v, 0.0).sum(1) / count)
        v = v[:, :size]
        if hidden[k] > 0:
            v = v * dropout.keep(batch, seed + len(sequences) + k, hidden[k])[:, None, None]
        slices.append(v)
    return torch.stack(slices, 2), means
