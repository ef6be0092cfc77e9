"""The MMIM-style model's own settings."""

from __future__ import annotations

from pydantic import Field

from engine.config import ModelConfig
from engine.config.section import WIDEST, Probability
from engine.vocabulary import Encoder


class MMIMModelConfig(ModelConfig):
    """Encoders, fusion MLP and head."""

    d_common: int = Field(64, ge=1, le=WIDEST, description="width of the text, audio, vision and fused features")
    encoder: Encoder = Field("gru", description="audio and vision encoder")
    dropout: Probability = Field(0.1, description="of the fusion MLP, and of the head where it has a hidden layer")
