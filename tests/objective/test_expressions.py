"""Information terms as text: what a text means, its way back, and errors that name the place."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.mimrl.settings import ESTIMATORS, TERMS, MIMRLObjectiveConfig, written_terms
from engine.mimrl.terms import MIMRL_ESTIMATORS, mimrl_expressions, mimrl_objective, weights_of
from engine.objective import CMI, MI, Expression, Term
from engine.objective.expressions import expression_text, parse_expression, parse_term, parse_terms, stage1_weights


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("MI(F, T)", MI("F", "T")),
        ("0.01 * MI(F,T)", 0.01 * MI("F", "T")),
        ("-0.01 * (CMI(A, C | T) - CMI(T, A | C))", -0.01 * (CMI("A", "C", given="T") - CMI("T", "A", given="C"))),
        ("inv = 0.01 * (MI(T, A) + MI(T, V))", (0.01 * (MI("T", "A") + MI("T", "V"))).named("inv")),
        ("MI(a, b) / 4 + 2 * 3 * MI(a, c)", 0.25 * MI("a", "b") + 6.0 * MI("a", "c")),
        ("-MI(a, b) + (1 - 3) * MI(a, c)", -MI("a", "b") + -2.0 * MI("a", "c")),
        ("MI(a, b) * 1e-3", 1e-3 * MI("a", "b")),
        ("2 * (3 * MI(a, b))", 6.0 * MI("a", "b")),
        ("MI(MI, CMI)", MI("MI", "CMI")),
        ('"my name" = MI("pooled-1", "été")', MI("pooled-1", "été").named("my name")),
    ],
)
def test_a_text_means_what_it_means_in_python(text: str, expression: Expression):
    assert parse_expression(text) == expression


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["objective.terms: found the end of ''; expected a number, MI(X, Y)"]),
        ("3", ["a number alone"]),
        ("MI(F T)", ["found 'T' at character 6 of 'MI(F T)'; expected ,"]),
        ("MI(F, T | C)", ["found '|' at character 9", "expected )"]),
        ("CMI(A, C)", ["found ')' at character 9", "expected |"]),
        ("H(F)", ["found 'H' at character 1", "MI(X, Y), CMI(X, Y | Z)"]),
        ("MI(F, T) * MI(F, A)", ["a product of two terms is none"]),
        ("MI(F, T) + 1", ["terms added to terms"]),
        ("MI(F, T) / 0", ["a number other than 0"]),
        ("1 / MI(F, T)", ["a number other than 0"]),
        ("1e999 * MI(F, T)", ["a finite number"]),
        ("1e300 * 1e300 * MI(F, T)", ["a finite number"]),
        ("MI(F, T) MI(F, A)", ["found 'MI' at character 10", "the end, or one of + - * /"]),
        ("MI(F, T); import os", ["found ';' at character 9", "the signs"]),
        ("__import__('os')", ['found "\'" at character 12']),
        ("(" * 60 + "MI(F, T)" + ")" * 60, ["brackets at most 50 deep"]),
        ("a = b = MI(F, T)", ["found 'b' at character 5"]),
        ('MI("", T)', ["found '\"\"' at character 4", "the name of a feature"]),
    ],
)
def test_errors_name_the_text_and_the_place(text: str, parts: list[str]):
    with pytest.raises(ConfigError) as caught:
        parse_expression(text)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_of_a_list_name_its_entry():
    with pytest.raises(ConfigError, match=r"objective\.terms\[1\]: found the end of 'MI\(F'"):
        parse_terms(["MI(F, T)", "MI(F"])
    with pytest.raises(ConfigError, match=r"objective\.terms\[1\]: found a second term named I\(F;T\)"):
        parse_terms(["MI(F, T)", "2 * MI(F, T)"])


def test_weights_of_estimators():
    expressions = parse_terms(["CMI(A, C | T) - MI(F, A)", "MI(F, T)"])
    assert list(stage1_weights(expressions, {"MI(F,T)": 3.0}).items()) == [
        (Term("F", "A"), 1.0),
        (Term("F", "T"), 3.0),
        (Term("A", "C", "T"), 1.0),
    ]
    with pytest.raises(ConfigError, match=r"a weight for MI\(F, V\); expected a term in use: MI\(F, A\), MI\(F, T\)"):
        stage1_weights(expressions, {"MI(F, V)": 1.0})
    with pytest.raises(ConfigError, match="one term"):
        parse_term("MI(F, T) + MI(F, A)")


# -- the way back -----------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
terms = st.builds(Term, names, names, st.none() | names)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(terms, numbers), min_size=1, max_size=5, unique_by=lambda t: t[0]), numbers, st.none() | names
)
def test_every_expression_survives_its_text(coefficients, weight, label):
    expression = Expression(tuple(coefficients), weight, label)
    assert parse_expression(expression_text(expression)) == expression


def test_what_has_no_text():
    for expression in (Expression(()), float("inf") * MI("a", "b")):
        with pytest.raises(ConfigError, match="finite weights"):
            expression_text(expression)


# -- MIMRL's vectors --------------------------------------------------------------------------------


def published(c2: list[float]) -> list[Expression]:
    """MIMRL's eight terms as they are written in Python."""
    ac_t, ta_c = CMI("A", "C", given="T"), CMI("T", "A", given="C")
    vc_t, tv_c = CMI("V", "C", given="T"), CMI("T", "V", given="C")
    tc_a, tc_v = CMI("T", "C", given="A"), CMI("T", "C", given="V")
    terms = [
        *(MI("F", "T"), MI("F", "A"), MI("F", "V"), (MI("T", "A") + MI("T", "V")).named("inv")),
        (tc_a + tc_v - ta_c - tv_c).named("spec_t"),
        *((ac_t - ta_c).named("spec_a"), (vc_t - tv_c).named("spec_v"), (ta_c + tv_c).named("comp")),
    ]
    return [c * term for c, term in zip(c2, terms, strict=True)]


@pytest.mark.parametrize("c2", [[0.01] * 8, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.0], [1, -2, 3e-17, 4, 5, 6, 7, 8]])
def test_the_vector_c2_is_a_short_way_to_write_terms(c2: list[float]):
    written = parse_terms(written_terms(MIMRLObjectiveConfig(c2=c2)))
    assert [e.name for e in written] == [e.name for e in published(c2)] == list(TERMS)
    assert written == published(c2) == mimrl_expressions(c2)


def test_the_vector_c1_is_a_short_way_to_write_weights():
    c1 = [float(i) for i in range(11)]
    weights = weights_of(MIMRLObjectiveConfig(c1=c1))
    assert " ".join(map(str, weights)) == (
        "I(F;T) I(F;A) I(F;V) I(T;A) I(T;V) I(A;C|T) I(T;A|C) I(V;C|T) I(T;V|C) I(T;C|A) I(T;C|V)"
    )
    assert list(weights.values()) == c1
    assert [term.key for term in weights] == list(ESTIMATORS)
    assert [str(parse_term(text)) for text in ESTIMATORS.values()] == list(map(str, weights))


def test_written_terms_make_the_objective_of_the_vectors():
    """Equal expressions, names and terms; the order of the estimators is that in which the terms name them."""
    small = {"compat": "none", "hidden": 8, "embed": 4}
    vectors = MIMRLObjectiveConfig(c1=2.0, c2=0.1, **small)
    texts = written_terms(vectors)
    written = MIMRLObjectiveConfig(terms=texts, estimator_weights=dict.fromkeys(ESTIMATORS.values(), 2.0), **small)
    ours, theirs = (mimrl_objective(each, 6, 6) for each in (written, vectors))
    assert ours.expressions == theirs.expressions
    assert ours.stage1_weights == theirs.stage1_weights == dict.fromkeys(MIMRL_ESTIMATORS, 2.0)
    few = mimrl_objective(MIMRLObjectiveConfig(terms=["0.1 * CMI(A, C | T)", "MI(F, T)"], **small), 6, 6)
    assert list(few.stage1_weights) == [Term("F", "T"), Term("A", "C", "T")]
