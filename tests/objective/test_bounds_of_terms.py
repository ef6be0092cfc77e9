"""Terms with bounds of their own: text, objectives, advice, both kinds of step, checkpoints, runs and reports."""

import copy
import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import engine
from engine import CMI, MI, Objective, TwoStageStep, checkpoint, trainer
from engine.config import ObjectiveConfig
from engine.errors import ConfigError, EstimatorError
from engine.information.probing import probe
from engine.mimrl.published import published_estimator
from engine.mimrl.terms import mimrl_objective
from engine.model.estimators import Estimate
from engine.model.stratified import StratifiedCLUB
from engine.objective.expressions import expression_text, parse_expression, parse_term
from engine.objective.minimised import minimised_terms
from engine.objective.readings import is_term, mark
from engine.objective.terms import Term
from engine.training.records import Selection
from engine.vocabulary import BOUNDS, CONDITIONAL_ESTIMATORS, CRITICS, VARIATIONAL_BOUNDS
from tests.small_runs import history, timeless
from tests.step.test_static import assert_equal
from tests.step.test_step import TwoFeatures, batches
from tests.test_mmim import small
from tests.warned import user_warnings

SMALL = ObjectiveConfig(hidden=16, embed=8)
DIMS = {"X": 4, "Y": 4, "C": 1}
EXPRESSIONS = [
    0.1 * MI("X", "Y"),
    *(-0.1 * MI("X", "Y", bound=bound) for bound in ("club", "club_sample", "l1out")),
    0.1 * MI("X", "Y", bound="ba"),
    -0.1 * CMI("X", "Y", given="C", bound="club"),
    -0.1 * CMI("X", "C", given="Y", bound="dv"),
    0.1 * MI("X", "Y", bound="smile"),
    0.1 * MI("X", "Y", critic="concat"),
]


def objective(expressions=EXPRESSIONS, **options) -> Objective:
    torch.manual_seed(0)
    return Objective(expressions, DIMS, discrete={"C": 3}, settings=SMALL, advise=False, **options)


def features(rows: int = 20, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(rows, 4, generator=generator) for name in "XY"}
    return drawn | {"C": torch.arange(rows).remainder(3)[:, None].float()}


# -- text ------------------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)
unconditional = st.one_of(
    st.builds(
        Term, names, names, bound=st.none() | st.sampled_from(BOUNDS), critic=st.none() | st.sampled_from(CRITICS)
    ),
    st.builds(Term, names, names, bound=st.sampled_from(VARIATIONAL_BOUNDS)),
)
conditional = st.builds(Term, names, names, names, st.none() | st.sampled_from((*CONDITIONAL_ESTIMATORS, "club")))
numbers = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(unconditional | conditional, numbers), min_size=1, max_size=5, unique_by=lambda t: t[0]),
    numbers,
    st.none() | names,
)
def test_every_expression_survives_its_text(coefficients, weight, label):
    expression = engine.objective.Expression(tuple(coefficients), weight, label)
    assert parse_expression(expression_text(expression)) == expression


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("-0.1 * MI(Z, S, bound=club)", -0.1 * MI("Z", "S", bound="club")),
        ("MI(Z, S, critic=concat, bound = smile)", MI("Z", "S", bound="smile", critic="concat")),
        ("leak = CMI(Z, S | Y, bound=club)", CMI("Z", "S", given="Y", bound="club").named("leak")),
        ("MI(bound, critic)", MI("bound", "critic")),
    ],
)
def test_a_text_means_what_it_means_in_python(text, expression):
    assert parse_expression(text) == expression


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("MI(Z, S, bound=kl)", ["found 'kl' at character 16", "one of infonce", "l1out, ba"]),
        ("CMI(Z, S | Y, bound=l1out)", ["found 'l1out'", "one of ldr, dv, nwj, club"]),
        ("CMI(Z, S | Y, critic=concat)", ["found 'concat'", "no critic="]),
        ("MI(Z, S, bound=club, critic=concat)", ["found 'concat'", "a bound of scores"]),
        ("MI(Z, S, bound=club, bound=club)", ["found 'bound' at character 22", "expected critic="]),
        ("MI(Z, S, k=3)", ["found 'k' at character 10", "expected bound= or critic="]),
        ("MI(Z, S, bound)", ["found ')' at character 15", "expected ="]),
        ("MI(Z, S, bound=club", ["found the end", "expected ) or ,"]),
    ],
)
def test_errors_name_the_text_and_the_place(text, parts):
    with pytest.raises(ConfigError) as caught:
        parse_expression(text)
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)


def test_names_and_keys():
    terms = [parse_term(text) for text in ("MI(Z, S)", "MI(Z, S, bound=club)", "MI(Z, S, bound=smile, critic=concat)")]
    assert [str(t) for t in terms] == ["I(Z;S)", "I(Z;S) by club", "I(Z;S) by smile and concat critic"]
    assert [t.key for t in terms] == ["Z_S", "Z_S_by_club", "Z_S_by_smile_concat"]
    assert all(is_term(str(t)) for t in terms) and not is_term("I(Z;S) by club-I(Z;Y)")
    assert mark("I(Z;S|Y) by club", 0.1, None) == "" and mark("I(Z;S|Y) by dv", 0.1, None) == "noise"
    with pytest.raises(ConfigError, match="key 'Z_S_by_club'"):
        Objective([MI("Z", "S", bound="club"), MI("Z", "S_by_club")], {"Z": 2, "S": 2, "S_by_club": 2}, advise=False)


# -- objectives ------------------------------------------------------------------------------------------------


def test_each_term_has_the_estimator_of_its_bound():
    of_terms = objective()
    assert of_terms.estimators["X_Y_by_club"].bound == "club" and of_terms.estimators["I(X;Y)"].bound == "infonce"
    assert isinstance(of_terms.estimators["XY_C_by_club"], StratifiedCLUB)
    assert of_terms.estimators["XC_Y_by_dv"].estimator == "dv"
    assert of_terms.estimators["X_Y_by_concat"].critic.kind == "concat"
    assert not of_terms.estimators.streams  # l1out and concat store all pairs
    assert objective(EXPRESSIONS[:3]).estimators.streams
    assert not objective([-MI("X", "Y", bound="club"), EXPRESSIONS[5]]).needs_products
    assert objective(EXPRESSIONS[:5]).min_batch == 2
    assert objective().min_batch == 4  # of 4 rows, two have one of the 3 classes
    of_class = objective([-MI("X", "C", bound="club")]).estimators["X_C_by_club"]
    assert of_class.classes == 3 and hasattr(of_class.q, "logits")


def test_both_losses_are_those_of_the_estimators():
    of_terms, rows = objective(), features()
    of_terms.eval()
    products = of_terms.sample_products(features(40, 1), 20)
    output = of_terms.estimator_loss(rows, products)
    single = of_terms.estimators["X_Y_by_club"](rows["X"], rows["Y"])
    torch.testing.assert_close(output.losses["I(X;Y) by club"], single.loss)
    torch.testing.assert_close(output.values["I(X;Y) by club"], single.value)
    torch.testing.assert_close(output.loss, sum(output.losses.values()))
    rows = {name: value.requires_grad_() for name, value in rows.items()}
    model = of_terms.model_loss(rows, products)
    expected = -sum(e.weight * model.values[e.name] for e in of_terms.expressions)
    torch.testing.assert_close(model.loss.detach(), expected)
    alone = objective([-0.1 * MI("X", "Y", bound="club")])
    alone.estimators["X_Y_by_club"].load_state_dict(of_terms.estimators["X_Y_by_club"].state_dict())
    (gradient,) = torch.autograd.grad(alone.eval().model_loss(rows).loss, rows["X"])
    (of_value,) = torch.autograd.grad(
        0.1 * of_terms.estimators["X_Y_by_club"](rows["X"], rows["Y"]).surrogate, rows["X"]
    )
    torch.testing.assert_close(gradient, of_value)  # a negative weight follows the bound downhill


def test_split_freeze_replace_and_state():
    of_terms, rows = objective(), features()
    assert of_terms.split("I(X;Y) by club") is of_terms.estimators["X_Y_by_club"]
    assert not any(p.requires_grad for p in of_terms.freeze("X_Y_by_l1out").parameters())

    class Fixed(nn.Module):
        def forward(self, x, y, z):
            value = (x.mean() + y.mean() + z.mean()) * 0 + 7
            return Estimate(value.detach(), value, value)

    of_terms.replace("I(X;Y|C) by club", Fixed())
    products = of_terms.sample_products(features(40, 1), 20)
    assert of_terms.estimator_loss(rows, products).values["I(X;Y|C) by club"] == 7
    fresh = objective()
    fresh.replace("I(X;Y|C) by club", Fixed())
    fresh.freeze("X_Y_by_l1out")
    fresh.load_state_dict(of_terms.estimator_state())
    a, b = (o.eval().model_loss(rows, products).loss for o in (of_terms, fresh))
    assert a == b


def test_what_cannot_be_estimated_so():
    for expression in (MI("X", "Y", bound="club"), CMI("X", "Y", given="C", bound="club")):
        with pytest.raises(EstimatorError, match="mode=fast"):
            objective([expression], make_estimator=published_estimator)


def test_readings_on_all_rows():
    readings = objective().read(features(80), 20)
    assert readings["I(X;Y) by club"].ceiling is None and readings["I(X;Y)"].ceiling is not None
    assert readings == objective().read(features(80), 20)  # no random number of others is drawn


# -- advice ----------------------------------------------------------------------------------------------------


def advice_of(make) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return user_warnings(caught)


def test_a_minimised_lower_bound_is_told_of_once():
    def make(*expressions):
        return advice_of(lambda: Objective(expressions, DIMS, discrete={"C": 3}, settings=SMALL))

    (text,) = make(-MI("X", "Y"), -CMI("X", "Y", given="C"), -MI("Y", "X", bound="nwj"))
    assert text.startswith("I(X;Y), I(X;Y|C), I(Y;X) by nwj: minimised by an estimate from below (infonce, ldr, nwj)")
    assert all(name in text for name in ("club", "club_sample", "l1out")) and "\n" not in text
    assert make(MI("X", "Y"), -MI("X", "Y", bound="club"), -CMI("X", "Y", given="C", bound="club")) == []
    assert make(MI("X", "Y") - 0.5 * MI("X", "Y")) == []  # maximised on the whole
    for bound in ("nwj", "club"):  # neither
        nothing = MI("X", "Y", bound=bound) - MI("X", "Y", bound=bound)
        assert make(nothing) == minimised_terms([nothing]) == []
    assert "maximised by an upper bound" in make(MI("X", "Y", bound="l1out"))[0]


def test_the_published_terms_are_not_told_of():
    from engine.config import Config

    published = Config(task="mimrl", preset="mosi")
    task = engine.task.find_task("mimrl")
    make = mimrl_objective(published.objective, 8, 8)
    assert advice_of(lambda: mimrl_objective(published.objective, 8, 8)) == []
    assert minimised_terms(make.expressions) and not task.warnings(published, make)
    assert task.minimised(published, make) == []
    written = Config(task="mimrl", objective={"terms": ["-0.1 * MI(F, A)"]})
    make = mimrl_objective(written.objective, 8, 8)
    assert len(task.warnings(written, make)) == 1 and task.minimised(written, make) == [Term("F", "A")]


# -- steps -----------------------------------------------------------------------------------------------------


def stepped(graphs: str, **options):
    torch.manual_seed(0)
    model, of_terms = TwoFeatures(), objective(
        [0.1 * MI("X", "Y"), -0.1 * MI("X", "Y", bound="club_sample"), -0.1 * MI("X", "Y", bound="club"),
         -0.1 * MI("X", "Y", bound="l1out"), -0.1 * CMI("X", "C", given="Y")]
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizers = (torch.optim.Adam(m.parameters(), 1e-2, fused=True) for m in (model, of_terms))
    return TwoStageStep(model, of_terms, nn.functional.mse_loss, *optimizers, graphs=graphs, **options)


def epochs(step: TwoStageStep, count: int, bank=None):
    values = []
    for _ in range(count):
        result, bank = step.train_epoch(batches(n=45), 45, bank, batch_size=10, stage1_n=2)
        values += [result.loss, *result.information.values(), *result.estimators.values()]
    tensors = [t.detach().double() for m in (step.model, step.objective) for t in m.state_dict().values()]
    return (values, tensors), bank


@pytest.mark.parametrize("options", [{}, {"autocast": torch.bfloat16}], ids=["float32", "bfloat16"])
def test_a_static_step_gives_what_an_eager_one_gives(options):
    eager, static = (epochs(stepped(graphs, **options), 3)[0] for graphs in ("off", "emulate"))
    assert_equal(eager, static, rtol=1e-4, atol=1e-5)


def test_a_state_that_is_put_back_goes_on_bit_equal():
    whole = stepped("off")
    _, bank = epochs(whole, 2)
    other = stepped("off")
    for name in ("model", "objective", "main_optimizer", "estimator_optimizer"):
        getattr(other, name).load_state_dict(copy.deepcopy(getattr(whole, name).state_dict()))
    other.generator.set_state(whole.generator.get_state())
    state = torch.get_rng_state()
    a, _ = epochs(whole, 2, copy.deepcopy(bank))
    torch.set_rng_state(state)
    b, _ = epochs(other, 2, bank)
    assert a[0] == b[0] and all(map(torch.equal, a[1], b[1]))


# -- whole runs ------------------------------------------------------------------------------------------------

RUN_TERMS = [
    "0.1 * MI(F, T)",
    "leak = -0.1 * MI(F, A, bound=club_sample)",
    "-0.1 * MI(F, C, bound=club)",
    "-0.1 * CMI(F, V | C)",
]


def test_a_run_resumes_bit_equal_and_reports_what_is_left(data, text_encoder, tmp_path):
    whole, two = tmp_path / "whole", tmp_path / "two"
    settings = small(data, text_encoder, objective={"terms": RUN_TERMS}, output={"report": True})
    with pytest.warns(UserWarning, match=r"I\(F;V\|C\): minimised by an estimate from below \(ldr\)"):
        trainer.train(settings, whole)
    trainer.train(settings.model_copy(update={"epochs": 2}), two)
    trainer.train(settings, two, resume=True)
    states = [checkpoint.load(folder / "last.safetensors")[0] for folder in (whole, two)]
    for part in ("model", "objective"):
        assert all(torch.equal(value, states[1][part][name]) for name, value in states[0][part].items())
    assert "estimators.F_A_by_club_sample.draw" in states[0]["objective"]
    assert [timeless(r) for r in history(whole)] == [timeless(r) for r in history(two)]
    left = json.loads((whole / "metrics.json").read_text())["left"]
    assert list(left) == ["I(F;A) by club_sample", "I(F;C) by club", "I(F;V|C)"]
    assert left == json.loads((two / "metrics.json").read_text())["left"]
    best = history(whole)[json.loads((whole / "metrics.json").read_text())["best_epoch"]]
    assert {name: of["reading"] for name, of in left.items()} == {name: best["valid"]["bank"][name] for name in left}
    assert {"reading", "valid", "test"} == set(left["I(F;C) by club"]) and left["I(F;C) by club"]["test"][
        "kind"
    ] == "r2"
    assert trainer.evaluate(whole, data)["mae"] > 0
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "What is left of minimised terms" in page and "I(F;A) by club_sample" in page


def test_what_is_left_is_that_of_the_best_model(data, text_encoder, tmp_path, monkeypatch):
    """The first epoch stays the best, so that the last weights are others."""
    monkeypatch.setattr(Selection, "better", lambda self, a, b, split: False)
    terms = {"terms": ["-0.1 * MI(F, A, bound=club)"]}
    trainer.train(small(data, text_encoder, objective=terms, output={"features": True}), tmp_path / "run")
    left = json.loads((tmp_path / "run/metrics.json").read_text())["left"]["I(F;A) by club"]["test"]
    known, unseen = (load_file(tmp_path / f"run/features_{split}.safetensors") for split in ("train", "test"))
    expected = probe(unseen["F"], unseen["A"], known=(known["F"], known["A"]))
    assert (left["knn"], left["linear"]) == pytest.approx((expected.knn, expected.linear), rel=1e-3, abs=1e-4)


def test_a_run_that_minimises_nothing_is_not_probed(data, text_encoder, tmp_path):
    trainer.train(small(data, text_encoder, epochs=2), tmp_path / "run")
    assert "left" not in json.loads((tmp_path / "run/metrics.json").read_text())
