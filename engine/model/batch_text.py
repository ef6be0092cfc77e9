"""The text of a batch as features, whichever way the data has it."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from engine.loaders.batch import Batch
from engine.model.text_encoder import encode_packed, encode_padded, encode_without_padding, pack_text, packable


def encode_text(encoder: nn.Module, batch: Batch) -> Tensor:
    """float32 [B, Lt, encoder.dim]: precomputed text features, or what the text encoder makes of the tokens.

    Padding is not computed where the encoder allows that.
    """
    if batch.text is not None:
        return batch.text
    if batch.static:
        return encode_padded(encoder, batch.token_ids, batch.token_mask)
    if batch.packed is None:
        return encode_without_padding(encoder, batch.token_ids, batch.token_mask)
    text = encode_packed(encoder, batch.packed)
    return F.pad(text, (0, 0, 0, batch.token_mask.shape[1] - text.shape[1]))


def project_text(encoder: nn.Module, batch: Batch, projection: nn.Linear) -> Tensor:
    """`projection` (without a bias) of `encode_text`, [B, Lt, d]; under autocast of its type.

    In a static batch on a GPU its weight is cast with the encoder's weights, and it reads the encoder's cast output.
    """
    watched = projection._forward_pre_hooks or projection._forward_hooks
    plain = type(projection) is nn.Linear and projection.bias is None and not watched
    if plain and batch.static and batch.text is None and batch.token_ids.is_cuda:
        return encode_padded(encoder, batch.token_ids, batch.token_mask, projection.weight)
    return projection(encode_text(encoder, batch))


def with_packed_text(encoder: nn.Module | None, batch: Batch) -> Batch:
    """The batch with its texts packed as `encode_text` reads them: before it moves to a GPU or into a graph."""
    if batch.static or batch.token_ids is None or batch.packed is not None:
        return batch
    if encoder is None or not packable(encoder):
        return batch
    return replace(batch, packed=pack_text(batch.token_ids, batch.token_mask))
