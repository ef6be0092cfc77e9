"""Host function of the compiled kernel: dropout.cpp holds the loop."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from engine.kernels import build
from engine.kernels.dropout import reference

SOURCE = Path(__file__).with_name("dropout.cpp")


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernel for float32 (and bfloat16) or float64, compiled at its first use; None (logged) if that fails."""
    arguments = [*[build.POINTER] * 2, build.SIZE, ctypes.c_uint64, ctypes.c_uint32, build.DOUBLE, build.INT]
    functions = {"dropout": arguments, "dropout_bf16": arguments}
    return build.library(SOURCE, dtype, functions, "torch's dropout runs")


def apply(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x (float32, float64 or bfloat16) with elements dropped by `seed`, int64 [1]; contiguous."""
    half = x.dtype == torch.bfloat16
    kernel = library(torch.float32 if half else x.dtype)
    if kernel is None:
        return reference.dropout(x.contiguous(), seed, p)
    x = x.contiguous()
    y = torch.empty_like(x)
    threads = torch.get_num_threads()
    drawn = int(seed) & (2**64 - 1)
    (kernel.dropout_bf16 if half else kernel.dropout)(
        x.data_ptr(), y.data_ptr(), x.numel(), drawn, reference.threshold(p), 1 / (1 - p), threads
    )
    return y
