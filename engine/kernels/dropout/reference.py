"""Dropout by formula: the mask as a function of a seed, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 1 << 14  # as in dropout.cpp
WORD = 0xFFFFFFFF


def mixed(h: Tensor) -> Tensor:
    """A bijection of 32-bit words, kept in int64, whose output bits look independent of its input's."""
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & WORD
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & WORD
    return h ^ (h >> 16)


def keep(count: int, seed: Tensor, p: float) -> Tensor:
    """bool [count]: which elements the mask of `seed` (int64 [1]) keeps, each with probability 1 - p."""
    low, high = seed & WORD, (seed >> 32) & WORD
    index = torch.arange(count, device=seed.device)
    key = mixed(low ^ mixed(high ^ mixed(index // PIECE)))
    draw = mixed(mixed((index % PIECE + key) & WORD) ^ high)
    return draw >= threshold(p)


def threshold(p: float) -> int:
    """The 32-bit draw from which on an element is kept."""
    return min(int(p * 2**32), WORD)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x where kept, times 1 / (1 - p)."""
    scaled = (x.float() * (1 / (1 - p))).to(x.dtype) if x.dtype == torch.bfloat16 else x * (1 / (1 - p))
    return torch.where(keep(x.numel(), seed, p).view(x.shape), scaled, torch.zeros_like(x))
