"""MIMRL's information terms: eleven estimators and the eight expressions that they make."""

from __future__ import annotations

from collections.abc import Sequence

from engine.mimrl import settings as mimrl
from engine.mimrl.published import published_estimator
from engine.objective import Objective, without_features
from engine.objective.expressions import parse_expression, parse_term, parse_terms, stage1_weights
from engine.objective.terms import Expression, Term
from engine.vocabulary import MODALITIES

MIMRL_ESTIMATORS = tuple(parse_term(text) for text in mimrl.ESTIMATORS.values())
"""MIMRL's eleven estimators in the order of `objective.c1`."""


def mimrl_expressions(c2: Sequence[float]) -> list[Expression]:
    """MIMRL's eight information terms, maximised with weights `c2`: fused, invariant, specific and complementary."""
    texts = (text if name.startswith("I(") else f"{name} = {text}" for name, text in mimrl.TERMS.items())
    return [c * parse_expression(text) for c, text in zip(c2, texts, strict=True)]


def absent_features(modalities: Sequence[str]) -> set[str]:
    """The features of the modalities that are not among `modalities`."""
    return {m[0].upper() for m in MODALITIES if m not in modalities}


def expressions_of(settings: mimrl.MIMRLObjectiveConfig, modalities: Sequence[str] = MODALITIES) -> list[Expression]:
    """The information terms of these settings, without those that name the feature of an absent modality."""
    written = parse_terms(settings.terms) if settings.c2 is None else mimrl_expressions(settings.c2)
    return without_features(written, absent_features(modalities))


def mimrl_objective(
    settings: mimrl.MIMRLObjectiveConfig,
    fused_dim: int,
    d_common: int,
    modalities: Sequence[str] = MODALITIES,
    classes: int | None = None,
) -> Objective:
    """The objective of MIMRL on features F [B, fused_dim], T, A, V [B, d_common] and label C [B, 1].

    Args:
        modalities: of text, audio and vision those that there are. Terms that name another are left out.
        classes: number of classes of the label; None for a regression.
    """
    published = settings.compat == "mimrl"
    return Objective(
        expressions_of(settings, modalities),
        dims={"F": fused_dim, "T": d_common, "A": d_common, "V": d_common, "C": 1},
        discrete={} if published else {"C": classes},
        advise=False,
        shared_draws=not published,
        make_estimator=published_estimator if published else None,
        estimators=weights_of(settings, modalities),
        settings=settings,
    )


def weights_of(settings: mimrl.MIMRLObjectiveConfig, modalities: Sequence[str] = MODALITIES) -> dict[Term, float]:
    """Stage-1 weights by term. The published estimators keep the order of `objective.c1`, which checkpoints have."""
    if settings.c1 is not None:
        weights = dict(zip(MIMRL_ESTIMATORS, settings.c1, strict=True))
    else:
        weights = stage1_weights(expressions_of(settings), settings.estimator_weights)
    if settings.c2 is not None:
        weights = {term: weights[term] for term in MIMRL_ESTIMATORS}
    absent = absent_features(modalities)
    return {term: weight for term, weight in weights.items() if not absent & {term.x, term.y, term.given}}
