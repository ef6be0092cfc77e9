"""What an objective is built from, checked before any estimator is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from engine.config import ObjectiveConfig
from engine.errors import ConfigError
from engine.objective.terms import Expression, Term, distinct_terms


def as_expressions(given: Any) -> tuple[Expression, ...]:
    """The expressions as a tuple; one alone stands for itself.

    Raises:
        ConfigError: anything that is no expression, such as a text.
    """
    expressions = (given,) if isinstance(given, (Expression, Term, str)) else tuple(given)
    for expression in expressions:
        if not isinstance(expression, Expression):
            what = f"{expression!r}, a {type(expression).__name__}"
            raise ConfigError(
                "objective", what, 'expressions of MI and CMI, such as 0.1 * MI("Z", "Y")', "Build them so."
            )
    return expressions


def as_settings(given: Any) -> ObjectiveConfig:
    """The estimators' settings; None for the default ones.

    Raises:
        ConfigError: anything else, such as a dict.
    """
    if given is None or isinstance(given, ObjectiveConfig):
        return given or ObjectiveConfig()
    what = f"a {type(given).__name__}"
    raise ConfigError(
        "objective.settings", what, "an engine.config.ObjectiveConfig", "Write ObjectiveConfig(hidden=64)."
    )


def by_term(weights: Mapping[Any, float], terms: Sequence[Term]) -> dict[Term, float]:
    """Stage-1 weights by term. Terms may be named by "I(a;b)" or by their key; what is unknown stays as it is."""
    known = {name: term for term in terms for name in (str(term), term.key)}
    return {known.get(name, name) if isinstance(name, str) else name: weight for name, weight in weights.items()}


def check_terms(
    expressions: Sequence[Expression], weights: Mapping[Term, float], dims: Mapping[str, int], discrete: Iterable[str]
) -> None:
    """Raise ConfigError where an objective's expressions, stage-1 weights and widths are at odds."""
    used, names = distinct_terms(expressions), [e.name for e in expressions]
    if repeated := {n for n in names if names.count(n) > 1}:
        raise ConfigError(
            "objective", f"several expressions named {sorted(repeated)}", "distinct names", "Call .named(...)."
        )
    if unused := [str(t) for t in weights if t not in used]:
        raise ConfigError("objective.estimators", f"{unused}", f"terms among {[str(t) for t in used]}", "Drop them.")
    if missing := [str(t) for t in used if t not in weights]:
        raise ConfigError("objective.estimators", f"no weight for {missing}", "one for every term", "Add them.")
    coefficients = [c for e in expressions for c in e.folded().values()]
    keys = [t.key for t in used]
    if shared := next((t for t in used if keys.count(t.key) > 1), None):
        found = f"another term with the key {shared.key!r} of {shared}"
        raise ConfigError("objective", found, "terms with distinct keys", "Rename a feature.")
    if infinite := [x for x in (*coefficients, *weights.values()) if not math.isfinite(x)]:
        raise ConfigError("objective", f"a weight of {infinite[0]}", "finite weights", "Correct it.")
    for name, count in discrete.items() if isinstance(discrete, Mapping) else ():
        if count is not None and (not isinstance(count, Integral) or isinstance(count, bool) or count < 2):
            raise ConfigError(
                f"objective.discrete[{name!r}]", repr(count), "the number of its classes, from 2, or None",
                "Count the classes; None where the number is not known.",
            )  # fmt: skip
    if unknown := [name for name in discrete if name not in dims]:
        raise ConfigError(
            "objective.discrete", f"{unknown[0]!r}", f"features among {sorted(dims)}", "Name one of them."
        )
    for term in used:
        if absent := [feature for feature in term.features if feature not in dims]:
            raise ConfigError(
                f"objective term {term}", f"no width for feature {absent[0]!r}", f"one of {sorted(dims)}",
                "Add it to dims.",
            )  # fmt: skip
        for feature in term.features:
            width = dims[feature]
            if not isinstance(width, Integral) or isinstance(width, bool) or width < 1:
                raise ConfigError(
                    f"objective.dims[{feature!r}]", repr(width), "a whole number from 1", "Give the feature's width."
                )
