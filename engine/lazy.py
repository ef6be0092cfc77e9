"""Public names of a package that are imported when they are first used."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, home: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and the `__dir__` of a package (PEP 562).

    The package imports the same names under `TYPE_CHECKING`, for type checkers and editors.

    Args:
        package: its `__name__`.
        home: name -> the module that defines it.
    """
    module = sys.modules[package]

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(home[name]), name)
        setattr(module, name, value)  # found without this function from now on
        return value

    return find, lambda: sorted({*vars(module), *home})
