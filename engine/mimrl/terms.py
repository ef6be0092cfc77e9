"""MIMRL's information terms: eleven estimators and the eight expressions that they make."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import MODALITIES
from engine.errors import ConfigError
from engine.expressions import parse_term, parse_terms, parse_weights, stage1_weights
from engine.mimrl.settings import (
    ESTIMATORS,
    TERMS,
    MIMRLObjectiveConfig,
    shorthand_terms,
    written_terms,
    written_weights,
)
from engine.objective import Expression, Objective, without_features

MIMRL_ESTIMATORS = tuple(map(parse_term, ESTIMATORS.values()))
"""MIMRL's eleven estimators in the order of `objective.c1`."""


def mimrl_expressions(c2: Sequence[float]) -> list[Expression]:
    """MIMRL's eight information terms, maximised with weights `c2`: fused, invariant, specific and complementary.

    >>> [expression.name for expression in mimrl_expressions([0.01] * 8)][3:]
    ['inv', 'spec_t', 'spec_a', 'spec_v', 'comp']
    """
    return parse_terms(shorthand_terms(c2))


def absent_features(modalities: Sequence[str]) -> set[str]:
    """The features of the modalities that are not among `modalities`."""
    return {m[0].upper() for m in MODALITIES if m not in modalities}


def mimrl_objective(
    settings: MIMRLObjectiveConfig, fused_dim: int, d_common: int, modalities: Sequence[str] = MODALITIES
) -> Objective:
    """The objective of MIMRL on features F [B, fused_dim], T, A, V [B, d_common] and label C [B, 1].

    Args:
        modalities: of text, audio and vision those that there are. Published terms that name another are left out.
    """
    for name, values, names in (("c1", settings.c1, ESTIMATORS), ("c2", settings.c2, TERMS)):
        if values is not None and len(values) != len(names):
            raise ConfigError(f"objective.{name}", f"{len(values)} weights", str(len(names)), "Give one for each.")
    absent = absent_features(modalities)
    expressions = without_features(parse_terms(written_terms(settings)), absent)
    if settings.c1 is None:
        weights = stage1_weights(expressions, settings.estimator_weights)
    else:
        weights = parse_weights(written_weights(settings))
    return Objective(
        expressions,
        dims={"F": fused_dim, "T": d_common, "A": d_common, "V": d_common, "C": 1},
        discrete=("C",),
        estimators={term: w for term, w in weights.items() if not absent & {term.x, term.y, term.given}},
        settings=settings,
    )
