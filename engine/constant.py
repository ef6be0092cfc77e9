"""Fixed numbers as a tensor, without a copy from the host in each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Constant:
    """Fixed numbers, as a tensor on any device.

    The numbers are kept in Python, because a module that is built on the meta device loses its buffers. The tensor is
    made at its first use on a device. It is made by fills alone, which a CUDA graph can capture.

    Args:
        numbers: floats, or rows of floats of equal length.

    Example:
        >>> weights = Constant([1.0, 2.0])
        >>> weights(torch.zeros(1))
        tensor([1., 2.])
    """

    def __init__(self, numbers: Sequence[float] | Sequence[Sequence[float]]):
        rows = len(numbers) > 0 and isinstance(numbers[0], Sequence)
        self.shape = (len(numbers), len(numbers[0])) if rows else (len(numbers),)
        self.numbers = tuple(float(x) for row in numbers for x in row) if rows else tuple(map(float, numbers))
        self._made: dict[Any, Tensor] = {}

    def __call__(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers on the device of `like`, in its dtype or another one. Do not change the tensor."""
        dtype = like.dtype if dtype is None else dtype
        key = (like.device, dtype)
        if torch.compiler.is_compiling():
            return self._made[key] if key in self._made else self._new(like.device, dtype)
        if isinstance(like, FakeTensor):
            return like.new_empty(self.shape, dtype=dtype)
        if key not in self._made:
            # a tensor made in inference mode cannot be used in training
            with torch.inference_mode(False), torch.no_grad():
                made = self._new(like.device, dtype)
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                return made  # it belongs to the graph
            self._made[key] = made
        return self._made[key]

    @torch.no_grad()
    def set(self, numbers: Sequence[float]) -> None:
        """Other numbers from now on, as many as before. Tensors that were made are changed in place, by fills."""
        self.numbers = tuple(map(float, numbers))
        for made in self._made.values():
            for i, number in enumerate(self.numbers):
                made.view(-1)[i].fill_(number)

    def _new(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        made = torch.zeros(len(self.numbers), device=device, dtype=dtype)
        for i, number in enumerate(self.numbers):
            if number:
                made[i].fill_(number)
        return made.view(self.shape)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": {}}  # copies and pickles make their own tensors
