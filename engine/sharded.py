"""Parameters that FSDP2 holds in parts: what a step does with their gradients beside those of whole parameters.

A rank holds a part of such a parameter, a DTensor. Nothing here imports torch.distributed unless there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Any) -> bool:
    """Whether the ranks hold a tensor in parts. FSDP2 averages its gradients itself."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which shares its memory; a tensor that is not in parts itself."""
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def gathered(tree: Any, keep: bool = True, device: str | None = None) -> Any:
    """A tree of dicts, lists and tuples with whole tensors in place of those in parts. All ranks must call it.

    Args:
        keep: False on a rank that only gives its parts: it gets None for each of them.
        device: where whole tensors go, one after another; None: they stay.
    """
    if isinstance(tree, dict):
        return {key: gathered(value, keep, device) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gathered(value, keep, device) for value in tree)
    if not is_sharded(tree):
        return tree
    whole = tree.full_tensor()
    return whole.to(device or whole.device) if keep else None


def somewhere(found: Sequence[bool], tensors: Sequence[Tensor]) -> list[bool]:
    """Each of `found` on any rank. Without tensors in parts the ranks know the same, and nothing is exchanged.

    Args:
        tensors: some of them may be in parts, of which every rank sees its own.
    """
    sharded: Any = next((t for t in tensors if is_sharded(t)), None)
    if sharded is None:
        return list(found)
    import torch.distributed as dist

    flags = torch.tensor([float(f) for f in found], device=sharded.device)
    for group in sharded.device_mesh.get_all_groups():
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return [flag > 0 for flag in flags.tolist()]


def clip_values(parameters: Sequence[nn.Parameter], limit: float) -> None:
    """Clip every element of the gradients to ±limit."""
    whole, parts = _kinds(parameters)
    nn.utils.clip_grad_value_(whole, limit)
    for p in parts:
        local(p.grad).clamp_(-limit, limit)


@torch.no_grad()
def clip_norm(parameters: Sequence[nn.Parameter], limit: float) -> None:
    """Scale the gradients so that the norm of all of them together is at most `limit`."""
    whole, parts = _kinds(parameters)
    if not parts:
        nn.utils.clip_grad_norm_(whole, limit)
        return
    gradients = [p.grad for p in whole if p.grad is not None]
    of_parts: Any = nn.utils.get_total_norm([p.grad for p in parts])
    norms = [of_parts.full_tensor()]
    norms += [nn.utils.get_total_norm(gradients)] if gradients else []
    factor = (limit / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
    for gradient in (*gradients, *(local(p.grad) for p in parts)):
        gradient.mul_(factor)


def _kinds(parameters: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that are whole, and those in parts that have a gradient."""
    whole = [p for p in parameters if not is_sharded(p)]
    return whole, [p for p in parameters if is_sharded(p) and p.grad is not None]
