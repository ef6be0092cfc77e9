"""Samples of users (arrays, data frames, tensors, lists) as tensors. Data that cannot be read safely is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import EstimatorError


def as_samples(where: str, name: str, values: Any) -> Tensor:
    """Rows of samples as a new float64 tensor [N, d] on the CPU, d >= 1.

    float32 would lose the differences between values that lie far from 0.

    Args:
        where: the caller, for errors.
        name: of the argument, for errors.
        values: [N, d] or [N] of numbers: an array of any byte order and strides, a DataFrame or Series (rows by
            position, whatever their index), a tensor on any device, or sequences of numbers.

    Raises:
        EstimatorError: text, dates, complex numbers or other objects, other shapes, entries that are missing or not
            finite.

    Example:
        >>> as_samples("estimate_mi", "x", [1, 2, 3]).shape
        torch.Size([3, 1])
    """
    samples = torch.from_numpy(_numbers(where, name, values))
    samples = samples[:, None] if samples.dim() == 1 else samples
    if samples.dim() != 2 or samples.shape[1] == 0:
        raise EstimatorError(
            where, f"{name} {list(samples.shape)}", "[N, d] or [N], d >= 1", "Flatten what is not the sample."
        )
    if count := int((~samples.isfinite()).sum()):
        raise EstimatorError(
            where, f"{count} non-finite entries in {name}", "finite samples", "Remove or replace them."
        )
    return samples


def _numbers(where: str, name: str, values: Any) -> np.ndarray:
    """A new float64 array of the numbers in `values`."""
    if isinstance(values, (list, tuple)) and any(isinstance(v, Tensor) for v in values):
        values = [_array(where, name, v) if isinstance(v, Tensor) else v for v in values]
    if isinstance(values, Tensor):
        values = _array(where, name, values)
    if isinstance(values, np.ma.MaskedArray):
        values = values.astype(np.float64).filled(np.nan)
    try:
        array = np.asarray(values)
        if array.dtype.kind == "O":  # such as a data frame's columns of several types, or with missing entries
            texts = [v for v in array.ravel() if isinstance(v, (str, bytes))]
            array = array if texts or array.ndim == 0 else array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _no_numbers(where, name, f"{type(values).__name__} ({error})") from None
    if array.dtype.kind not in "biuf":
        raise _no_numbers(where, name, f"{type(values).__name__} with entries of type {array.dtype}")
    return np.array(array, dtype=np.float64, order="C")


def _array(where: str, name: str, tensor: Tensor) -> np.ndarray:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex():
        raise _no_numbers(where, name, f"a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}")
    return tensor.detach().to("cpu", torch.float64).numpy()


def _no_numbers(where: str, name: str, given: str) -> EstimatorError:
    return EstimatorError(
        where, f"{name}: {given}", "an array of real numbers, [N, d] or [N]", "Number categories; convert text first."
    )
