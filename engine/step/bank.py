"""Features of a whole training set, stored by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.knn_product import Bank


class FeatureBank:
    """Detached features of every sample of a training set. Product rows are drawn from it.

    Args:
        size: number of samples in the set.
        device: where the features will be; None where the first features that are stored decide.

    Example:
        >>> bank = FeatureBank(3)
        >>> bank.store(torch.tensor([2, 0]), {"T": torch.tensor([[5.0], [7.0]])})
        >>> bank.tensors()["T"]
        tensor([[7.],
                [5.]])
    """

    def __init__(self, size: int, device: torch.device | None = None):
        self.size = size
        self.rows: dict[str, Tensor] = {}
        self.filled = torch.zeros(size, dtype=torch.bool, device=device)  # True for samples that were stored

    def store(self, index: Tensor, features: Mapping[str, Tensor], keep: Tensor | None = None) -> None:
        """Keep a copy of `features` [B, width] of the samples `index` int64 [B].

        Args:
            keep: bool [B], or one for all: False forgets the sample instead. None: all are kept.
        """
        if keep is not None:
            keep = keep.expand(len(index))
        for name, value in features.items():
            if value.dim() == 0 or len(value) != len(index):
                raise ConfigError(
                    f"feature {name!r}", f"shape {list(value.shape)} in a batch of {len(index)}",
                    f"[{len(index)}, ...], as the feature bank keeps a row per sample",
                    "Pick the features to keep with features=.",
                )  # fmt: skip
            if keep is not None:
                value = torch.where(keep.reshape(-1, *[1] * (value.dim() - 1)), value, torch.zeros_like(value))
            if name not in self.rows:
                self.rows[name] = value.new_zeros(self.size, *value.shape[1:])
            self.rows[name].index_copy_(0, index, value.detach())
        if self.filled.device != index.device:
            self.filled = self.filled.to(index.device)
        if keep is None:
            self.filled.index_fill_(0, index, True)
        else:
            self.filled.index_copy_(0, index, keep)

    def tensors(self) -> Bank:
        """Features of the samples that were stored, [n, width] each, in row order."""
        if bool(self.filled.all()):
            return Bank(self.rows)
        return Bank({name: value[self.filled] for name, value in self.rows.items()})

    def clear(self) -> None:
        """Forget what was stored; the memory stays allocated."""
        self.filled.zero_()

    def copy(self) -> FeatureBank:
        """A bank of the same content in memory of its own."""
        copied = FeatureBank(self.size)
        copied.load_state_dict(self.state_dict())
        return copied

    @classmethod
    def of(cls, state: Mapping[str, Any] | None, device: torch.device | str | None = None) -> FeatureBank | None:
        """The bank that `state_dict` gave, on `device`; None of None."""
        if state is None:
            return None
        bank = cls(len(state["filled"]))
        bank.load_state_dict(state)
        if device is not None:
            bank.filled = bank.filled.to(device)
            bank.rows = {name: value.to(device) for name, value in bank.rows.items()}
        return bank

    def state_dict(self) -> dict[str, Any]:
        return {"filled": self.filled, "rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.filled, self.rows = state["filled"].clone(), {k: v.clone() for k, v in state["rows"].items()}
