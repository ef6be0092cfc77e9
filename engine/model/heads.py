"""The prediction head."""

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.kernels.dropout import Dropout

HEAD_WIDTH = 128


class Head(nn.Module):
    """Fused feature to prediction: Linear(c -> n) for c <= 128, else Linear(c -> 128), ReLU, Dropout, Linear(128 -> n).

    Args:
        dim: the width c.
        n: the number of values to regress, or of classes (the prediction is then their logits).
        dropout: rate of the wide head. The narrow head has none.
    """

    def __init__(self, dim: int, n: int, dropout: float = 0.0):
        super().__init__()
        if dim <= HEAD_WIDTH:
            layers = [nn.Linear(dim, n)]
        else:
            layers = [nn.Linear(dim, HEAD_WIDTH), nn.ReLU(), Dropout(dropout), nn.Linear(HEAD_WIDTH, n)]
        self.layers = nn.Sequential(*layers)

    def forward(self, fused: Tensor) -> Tensor:
        """[B, c] -> [B, n]. On a GPU in the parameters' type, without autocast: casts cost more than they save."""
        if not fused.is_cuda:
            return self.layers(fused)
        with torch.autocast("cuda", enabled=False):
            return self.layers(fused.to(self.layers[-1].weight.dtype))


def make_head(dim: int, task: str, num_class: int, dropout: float = 0.0) -> Head:
    """The head of a task. ConfigError for a classification into fewer than two classes.

    >>> len(make_head(64, "regression", 1).layers), len(make_head(256, "regression", 1).layers)
    (1, 4)
    """
    if task == "classification" and num_class < 2:
        raise ConfigError(
            "model.num_class", str(num_class), "at least 2 for model.task=classification", "Set model.num_class."
        )
    return Head(dim, num_class, dropout)
