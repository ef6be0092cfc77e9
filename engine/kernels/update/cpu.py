"""The formula on memory of the CPU that addresses name. It is there for tests: on a CPU torch's own passes are used."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from engine.kernels.update import reference
from engine.kernels.update.tables import COLUMNS, ROWS


def inspect(
    sizes: Tensor, blocks: Tensor, gradients: Tensor, aligned: bool, limit: float, inverse: Tensor | None
) -> Tensor:
    """As `reference.inspect`, of the gradients at these addresses."""
    return reference.inspect(_at(gradients, sizes), limit, inverse)


def move(
    addresses: Tensor, sizes: Tensor, blocks: Tensor, group: Tensor, settings: Tensor, gradients: Tensor,
    aligned: bool, rates: Tensor, limit: float, norm: float, stats: Tensor | None, inverse: Tensor | None,
    skip: Tensor | None, average: Tensor | None, low: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """As `reference.move`, of what lies at these addresses."""
    ones = torch.ones_like(sizes)
    parts = {
        row: _at(addresses[i], ones if row == "step" else sizes, low if row == "low" and low else torch.float32)
        for i, row in enumerate(ROWS)
    }
    parts["step"] = [step.view(()) for step in parts["step"]]
    weights = [
        reference.Weight(**{row: parts[row][i] for row in ROWS}, group=number)
        for i, number in enumerate(group.tolist())
    ]
    groups = [_settings(row) for row in settings.view(-1, COLUMNS).tolist()]
    return reference.move(weights, _at(gradients, sizes), groups, rates, limit, norm, stats, inverse, skip, average)


def _at(addresses: Tensor, sizes: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """Vectors of these sizes at these addresses; None at address 0."""
    pairs = zip(addresses.tolist(), sizes.tolist(), strict=True)
    return [None if address == 0 and size else _vector(address, size, dtype) for address, size in pairs]


def _vector(address: int, size: int, dtype: torch.dtype) -> Tensor:
    if size == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * (size * dtype.itemsize)).from_address(address), dtype=dtype)


def _settings(row: list[float]) -> reference.Settings:
    first, second, _, _, eps, coupled, decoupled = row
    return reference.Settings(math.exp(first), math.exp(second), eps, coupled or decoupled, decoupled != 0)
