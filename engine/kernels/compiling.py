"""What torch.compile is told, without importing the compiler."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.registry import LIB

Function = TypeVar("Function", bound=Callable)


def constant_when_compiled(function: Function) -> Function:
    """As `torch.compiler.assume_constant_result`, but without importing the compiler, which takes a second.

    torch.compile does not look inside the function. It takes what it returns as a constant.
    """
    function._dynamo_marked_constant = True
    return function


def _refuse_again(where: str, advice: str, changes: bool) -> None:
    if changes and torch._C._current_graph_task_id() != -1:
        raise ConfigError(
            where, "a forward pass while a backward pass runs, as in torch.utils.checkpoint or in a hook",
            "a forward pass outside of one: run again, it would read what the first has updated", advice,
        )  # fmt: skip


def _copied(buffer: Tensor, where: str, advice: str, changes: bool) -> Tensor:
    _refuse_again(where, advice, changes)  # here, too, since only the running graph knows whether it is run again
    return buffer.clone()


LIB.define("as_read(Tensor buffer, str where, str advice, bool changes) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIB.impl("as_read", _copied, "CompositeExplicitAutograd")
torch.library.register_fake("engine::as_read", lambda buffer, *_: torch.empty_like(buffer), lib=LIB)


def as_read(
    where: str,
    buffer: Tensor,
    changes: bool = True,
    advice: str = "Call this module outside of checkpoint and of hooks, or in eval mode.",
) -> Tensor:
    """A buffer for a forward pass that also updates it.

    A compiled backward pass computes some values again, from the buffer itself. By then it holds other numbers, and the
    gradients are wrong without an error (torch 2.13; a clone does not help, because it is computed again, too). In a
    graph this is therefore a copy that is opaque to the compiler, which keeps it.

    Args:
        where: what the buffer is, for the error.
        changes: whether this pass updates it.
        advice: what to do, for the error.

    Raises:
        ConfigError: a backward pass is running. A forward pass that is run again would read the updated buffer.
    """
    if torch.compiler.is_compiling():
        return torch.ops.engine.as_read(buffer, where, advice, changes)
    _refuse_again(where, advice, changes)
    return buffer
