"""Lists of seeds, as the functions that train several runs take them."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from engine.config.problems import short
from engine.errors import ConfigError


def different_seeds(given: Any) -> list[int]:
    """The seeds as a list of plain integers, in the order given.

    >>> different_seeds(range(2))
    [0, 1]

    Raises:
        ConfigError: none at all, one that is no integer from 0 to 2**32 - 1, or one that is there twice.
    """
    try:
        if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
            raise TypeError
        listed = list(given)
        if any(isinstance(seed, bool) for seed in listed):
            raise TypeError
        seeds = [operator.index(seed) for seed in listed]
    except TypeError:
        seeds = []
    if not seeds or not all(0 <= seed < 2**32 for seed in seeds) or len(set(seeds)) < len(seeds):
        expected = "a list of different integers from 0 to 2**32 - 1, such as [0, 1, 2]"
        raise ConfigError("seeds", short(given), expected, "Change the seeds.")
    return seeds
