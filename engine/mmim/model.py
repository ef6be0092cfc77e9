"""MMIM-style model: a text encoder, recurrent audio and vision encoders, and an MLP that adds to the text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.config import Config
from engine.kernels.dropout import Dropout
from engine.loaders.batch import Batch
from engine.model.batch_text import encode_text, with_packed_text
from engine.model.encoders import SequenceEncoder, length_mask, masked_mean
from engine.model.heads import make_head
from engine.model.output import ModelOutput
from engine.task import Inputs


class MMIM(nn.Module):
    """Features T, A and V of width `model.d_common`, the fused feature F, and a head on F.

    T is the mean of the projected text tokens. A and V are means of recurrent encoders over valid frames. F is T plus
    what an MLP makes of all three; without text it is the MLP's output.
    """

    def __init__(self, config: Config, inputs: Inputs, text_encoder: nn.Module | None):
        super().__init__()
        m, self.modalities = config.model, tuple(config.data.modalities)
        width = m.d_common
        self.text_encoder = text_encoder
        if "text" in self.modalities:
            self.text_projection = nn.Linear(text_encoder.dim, width)
        for name in ("audio", "vision"):
            if name in self.modalities:
                setattr(self, f"{name}_encoder", SequenceEncoder(m.encoder, getattr(inputs, name), width))
        self.fusion = nn.Sequential(
            nn.Linear(len(self.modalities) * width, width), nn.ReLU(), Dropout(m.dropout), nn.Linear(width, width)
        )
        self.head = make_head(width, m.task, m.num_class, m.dropout)
        self.feature_dims = dict.fromkeys(["F", *(name[0].upper() for name in self.modalities)], width)

    def forward(self, batch: Batch) -> ModelOutput:
        features = {name[0].upper(): self._feature(name, batch) for name in self.modalities}
        fused = self.fusion(torch.cat(list(features.values()), dim=1))
        if "T" in features:
            fused = features["T"] + fused
        return ModelOutput(self.head(fused), {"F": fused, **features})

    def _feature(self, name: str, batch: Batch) -> Tensor:
        """float32 [B, d_common] of one modality."""
        if name == "text":
            return masked_mean(self.text_projection(encode_text(self.text_encoder, batch)), batch.token_mask != 0)
        frames, length = getattr(batch, name), getattr(batch, f"{name}_length")
        encoded = getattr(self, f"{name}_encoder")(frames, length)
        return masked_mean(encoded, length_mask(length, frames.shape[1]))

    def prepare(self, batch: Batch) -> Batch:
        """The batch with its texts packed, before it moves to a GPU or into a graph."""
        return with_packed_text(self.text_encoder, batch)
