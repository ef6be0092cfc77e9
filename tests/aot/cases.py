"""The cases of all operations: each file of this folder that has an operation's name gives `cases()`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from collections import Counter

import engine.kernels
from tests.aot.compiling import AotCase


@functools.cache
def all_cases() -> tuple[AotCase, ...]:
    """The cases of every operation that has a `triton.py`. Every such operation must have a file here."""
    collected: list[AotCase] = []
    for info in pkgutil.iter_modules(engine.kernels.__path__):
        if info.ispkg and importlib.util.find_spec(f"engine.kernels.{info.name}.triton"):
            cases = importlib.import_module(f"tests.aot.{info.name}").cases()
            strangers = [case.name for case in cases if not case.name.startswith(f"{info.name}.")]
            if strangers:
                raise ValueError(f"names of {info.name}'s cases must begin with its folder's name: {strangers}")
            collected += cases
    repeated = sorted(name for name, times in Counter(case.name for case in collected).items() if times > 1)
    if repeated:
        raise ValueError(f"ahead-of-time cases of one name: {repeated}")
    return tuple(collected)
