"""Missing modalities and masked frames at random, drawn on finished batches, so that every loader gives the same.

A draw depends on the seed, the epoch, the sample and the position, and on nothing else: not on the batch, the order,
the loader, the number of processes or the device. It is computed on the batch's device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from engine.config import AugmentConfig
from engine.loaders.batch import Batch
from engine.vocabulary import MODALITIES

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64
_WORD = 1 << 64
_DROP, _MASK, _SPARE = (
    0,
    3,
    6,
)  # numbers of the independent streams: one per modality for dropping, one for masking, one more


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of one loader.

    Attributes:
        config: probabilities. seed: together with the epoch, it decides all draws.
        empty: token ids of an empty text, such as [CLS] [SEP]. A missing text becomes these; they are never masked.
        unknown: token id that a masked token becomes. pad_id: what fills token ids.
    """

    config: AugmentConfig
    seed: int
    empty: Sequence[int]
    unknown: int
    pad_id: int
    _rows: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict, compare=False, repr=False)

    STREAMS = 7  # random streams: three modalities are dropped and masked, and one is spared

    def keys(self, epoch: int) -> list[int]:
        """One int64 per stream. An epoch's draws depend on these, the sample and the position."""
        return [_key(self.seed, epoch, stream) for stream in range(self.STREAMS)]

    def apply(self, batch: Batch, keys: Sequence[int] | Tensor) -> Batch:
        """A new batch with an epoch's draws applied.

        Args:
            keys: what `keys(epoch)` gives, as numbers or as int64 [STREAMS] on the batch's device.
        """
        c = self.config
        rates = {"text": (c.drop_text, c.mask_text), "audio": (c.drop_audio, c.mask_audio)}
        rates["vision"] = (c.drop_vision, c.mask_vision)
        dropped = self._dropped([rates[m][0] for m in MODALITIES], batch.index, keys)
        for number, name in enumerate(MODALITIES):
            change = self._text if name == "text" else self._frames
            if rates[name][1]:
                batch = change(batch, name, masked=self._masked(number, rates[name][1], batch, name, keys))
            if rates[name][0]:
                batch = change(batch, name, dropped=dropped[:, number])
        return batch

    def _dropped(self, rates: list[float], index: Tensor, keys: Sequence[int] | Tensor) -> Tensor:
        """bool [B, 3]. Where all three would go, one of them, drawn evenly, stays."""
        drawn = [self._chance(keys[_DROP + i], rate, index) for i, rate in enumerate(rates)]
        dropped = torch.stack(drawn, 1)
        spared = (_bits(keys[_SPARE], index) >> 1 & 0x3FFFFFFF) % len(MODALITIES)
        kept = torch.arange(len(MODALITIES), device=index.device) == spared[:, None]
        return dropped & ~(dropped.all(1, keepdim=True) & kept)

    def _masked(self, number: int, rate: float, batch: Batch, name: str, keys: Sequence[int] | Tensor) -> Tensor:
        """Masked positions, bool [B, L]."""
        length = batch.token_mask.shape[1] if name == "text" else getattr(batch, name).shape[1]
        place = torch.arange(length, device=batch.index.device)
        return self._chance(keys[_MASK + number], rate, batch.index[:, None], place)

    def _chance(self, key: int | Tensor, rate: float, index: Tensor, place: Tensor | None = None) -> Tensor:
        bits = _bits(key, index)
        if place is not None:
            bits = _mix(bits + place * _signed(_GOLDEN))
        return (bits & (2**63 - 1)) < int(rate * 2**63)

    def _frames(self, batch: Batch, name: str, masked: Tensor | None = None, dropped: Tensor | None = None) -> Batch:
        frames, length = getattr(batch, name), getattr(batch, f"{name}_length")
        if masked is not None:
            return replace(batch, **{name: frames.masked_fill(masked[..., None], 0)})
        frames = frames.masked_fill(dropped[:, None, None], 0)
        return replace(batch, **{name: frames, f"{name}_length": length.masked_fill(dropped, 1)})

    def _text(self, batch: Batch, name: str, masked: Tensor | None = None, dropped: Tensor | None = None) -> Batch:
        ids, mask = batch.token_ids, batch.token_mask
        if masked is not None:
            if ids is None:
                return replace(batch, text=batch.text.masked_fill(masked[..., None], 0))
            special = torch.zeros_like(ids, dtype=torch.bool)
            for token in self.empty:
                special |= ids == token
            return replace(batch, token_ids=ids.masked_fill(masked & (mask != 0) & ~special, self.unknown))
        # a missing text becomes an empty one: its special tokens, or one frame of zeros
        kept = [] if ids is None else list(self.empty[: ids.shape[1]])
        here = torch.arange(mask.shape[1], device=mask.device) < max(1, len(kept))
        mask = torch.where(dropped[:, None], here.to(mask.dtype), mask)
        if ids is None:
            return replace(batch, token_mask=mask, text=batch.text.masked_fill(dropped[:, None, None], 0))
        row = self._empty_text(ids)
        return replace(batch, token_mask=mask, token_ids=torch.where(dropped[:, None], row, ids))

    def _empty_text(self, ids: Tensor) -> Tensor:
        """An empty text as wide as ids [B, L]. Made once per width: a static step may copy nothing from the host."""
        key = (ids.shape[1], ids.device)
        if key not in self._rows:
            kept = list(self.empty[: ids.shape[1]])
            row = kept + [self.pad_id] * (ids.shape[1] - len(kept))
            self._rows[key] = torch.tensor(row, dtype=ids.dtype, device=ids.device)
        return self._rows[key]


def _signed(word: int) -> int:
    """The int64 with the same 64 bits."""
    return (word + (_WORD >> 1)) % _WORD - (_WORD >> 1)


def _key(*numbers: int) -> int:
    """64 bits, as int64, that depend on all numbers and on their order."""
    state = 0
    for number in numbers:
        state = (state + number * _GOLDEN + _GOLDEN) % _WORD
        state = ((state ^ state >> 30) * _FIRST) % _WORD
        state = ((state ^ state >> 27) * _SECOND) % _WORD
        state ^= state >> 31
    return _signed(state)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's mixing. int64 tensors wrap around; the masks make the shifts unsigned."""
    x = (x ^ (x >> 30 & 2**34 - 1)) * _signed(_FIRST)
    x = (x ^ (x >> 27 & 2**37 - 1)) * _signed(_SECOND)
    return x ^ (x >> 31 & 2**33 - 1)


def _bits(key: int | Tensor, index: Tensor) -> Tensor:
    """64 random bits per sample, int64 of the shape of `index`."""
    return _mix(_mix(index * _signed(_GOLDEN) + key))
