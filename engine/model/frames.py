"""What a sequence encoder is called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.errors import DataError
from engine.kernels.arguments import looks_at
from engine.kernels.gradients import transformed
from engine.kernels.recurrent.cpu import checked
from engine.kernels.registry import is_static


def check_frames(where: str, x: Any, length: Any, width: int, dtype: torch.dtype) -> None:
    """Refuse frames and lengths that do not fit an encoder. Values of lengths are read on the CPU alone.

    Args:
        where: the encoder, for errors.
        x, length: [B, L, width] and [B].
        dtype: of the encoder's parameters.

    Raises:
        DataError: another shape, type or device, or lengths out of range.
    """
    if torch.compiler.is_compiling() or transformed():
        return
    for name, value in (("frames", x), ("lengths", length)):
        if not isinstance(value, Tensor):
            raise DataError(where, f"{name}, a {type(value).__name__}", "a torch.Tensor", "Call torch.as_tensor on it.")
    if x.dim() != 3 or x.shape[2] != width:
        do = "Give right-padded frames of the width that the encoder was built for."
        raise DataError(where, f"frames {list(x.shape)}", f"[B, L, {width}]", do)
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        what = f"frames of {x.dtype} for parameters of {dtype}"
        raise DataError(where, what, "one type", "Convert the frames with .to(dtype), or the encoder.")
    if length.shape != x.shape[:1]:
        what = f"lengths of shape {list(length.shape)}"
        raise DataError(where, what, f"[{len(x)}], one per row", "Give each row its length.")
    if looks_at(length) and not is_static():
        checked(length, x, x.shape[0] * x.shape[1])
