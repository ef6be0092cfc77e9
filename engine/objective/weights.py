"""Weights of expressions as a state dict's metadata holds them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence


def restored(changed: Mapping[str, Sequence[float]], built_with: Mapping[str, float]) -> dict[str, float]:
    """The weights that a state had.

    >>> restored({"leak": [0.1, 0.5]}, {"leak": 0.1, "keep": 1.0})
    {'leak': 0.5, 'keep': 1.0}

    Args:
        changed: {name: (the weight that the objective was built with then, the weight in the state)}.
        built_with: {name: the weight that the present objective was built with}. Where it is another one than then, it
            is kept, with a warning. So is a changed weight of an expression that it does not have left out.
    """
    weights = dict(built_with)
    for name, (built, then) in changed.items():
        if name in weights and math.isclose(built, weights[name], rel_tol=1e-6):
            weights[name] = then
        elif name in weights and not math.isclose(then, weights[name], rel_tol=1e-6):
            warnings.warn(
                f"objective: the state's weight of {name} is {then:g}, changed from {built:g}. This objective was "
                f"built with {weights[name]:g}, which is kept. Call set_weights for another one.",
                stacklevel=2,
            )
        elif name not in weights:
            warnings.warn(
                f"objective: the state's weight of {name} is {then:g}, changed from {built:g}. This objective has no "
                "expression of that name, so that the weight is left out. Call set_weights if it has another name.",
                stacklevel=2,
            )
    return weights
