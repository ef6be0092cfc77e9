"""What a model returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ModelOutput(NamedTuple):
    """A prediction and named features. A model may return this, or any pair of the two.

    Attributes:
        prediction: float32 [B, n]: values, or the logits of a classification.
        features: float32 [B, width] each, under the names that information terms use.
    """

    prediction: Tensor
    features: dict[str, Tensor]
