"""What torch.compile is told about a function, without importing the compiler."""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def constant_when_compiled(function: Function) -> Function:
    """As `torch.compiler.assume_constant_result`, but without importing the compiler, which takes a second.

    torch.compile does not look inside the function. It takes what it returns as a constant.
    """
    function._dynamo_marked_constant = True
    return function
