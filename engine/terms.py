"""Information terms on named features, and weighted sums of them.

>>> keep, forget = 0.1 * MI("Z", "Y"), -0.1 * CMI("Z", "S", given="Y").named("leak")
>>> (keep.weight, keep.name), (forget.weight, forget.name)
((0.1, 'I(Z;Y)'), (-0.1, 'leak'))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.constant import Constant


@dataclass(frozen=True)
class Term:
    """One information quantity between named features: I(x;y), or I(x;y|given). In nats.

    >>> str(Term("Z", "S", given="Y"))
    'I(Z;S|Y)'
    """

    x: str
    y: str
    given: str | None = None

    def __str__(self) -> str:
        return f"I({self.x};{self.y})" if self.given is None else f"I({self.x};{self.y}|{self.given})"

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the features that the term's estimator reads, in the order of its arguments."""
        return (self.x, self.y) if self.given is None else (self.x, self.y, self.given)

    @property
    def key(self) -> str:
        """The term's key in `Objective.estimators`. Names of modules may hold neither dots nor brackets."""
        if self.given is None:
            return f"{self.x}_{self.y}"
        if len(self.x) == len(self.y) == len(self.given) == 1:
            return f"{self.x}{self.y}_{self.given}"
        return f"{self.x}_{self.y}_given_{self.given}"


@dataclass(frozen=True)
class Expression:
    """A weighted sum of terms, Σ coefficient · term, as an objective uses it.

    An objective maximises weight · value. `w * expression` scales the weight, so that the reported value stays in nats.
    A sum folds the weights of its parts into the coefficients.

    >>> total = (MI("T", "A") - 2 * MI("T", "V")).named("difference")
    >>> total.name, (0.5 * total).weight
    ('difference', 0.5)
    """

    coefficients: tuple[tuple[Term, float], ...]
    weight: float = 1.0
    label: str | None = None

    @property
    def name(self) -> str:
        """What the expression is reported as: its label, or else its formula."""
        if self.label is not None:
            return self.label
        parts = []
        for term, coefficient in self.coefficients:
            size = "" if abs(coefficient) == 1 else f"{abs(coefficient):g}·"
            parts.append(f"{'-' if coefficient < 0 else '+'}{size}{term}")
        return "".join(parts).removeprefix("+")

    def named(self, label: str) -> Expression:
        """The same expression, reported as `label`."""
        return replace(self, label=label)

    def folded(self) -> dict[Term, float]:
        """Each term's coefficient times the expression's weight."""
        return {term: self.weight * coefficient for term, coefficient in self.coefficients}

    def __add__(self, other: Expression) -> Expression:
        if not isinstance(other, Expression):
            return NotImplemented
        total = self.folded()
        for term, coefficient in other.folded().items():
            total[term] = total.get(term, 0.0) + coefficient
        return Expression(tuple(total.items()))

    def __sub__(self, other: Expression) -> Expression:
        if not isinstance(other, Expression):
            return NotImplemented
        return self + -other

    def __neg__(self) -> Expression:
        return -1.0 * self

    def __rmul__(self, factor: float) -> Expression:
        return replace(self, weight=float(factor) * self.weight)

    __mul__ = __rmul__


def MI(x: str, y: str) -> Expression:
    """Mutual information I(x;y) between two named features, in nats.

    >>> (MI("text", "audio") + MI("text", "video")).name
    'I(text;audio)+I(text;video)'
    """
    return Expression(((Term(x, y), 1.0),))


def CMI(x: str, y: str, *, given: str) -> Expression:
    """Conditional mutual information I(x;y|given) between named features, in nats.

    >>> CMI("Z", "S", given="Y").name
    'I(Z;S|Y)'
    """
    return Expression(((Term(x, y, given), 1.0),))


class Sums:
    """Computes the values of expressions from those of terms, with one matrix of coefficients.

    Args:
        expressions: sums of terms.
        terms: all terms, in the order of their values.
    """

    def __init__(self, expressions: Sequence[Expression], terms: Sequence[Term]):
        rows = [[dict(e.coefficients).get(term, 0.0) for term in terms] for e in expressions]
        self.names = [e.name for e in expressions]
        self._coefficients = Constant(rows)
        self._used = Constant([[float(c != 0) for c in row] for row in rows])

    def __call__(self, values: Tensor) -> Tensor:
        """[terms] -> [expressions]. A term that is not finite spoils only the expressions that use it."""
        used = self._used(values, torch.bool)
        return torch.where(used, self._coefficients(values) * values, 0.0).sum(1)


def distinct_terms(expressions: Sequence[Expression]) -> list[Term]:
    """The terms of all expressions in order of appearance, MI before CMI."""
    seen = dict.fromkeys(term for e in expressions for term, _ in e.coefficients)
    return sorted(seen, key=lambda term: term.given is not None)
