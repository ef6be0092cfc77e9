"""What hand-written operations can do with gradients, and what they refuse.

A hand-written backward pass gives gradients, but no gradients of gradients. Host functions know neither the transforms
of torch.func nor forward-mode AD. The formulas (backend "reference") support all of these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge

from engine.errors import ConfigError

_active = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._is_tracing


def transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...), forward-mode AD or torch.jit.trace is active.

    torch.jit.trace records torch's operations. It would keep a host function's results as constants.
    """
    return _active() is not None or forward_ad._current_level >= 0 or _tracing()


_REMEDY = 'Run the forward pass under engine.use_backend("reference"): torch differentiates its formulas.'


def batched(*gradients: Tensor | None) -> bool:
    """Whether these are batches of gradients, which `is_grads_batched` makes by an older vmap: no transform."""
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in gradients)


def refuse_vmap(where: str) -> None:
    """Refuse a call under vmap, for code that must read values."""
    stack = torch._C._functorch.get_interpreter_stack() if _active() is not None else None
    if stack and any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack):
        raise ConfigError(where, "a call under vmap", "plain tensors: values decide what is done", "Loop in its place.")


def update_buffer(where: str, buffer: Tensor, value: Tensor, finite_only: bool = False) -> None:
    """`buffer.copy_(value)`, with a ConfigError if a transform of torch.func refuses it.

    Args:
        finite_only: entries whose new value is not finite stay as they are.
    """
    if finite_only:
        value = torch.where(value.isfinite(), value, buffer)
    try:
        buffer.copy_(value)
    except RuntimeError:
        if not transformed():
            raise
        raise ConfigError(
            where, "a transform of torch.func, which cannot change it", "a module in eval mode, which only reads it",
            "Call .eval() on the module first.",
        ) from None  # fmt: skip


def differentiable_once(operation: str, remedy: str = _REMEDY) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for the backward method of an autograd.Function: differentiating its result raises ConfigError.

    torch's `once_differentiable` does so only if the incoming gradient requires a gradient itself. That of a mean does
    not. The result would then count as a constant, and a gradient penalty would silently have no effect.

    Args:
        operation: what users call, for the error.
        remedy: what to do about it, for the error.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
            if torch.compiler.is_compiling():
                return backward(ctx, *grads)
            if transformed() or batched(*grads):
                what = "a batch of gradients (is_grads_batched, vectorize), or forward-mode AD"
                raise ConfigError(f"backward pass of {operation}", what, "one plain gradient", remedy)
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            anchors = _anchors(operation, remedy, ctx, grads)
            with torch.no_grad():
                gradients = backward(ctx, *grads)
            return _last(operation, remedy, anchors, gradients if isinstance(gradients, tuple) else (gradients,))

        wrapper.differentiable_once = True
        return wrapper

    return decorate


def _anchors(operation: str, remedy: str, ctx: Any, grads: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Tensors on which the gradients depend: all inputs that require one, and the incoming gradients.

    An input that is neither saved nor a leaf cannot be reached. Its second gradient could not be refused later, so the
    call is refused now.
    """
    held = [t for t in (*ctx.saved_tensors, *grads) if t is not None and t.requires_grad]
    known = {tuple(get_gradient_edge(t))[:2] for t in held}
    for node, number in ctx.next_functions:
        if node is None or (node, number) in known:
            continue
        if not hasattr(node, "variable"):
            raise _refusal(operation, remedy)
        held.append(node.variable)
    return held


def _last(
    operation: str, remedy: str, anchors: list[Tensor], gradients: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The same gradients, but their own gradients are refused."""
    if not anchors or all(g is None for g in gradients):
        return gradients
    left = iter(_Last.apply(operation, remedy, len(anchors), *anchors, *(g for g in gradients if g is not None)))
    return tuple(None if g is None else next(left) for g in gradients)


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operation: str, remedy: str, anchors: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.refusal = operation, remedy
        return tensors[anchors:]

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> None:
        raise _refusal(*ctx.refusal)


def _refusal(operation: str, remedy: str) -> ConfigError:
    return ConfigError(
        f"backward pass of {operation}", "a gradient of its gradient, as a gradient penalty needs it",
        "first gradients alone", remedy,
    )  # fmt: skip


def no_gradient(name: str) -> Callable[..., None]:
    """A backward for `torch.ops.engine.NAME` that refuses. The functions of `engine.kernels` give gradients."""

    def backward(ctx: Any, *_: Tensor | None) -> None:
        raise ConfigError(
            f"torch.ops.engine.{name}", "a gradient through the bare operation", "a call of the function that has one",
            "Call the function of engine.kernels that uses it.",
        )  # fmt: skip

    return backward
