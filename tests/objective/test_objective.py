"""Declaring information terms: algebra, names, grouping into estimators, the two losses, readings on all rows."""

import copy
import math
import warnings

import pytest
import torch

from engine.errors import ConfigError, EstimatorError
from engine.mimrl.settings import MIMRLObjectiveConfig as ObjectiveConfig
from engine.mimrl.terms import MIMRL_ESTIMATORS, mimrl_expressions, mimrl_objective
from engine.model.estimators import Estimate, MIEstimator
from engine.objective import CMI, MI, Objective, Term
from engine.objective.objective import MOST_PAIRED

SMALL = ObjectiveConfig(hidden=16, embed=8, compat="none")


def features(rows: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(rows, 6, generator=generator) for name in "FTAV"}
    return drawn | {"C": torch.randint(-3, 4, (rows, 1), generator=generator).float()}


def small_mimrl(**changes) -> Objective:
    return mimrl_objective(ObjectiveConfig(**SMALL.model_dump(exclude_unset=True) | changes), 6, 6)


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
        with pytest.raises(TypeError, match="'Expression' and 'int'"):
            MI("A", "B") + 1
        with pytest.raises(TypeError, match="'int' and 'Expression'"):
            1 + MI("A", "B")
        assert sum([MI("A", "B"), MI("A", "C")]) == MI("A", "B") + MI("A", "C")  # which begins with 0


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

    def test_a_call_gives_the_loss_of_its_stage(self):
        objective, rows = Objective([0.5 * MI("F", "T")], {"F": 6, "T": 6}, settings=SMALL), features()
        losses = {stage: objective(rows, stage=stage).loss.item() for stage in ("estimators", "model")}
        assert losses == {
            "estimators": objective.estimator_loss(rows).loss.item(), "model": objective.model_loss(rows).loss.item()
        }  # fmt: skip
        assert losses["model"] == pytest.approx(0.5 * losses["estimators"]) and losses["model"] != 0
        for stage in losses:
            assert not any(value.requires_grad for value in objective(rows, stage=stage).values.values())
        output = objective(rows, stage="model")
        assert {name: -loss.item() for name, loss in output.losses.items()} == {
            name: value.item() for name, value in output.values.items()
        }
        assert all(loss.requires_grad for loss in output.losses.values())
        with pytest.raises(ConfigError, match="stage 'stage2'"):
            objective(rows, stage="stage2")

    def test_the_least_batch_has_the_neighbours_of_a_query(self):
        assert small_mimrl(k_neighbor=3).min_batch == 3
        assert (
            Objective([MI("F", "T")], {"F": 6, "T": 6}, settings=SMALL.model_copy(update={"k_neighbor": 3})).min_batch
            == 2
        )


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


class TestReadings:
    @pytest.mark.parametrize("compat", ["none", "mimrl"])
    def test_values_are_those_of_the_estimators_on_all_rows(self, compat):
        """InfoNCE of the scores of all pairs of rows; DV of all rows and of as many product rows."""
        objective, bank = small_mimrl(compat=compat), features(96)
        found = objective.read(bank, batch_size=12)
        assert list(found) == [*dict.fromkeys([*map(str, MIMRL_ESTIMATORS), *(e.name for e in objective.expressions)])]
        generator = torch.Generator().manual_seed(0)
        epoch = objective.sample_epoch(bank, [12] * 8, generator)
        products = [epoch.take(number) for number in range(8)]
        for term in MIMRL_ESTIMATORS:
            estimator = objective.split(term)
            if term.given is None:
                scores = estimator.critic(bank[term.x], bank[term.y]).double()
                true = math.log(96) + (scores.diag() - scores.logsumexp(1)).mean().item()
            else:
                rows = [torch.cat([p[str(term)][i] for p in products]) for i in range(3)]
                assert len(rows[0]) == 96
                true = estimator([bank[n] for n in (term.x, term.y, term.given)], rows).details["dv"].item()
            assert found[str(term)].value == pytest.approx(true, abs=1e-5)
        value = {name: reading.value for name, reading in found.items()}
        assert value["inv"] == pytest.approx(value["I(T;A)"] + value["I(T;V)"])
        assert value["spec_a"] == pytest.approx(value["I(A;C|T)"] - value["I(T;A|C)"])

    def test_all_rows_read_what_a_batch_cannot(self):
        """True value: six columns of correlation .99 have 11.75 nats, log 32 is 3.47, log 1024 is 6.93."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1024, 6, generator=generator)
        y = 0.99 * x + math.sqrt(1 - 0.99**2) * torch.randn(1024, 6, generator=generator)
        torch.manual_seed(0)
        objective = Objective([MI("X", "Y")], {"X": 6, "Y": 6}, settings=SMALL.model_copy(update={"hidden": 64}))
        optimizer = torch.optim.Adam(objective.parameters(), 3e-3)
        for _ in range(8):
            for rows in torch.randperm(1024, generator=generator).split(32):
                output = objective.estimator_loss({"X": x[rows], "Y": y[rows]})
                optimizer.zero_grad()
                output.loss.backward()
                optimizer.step()
        found = objective.read({"X": x, "Y": y}, 32)["I(X;Y)"]
        assert output.values["I(X;Y)"] < math.log(32)
        assert found.ceiling == pytest.approx(math.log(1024))
        assert 4.5 < found.value < found.ceiling

    def test_ceilings(self):
        def ceilings(rows=96, **settings):
            return {n: r.ceiling for n, r in small_mimrl(**settings).read(features(rows), 12).items()}

        infonce = ceilings()
        assert infonce["I(F;T)"] == infonce["I(T;V)"] == math.log(96)
        assert infonce["inv"] == 2 * math.log(96)
        assert infonce["I(T;A|C)"] is infonce["comp"] is infonce["spec_t"] is None
        assert ceilings(bound="interpolate", alpha=0.01)["I(F;T)"] == 1 + math.log(95 / 0.01)
        assert set(ceilings(bound="nwj").values()) == {None}
        assert ceilings(rows=MOST_PAIRED + 50, critic="concat")["I(F;T)"] == math.log(MOST_PAIRED)
        assert ceilings(rows=MOST_PAIRED + 50)["I(F;T)"] == math.log(MOST_PAIRED + 50)
        large = small_mimrl(critic="concat").read(features(MOST_PAIRED + 50), MOST_PAIRED + 20)
        assert large["I(F;T)"].ceiling == math.log(MOST_PAIRED) and math.isfinite(large["I(A;C|T)"].value)

    @pytest.mark.parametrize("bound", ["infonce", "mine"])
    def test_it_changes_nothing(self, bound):
        objective, bank = small_mimrl(bound=bound), features(96)
        before, random_state = {k: v.clone() for k, v in objective.state_dict().items()}, torch.get_rng_state()
        first = objective.train().read(bank, 12)
        assert objective.training and torch.equal(torch.get_rng_state(), random_state)
        assert all(torch.equal(v, before[k]) for k, v in objective.state_dict().items())
        torch.manual_seed(5)
        assert objective.read(bank, 12) == first

    def test_a_skipped_term_is_no_number(self):
        class Skips(torch.nn.Module):
            def forward(self, x, y):
                zero = torch.zeros(())
                return Estimate(zero, zero, zero, {"skipped": torch.ones(())})

        objective = small_mimrl()
        objective.replace("I(T;A)", Skips())
        found = objective.read(features(96), 12)
        assert math.isnan(found["I(T;A)"].value) and math.isnan(found["inv"].value)
        assert found["I(T;A)"].ceiling is None and math.isfinite(found["I(T;V)"].value)

    def test_a_missing_feature_is_named(self):
        with pytest.raises(EstimatorError, match="no feature 'F'"):
            small_mimrl().read({}, 12)

    def test_too_few_rows_for_product_rows_are_not_read(self):
        assert small_mimrl(k_neighbor=4).read(features(4), 12) == {}
        assert small_mimrl(k_neighbor=4).read(features(5), 12) != {}


class TestMakeEstimator:
    def test_a_subclass_runs_alone_and_keeps_what_it_changes(self):
        class Halved(MIEstimator):
            def read_scores(self, scores, log_baseline, log_ema):
                return tuple(0.5 * part for part in super().read_scores(scores, log_baseline, log_ema))

        def make(kind):
            torch.manual_seed(0)
            return kind(4, 4, bound="dv", hidden=16, embed=8)

        objective = Objective([MI("A", "B")], {"A": 4, "B": 4}, make_estimator=lambda *_: make(Halved))
        rows = {name: torch.randn(12, 4, generator=torch.Generator().manual_seed(n)) for n, name in enumerate("AB")}
        assert len(objective.estimators.groups) == 0
        expected = 0.5 * make(MIEstimator)(rows["A"], rows["B"]).value
        assert objective.estimate(rows)["I(A;B)"].value == expected != 0

    def test_any_module_that_gives_estimates_will_do(self):
        class Mean(torch.nn.Module):
            def __init__(self, width: int):
                super().__init__()
                self.scale = torch.nn.Parameter(torch.full((width,), 2.0))

            def forward(self, x, y):
                value = (self.scale * x * y).mean()
                return Estimate(value.detach(), value, -value)

        seen = []

        def make(term, dims, settings):
            seen.append((str(term), dims[term.x], settings.bound))
            return Mean(dims[term.x])

        settings = SMALL.model_copy(update={"bound": "dv"})
        objective = Objective([3 * MI("A", "B")], {"A": 4, "B": 4}, settings=settings, make_estimator=make)
        rows = {"A": torch.ones(5, 4), "B": torch.full((5, 4), 0.5)}
        assert seen == [("I(A;B)", 4, "dv")]
        assert objective.model_loss(rows).loss == -3.0


class TestMistakes:
    """What users write by mistake is told in one line."""

    @pytest.mark.parametrize(
        ("made", "told"),
        [
            (lambda: Objective(["I(Z;Y)"], dims={"Z": 4, "Y": 2}), "found 'I.Z;Y.', a str; expected expressions"),
            (lambda: Objective([MI("Z", "Y")], dims={"Z": "4", "Y": 2}), r"dims\['Z'\]: found '4'"),
            (lambda: Objective([MI("Z", "Y")], dims={"Z": 4, "Y": 0}), r"dims\['Y'\]: found 0"),
            (lambda: Objective([MI("Z", "Y")], dims={"Z": 4, "Y": 2}, discrete={"y": 3}), "discrete: found 'y'"),
            (
                lambda: Objective([MI("Z", "Y")], dims={"Z": 4, "Y": 2}, settings={"hidden": 8}),
                "settings: found a dict",
            ),
            (lambda: CMI("Z", "Y", given=None), "given=None; expected the name of the condition"),
            (lambda: Objective([MI("Z", "Y")], dims={"Z": 4, "Y": 1}, discrete={"Y": 0}), r"discrete\['Y'\]: found 0;"),
            (
                lambda: Objective([MI("Z", "Y")], dims={"Z": 4, "Y": 1}, discrete={"Y": "2"}),
                "found '2'; .* of its classes",
            ),
            (lambda: MI("Z", ""), "feature ''"),
            (lambda: torch.ones((), requires_grad=True) * MI("Z", "Y"), "weights do not learn"),
        ],
    )
    def test_when_it_is_built(self, made, told):
        with pytest.raises(ConfigError, match=told):
            made()

    def test_features_and_estimators_of_another_kind(self):
        objective = Objective([MI("Z", "Y")], dims={"Z": 4, "Y": 2})
        with pytest.raises(EstimatorError, match="a ndarray as feature 'Z'"):
            objective.model_loss({"Z": torch.zeros(8, 4).numpy(), "Y": torch.zeros(8, 2)})
        objective.replace("I(Z;Y)", torch.nn.Bilinear(4, 2, 1))
        with pytest.raises(EstimatorError, match="a Tensor from its estimator, a Bilinear"):
            objective.model_loss({"Z": torch.zeros(8, 4), "Y": torch.zeros(8, 2)})

    def test_an_objective_of_nothing_is_told_when_it_is_used(self):
        with pytest.raises(EstimatorError, match="found no terms"):
            Objective([], dims={}).model_loss({"Z": torch.zeros(8, 4)})

    def test_what_cannot_be_assigned(self):
        objective = Objective([MI("Z", "Y")], dims={"Z": 4, "Y": 2})
        with pytest.raises(ConfigError, match="set_weights"):
            objective.expressions = (2 * MI("Z", "Y"),)
        with pytest.raises(TypeError):
            objective.stage1_weights[objective.terms[0]] = 2.0


def test_estimators_learn_from_features_of_inference_mode():
    torch.manual_seed(0)
    terms = [MI("Z", "Y"), MI("Z", "Y", bound="club"), CMI("Z", "Y", given="S", bound="club")]
    objective = Objective(terms, dims={"Z": 4, "Y": 2, "S": 1})
    with torch.inference_mode():
        made = {name: torch.randn(16, width) for name, width in (("Z", 4), ("Y", 2), ("S", 1))}
    grads = []
    for batch in (made, {name: value.clone() for name, value in made.items()}):
        objective.zero_grad()
        objective.eval().estimator_loss(batch).loss.backward()
        grads.append([p.grad.clone() for p in objective.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and len(grads[0]) > 10
    objective.estimators["I(Z;Y) by club"](made["Z"], made["Y"]).loss.backward()


class TestWeights:
    def test_sums_and_quotients_of_expressions(self):
        total = sum([MI("Z", "Y"), 2 * MI("Z", "S")]) / 4
        assert total.weight == 0.25
        assert [c for _, c in total.coefficients] == [1.0, 2.0]

    def test_a_schedule_changes_the_loss_and_its_gradient(self):
        """Against the weighted sum of the values themselves."""
        torch.manual_seed(0)
        terms = [(0.1 * MI("Z", "Y")).named("keep"), -0.2 * MI("Z", "S", bound="club")]
        objective = Objective(terms, dims={"Z": 4, "Y": 2, "S": 1}).eval()
        z = torch.randn(16, 4, requires_grad=True)
        batch = {"Z": z, "Y": torch.randn(16, 2), "S": torch.randn(16, 1)}
        before = objective.model_loss(batch)
        keep, leak = (estimate.surrogate for estimate in before.estimates.values())
        grads = [torch.autograd.grad(v, z, retain_graph=True)[0] for v in (keep, leak)]
        for weight in (0.0, 0.7):
            objective.set_weights({"keep": weight})
            after = objective.model_loss(batch)
            torch.testing.assert_close(after.loss.detach(), (-weight * keep + 0.2 * leak).detach())
            torch.testing.assert_close(torch.autograd.grad(after.loss, z)[0], -weight * grads[0] + 0.2 * grads[1])
            assert after.values["keep"] == keep.detach()  # in nats, whatever the weight
        with pytest.raises(ConfigError, match="found 'other'"):
            objective.set_weights({"other": 1.0})
        with pytest.raises(ConfigError, match="nan"):
            objective.set_weights({"keep": math.nan})

    def test_a_resumed_loop_goes_on_with_the_changed_weights(self, tmp_path):
        """The loss of one batch is that of the objective whose state was saved, through a file, and within a module."""

        def built(weight=0.1, extra=()):
            torch.manual_seed(0)
            terms = [(weight * MI("Z", "Y")).named("keep"), -0.2 * MI("Z", "S", bound="club"), *extra]
            return Objective(terms, dims={"Z": 4, "Y": 2, "S": 1}).eval()

        batch = {"Z": torch.randn(16, 4), "Y": torch.randn(16, 2), "S": torch.randn(16, 1)}
        objective = built()
        first, plain = objective.state_dict(), {k: v.clone() for k, v in objective.state_dict().items()}
        objective.set_weights({"keep": 0.7})
        expected = objective.model_loss(batch).loss
        assert expected != built().model_loss(batch).loss
        torch.save(torch.nn.ModuleDict({"terms": objective}).state_dict(), tmp_path / "state.pt")

        resumed = torch.nn.ModuleDict({"terms": built()})
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(resumed["terms"].model_loss(batch).loss, expected)
        assert list(objective.state_dict()) == list(first)  # no other keys than before
        resumed["terms"].load_state_dict(plain)  # as states from before weights were noted
        assert torch.equal(resumed["terms"].model_loss(batch).loss, expected)
        resumed["terms"].load_state_dict(first)  # from before they were changed
        assert torch.equal(resumed["terms"].model_loss(batch).loss, built().model_loss(batch).loss)

        wider = built(extra=[MI("Y", "S")])
        wider.load_state_dict(objective.state_dict(), strict=False)
        assert [e.weight for e in wider.expressions] == [0.7, -0.2, 1.0]
        other = built(weight=0.5)
        with pytest.warns(UserWarning, match=r"keep is 0.7, changed from 0.1. .* built with 0.5, which is kept"):
            other.load_state_dict(objective.state_dict())
        assert other.expressions[0].weight == 0.5
        renamed = Objective([e.named(f"my {e.name}") for e in built().expressions], dims={"Z": 4, "Y": 2, "S": 1})
        with pytest.warns(UserWarning, match=r"weight of keep is 0.7, .* no expression of that name"):
            renamed.load_state_dict(objective.state_dict())
        assert [e.weight for e in renamed.expressions] == [0.1, -0.2]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            built(weight=0.7).load_state_dict(objective.state_dict())  # built anew with the weight that it had

    def test_stage_1_weights_by_name(self):
        torch.manual_seed(0)
        objective = Objective([MI("Z", "Y")], dims={"Z": 4, "Y": 2}, estimators={"I(Z;Y)": 3.0})
        output = objective.estimator_loss({"Z": torch.randn(8, 4), "Y": torch.randn(8, 2)})
        torch.testing.assert_close(output.loss, 3 * output.losses["I(Z;Y)"])


WIDTHS = {"Z": 4, "Y": 2, "S": 2}


class TestStateOfOtherTerms:
    def objective(self, *names):
        return Objective([MI("Z", name) for name in names], dims=WIDTHS)

    def values(self, objective):
        generator = torch.Generator().manual_seed(3)
        batch = {name: torch.randn(16, width, generator=generator) for name, width in WIDTHS.items()}
        return {name: float(estimate.value) for name, estimate in objective.estimate(batch).items()}

    @pytest.mark.parametrize("by", ["state_dict", "estimator_state", "file"])
    def test_values_follow_their_terms(self, by, tmp_path):
        """Stacks were loaded by position: in another order, each term silently got the other's estimator."""
        one = self.objective("Y", "S")
        state = one.estimator_state() if by == "estimator_state" else one.state_dict()
        if by == "file":
            torch.save(state, tmp_path / "objective.pt")
            state = torch.load(tmp_path / "objective.pt", weights_only=True)
        turned = self.objective("S", "Y")
        turned.load_state_dict(state)
        assert self.values(turned) == pytest.approx(self.values(one), abs=1e-6)

    @pytest.mark.parametrize("by", ["state_dict", "estimator_state"])
    def test_terms_are_added_and_removed(self, by):
        small, large = self.objective("Y"), self.objective("S", "Y")
        fresh = self.values(large)["I(Z;S)"]
        found = large.load_state_dict(getattr(small, by)(), strict=False)
        assert {name.split(".")[1] for name in found.missing_keys} == {"Z_S"}
        assert found.unexpected_keys == []
        assert self.values(large) == pytest.approx({"I(Z;S)": fresh} | self.values(small), abs=1e-6)
        smaller = self.objective("S")
        found = smaller.load_state_dict(getattr(large, by)(), strict=False)
        assert found.missing_keys == []
        assert {name.split(".")[1] for name in found.unexpected_keys} == {"Z_Y"}
        assert self.values(smaller) == pytest.approx({"I(Z;S)": fresh}, abs=1e-6)
        with pytest.raises(RuntimeError, match=r"Z_S\.critic"):
            self.objective("S", "Y").load_state_dict(getattr(small, by)())

    def test_a_split_estimator_meets_a_stacked_one(self):
        one, other = self.objective("Y", "S"), self.objective("Y", "S")
        one.split("I(Z;Y)")
        values = self.values(one)
        other.load_state_dict(one.estimator_state())
        assert self.values(other) == pytest.approx(values, abs=1e-6)

    def test_an_estimator_that_left_its_group_has_its_own_values(self):
        """Its group still holds the values that it had before."""
        one = self.objective("Y", "S")
        with torch.no_grad():
            one.split("I(Z;Y)").critic.g[0].weight.mul_(3)
        for other in (self.objective("S", "Y"), self.objective("Y", "S"), copy.deepcopy(one)):
            other.load_state_dict(one.state_dict(), strict=False)
            assert self.values(other) == pytest.approx(self.values(one), abs=1e-6)

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("terms", [("Y", "S"), ("S", "Y")])
    def test_an_estimator_that_left_its_group_takes_its_entry_of_a_stack(self, terms, strict):
        """Splitting before loading left it as it was made: an error, and none with strict=False."""
        one, other = self.objective("Y", "S"), self.objective(*terms)
        other.freeze("I(Z;Y)")
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.mul_(1.5)
        found = other.load_state_dict(one.state_dict(), strict=strict)
        assert not found.missing_keys and not found.unexpected_keys
        assert self.values(other) == pytest.approx(self.values(one), abs=1e-6)

    def test_an_estimator_of_another_kind_takes_no_entry_of_a_stack(self):
        """The stack still holds what the replaced one left."""
        one, other = self.objective("Y", "S"), self.objective("Y", "S")
        one.replace("I(Z;Y)", MIEstimator(WIDTHS["Z"], WIDTHS["Y"], critic="concat"))
        other.split("I(Z;Y)")
        before = self.values(other)["I(Z;Y)"]
        found = other.load_state_dict(one.state_dict(), strict=False)
        assert {name.split(".")[1] for name in found.missing_keys} == {"Z_Y"}
        assert self.values(other)["I(Z;Y)"] == before


class TestFrozenConditionals:
    def test_a_frozen_club_stays_what_it_is(self):
        """Its moving mean and variance belong to q: it would be another density with others."""
        torch.manual_seed(0)
        objective = Objective([-1 * MI("Z", "S", bound="club")], dims={"Z": 4, "S": 1})
        batch = {"Z": torch.randn(32, 4), "S": torch.randn(32, 1)}
        objective.estimate(batch)
        objective.freeze("I(Z;S) by club")
        before = objective.estimate(batch)["I(Z;S) by club"].value
        for _ in range(3):
            objective.estimate({name: 5 * value + 3 for name, value in batch.items()})
        assert objective.estimate(batch)["I(Z;S) by club"].value == before

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_bounds_of_conditionals_in_other_types(self, dtype):
        torch.manual_seed(0)
        for bound in ("club", "club_sample", "l1out", "ba"):
            estimator = MIEstimator(4, 1, bound=bound, hidden=8).eval()
            x, y = torch.randn(16, 4).to(dtype), torch.randn(16, 1).to(dtype)
            expected = estimator(x.float(), y.float()).value
            torch.testing.assert_close(estimator.to(dtype)(x, y).value.float(), expected, rtol=0.05, atol=0.05)
