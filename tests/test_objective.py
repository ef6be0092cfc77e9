"""Declaring information terms: algebra, names, grouping into estimators, the two losses."""

import pytest
import torch

from engine.config import ObjectiveConfig
from engine.errors import ConfigError, EstimatorError
from engine.objective import CMI, MI, MIMRL_ESTIMATORS, Objective, Term, mimrl_expressions, mimrl_objective

SMALL = ObjectiveConfig(hidden=16, embed=8, compat="none")


def features(rows: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(rows, 6, generator=generator) for name in "FTAV"}
    return drawn | {"C": torch.randint(-3, 4, (rows, 1), generator=generator).float()}


def small_mimrl(**changes) -> Objective:
    return mimrl_objective(SMALL.model_copy(update=changes), 6, 6)


class TestExpressions:
    def test_names(self):
        assert MI("F", "T").name == "I(F;T)"
        assert CMI("A", "C", given="T").name == "I(A;C|T)"
        assert (MI("A", "B") - 2 * MI("A", "C")).name == "I(A;B)-2·I(A;C)"
        assert MI("A", "B").named("shared").name == "shared"

    def test_weight_stays_outside_a_value_and_folds_into_a_sum(self):
        weighted = 0.01 * (MI("A", "B") + MI("A", "C")).named("x")
        assert weighted.weight == 0.01
        assert dict(weighted.coefficients) == {Term("A", "B"): 1.0, Term("A", "C"): 1.0}
        summed = 0.5 * MI("A", "B") + MI("A", "C")
        assert summed.weight == 1.0
        assert dict(summed.coefficients) == {Term("A", "B"): 0.5, Term("A", "C"): 1.0}

    def test_equal_terms_add_up(self):
        assert dict((MI("A", "B") + MI("A", "B")).coefficients) == {Term("A", "B"): 2.0}

    def test_minus_minimises(self):
        assert (-MI("A", "B")).weight == -1.0
        assert dict((MI("A", "C") - MI("A", "B")).coefficients)[Term("A", "B")] == -1.0

    def test_only_expressions_add(self):
        with pytest.raises(TypeError):
            MI("A", "B") + 1


class TestDeclaration:
    def test_mimrl_is_eleven_estimators_and_eight_terms(self):
        objective = small_mimrl()
        assert [t.key for t in objective.terms] == [
            *("F_T", "F_A", "F_V", "T_A", "T_V", "AC_T", "TA_C", "VC_T", "TV_C", "TC_A", "TC_V")
        ]
        assert [e.name for e in objective.expressions] == [
            *("I(F;T)", "I(F;A)", "I(F;V)", "inv", "spec_t", "spec_a", "spec_v", "comp")
        ]

    def test_derived_terms_follow_their_formulas(self):
        values = dict(zip(map(str, MIMRL_ESTIMATORS), range(1, 12), strict=True))
        found = {
            e.name: sum(c * values[str(t)] for t, c in e.coefficients) for e in mimrl_expressions([1.0] * 8)
        }  # I(F;T)=1 … I(T;V)=5, I(A;C|T)=6, I(T;A|C)=7, I(V;C|T)=8, I(T;V|C)=9, I(T;C|A)=10, I(T;C|V)=11
        assert found == {
            **{"I(F;T)": 1, "I(F;A)": 2, "I(F;V)": 3, "inv": 9, "comp": 16},
            **{"spec_t": 10 + 11 - 7 - 9, "spec_a": 6 - 7, "spec_v": 8 - 9},
        }

    def test_one_estimator_serves_every_expression_of_its_term(self):
        objective = Objective(
            [MI("A", "B"), (MI("A", "B") + MI("B", "C")).named("sum")], {"A": 4, "B": 4, "C": 2}, settings=SMALL
        )
        assert list(objective.estimators) == ["A_B", "B_C"]

    def test_long_names_make_valid_module_names(self):
        objective = Objective(
            [CMI("audio", "label", given="text")], {"audio": 4, "label": 1, "text": 4}, settings=SMALL
        )
        assert list(objective.estimators) == ["audio_label_given_text"]

    @pytest.mark.parametrize(
        "build, named",
        [
            (lambda: Objective([MI("A", "B")], {"A": 4}), "'B'"),
            (lambda: Objective([MI("A", "B"), MI("A", "B")], {"A": 4, "B": 4}), "I(A;B)"),
            (lambda: Objective([MI("A", "B")], {"A": 4, "B": 4}, estimators={Term("A", "C"): 1.0}), "I(A;C)"),
            (lambda: Objective([MI("A", "B")], {"A": 4, "B": 4}, estimators={}), "I(A;B)"),
            (lambda: small_mimrl(c1=[1.0]), "c1"),
            (lambda: small_mimrl(c2=[1.0]), "c2"),
        ],
    )
    def test_bad_declarations_say_what_is_wrong(self, build, named):
        with pytest.raises(ConfigError, match=named.replace("(", r"\(").replace(")", r"\)")):
            build()


class TestLosses:
    def test_stage_1_loss_is_the_weighted_sum_of_the_estimators_losses(self):
        weights = [0.1 * i for i in range(1, 12)]
        objective, rows = small_mimrl(c1=weights), features()
        output = objective.estimator_loss(rows, objective.sample_products(features(40, seed=1), 12))
        expected = sum(w * loss for w, loss in zip(weights, output.losses.values(), strict=True))
        torch.testing.assert_close(output.loss, expected)
        assert list(output.values) == [str(t) for t in MIMRL_ESTIMATORS]

    def test_stage_2_loss_maximises_the_weighted_terms(self):
        weights = [0.1 * i for i in range(1, 9)]
        objective, rows = small_mimrl(c2=weights), features()
        output = objective.model_loss(rows, objective.sample_products(features(40, seed=1), 12))
        expected = -sum(w * value for w, value in zip(weights, output.values.values(), strict=True))
        torch.testing.assert_close(output.loss.detach(), expected)

    def test_a_gradient_step_on_features_raises_the_information(self):
        torch.manual_seed(0)
        objective = Objective([MI("A", "B")], {"A": 6, "B": 6}, settings=SMALL)
        a, b = torch.randn(32, 6, requires_grad=True), torch.randn(32, 6)
        before = objective.model_loss({"A": a, "B": b})
        (gradient,) = torch.autograd.grad(before.loss, a)
        after = objective.model_loss({"A": a.detach() - 0.5 * gradient, "B": b})
        assert after.values["I(A;B)"] > before.values["I(A;B)"]

    def test_a_negative_weight_lowers_it(self):
        torch.manual_seed(0)
        objective = Objective([-MI("A", "B")], {"A": 6, "B": 6}, settings=SMALL)
        a, b = torch.randn(32, 6, requires_grad=True), torch.randn(32, 6)
        before = objective.model_loss({"A": a, "B": b})
        (gradient,) = torch.autograd.grad(before.loss, a)
        after = objective.model_loss({"A": a.detach() - 0.5 * gradient, "B": b})
        assert after.values["I(A;B)"] < before.values["I(A;B)"]

    def test_conditional_terms_need_product_rows(self):
        with pytest.raises(EstimatorError, match="product rows"):
            small_mimrl().model_loss(features())


class TestProducts:
    def test_rows_are_a_neighbours_x_and_a_queries_y_and_z(self):
        objective = small_mimrl(k_neighbor=3)
        bank = features(50)
        rows = objective.sample_products(bank, 12, torch.Generator().manual_seed(0))
        assert set(rows) == {str(t) for t in MIMRL_ESTIMATORS if t.given is not None}
        for term in (t for t in MIMRL_ESTIMATORS if t.given is not None):
            x, y, z = rows[str(term)]
            assert len(x) == len(y) == len(z) == 12
            source = {n: {tuple(r.tolist()) for r in bank[n]} for n in (term.x, term.y, term.given)}
            pairs = {
                (tuple(a.tolist()), tuple(b.tolist())) for a, b in zip(bank[term.y], bank[term.given], strict=True)
            }
            assert all(tuple(r.tolist()) in source[term.x] for r in x)
            assert all((tuple(a.tolist()), tuple(b.tolist())) in pairs for a, b in zip(y, z, strict=True))

    def test_terms_of_one_condition_share_a_draw_unless_faithful(self):
        bank = {**features(60), "C": torch.arange(60.0)[:, None]}
        for compat, shared in (("none", True), ("mimrl", False)):
            rows = small_mimrl(compat=compat).sample_products(bank, 12, torch.Generator().manual_seed(0))
            assert torch.equal(rows["I(A;C|T)"][2], rows["I(V;C|T)"][2]) is shared

    def test_a_generator_fixes_the_draw(self):
        def draw(seed):
            return small_mimrl().sample_products(features(60), 12, torch.Generator().manual_seed(seed))

        for term, rows in draw(3).items():
            assert all(torch.equal(a, b) for a, b in zip(rows, draw(3)[term], strict=True))
        assert not torch.equal(draw(3)["I(A;C|T)"][2], draw(4)["I(A;C|T)"][2])

    def test_label_conditions_are_drawn_within_strata(self):
        bank = features(210)
        x, y, z = small_mimrl().sample_products(bank, 40, torch.Generator().manual_seed(0))["I(T;A|C)"]
        label_of = {tuple(r.tolist()): c.item() for r, c in zip(bank["T"], bank["C"], strict=True)}
        assert all(label_of[tuple(r.tolist())] == c.item() for r, c in zip(x, z, strict=True))
        assert len(y) == 40

    def test_too_many_neighbours_for_the_batch(self):
        with pytest.raises(EstimatorError, match="k_neighbor"):
            small_mimrl(k_neighbor=4).sample_products(features(20), 3)
