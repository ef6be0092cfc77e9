"""MIMRL's information terms: eleven estimators and the eight expressions that they make."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import MODALITIES, ObjectiveConfig
from engine.errors import ConfigError
from engine.objective import CMI, MI, Expression, Objective, Term, without_features

MIMRL_ESTIMATORS = (
    *(Term("F", "T"), Term("F", "A"), Term("F", "V"), Term("T", "A"), Term("T", "V")),
    *(Term("A", "C", "T"), Term("T", "A", "C"), Term("V", "C", "T"), Term("T", "V", "C")),
    *(Term("T", "C", "A"), Term("T", "C", "V")),
)
"""MIMRL's eleven estimators in the order of `objective.c1`."""


def mimrl_expressions(c2: Sequence[float]) -> list[Expression]:
    """MIMRL's eight information terms, maximised with weights `c2`: fused, invariant, specific and complementary."""
    ac_t, ta_c = CMI("A", "C", given="T"), CMI("T", "A", given="C")
    vc_t, tv_c = CMI("V", "C", given="T"), CMI("T", "V", given="C")
    tc_a, tc_v = CMI("T", "C", given="A"), CMI("T", "C", given="V")
    terms = [
        MI("F", "T"),
        MI("F", "A"),
        MI("F", "V"),
        (MI("T", "A") + MI("T", "V")).named("inv"),
        (tc_a + tc_v - ta_c - tv_c).named("spec_t"),
        (ac_t - ta_c).named("spec_a"),
        (vc_t - tv_c).named("spec_v"),
        (ta_c + tv_c).named("comp"),
    ]
    return [c * term for c, term in zip(c2, terms, strict=True)]


def absent_features(modalities: Sequence[str]) -> set[str]:
    """The features of the modalities that are not among `modalities`."""
    return {m[0].upper() for m in MODALITIES if m not in modalities}


def mimrl_objective(
    settings: ObjectiveConfig, fused_dim: int, d_common: int, modalities: Sequence[str] = MODALITIES
) -> Objective:
    """The objective of MIMRL on features F [B, fused_dim], T, A, V [B, d_common] and label C [B, 1].

    Args:
        modalities: of text, audio and vision those that there are. Terms that name another are left out.
    """
    if len(settings.c1) != len(MIMRL_ESTIMATORS):
        raise ConfigError("objective.c1", f"{len(settings.c1)} weights", f"{len(MIMRL_ESTIMATORS)}", "Give one a term.")
    if len(settings.c2) != 8:
        raise ConfigError("objective.c2", f"{len(settings.c2)} weights", "8", "Give one an expression.")
    absent = absent_features(modalities)
    weights = dict(zip(MIMRL_ESTIMATORS, settings.c1, strict=True))
    return Objective(
        without_features(mimrl_expressions(settings.c2), absent),
        dims={"F": fused_dim, "T": d_common, "A": d_common, "V": d_common, "C": 1},
        discrete=("C",),
        estimators={term: w for term, w in weights.items() if not absent & {term.x, term.y, term.given}},
        settings=settings,
    )
