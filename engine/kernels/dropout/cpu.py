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
    """The kernel for float32 (and bfloat16) or float64, compiled at its first use; None (logged once) without one."""
    try:
        loaded = ctypes.CDLL(str(build.compiled(SOURCE, dtype)))
    except (OSError, OutputError, subprocess.SubprocessError, RuntimeError) as cause:
        log.warning("dropout kernel: not available (%s); torch's dropout runs instead, slower", cause)
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for function in (loaded.dropout, loaded.dropout_bf16):
        function.argtypes = [pointer, pointer, size, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_double, ctypes.c_int]
        function.restype = None
    return loaded


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
