"""Information terms on named features, and weighted sums of them.

>>> keep, forget = 0.1 * MI("Z", "Y"), -0.1 * CMI("Z", "S", given="Y").named("leak")
>>> (keep.weight, keep.name), (forget.weight, forget.name)
((0.1, 'I(Z;Y)'), (-0.1, 'leak'))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.constant import Constant
from engine.errors import ConfigError
from engine.vocabulary import BOUNDS, CONDITIONAL_ESTIMATORS, CRITICS, UPPER_BOUNDS, VARIATIONAL_BOUNDS


@dataclass(frozen=True)
class Term:
    """One information quantity between named features: I(x;y), or I(x;y|given). In nats.

    Equal quantities with different bounds or critics are different terms: each has an estimator of its own.

    >>> str(Term("Z", "S", given="Y")), str(Term("Z", "S", bound="club"))
    ('I(Z;S|Y)', 'I(Z;S) by club')

    Args:
        bound: how the term is estimated; None: as the objective's settings say.
        critic: kind of the critic; None: as the objective's settings say. A bound without a critic has none.

    Raises:
        ConfigError: a bound or a critic that such a term cannot have.
    """

    x: str
    y: str
    given: str | None = None
    bound: str | None = None
    critic: str | None = None

    def __post_init__(self) -> None:
        for name in self.features:
            if not isinstance(name, str) or not name:
                raise ConfigError("information term", f"the feature {name!r}", "a name, a text", "Name the feature.")
        conditional = self.given is not None
        known = (*CONDITIONAL_ESTIMATORS, "club") if conditional else BOUNDS + VARIATIONAL_BOUNDS
        if self.bound is not None and self.bound not in known:
            raise ConfigError(
                f"bound of {self._quantity}", repr(self.bound), f"one of {', '.join(known)}", "Choose one of these."
            )
        if self.critic is None:
            return
        if conditional or self.bound in VARIATIONAL_BOUNDS or self.critic not in CRITICS:
            allowed = f"one of {', '.join(CRITICS)}, for an unconditional term by a bound of scores"
            raise ConfigError(f"critic of {self}", repr(self.critic), allowed, "Change critic=, or drop it.")

    def __str__(self) -> str:
        own = [self.bound, None if self.critic is None else f"{self.critic} critic"]
        how = " and ".join(filter(None, own))
        return f"{self._quantity} by {how}" if how else self._quantity

    @property
    def _quantity(self) -> str:
        return f"I({self.x};{self.y})" if self.given is None else f"I({self.x};{self.y}|{self.given})"

    @property
    def from_above(self) -> bool:
        """Whether the term has an upper bound."""
        return self.bound in UPPER_BOUNDS

    @property
    def needs_products(self) -> bool:
        """Whether the term's estimator compares the batch with product rows, which are drawn from a bank."""
        return self.given is not None and not self.from_above

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the features that the term's estimator reads, in the order of its arguments."""
        return (self.x, self.y) if self.given is None else (self.x, self.y, self.given)

    @property
    def key(self) -> str:
        """The term's key in `Objective.estimators`. Names of modules may hold neither dots nor brackets."""
        own = "_".join(filter(None, (self.bound, self.critic)))
        suffix = f"_by_{own}" if own else ""
        if self.given is None:
            return f"{self.x}_{self.y}{suffix}"
        if len(self.x) == len(self.y) == len(self.given) == 1:
            return f"{self.x}{self.y}_{self.given}{suffix}"
        return f"{self.x}_{self.y}_given_{self.given}{suffix}"


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

    def __radd__(self, other: float) -> Expression:
        """For `sum`, which begins with 0."""
        return self if isinstance(other, (int, float)) and other == 0 else NotImplemented

    def __neg__(self) -> Expression:
        return -1.0 * self

    def __rmul__(self, factor: float) -> Expression:
        if isinstance(factor, Tensor) and factor.requires_grad:
            raise ConfigError(
                f"weight of {self.name}", "a tensor that requires a gradient", "a number: an objective's weights do "
                "not learn", "Weigh the entries of `ObjectiveOutput.losses` yourself, or call .item().",
            )  # fmt: skip
        try:
            return NotImplemented if isinstance(factor, str) else replace(self, weight=float(factor) * self.weight)
        except (TypeError, ValueError):
            return NotImplemented

    __mul__ = __rmul__

    def __truediv__(self, divisor: float) -> Expression:
        return self * (1 / divisor)


def MI(x: str, y: str, *, bound: str | None = None, critic: str | None = None) -> Expression:
    """Mutual information I(x;y) between two named features, in nats.

    >>> (MI("text", "audio") + MI("text", "video")).name
    'I(text;audio)+I(text;video)'
    >>> MI("Z", "S", bound="club").name
    'I(Z;S) by club'

    Args:
        bound: one of `engine.vocabulary.BOUNDS`, or of `VARIATIONAL_BOUNDS`, which predict y from x: "club",
            "club_sample" and "l1out" are upper bounds, "ba" is a lower one. None: `objective.bound`.
        critic: "separate" or "concat". None: `objective.critic`.
    """
    return Expression(((Term(x, y, bound=bound, critic=critic), 1.0),))


def CMI(x: str, y: str, *, given: str, bound: str | None = None) -> Expression:
    """Conditional mutual information I(x;y|given) between named features, in nats.

    >>> CMI("Z", "S", given="Y").name
    'I(Z;S|Y)'

    Args:
        bound: "ldr", "dv" or "nwj", which a classifier of joint and product rows gives, or "club", an upper bound:
            among rows of one class of the condition (`engine.model.stratified`), or among rows whose conditions are
            nearest (`engine.model.neighbour_club`). None: `objective.cmi_estimator`.

    Raises:
        ConfigError: a condition that is no name, or a bound that such a term cannot have.
    """
    if given is None:
        raise ConfigError(f"CMI({x!r}, {y!r})", "given=None", "the name of the condition", "Name it, or use MI.")
    return Expression(((Term(x, y, given, bound), 1.0),))


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


def without_features(expressions: Iterable[Expression], absent: Iterable[str]) -> list[Expression]:
    """The expressions without the terms that name a feature of `absent`; one that loses all its terms is left out."""
    absent = set(absent)
    kept = [
        replace(e, coefficients=tuple((t, c) for t, c in e.coefficients if not absent & {t.x, t.y, t.given}))
        for e in expressions
    ]
    return [e for e in kept if e.coefficients]
