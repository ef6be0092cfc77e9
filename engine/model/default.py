"""The estimator that an objective builds for a term."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from engine.model.cmi import CMIEstimator
from engine.model.estimators import MIEstimator
from engine.model.neighbour_club import NeighbourCLUB
from engine.model.stratified import StratifiedCLUB
from engine.vocabulary import VARIATIONAL_BOUNDS

if TYPE_CHECKING:
    from engine.config import ObjectiveConfig
    from engine.objective.terms import Term


def default_estimator(
    term: Term, dims: Mapping[str, int], settings: ObjectiveConfig, classes: Mapping[str, int] | None = None
) -> nn.Module:
    """The estimator that an objective builds for a term: `MIEstimator`, or `CMIEstimator` for a conditional one.

    A conditional term by "club" gets a `StratifiedCLUB` for a condition of classes, and a `NeighbourCLUB` for another.

    Args:
        classes: the number of classes of the features that hold classes.
    """
    s, counts = settings, classes or {}
    if term.given is None:
        bound = term.bound or s.bound
        return MIEstimator(
            dims[term.x],
            dims[term.y],
            critic=term.critic or s.critic,
            bound=bound,
            baseline=s.baseline,
            hidden=s.hidden,
            embed=s.embed,
            alpha=s.alpha,
            smile_tau=s.smile_tau,
            ema_rate=s.ema_rate,
            on_degenerate=s.on_degenerate,
            classes=counts.get(term.y) if bound in VARIATIONAL_BOUNDS else None,
        )
    if term.bound == "club":
        if term.given not in counts:
            return NeighbourCLUB(
                dims[term.x],
                dims[term.y],
                dims[term.given],
                counts.get(term.y),
                k=s.k_neighbor,
                hidden=s.hidden,
                on_degenerate=s.on_degenerate,
            )
        return StratifiedCLUB(
            dims[term.x],
            dims[term.y],
            counts[term.given],
            counts.get(term.y),
            hidden=s.hidden,
            on_degenerate=s.on_degenerate,
        )
    return CMIEstimator(
        max(dims[term.x], dims[term.y], dims[term.given]),
        hidden=s.hidden,
        estimator=term.bound or s.cmi_estimator,
        on_degenerate=s.on_degenerate,
    )
