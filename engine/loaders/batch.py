"""The Batch that models receive: the only thing a model knows of data."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass
class PackedText:
    """Texts of a batch put end to end into rows of one width: what a text encoder reads instead of padding.

    Attributes:
        token_ids, position: int64 [rows, width], each text's positions counted from 0.
        text: int64 [rows, width], which text a place belongs to; -1 where nothing is attended to.
        place: int64 [B, L], where a text's tokens are in the flattened rows (0 for padding).
    """

    token_ids: Tensor
    position: Tensor
    text: Tensor
    place: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedText":
        """The same with every tensor on `device`."""
        return PackedText(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))


@dataclass
class Batch:
    """One padded batch of utterances. All sequences are padded on the RIGHT with zeros.

    Attributes:
        index: int64 [B], row of each sample in its split (file order).
        ids: B sample ids.
        label: float32 [B, n_label] (regression) or int64 [B] (classification).
        token_ids: int64 [B, Lt] or None where text features are precomputed.
        token_mask: int64 [B, Lt], 1 at attended tokens (CLS and SEP included).
        text: float32 [B, Lt, d_t] precomputed text features, or None where tokens are given.
        audio: float32 [B, La, d_a]; audio_length: int64 [B], 1 <= length <= La.
        vision: float32 [B, Lv, d_v]; vision_length: int64 [B], 1 <= length <= Lv.
        packed: the token_ids once more as `engine.model.text_encoder.pack_text` lays them out, or None.
        static: the batch lies in buffers of a static step: its widths are a bucket's, not those of its longest
            sequences, and nothing may look at its values on the host.
        audio_width, vision_width: int64 0-d, the widths without the bucket; None where the tensors have them.

    A missing modality is one zero frame of length 1.
    """

    index: Tensor
    ids: list[str]
    label: Tensor
    token_ids: Tensor | None
    token_mask: Tensor
    text: Tensor | None
    audio: Tensor
    audio_length: Tensor
    vision: Tensor
    vision_length: Tensor
    packed: PackedText | None = None
    static: bool = False
    audio_width: Tensor | None = None
    vision_width: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with every tensor on `device`."""
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), (Tensor, PackedText))
        }
        return replace(self, **moved)
