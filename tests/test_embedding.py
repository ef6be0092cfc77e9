"""An objective inside other people's code: their storage, their optimisers, their modules in its place."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

from engine import CMI, MI, CMIEstimator, MIEstimator, Objective
from engine.config import ObjectiveConfig
from engine.constant import Constant
from engine.errors import ConfigError, EstimatorError
from engine.kernels import InfoNCE, infonce, mi_lower_bound
from engine.model.estimators import Critic
from engine.objective import Sums, Term

SMALL = ObjectiveConfig(compat="none", hidden=16, embed=8)
TERMS = {
    "one": [MI("a", "b")],
    "two": [MI("a", "b"), MI("a", "c")],
    "conditional": [CMI("a", "b", given="s"), CMI("a", "c", given="s")],
    "mixed": [MI("a", "b"), MI("a", "c"), CMI("a", "b", given="s"), CMI("c", "b", given="s")],
}


def rows(count: int = 24, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(count, 6, generator=generator)
    drawn = {name: common + 0.3 * torch.randn(count, 6, generator=generator) for name in "abc"}
    return drawn | {"s": torch.randn(count, 1, generator=generator)}


def build(terms="mixed", **settings) -> Objective:
    torch.manual_seed(0)
    terms = TERMS[terms] if isinstance(terms, str) else terms
    return Objective(terms, {"a": 6, "b": 6, "c": 6, "s": 1}, settings=SMALL.model_copy(update=settings))


def stage1(objective: Objective, features: dict[str, Tensor]):
    products = None
    if objective.needs_products:
        generator = torch.Generator().manual_seed(3)
        products = objective.sample_products(rows(40, 5), len(features["a"]), generator)
    return objective.estimator_loss(features, products)


def train(objective: Objective, optimizer: torch.optim.Optimizer, steps: int = 8) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = stage1(objective, rows()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def snapshot(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def of_term(objective: Objective, key: str) -> dict[str, Tensor]:
    return snapshot({n: t for n, t in objective.estimator_state().items() if n.startswith(f"estimators.{key}.")})


class TestStorage:
    """A parameter's memory belongs to whoever put it there."""

    @pytest.mark.parametrize("terms", TERMS)
    def test_an_optimiser_with_one_flat_buffer(self, terms):
        plain, objective = build(terms), build(terms)
        expected = train(plain, torch.optim.Adam(plain.parameters(), 1e-2))
        parameters = list(objective.parameters())
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
        for p, part in zip(parameters, flat.detach().split([p.numel() for p in parameters]), strict=True):
            p.data = part.view_as(p)
        optimizer, losses = torch.optim.Adam([flat], 1e-2), []
        for _ in range(len(expected)):
            loss = stage1(objective, rows()).loss
            flat.grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
            optimizer.step()
            losses.append(loss.item())
        assert losses == pytest.approx(expected, rel=1e-4) and losses[-1] < losses[0] - 0.1

    @pytest.mark.parametrize("terms", TERMS)
    def test_fsdp2(self, terms):
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.objective = build(terms)

            def forward(self, features):
                return stage1(self.objective, features).loss

        def losses(model: nn.Module) -> list[float]:
            optimizer, found = torch.optim.Adam(model.parameters(), 1e-2), []
            for _ in range(6):
                loss = model(rows())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
            return found

        expected = losses(Wrapped())
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            model = fully_shard(Wrapped(), mesh=init_device_mesh("cpu", (1,)))
            assert losses(model) == pytest.approx(expected, rel=1e-5)
        finally:
            dist.destroy_process_group()
        assert expected[-1] < expected[0]

    def test_safetensors(self, tmp_path):
        from safetensors.torch import load_model, save_model

        objective = build()
        train(objective, torch.optim.Adam(objective.parameters()), 2)
        save_model(objective, str(tmp_path / "objective.safetensors"))
        other = build()
        load_model(other, str(tmp_path / "objective.safetensors"))
        assert stage1(other, rows()).loss == stage1(objective, rows()).loss

    def test_shared_memory(self):
        objective = build().share_memory()
        stage1(objective, rows()).loss.backward()
        assert all(p.is_shared() for p in objective.parameters())

    def test_a_copy_and_its_pickle_are_no_larger_than_the_parameters(self):
        objective = build(hidden=64)
        stage1(objective, rows()).loss.backward()
        size = sum(p.numel() * p.element_size() for p in objective.parameters())
        for thing in (objective.state_dict(), copy.deepcopy(objective).zero_grad() or copy.deepcopy(build(hidden=64))):
            buffer = io.BytesIO()
            torch.save(thing, buffer)
            assert size < buffer.tell() < 1.5 * size

    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "double and back", "to"])
    def test_a_moved_objective_gives_the_same(self, way):
        objective = build(bound="mine")
        expected = stage1(objective.eval(), rows())
        if way == "deepcopy":
            objective = copy.deepcopy(objective)
        elif way == "pickle":
            buffer = io.BytesIO()
            torch.save(objective, buffer)
            buffer.seek(0)
            objective = torch.load(buffer, weights_only=False)
        elif way == "to":
            objective = objective.to("cpu", torch.float64)
            features = {n: t.double() for n, t in rows().items()}
            torch.testing.assert_close(stage1(objective, features).loss.float(), expected.loss, rtol=1e-4, atol=1e-4)
            objective = objective.to(torch.float32)
        else:
            objective = objective.double().float()
        found = stage1(objective, rows())
        assert found.values == expected.values and found.loss == expected.loss
        found.loss.backward()
        assert all(p.grad is not None for p in objective.parameters())

    def test_first_used_in_inference_mode(self):
        objective = build("two")
        with torch.inference_mode():
            objective.model_loss(rows())
            objective.estimator_loss(rows())
        objective.estimator_loss(rows()).loss.backward()
        features = {n: t.requires_grad_() for n, t in rows().items()}
        objective.model_loss(features).loss.backward()
        assert features["a"].grad.abs().sum() > 0

    def test_few_tensors(self):
        from engine.mimrl.settings import MIMRLObjectiveConfig
        from engine.mimrl.terms import mimrl_objective

        small = MIMRLObjectiveConfig(compat="none", hidden=16, embed=8)
        assert len(list(mimrl_objective(small, 6, 6).parameters())) == 22


class TestSettings:
    def test_weights_after_from_pretrained(self, tmp_path):
        from transformers import PretrainedConfig, PreTrainedModel

        class Config(PretrainedConfig):
            model_type = "objective_inside"

        class Model(PreTrainedModel):
            config_class = Config

            def __init__(self, config):
                super().__init__(config)
                self.objective = build([MI("a", "b"), -0.5 * MI("a", "c"), 0.25 * CMI("a", "b", given="s")])
                self.post_init()

            def _init_weights(self, module):
                pass

        model = Model(Config())
        model.save_pretrained(tmp_path)
        other = Model.from_pretrained(tmp_path)
        products = model.objective.sample_products(rows(40, 5), 24, torch.Generator().manual_seed(3))
        for evaluate in ("estimator_loss", "model_loss"):
            a, b = (getattr(m.objective, evaluate)(rows(), products) for m in (model, other))
            torch.testing.assert_close(a.loss, b.loss)
            assert a.loss != 0 and list(a.values) == list(b.values)

    def test_constants(self):
        constant = Constant([[1, 0, -0.5], [0, 2, 3]])
        like = torch.zeros(1, dtype=torch.float64)
        assert constant(like).tolist() == [[1, 0, -0.5], [0, 2, 3]] and constant(like) is constant(like + 1)
        assert constant(like).dtype == torch.float64 and constant(torch.zeros(1)).dtype == torch.float32
        assert constant(like, torch.bool).tolist() == [[True, False, True], [False, True, True]]
        again = copy.deepcopy(constant)
        assert again._made == {} and torch.equal(again(like), constant(like))

    def test_constants_in_a_captured_step(self):
        """Nothing is made in a step: neither in the first one, nor where values are read."""
        from torch.utils._python_dispatch import TorchDispatchMode

        class Names(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.add(str(func))
                return func(*args, **(kwargs or {}))

        objective, seen = build(), set()
        products = objective.sample_products(rows(40, 5), 24, torch.Generator().manual_seed(3))
        features = {n: t.requires_grad_() for n, t in rows().items()}
        with Names():
            for evaluate in (objective.estimator_loss, objective.model_loss):
                output = evaluate(features, products)
                output.loss.backward()
                assert output.stacked_values.shape == (len(output.names),)
        assert not seen & {"aten.fill_.Scalar", "aten._to_copy.default", "aten.lift_fresh.default"}
        assert "aten.dot.default" in seen

    def test_compiled(self):
        """Whole graphs, with estimators in groups and on their own."""
        objective = build(critic="concat").eval()
        objective.freeze("I(a;b)")
        objective.freeze("I(c;b|s)")
        for evaluate in (objective.estimator_loss, objective.model_loss):
            compiled = torch.compile(evaluate, backend="eager", fullgraph=True, dynamic=True)
            for count in (24, 16):
                features = rows(count)
                products = objective.sample_products(rows(40, 5), count, torch.Generator().manual_seed(3))
                a, b = evaluate(features, products), compiled(features, products)
                torch.testing.assert_close(a.loss, b.loss, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(a.losses, b.losses, rtol=1e-4, atol=1e-5)
                b.loss.backward()

    def test_a_term_that_is_not_finite_spoils_its_expressions_alone(self):
        terms = [Term("a", "b"), Term("a", "c")]
        sums = Sums([MI("a", "b"), MI("a", "c") - 2 * MI("a", "b"), MI("a", "c")], terms)
        assert sums(torch.tensor([1.0, 5.0])).tolist() == [1, 3, 5]
        found = sums(torch.tensor([math.nan, 5.0])).tolist()
        assert math.isnan(found[0]) and math.isnan(found[1]) and found[2] == 5

    def test_declared_order_and_mixed_kinds(self):
        """Groups do not follow the order of the terms: losses and values still belong to their names."""
        terms = [CMI("a", "b", given="s"), MI("a", "b"), MI("b", "c"), CMI("c", "b", given="s")]
        weights = {Term("a", "b", "s"): 0.5, Term("b", "c"): 2.0, Term("c", "b", "s"): 3.0, Term("a", "b"): 0.25}
        torch.manual_seed(0)
        objective = Objective(terms, {"a": 6, "b": 6, "c": 6, "s": 1}, estimators=weights, settings=SMALL)
        products = objective.sample_products(rows(40, 5), 24, torch.Generator().manual_seed(3))
        output = objective.estimator_loss(rows(), products)
        assert list(output.values) == list(map(str, weights))
        for term in weights:
            estimator, features = objective.estimators[term], rows()
            if term.given is None:
                alone = estimator(features[term.x], features[term.y])
            else:
                alone = estimator(tuple(features[n] for n in (term.x, term.y, term.given)), tuple(products[str(term)]))
            torch.testing.assert_close(output.losses[str(term)], alone.loss, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(output.values[str(term)], alone.value, rtol=1e-4, atol=1e-5)
        expected = sum(w * output.losses[str(t)] for t, w in weights.items())
        torch.testing.assert_close(output.loss, expected)
        second = objective.model_loss(rows(), products)
        torch.testing.assert_close(second.loss, sum(second.losses.values()))
        for name, estimate in second.estimates.items():
            torch.testing.assert_close(second.values[name], estimate.value)


def tower(width_in: int = 6, width_out: int = 8) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(width_in, 16), nn.ReLU(), nn.Linear(16, width_out))


class TestOneEstimator:
    """A single term's estimator: read, changed, replaced, frozen."""

    def test_names(self):
        objective = build()
        assert list(objective.estimators) == ["a_b", "a_c", "ab_s", "cb_s"] and len(objective.estimators) == 4
        for name in ("a_b", "I(a;b)", Term("a", "b")):
            assert objective.estimators.key(name) == "a_b" and name in objective.estimators
        with pytest.raises(ConfigError, match=r"no term I\(b;a\).*I\(a;b\)"):
            objective.freeze("I(b;a)")

    def test_reading_and_changing_in_place(self):
        objective = build()
        view = objective.estimators["a_b"]
        assert dict(view.named_parameters()).keys() == dict(MIEstimator(6, 6).named_parameters()).keys()
        assert view.critic.g[0].weight.shape == (16, 6) and view.bound == "infonce" and view.critic.kind == "separate"
        assert len(view.critic.g) == 7 and view.critic.g[-1].bias.shape == (8,)
        before = stage1(objective, rows()).values
        with torch.no_grad():
            view.critic.g[0].weight.mul_(2)
        after = stage1(objective, rows()).values
        assert {name for name in before if before[name] != after[name]} == {"I(a;b)"}
        state = snapshot(objective.estimators["a_c"].state_dict())
        view.load_state_dict(state)
        assert all(torch.equal(t, state[n]) for n, t in view.state_dict().items())
        with pytest.raises(ConfigError, match=r"critic\.g\.0\.bias"):
            view.load_state_dict({n: t for n, t in state.items() if n != "critic.g.0.bias"})

    def test_parts_of_a_group_are_no_leaves(self):
        view = build().estimators["a_b"]
        with pytest.raises(ValueError, match="non-leaf"):
            torch.optim.SGD(view.parameters(), 0.1)
        with pytest.raises(RuntimeError, match="leaf"):
            view.critic.g[0].weight.requires_grad_(False)
        with pytest.raises(AttributeError, match=r"split\('a_b'\)"):
            view.critic.g.append(nn.Tanh())

    def test_initial_values_are_those_of_single_estimators(self):
        torch.manual_seed(0)
        modules = {"a_b": MIEstimator(6, 6, hidden=16, embed=8), "a_c": MIEstimator(6, 6, hidden=16, embed=8)}
        modules |= {"ab_s": CMIEstimator(6, 16), "cb_s": CMIEstimator(6, 16)}
        state = {f"estimators.{key}.{n}": t for key, m in modules.items() for n, t in m.state_dict().items()}
        found = build().estimator_state()
        assert list(found) == list(state) and all(torch.equal(found[n], t) for n, t in state.items())

    @pytest.mark.parametrize("how", ["set on a part", "replace"])
    def test_a_replaced_tower_is_used_and_learns(self, how):
        objective, new = build("two"), tower()
        before = objective.estimator_loss(rows()).values
        if how == "replace":
            estimator = MIEstimator(6, 6, hidden=16, embed=8)
            estimator.critic.g = new
            objective.replace("I(a;b)", estimator)
        else:
            view = objective.estimators["a_b"]
            view.critic.g = new
            assert view.critic.g[0] is new[0]
        output = objective.estimator_loss(rows())
        output.loss.backward()
        assert output.values["I(a;b)"] != before["I(a;b)"] and output.values["I(a;c)"] == before["I(a;c)"]
        assert new[0].weight.grad.abs().sum() > 0 and any(p is new[0].weight for p in objective.parameters())
        critic = objective.estimators["a_b"].critic
        expected = critic.h(rows()["b"]) @ new(rows()["a"]).t()
        torch.testing.assert_close(critic(rows()["a"], rows()["b"]), expected)

    def test_what_is_set_on_a_part_is_used(self):
        objective = build()
        objective.estimators["a_b"].critic.g[1] = nn.GELU()
        objective.estimators["ab_s"].classifier[1] = nn.Tanh()
        objective.estimators["a_c"].bound = "nwj"
        expected = build()
        found, other = stage1(objective, rows()).values, stage1(expected, rows()).values
        assert {name for name in found if found[name] == other[name]} == {"I(c;b|s)"}
        assert stage1(objective, rows()).loss.isfinite()

    def test_any_module_may_stand_for_an_estimator(self):
        class Constantly(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.tensor(2.0))

            def forward(self, x, y):
                from engine.model.estimators import Estimate

                value = self.scale * (x * y).mean()
                return Estimate(value.detach(), value, -value)

        objective, module = build(), Constantly()
        objective.estimators["a_b"] = module
        output = stage1(objective, rows())
        assert output.values["I(a;b)"] == 2 * (rows()["a"] * rows()["b"]).mean()
        output.loss.backward()
        assert module.scale.grad is not None and objective.estimators["a_b"] is module
        with pytest.raises(ConfigError, match="a Tensor"):
            objective.replace("I(a;b)", torch.zeros(3))

    @pytest.mark.parametrize("before_the_optimiser", [True, False])
    @pytest.mark.parametrize("optimiser", [torch.optim.Adam, torch.optim.AdamW])
    def test_a_frozen_estimator_stays_and_the_others_learn(self, optimiser, before_the_optimiser):
        objective = build()
        if before_the_optimiser:
            objective.freeze("I(a;b)")
            objective.freeze("I(c;b|s)")
        optimizer = optimiser(objective.parameters(), 1e-2, weight_decay=0.1)
        train(objective, optimizer, 2)
        if not before_the_optimiser:
            objective.freeze("I(a;b)")
            objective.freeze("I(c;b|s)")
        before = {key: of_term(objective, key) for key in objective.estimators}
        train(objective, optimizer, 5)
        for key in ("a_b", "cb_s"):
            assert all(torch.equal(t, before[key][n]) for n, t in of_term(objective, key).items())
            assert not any(p.requires_grad for p in objective.estimators[key].parameters())
        for key in ("a_c", "ab_s"):
            assert any(not torch.equal(t, before[key][n]) for n, t in of_term(objective, key).items())

    def test_the_others_learn_as_without_the_frozen_one(self):
        """Splitting changes nothing but who learns: no value of the others, at no step."""
        plain, objective = build("two"), build("two")
        optimizers = [torch.optim.Adam(o.parameters(), 1e-2) for o in (plain, objective)]
        objective.freeze("I(a;b)")
        for _ in range(4):
            for o, optimizer in zip((plain, objective), optimizers, strict=True):
                train(o, optimizer, 1)
        a, b = (o.estimator_loss(rows()).values for o in (plain, objective))
        torch.testing.assert_close(a["I(a;c)"], b["I(a;c)"], rtol=1e-4, atol=1e-5)
        assert a["I(a;b)"] != b["I(a;b)"]

    def test_freezing_gives_gradients_to_features_still(self):
        objective = build()
        objective.freeze("I(a;b)").requires_grad_(False)
        features = {n: t.requires_grad_() for n, t in rows().items()}
        products = objective.sample_products(rows(40, 5), 24, torch.Generator().manual_seed(3))
        loss = objective.model_loss(features, products)
        loss.losses["I(a;b)"].backward()
        assert features["a"].grad.abs().sum() > 0
        objective.estimators["a_b"].requires_grad_(True)
        assert all(p.requires_grad for p in objective.parameters())

    @pytest.mark.parametrize("off_again", [False, True])
    def test_freezing_and_freeing_while_all_are_off(self, off_again):
        """A loop turns all of them off for stage 2; what is frozen or freed there stays so when they are on again."""
        objective = build()
        freed = objective.freeze("I(a;c)")
        objective.requires_grad_(False)
        frozen, own = objective.freeze("I(a;b)"), objective.split("I(c;b|s)")
        freed.requires_grad_(True)
        if off_again:
            objective.requires_grad_(False)
            assert not any(p.requires_grad for p in objective.parameters())
        objective.requires_grad_(True)
        assert not any(p.requires_grad for p in frozen.parameters())
        assert all(p.requires_grad for module in (freed, own) for p in module.parameters())
        assert all(p.requires_grad for group in objective.estimators.groups for p in group.parameters())

    def test_a_group_left_by_all_is_gone(self):
        objective = build("two")
        modules = [objective.split(name) for name in ("I(a;b)", "I(a;c)")]
        assert len(objective.estimators.groups) == 0 and all(isinstance(m, MIEstimator) for m in modules)
        assert len(list(objective.parameters())) == 32
        torch.testing.assert_close(
            objective.estimator_loss(rows()).loss, build("two").estimator_loss(rows()).loss, rtol=1e-4, atol=1e-5
        )

    def test_a_deep_copy_of_a_view_is_a_module(self):
        view = build().estimators["a_b"]
        module = copy.deepcopy(view)
        assert isinstance(module, MIEstimator)
        torch.testing.assert_close(module(rows()["a"], rows()["b"]).value, view(rows()["a"], rows()["b"]).value)
        assert isinstance(copy.deepcopy(view.critic), Critic)


class TestStates:
    def test_a_state_by_estimator_loads(self):
        """What was saved when every estimator had parameters of its own."""
        trained = build(bound="mine")
        train(trained, torch.optim.Adam(trained.parameters(), 1e-2))
        old = snapshot(trained.estimator_state())
        assert "estimators.a_b.critic.g.0.weight" in old and old["estimators.a_c.log_ema"].shape == ()
        fresh = build(bound="mine")
        fresh.load_state_dict(old)
        assert all(torch.equal(t, old[name]) for name, t in fresh.estimator_state().items())
        assert stage1(fresh.eval(), rows()).loss == stage1(trained.eval(), rows()).loss

    def test_an_incomplete_state_does_not(self):
        old = snapshot(build().estimator_state())
        del old["estimators.a_b.critic.g.0.weight"]
        with pytest.raises(RuntimeError, match="Missing key"):
            build().load_state_dict(old)

    def test_states_after_a_split(self):
        objective, other = build(), build()
        for o in (objective, other):
            o.freeze("I(a;b)")
        train(objective, torch.optim.Adam(objective.parameters(), 1e-2), 3)
        with torch.no_grad():
            objective.estimators["a_b"].critic.g[0].weight.mul_(3)
        for state in (objective.state_dict(), snapshot(objective.estimator_state())):
            fresh = copy.deepcopy(other)
            fresh.load_state_dict(state)
            torch.testing.assert_close(stage1(fresh, rows()).loss, stage1(objective, rows()).loss)
        whole = build()
        whole.load_state_dict(snapshot(objective.estimator_state()))
        torch.testing.assert_close(stage1(whole, rows()).loss, stage1(objective, rows()).loss, rtol=1e-4, atol=1e-5)


class TestLoneEstimators:
    """What is changed in an estimator's modules is used."""

    @pytest.mark.parametrize("critic", ["separate", "concat"])
    @pytest.mark.parametrize("bound", ["infonce", "nwj"])
    def test_changed_towers(self, critic, bound):
        estimator, x, y = MIEstimator(6, 6, critic, bound, hidden=16, embed=8), rows()["a"], rows()["b"]
        name = "g" if critic == "separate" else "f"
        changed = getattr(estimator.critic, name)
        before = estimator(x, y).value
        changed[1] = nn.GELU()
        with_gelu = estimator(x, y).value
        changed.append(nn.Tanh())
        with_both = estimator(x, y)
        assert len({before.item(), with_gelu.item(), with_both.value.item()}) == 3
        with_both.loss.backward()
        assert all(p.grad is not None for p in estimator.parameters())

    def test_a_changed_concat_critic_scores_all_pairs(self):
        critic = Critic(6, 6, "concat", hidden=16)
        x, y = rows()["a"][:5], rows()["b"][:4]
        plain = critic(x, y)
        critic.f = nn.Sequential(*critic.f, nn.Identity())
        torch.testing.assert_close(critic(x, y), plain)

    @pytest.mark.parametrize(
        "activation, other", [("relu", nn.GELU()), ("leakyrelu", nn.LeakyReLU(0.5)), ("gelu", nn.GELU("tanh"))]
    )
    def test_another_activation(self, activation, other):
        torch.manual_seed(0)
        estimator = MIEstimator(6, 6, hidden=16, embed=8, activation=activation)
        with torch.no_grad():
            for p in estimator.parameters():
                p.mul_(2)
        x, y = 3 * rows()["a"], 3 * rows()["b"]
        before = estimator(x, y).value
        estimator.critic.g[1] = other
        assert estimator(x, y).value != before

    def test_hooks_and_parametrisations(self):
        torch.manual_seed(0)
        estimator, x, y = MIEstimator(6, 6, hidden=16, embed=8), rows()["a"], rows()["b"]
        before, seen = estimator(x, y).value, []
        estimator.critic.g[2].register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
        torch.testing.assert_close(estimator(x, y).value, before)
        assert seen == [(24, 16)]
        nn.utils.parametrizations.spectral_norm(estimator.critic.h[0])
        assert estimator(x, y).value != before

    def test_a_changed_classifier(self):
        estimator = CMIEstimator(6, 16)
        given = tuple(rows()[n] for n in "abc")
        before = estimator(given, given).loss
        estimator.classifier[1] = nn.Tanh()
        assert estimator(given, given).loss != before


class TestTemperature:
    @pytest.mark.parametrize(
        "wrong", [0.0, -1, math.nan, math.inf, torch.linspace(0.1, 2, 12), torch.zeros(()), torch.tensor([-1.0])]
    )
    def test_refused(self, wrong):
        q, k = torch.randn(12, 12), torch.randn(12, 12)
        for evaluate in (
            lambda: infonce(q, k, temperature=wrong),
            lambda: mi_lower_bound(q, k, temperature=wrong),
            lambda: InfoNCE(temperature=wrong),
        ):
            with pytest.raises(EstimatorError, match="one positive number") as caught:
                evaluate()
            assert "\n" not in str(caught.value)

    def test_one_element(self):
        q, k = torch.randn(12, 5), torch.randn(12, 5)
        expected = infonce(q, k, temperature=0.5)
        for temperature in (torch.tensor(0.5), torch.tensor([[0.5]]), nn.Parameter(torch.tensor([0.5]))):
            torch.testing.assert_close(infonce(q, k, temperature=temperature), expected)
        (gradient,) = torch.autograd.grad(infonce(q, k, temperature=temperature), temperature)
        assert gradient.shape == (1,) and gradient != 0
        torch.testing.assert_close(InfoNCE(temperature=torch.tensor([0.5]))(q, k), expected)
