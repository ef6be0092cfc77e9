"""Ragged sequences to a padded batch, as its formula: the spec that every faster backend is tested against."""

import torch
from torch import Tensor


def scale(values: Tensor, shift: Tensor, factor: Tensor, clip: float) -> Tensor:
    """See `op.scale`."""
    scaled = ((values.double() - shift) * factor).clamp(-clip, clip).float()
    return torch.where((values != 0).any(-1, keepdim=True), scaled, 0.0)


def pad(values: Tensor, offsets: Tensor, rows: Tensor, width: int, fill: int, closing: int) -> tuple[Tensor, Tensor]:
    """See `op.pad`. values [total, d] or [total] -> [B, width, d] or [B, width], lengths [B]."""
    start = offsets[rows]
    whole = offsets[rows + 1] - start
    lengths = whole.clamp(max=width)
    place = torch.arange(width, device=values.device)
    live = place < lengths[:, None]
    out = values.new_full((len(rows), width, *values.shape[1:]), fill)
    out[live] = values[(start[:, None] + place)[live]]
    if closing >= 0:
        cut = (lengths < whole) & (lengths > 0)
        out[cut, width - 1] = closing
    return out.to(torch.int64 if values.dtype == torch.int32 else torch.float32), lengths
