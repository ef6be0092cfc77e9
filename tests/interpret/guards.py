"""Guards around kernels, whose reading and writing out of bounds goes unnoticed in triton's interpreter and on a GPU.

    with Guards() as guards:
        q, k = guards.input(q), guards.input(k)
        out = forward(q, k)

- an input lies between bands of NaN (integers: their largest value), so that a load past its end poisons the result;
- what the host function allocates lies between canaries and is itself filled with NaN, so that what a kernel forgets to
  write shows, and what it writes elsewhere is found;
- on leaving, AssertionError if a band, a canary or an input has changed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interpret import device

# More than the overshoot of one tile of 64 rows of 256.
BAND = 1 << 14


def require_interpreter() -> None:
    """Skip the test module unless its kernels can run: in triton's interpreter, or on the GPU that `--device` names.

    Call it before importing them.
    """
    if (reason := device.missing()) is not None:
        pytest.skip(reason, allow_module_level=True)


def poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


class Guards:
    """Context manager; see the module's text. It replaces torch's allocating functions while it is entered."""

    PATCHED = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))

    def __init__(self) -> None:
        self._guarded: list[tuple[str, Tensor, Tensor, Tensor | None]] = []
        self._originals: dict[tuple[Any, str], Any] = {}

    def input(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor`, of the same shape and strides, between bands; gaps between its elements are poisoned."""
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        buffer = torch.full((span + 2 * BAND,), poison(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
        view = buffer.as_strided(tensor.shape, tensor.stride(), BAND)
        view.copy_(tensor)
        self._guarded.append((f"an input {list(tensor.shape)}", buffer, view, buffer.clone()))
        return view

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, place: Any = None) -> Tensor:
        count = 1
        for n in shape:
            count *= n
        buffer = torch.full((count + 2 * BAND,), poison(dtype), dtype=dtype, device=place)
        view = buffer[BAND : BAND + count].view(shape)
        self._guarded.append((f"an allocation {list(shape)}", buffer, view, None))
        return view

    def __enter__(self) -> Guards:
        for owner, name in self.PATCHED:
            self._originals[owner, name] = getattr(owner, name)

        def empty(*size: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
            shape = _shape(size)
            if 0 in shape:
                return self._originals[torch, "empty"](shape, dtype=dtype, **rest)
            return self._allocate(shape, dtype or torch.get_default_dtype(), rest.get("device"))

        def empty_like(tensor: Tensor, *, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
            return empty(tensor.shape, dtype=dtype or tensor.dtype, device=rest.get("device") or tensor.device)

        def new_empty(tensor: Tensor, *size: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
            return empty(_shape(size), dtype=dtype or tensor.dtype, device=rest.get("device") or tensor.device)

        for (owner, name), function in zip(self.PATCHED, (empty, empty_like, new_empty), strict=True):
            setattr(owner, name, function)
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        for (owner, name), function in self._originals.items():
            setattr(owner, name, function)
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise AssertionError if anything was written where it should not have been."""
        for what, buffer, _, before in self._guarded:
            if before is not None:
                assert _same(buffer, before), f"{what} or the band around it was written to"
            else:
                canary = torch.full((BAND,), poison(buffer.dtype), dtype=buffer.dtype, device=buffer.device)
                assert _same(buffer[:BAND], canary), f"something was written before {what}"
                assert _same(buffer[-BAND:], canary), f"something was written past the end of {what}"


def _shape(size: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
