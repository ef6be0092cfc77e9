"""Features of the last batches, from which product rows are drawn where no bank of the whole training set is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.knn_product import Bank


class RecentFeatures:
    """Detached features of the last `capacity` samples that were stored. The oldest are replaced.

    A `FeatureBank` needs to know every sample's row number. This needs nothing but the features, so that conditional
    terms can be used in a loop that streams its data.

    Args:
        capacity: number of samples. More samples have nearer neighbours; older ones come from an older model.

    Example:
        >>> recent = RecentFeatures(3)
        >>> for value in (1.0, 2.0):
        ...     recent.store({"T": torch.full((2, 1), value)})
        >>> recent.tensors()["T"].flatten().sort().values, len(recent)
        (tensor([1., 2., 2.]), 3)
    """

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ConfigError("RecentFeatures", f"a capacity of {capacity}", "at least 1", "Give a larger number.")
        self.capacity, self.stored, self.rows = capacity, 0, {}

    def __len__(self) -> int:
        return min(self.stored, self.capacity)

    def store(self, features: Mapping[str, Tensor]) -> None:
        """Keep a copy of `features` [B, width]. All calls must give the same names and widths."""
        if self.rows and {n: v.shape[1:] for n, v in features.items()} != {
            n: v.shape[1:] for n, v in self.rows.items()
        }:
            raise ConfigError(
                "RecentFeatures", f"features {_shapes(features)}", f"{_shapes(self.rows)}, as in the batches before",
                "Store the same features every time, or use another RecentFeatures.",
            )  # fmt: skip
        if any(self.rows[name].device != value.device for name, value in features.items() if name in self.rows):
            self.to(next(iter(features.values())).device)  # a state may have been loaded on the CPU
        count = len(next(iter(features.values())))
        kept = min(count, self.capacity)  # of a batch larger than the capacity only its end
        place = torch.arange(self.stored + count - kept, self.stored + count) % self.capacity
        for name, value in features.items():
            if name not in self.rows:
                self.rows[name] = value.new_zeros(self.capacity, *value.shape[1:])
            self.rows[name].index_copy_(0, place.to(value.device), value.detach()[count - kept :])
        self.stored += count

    def tensors(self) -> Bank:
        """The features that are kept, [n, width] each, n up to the capacity. Their order has no meaning."""
        return Bank({name: value[: len(self)].clone() for name, value in self.rows.items()})

    def to(self, device: torch.device | str) -> None:
        """Move the features that are kept."""
        self.rows = {name: value.to(device) for name, value in self.rows.items()}

    def state_dict(self) -> dict[str, Any]:
        """The features that are kept and their number, for `load_state_dict`."""
        return {"capacity": self.capacity, "stored": self.stored, "rows": {k: v.clone() for k, v in self.rows.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.capacity, self.stored = state["capacity"], state["stored"]
        self.rows = {name: value.clone() for name, value in state["rows"].items()}


def _shapes(features: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} [B, {', '.join(map(str, value.shape[1:]))}]" for name, value in sorted(features.items()))
