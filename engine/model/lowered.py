"""Parameters in autocast's type, all cast at once.

Autocast casts each weight of each Linear separately in every forward pass, and casts its gradient again. `lower` casts
all of them in one foreach operation each way. The cast is part of the forward pass, so it always sees current values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.gradients import differentiable_once
from engine.kernels.registry import backend_for

LOW = (torch.float16, torch.bfloat16)


def autocast_type(device: torch.device) -> torch.dtype | None:
    """The 16-bit type in which autocast multiplies on `device` now. None where autocast is off or of another type."""
    if not torch.is_autocast_enabled(device.type):
        return None
    dtype = torch.get_autocast_dtype(device.type)
    return dtype if dtype in LOW else None


def lower(groups: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """Each group's tensors end to end along axis 0, in `dtype`, differentiable. One foreach operation copies all.

    A group of one tensor that already has the type is that tensor itself. As with autocast, gradients are formed in
    `dtype` and then cast to the tensors' own type, by one foreach operation.

    Args:
        groups: tensors that differ at most in axis 0: the weights of query, key and value, which one product then
            multiplies, or single weights.
    """
    groups = [tuple(group) for group in groups]
    copied = [i for i, g in enumerate(groups) if len(g) > 1 or g[0].dtype != dtype]
    frozen = [i for i in copied if not any(t.requires_grad for t in groups[i])]
    moving = [i for i in copied if any(t.requires_grad for t in groups[i])]
    copies: dict[int, Tensor] = {}
    if frozen:
        copies |= zip(frozen, _copied([groups[i] for i in frozen], dtype), strict=True)
    if moving and backend_for(groups[moving[0]][0]) == "reference":
        copies |= {i: torch.cat(groups[i]).to(dtype) for i in moving}
    elif moving:
        sizes = [len(groups[i]) for i in moving]
        copies |= zip(moving, _Lower.apply(dtype, sizes, *(t for i in moving for t in groups[i])), strict=True)
    return [copies.get(i, g[0]) for i, g in enumerate(groups)]


def _copied(groups: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    wholes = [g[0].new_empty((sum(t.shape[0] for t in g), *g[0].shape[1:]), dtype=dtype) for g in groups]
    parts = [p for w, g in zip(wholes, groups, strict=True) for p in w.split([t.shape[0] for t in g])]
    torch._foreach_copy_(parts, [t.detach() for g in groups for t in g])
    return wholes


class _Lower(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, sizes, *tensors):
        ctx.set_materialize_grads(False)
        ctx.sizes, ctx.types = sizes, [t.dtype for t in tensors]
        ctx.lengths = [t.shape[0] for t in tensors]
        left = iter(tensors)
        return tuple(_copied([[next(left) for _ in range(size)] for size in sizes], dtype))

    @staticmethod
    @differentiable_once("the cast of parameters for autocast")
    def backward(ctx, *grads):
        lengths, parts = iter(ctx.lengths), []
        for size, grad in zip(ctx.sizes, grads, strict=True):
            own = [next(lengths) for _ in range(size)]
            parts += [None] * size if grad is None else grad.split(own)
        wanted = [i for i, part in enumerate(parts) if part is not None and ctx.needs_input_grad[2 + i]]
        result = [None] * len(parts)
        for i in wanted:
            result[i] = torch.empty_like(parts[i], dtype=ctx.types[i], memory_format=torch.contiguous_format)
        if wanted:
            torch._foreach_copy_([result[i] for i in wanted], [parts[i] for i in wanted])
        return None, None, *result
