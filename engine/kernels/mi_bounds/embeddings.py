"""What the bounds are called with: embeddings, temperature and positives, checked and brought to one form."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.arguments import exact_type, looks_at
from engine.kernels.mi_bounds.reference import check_positives, full_precision
from engine.kernels.registry import interpreting

# the least temperature whose inverse float32 can hold
_LEAST = 1 / torch.finfo(torch.float32).max


def normalised(x: Tensor) -> Tensor:
    """Rows of length 1. A row of zeros has no direction: it stays zero and gets no gradient.

    `torch.nn.functional.normalize` alone would give it a gradient of 1e12 (infinite in fp16).
    """
    x = full_precision(x)
    return torch.where(x.eq(0).all(-1, keepdim=True), 0.0, torch.nn.functional.normalize(x, dim=-1))


def prepared(where: str, q: Tensor, k: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, d] or [G, B, d] and k in one dtype, and the scale of their products, 1 / temperature."""
    check_pair(where, q, k)
    exact, dtype = exact_type(where, q, k), torch.promote_types(q.dtype, k.dtype)
    # products of 16-bit embeddings are exact in fp32; the CPU has nothing to gain from 16 bits
    dtype = exact if q.device.type == "cpu" and not interpreting() else dtype
    return q.to(dtype), k.to(dtype), _scale(where, temperature, q.device, exact)


def check_pair(where: str, q: Tensor, k: Tensor) -> None:
    """Refuse embeddings that have no rows, or whose widths or groups do not fit."""
    if 0 in q.shape:
        raise EstimatorError(where, f"embeddings {list(q.shape)}", "rows and columns", "Leave out empty batches.")
    if q.dim() not in (2, 3) or k.dim() != q.dim() or q.shape[-1] != k.shape[-1] or q.shape[:-2] != k.shape[:-2]:
        raise wrong_shapes(where, q, k, "[B, d] and [M, d], or [G, B, d] and [G, M, d]")


def grouped(x: Tensor) -> Tensor:
    """[G, B, d]; [B, d] is one group."""
    return x if x.dim() == 3 else x.unsqueeze(0)


def wrong_shapes(where: str, q: Tensor, k: Tensor, expected: str) -> EstimatorError:
    return EstimatorError(where, f"{list(q.shape)} and {list(k.shape)}", expected, "Check the embeddings.")


def positives_in_range(
    positives: Tensor, rows: int, columns: int, exclude_self: bool, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Positives that are in range, and the scale, NaN where they were not.

    If the host may read the positives, wrong ones raise an EstimatorError instead.
    """
    if looks_at(positives):
        check_positives(positives, columns, exclude_self)
        return positives, scale
    inside = positives.clamp(0, columns - 1)
    right = inside == positives
    if exclude_self:
        right = right & (positives != torch.arange(rows, device=positives.device))
    return inside, torch.where(right.all(), scale, math.nan)


def _scale(where: str, temperature: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """1 / temperature, 0-d. NaN if a tensor that the host does not read holds no positive number."""
    seen = check_temperature(where, temperature, device)
    if not isinstance(temperature, Tensor):
        return torch.full((), 1 / float(temperature), dtype=dtype, device=device)
    temperature = temperature.reshape(()).to(device=device, dtype=dtype)
    if not seen:
        positive = (temperature > 0) & (temperature < math.inf)
        temperature = torch.where(positive, temperature, math.nan)
    return 1 / temperature


def check_temperature(where: str, temperature: float | Tensor, device: torch.device | None = None) -> bool:
    """Refuse anything but one positive number.

    Args:
        where: the operation, for errors.
        temperature: a number, or a tensor of one element.
        device: of the embeddings; a tensor must be there, or on the CPU. None: anywhere.

    Returns:
        Whether the value was read; it is not on a GPU or in a graph.

    Raises:
        EstimatorError: another value, type or device.
    """
    if isinstance(temperature, Tensor):
        real = not (temperature.is_complex() or temperature.dtype == torch.bool)
        near = device is None or temperature.device.type == "cpu" or temperature.device == device
        if temperature.numel() == 1 and real and near:
            if not looks_at(temperature):
                return False
            if _LEAST <= temperature.item() < math.inf:
                return True
            what = repr(temperature.item())
        else:
            what = f"{temperature.dtype} {list(temperature.shape)} on {temperature.device}"
    elif isinstance(temperature, Real) and not isinstance(temperature, bool) and _LEAST <= temperature < math.inf:
        return True
    else:
        what = repr(temperature)
    near = "" if device is None or device.type == "cpu" else f", on the CPU or on {device}"
    raise EstimatorError(where, f"temperature {what}", f"one positive number{near}", "Give one such as 0.07.")
