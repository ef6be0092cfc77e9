"""Information terms as text: "inv = 0.01 * (MI(T, A) + MI(T, V))" is an `engine.objective.terms.Expression`, and back.

A text is a weighted sum of `MI(X, Y)` and `CMI(X, Y | Z)`, with an optional name in front:

    text    = [name "="] sum
    sum     = product {("+" | "-") product}
    product = factor {("*" | "/") factor}
    factor  = ["-" | "+"] (number | "MI(X, Y" own ")" | "CMI(X, Y | Z" own ")" | "(" sum ")")
    own     = ["," "bound" "=" word] ["," "critic" "=" word]

It means what the same sum means in Python: `MI(Z, S, bound=club)` has a bound of its own. Names of features are words,
or stand in double quotes. Nothing of a text is executed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.objective.terms import Expression, Term

TERMS = "objective.terms"
WEIGHTS = "objective.estimator_weights"
FORM = 'a sum such as 0.01 * (MI(X, Y) - CMI(X, Y | Z)), with "name =" in front if it is to have one'
DEEPEST = 50
OPTIONS = ("bound", "critic")
"""What a term may have of its own, as name=value."""

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)
    |(?P<word>[^\W\d]\w*)|(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<sign>[-+*/()|,=]))""",
    re.VERBOSE,
)
_WORD = re.compile(r"[^\W\d]\w*")


def parse_expression(text: str, where: str = TERMS) -> Expression:
    """The expression that a text stands for.

    >>> parse_expression("leak = -0.1 * CMI(Z, S | Y)").name
    'leak'

    Args:
        where: how errors name the place of the text.

    Raises:
        ConfigError: it is no such text; the error names the text, the place in it and what is allowed there.
    """
    return _Parser(text, where).expression()


def parse_term(text: str, where: str = WEIGHTS) -> Term:
    """The single term that a text stands for.

    >>> str(parse_term("CMI(Z, S | Y)"))
    'I(Z;S|Y)'

    Raises:
        ConfigError: the text is not a single term, such as a sum.
    """
    return _Parser(text, where).only_term()


def parse_terms(texts: Sequence[str], where: str = TERMS) -> list[Expression]:
    """The expressions of several texts, whose names must differ. Errors as `parse_expression`."""
    expressions = [parse_expression(text, f"{where}[{i}]") for i, text in enumerate(texts)]
    names = [expression.name for expression in expressions]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(
                f"{where}[{i}]", f"a second term named {name}", "distinct names", 'Put "another_name =" in front.'
            )
    return expressions


def parse_weights(weights: Mapping[str, float], where: str = WEIGHTS) -> dict[Term, float]:
    """Weights by term instead of by text.

    Raises:
        ConfigError: a key is no term, or two keys are the same one.
    """
    parsed: dict[Term, float] = {}
    for text, weight in weights.items():
        term = parse_term(text, where)
        if term in parsed:
            raise ConfigError(where, f"two weights for {term}", "one weight for each term", "Leave one out.")
        parsed[term] = weight
    return parsed


def stage1_weights(expressions: Sequence[Expression], weights: Mapping[str, float]) -> dict[Term, float]:
    """The stage-1 weight of every term in these expressions: 1 where `weights` names none. MI comes before CMI.

    >>> stage1_weights([parse_expression("MI(F, T) + MI(F, A)")], {"MI(F, A)": 2.0}).values()
    dict_values([1.0, 2.0])

    Raises:
        ConfigError: a weight for a term that no expression uses.
    """
    from engine.objective.terms import distinct_terms

    used = dict.fromkeys(distinct_terms(expressions), 1.0)
    given = parse_weights(weights)
    for term in given:
        if term not in used:
            allowed = ", ".join(map(term_text, used)) or "none, because there are no terms"
            raise ConfigError(WEIGHTS, f"a weight for {term_text(term)}", f"a term in use: {allowed}", "Leave it out.")
    return used | given


# -- writing ----------------------------------------------------------------------------------------


def expression_text(expression: Expression) -> str:
    """The text that `parse_expression` turns into an equal expression.

    >>> expression_text(parse_expression("inv=.5*(MI(T,A)+2*MI(T,V))"))
    'inv = 0.5 * (MI(T, A) + 2 * MI(T, V))'

    Raises:
        ConfigError: it has no terms, or a weight that is not finite.
    """
    pairs = list(expression.coefficients)
    if not pairs or not all(map(math.isfinite, (expression.weight, *(size for _, size in pairs)))):
        raise ConfigError("expression", expression.name or "no terms", "terms with finite weights", "Correct it.")
    if len(pairs) == 1 and pairs[0][1] != 1:
        # A product alone would be read as the weight of the expression. Only a sum has coefficients.
        pairs = [(pairs[0][0], 0.0), *pairs]
    body = _sum_text(pairs)
    if expression.weight != 1:
        body = f"{_number(expression.weight)} * {body if len(pairs) == 1 else f'({body})'}"
    return body if expression.label is None else f"{_name(expression.label)} = {body}"


def _sum_text(pairs: Iterable[tuple[Term, float]]) -> str:
    """Terms and their coefficients as a sum."""
    text = ""
    for term, coefficient in pairs:
        size = "" if abs(coefficient) == 1 else f"{_number(abs(coefficient))} * "
        text += f" {'-' if coefficient < 0 else '+'} {size}{term_text(term)}"
    return f"-{text[3:]}" if text.startswith(" - ") else text[3:]


def term_text(term: Term) -> str:
    """A term as `parse_term` reads it.

    >>> term_text(parse_term("CMI(Z,S|Y)"))
    'CMI(Z, S | Y)'
    """
    pair = f"{_name(term.x)}, {_name(term.y)}"
    own = "".join(f", {name}={value}" for name in OPTIONS if (value := getattr(term, name)) is not None)
    return f"MI({pair}{own})" if term.given is None else f"CMI({pair} | {_name(term.given)}{own})"


def _number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def _name(name: str) -> str:
    return name if _WORD.fullmatch(name) else json.dumps(name, ensure_ascii=False)


# -- reading ----------------------------------------------------------------------------------------


class _Parser:
    """Reads one text from left to right."""

    def __init__(self, text: str, where: str):
        self.text, self.where = text, where
        self.tokens = self._split()
        self.next, self.depth = 0, 0

    def expression(self) -> Expression:
        label = None
        if len(self.tokens) > 1 and self.tokens[0][0] in ("word", "quoted") and self.tokens[1][1] == "=":
            label = self._feature("a name")
            self._take("=")
        value = self._sum()
        if self.next < len(self.tokens):
            raise self._error("the end, or one of + - * /")
        if isinstance(value, float):
            raise self._error("a term such as MI(X, Y): a number alone is none")
        return value if label is None else value.named(label)

    def only_term(self) -> Term:
        value = self._factor()
        if self.next < len(self.tokens) or isinstance(value, float):
            raise ConfigError(self.where, f"{self.text!r}", "one term", "Write MI(X, Y) or CMI(X, Y | Z).")
        return value.coefficients[0][0]

    def _split(self) -> list[tuple[str, str, int]]:
        """(kind, text, position) of every token."""
        tokens, end, position = [], len(self.text.rstrip()), 0
        while position < end:
            match = _TOKEN.match(self.text, position)
            if match is None:
                start = position + len(self.text[position:]) - len(self.text[position:].lstrip())
                raise ConfigError(
                    self.where,
                    f"{self.text[start]!r} at character {start + 1} of {self.text!r}",
                    "names, numbers and the signs + - * / ( ) , | =",
                    "Change the term.",
                )
            tokens.append((str(match.lastgroup), match[str(match.lastgroup)], match.start(str(match.lastgroup))))
            position = match.end()
        return tokens

    def _peek(self) -> str | None:
        """The sign that comes next, if a sign comes next."""
        kind, text, _ = self.tokens[self.next] if self.next < len(self.tokens) else ("end", "", 0)
        return text if kind == "sign" else None

    def _take(self, *signs: str) -> str:
        sign = self._peek()
        if sign is None or sign not in signs:
            raise self._error(" or ".join(signs))
        self.next += 1
        return sign

    def _sum(self) -> Expression | float:
        self.depth += 1
        if self.depth > DEEPEST:
            raise self._error(f"brackets at most {DEEPEST} deep")
        value = self._product()
        while self._peek() in ("+", "-"):
            sign = self._take("+", "-")
            other = self._product()
            if isinstance(value, float) != isinstance(other, float):
                raise self._error("terms added to terms: a number can only multiply them")
            value = value + other if sign == "+" else value - other
        self.depth -= 1
        return value

    def _product(self) -> Expression | float:
        value = self._factor()
        while self._peek() in ("*", "/"):
            sign = self._take("*", "/")
            other = self._factor()
            if sign == "/":
                if not isinstance(other, float) or other == 0:
                    raise self._error("a number other than 0 after /")
                value = value / other if isinstance(value, float) else replace(value, weight=value.weight / other)
            elif not isinstance(value, float) and not isinstance(other, float):
                raise self._error("a number times a term: a product of two terms is none")
            else:
                value = value * other
            if not math.isfinite(value if isinstance(value, float) else value.weight):
                raise self._error("a finite number")
        return value

    def _factor(self) -> Expression | float:
        negative = False
        while self._peek() in ("-", "+"):
            negative ^= self._take("-", "+") == "-"
        value = self._atom()
        return -value if negative else value

    def _atom(self) -> Expression | float:
        from engine.objective.terms import CMI, MI

        if self._peek() == "(":
            self._take("(")
            value = self._sum()
            self._take(")")
            return value
        kind, text, _ = self.tokens[self.next] if self.next < len(self.tokens) else ("end", "", 0)
        if kind == "number":
            self.next += 1
            if not math.isfinite(float(text)):
                raise self._error("a finite number")
            return float(text)
        if kind != "word" or text not in ("MI", "CMI"):
            raise self._error("a number, MI(X, Y), CMI(X, Y | Z) or a bracket")
        self.next += 1
        self._take("(")
        x = self._feature()
        self._take(",")
        y = self._feature()
        if text == "MI":
            return self._with_options(lambda own: MI(x, y, **own))
        self._take("|")
        given = self._feature()
        return self._with_options(lambda own: CMI(x, y, given=given, **own))

    def _with_options(self, make: Callable[[dict[str, str]], Expression]) -> Expression:
        """The term that `make` makes of the options that follow, up to its closing bracket."""
        own: dict[str, str] = {}
        while self._take(")", ",") == ",":
            option = self._word(" or ".join(name for name in OPTIONS if name not in own))
            if option not in OPTIONS or option in own:
                self.next -= 1
                raise self._error(" or ".join(f"{name}=" for name in OPTIONS if name not in own) or ")")
            self._take("=")
            own[option] = self._word("a word")
        try:
            return make(own)
        except (ConfigError, TypeError) as problem:  # such as CMI with a critic
            self.next -= 2  # to the last option's value
            known = problem.expected if isinstance(problem, ConfigError) else "no critic= for CMI"
            raise self._error(known) from problem

    def _word(self, what: str) -> str:
        kind, text, _ = self.tokens[self.next] if self.next < len(self.tokens) else ("end", "", 0)
        if kind != "word":
            raise self._error(what)
        self.next += 1
        return text

    def _feature(self, what: str = "the name of a feature") -> str:
        kind, text, _ = self.tokens[self.next] if self.next < len(self.tokens) else ("end", "", 0)
        if kind == "quoted":
            try:
                text = json.loads(text)
            except ValueError:
                text = ""
        if kind not in ("word", "quoted") or not text:
            raise self._error(what)
        self.next += 1
        return text

    def _error(self, expected: str) -> ConfigError:
        if self.next < len(self.tokens):
            _, text, position = self.tokens[self.next]
            place = f"{text!r} at character {position + 1} of {self.text!r}"
        else:
            place = f"the end of {self.text!r}"
        return ConfigError(self.where, place, expected, f"Write {FORM}.")
