"""Where the weights of an update lie, as tensors on their device: addresses, sizes, and the blocks of one launch.

Nothing is copied from the host. A number of Python's becomes an argument of a kernel that adds it to 0, so that a CUDA
graph can hold the tables' making, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.update.reference import Settings, Weight

BLOCK = 2048
"""Elements of a weight that one program moves."""
ROWS = ("parameter", "first", "second", "step", "average", "low")
"""What `Table.addresses` has of every weight; 0 for none."""
COLUMNS = 7
"""Of `Table.settings`: log beta1, log beta2, 1 - beta1, 1 - beta2, eps, and weight decay coupled and decoupled."""
ALIGNED = 16


def numbers(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The host's numbers as a vector on a device, without a copy."""
    out = torch.zeros(len(values), dtype=dtype, device=device)
    torch._foreach_add_(list(out.unbind()), list(values))
    return out


def layout(tensor: Tensor) -> tuple[tuple[int, int], ...] | None:
    """Sizes and strides in memory without axes of size 1; None where elements overlap or leave gaps.

    Tensors of one layout have their elements in one order in memory.
    """
    axes = tuple((n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1)
    if tensor.numel() == 0:
        return ()
    expected = 1
    for n, s in sorted(axes, key=lambda axis: axis[1]):
        if s != expected:
            return None
        expected *= n
    return axes


class Gradients(NamedTuple):
    """Where the gradients of a table's weights lie, int64 [n], and whether all addresses are multiples of `ALIGNED`."""

    addresses: Tensor
    aligned: bool


class Table:
    """The weights of an optimiser whose gradients `inspect` and `move` take. They must stay where they are.

    Args:
        weights: float32, of one device, each with its moments and its average of one `layout`; `step` is float32. The
            elements of a 16-bit copy lie in memory in the order of its weight's.
        groups: settings of the groups of weights.
        low: the type of the 16-bit copies; None for none. Which of them there are makes no difference to the kernel.

    Attributes:
        addresses: int64 [len(ROWS), n].
        sizes: int64 [n], elements of each weight.
        blocks: int64 [2, blocks]: of each block its weight, and the number of its first element.
        group: int64 [n], of each weight. settings: float64 [groups, COLUMNS].
        aligned: whether all addresses are multiples of 16.
    """

    def __init__(self, weights: Sequence[Weight], groups: Sequence[Settings], low: torch.dtype | None = None):
        device, n = weights[0].parameter.device, len(weights)
        self.count, self.low = n, low
        for w in weights:
            if w.low is not None and w.low.dtype != low:
                raise ConfigError("Table", f"a copy of {w.low.dtype} with low={low}", "one type", "Pass the copies'.")
        rows = [[0 if getattr(w, row) is None else getattr(w, row).data_ptr() for w in weights] for row in ROWS]
        sizes, group = [w.parameter.numel() for w in weights], [w.group for w in weights]
        every = numbers([*(a for row in rows for a in row), *sizes, *group], torch.int64, device)
        self.addresses = every[: len(ROWS) * n].view(len(ROWS), n)
        self.sizes, self.group = every[-2 * n : -n], every[-n:]
        settings = numbers([x for s in groups for x in _columns(s)], torch.float64, device)
        self.settings = settings.view(len(groups), COLUMNS)
        counts = (self.sizes + BLOCK - 1).div(BLOCK, rounding_mode="floor")
        total = sum(-(-size // BLOCK) for size in sizes)
        owner = torch.repeat_interleave(torch.arange(n, device=device), counts, output_size=total)
        before = torch.arange(total, device=device) - (counts.cumsum(0) - counts).index_select(0, owner)
        self.blocks = torch.stack([owner, before * BLOCK])
        self.aligned = all(a % ALIGNED == 0 for row, of in zip(rows, ROWS, strict=True) if of != "step" for a in row)

    def gradients(self, gradients: Sequence[Tensor]) -> Gradients:
        """The gradients of the weights, in their order, each of the `layout` of its weight. They must be kept alive."""
        found = [g.data_ptr() for g in gradients]
        aligned = self.aligned and all(a % ALIGNED == 0 for a in found)
        return Gradients(numbers(found, torch.int64, self.addresses.device), aligned)


def _columns(s: Settings) -> tuple[float, ...]:
    coupled, decoupled = (0.0, s.weight_decay) if s.decoupled else (s.weight_decay, 0.0)
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in (s.beta1, s.beta2)]
    return (*logs, 1 - s.beta1, 1 - s.beta2, s.eps, coupled, decoupled)
