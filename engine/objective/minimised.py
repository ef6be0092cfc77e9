"""Terms that an objective minimises: how well their bounds suit that.

A lower bound that is minimised can read 0 while all the information is there: its critic need only fail. An upper bound
that is maximised can rise without the information rising.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.objective.terms import Expression, Term
from engine.vocabulary import UPPER_BOUNDS


def total_weights(expressions: Iterable[Expression]) -> dict[Term, float]:
    """The weight with which the expressions together maximise each term.

    >>> from engine import MI
    >>> list(total_weights([MI("Z", "Y"), -0.5 * (MI("Z", "S") + MI("Z", "Y"))]).values())
    [0.5, -0.5]
    """
    total: dict[Term, float] = {}
    for expression in expressions:
        for term, weight in expression.folded().items():
            total[term] = total.get(term, 0.0) + weight
    return total


def minimised_terms(expressions: Iterable[Expression]) -> list[Term]:
    """The terms whose total weight is negative."""
    return [term for term, weight in total_weights(expressions).items() if weight < 0]


def advice(expressions: Iterable[Expression], bound: str, conditional: str) -> list[str]:
    """A sentence on lower bounds that are minimised, and one on upper bounds that are maximised, where there are any.

    Args:
        bound, conditional: how terms are estimated that have no bound of their own.
    """
    weights = total_weights(expressions)
    below = {t: t.bound or (bound if t.given is None else conditional) for t, w in weights.items() if w < 0}
    below = {t: how for t, how in below.items() if how not in UPPER_BOUNDS}
    above = [t for t, w in weights.items() if w > 0 and t.from_above]
    texts = []
    if below:
        names, hows = ", ".join(map(str, below)), ", ".join(dict.fromkeys(below.values()))
        texts.append(
            f"{names}: minimised by an estimate from below ({hows}), which can read 0 while information is there. "
            'Upper bounds: bound="club", "club_sample" or "l1out" (conditional: "club"). What is left: engine.probe.'
        )
    if above:
        texts.append(
            f"{', '.join(map(str, above))}: maximised by an upper bound, which can rise while the information does not."
        )
    return texts
