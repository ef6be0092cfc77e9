"""The floating-point type of a training step's matrix products, and whether this machine gains from it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from engine.errors import ConfigError

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(setting: str, device: torch.device) -> torch.dtype | None:
    """The type of autocast that `train.amp` means on a device, or None for float32 throughout.

    "auto" is bf16 where the hardware multiplies it: on GPUs from compute capability 8.0, and on CPUs with AMX or
    AVX-512 BF16. It is fp16 on older GPUs with tensor cores (from 7.0), and float32 elsewhere. Other CPUs emulate bf16
    about twenty times slower than float32, so that "bf16" warns there.

    >>> autocast_dtype("off", torch.device("cpu")) is None
    True

    Raises:
        ConfigError: a type that the device cannot compute in.
    """
    if setting == "off":
        return None
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if setting == "auto":
            return TYPES["bf16"] if capability >= (8, 0) else TYPES["fp16"] if capability >= (7, 0) else None
        if setting == "bf16" and capability < (8, 0):
            raise ConfigError(
                "train.amp", f"bf16 on a GPU of compute capability {capability[0]}.{capability[1]}", "8.0 or newer",
                "Use train.amp=fp16 or auto.",
            )  # fmt: skip
        return TYPES[setting]
    if device.type == "cpu":
        fast = cpu_multiplies_bf16()
        if setting == "auto":
            return TYPES["bf16"] if fast else None
        if setting == "fp16":
            raise ConfigError("train.amp", "fp16 on a CPU", "off, auto or bf16", "Use train.amp=auto.")
        if not fast:
            warnings.warn("train.amp=bf16: this processor has no bf16 units; float32 is much faster", stacklevel=2)
        return TYPES[setting]
    return None if setting == "auto" else TYPES[setting]


@contextlib.contextmanager
def cudnn_as_matmul(tf32: bool = False) -> Iterator[None]:
    """Within the context cuDNN rounds float32 to TF32 only where matrix products may, or with `tf32`.

    `torch.backends.cuda.matmul.allow_tf32` says whether matrix products may. By default torch lets cuDNN round, but
    not matrix products. The forward and the backward pass of a cuDNN operation must both lie in the context.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32 or torch.backends.cuda.matmul.allow_tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def cpu_multiplies_bf16() -> bool:
    """Whether this processor has instructions for bf16 products."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
