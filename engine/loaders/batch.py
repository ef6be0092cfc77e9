"""The Batch that models receive. It is all that a model knows of data."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class PackedText:
    """Texts of a batch put end to end into rows of one width. A text encoder reads them without padding.

    Attributes:
        token_ids, position: int64 [rows, width]; each text's positions count from 0.
        text: int64 [rows, width], the text that a place belongs to; -1 where nothing is attended to.
        place: int64 [B, L], where a text's tokens are in the flattened rows; 0 for padding.
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
    """One padded batch of utterances. All sequences are padded on the RIGHT, frames and features with zeros.

    Attributes:
        index: int64 [B], row of each sample in its split (file order).
        ids: B sample ids.
        label: float32 [B, n_label] (regression) or int64 [B] (classification).
        token_ids: int64 [B, Lt], or None if text features are precomputed.
        token_mask: int64 [B, Lt], 1 at attended tokens (CLS and SEP included).
        text: float32 [B, Lt, d_t] precomputed text features, or None if there are tokens.
        audio: float32 [B, La, d_a]; audio_length: int64 [B], 1 <= length <= La.
        vision: float32 [B, Lv, d_v]; vision_length: int64 [B], 1 <= length <= Lv.
        packed: the token_ids once more as `engine.model.text_encoder.pack_text` lays them out, or None.
        static: the batch lies in buffers of a static step. Its widths are a bucket's, not those of its longest
            sequences,
            and nothing may read its values on the host.
        audio_width, vision_width: int64 0-d, the widths without the bucket; None if the tensors have these widths.

    A missing modality is one zero frame of length 1.

    >>> import torch
    >>> text, frames = (torch.tensor([[101, 102]]), torch.ones(1, 2)), (torch.zeros(1, 3, 5), torch.tensor([3]))
    >>> batch = Batch.of(torch.tensor([0]), ["a_1"], torch.tensor([[0.5]]), text, frames, frames)
    >>> len(batch), batch.token_ids.shape, batch.text
    (1, torch.Size([1, 2]), None)
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

    @classmethod
    def of(
        cls,
        index: Tensor,
        ids: list[str],
        label: Tensor,
        text: tuple[Tensor, Tensor],
        audio: tuple[Tensor, Tensor],
        vision: tuple[Tensor, Tensor],
        **static: Any,
    ) -> "Batch":
        """A batch of padded tensors: text with its mask, audio and vision with their lengths.

        Integers in `text` are token ids; floats are precomputed features.
        """
        tokens, features = (None, text[0]) if text[0].is_floating_point() else (text[0], None)
        return cls(index, ids, label, tokens, text[1], features, *audio, *vision, **static)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, rows: slice) -> "Batch":
        """Some rows of a batch that is neither packed nor static, as wide as it is."""
        cut = {f.name: value[rows] for f in fields(self) if isinstance(value := getattr(self, f.name), (Tensor, list))}
        return replace(self, **cut)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with every tensor on `device`."""
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), (Tensor, PackedText))
        }
        return replace(self, **moved)
