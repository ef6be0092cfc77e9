"""Host function of the compiled kernel: dropout.cpp holds the loop."""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import OutputError
from engine.kernels.dropout import reference
from engine.kernels.recurrent import build

SOURCE = Path(__file__).with_name("dropout.cpp")

log = logging.getLogger("engine")


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernel for float32 or float64, compiled at its first use; None (logged once) where it cannot be had."""
    try:
        loaded = ctypes.CDLL(str(build.compiled(SOURCE, dtype)))
    except (OSError, OutputError, subprocess.SubprocessError, RuntimeError) as cause:
        log.warning("dropout kernel: not available (%s); torch's dropout runs instead, slower", cause)
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded.dropout.argtypes = [pointer, pointer, size, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_double, ctypes.c_int]
    loaded.dropout.restype = None
    return loaded


def apply(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x (float32 or float64) with elements dropped by `seed`, int64 [1]; contiguous."""
    if library(x.dtype) is None:
        return reference.dropout(x.contiguous(), seed, p)
    x = x.contiguous()
    y = torch.empty_like(x)
    threads = torch.get_num_threads()
    drawn = int(seed) & (2**64 - 1)
    library(x.dtype).dropout(x.data_ptr(), y.data_ptr(), x.numel(), drawn, reference.threshold(p), 1 / (1 - p), threads)
    return y
