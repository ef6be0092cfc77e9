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


LIB.define("as_read(Tensor buffer) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIB.impl("as_read", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("engine::as_read", torch.empty_like, lib=LIB)


def as_read(where: str, buffer: Tensor, changes: bool = True) -> Tensor:
    """A buffer for a forward pass that also updates it.

    A compiled backward pass computes some values again, from the buffer itself. By then it holds other numbers, and the
    gradients are wrong without an error (torch 2.13; a clone does not help, because it is computed again, too). In a
    graph this is therefore a copy that is opaque to the compiler, which keeps it.

    Args:
        where: what the buffer is, for the error.
        changes: whether this pass updates it.

    Raises:
        ConfigError: the forward pass is run again within a backward pass, which would read the updated buffer.
    """
    if torch.compiler.is_compiling():
        return torch.ops.engine.as_read(buffer)
    if changes and torch._C._current_graph_task_id() != -1:
        raise ConfigError(
            where, "a forward pass within a backward pass, as torch.utils.checkpoint runs it again",
            "one forward pass: the second would read what the first has updated",
            "Call this module outside of checkpoint, or in eval mode.",
        )  # fmt: skip
    return buffer
