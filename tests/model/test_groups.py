"""Estimators evaluated together give what each of them gives alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from engine import MI, Objective, checkpoint
from engine.config import ObjectiveConfig
from engine.errors import ConfigError, EstimatorError
from engine.kernels import registry
from engine.kernels.critics import cpu
from engine.kernels.mi_bounds import BOUNDS
from engine.kernels.registry import use_backend
from engine.model.estimators import Estimate, MIEstimator
from engine.model.groups import MIGroup

PAIRS = {"ft": ("F", "T"), "fa": ("F", "A"), "fv": ("F", "V"), "ta": ("T", "A"), "tv": ("T", "V")}
DIMS = {"F": 7, "T": 5, "A": 5, "V": 5}


def estimators(pairs=PAIRS, **settings) -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    settings = {"hidden": 24, "embed": 6} | settings
    found = torch.nn.ModuleDict({name: MIEstimator(DIMS[x], DIMS[y], **settings) for name, (x, y) in pairs.items()})
    for parameter in found.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return found


def features(rows: int = 20, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(rows, 1, generator=generator)
    return {
        name: (torch.randn(rows, width, generator=generator) + common).to(dtype).requires_grad_()
        for name, width in DIMS.items()
    }


def grouped(modules: torch.nn.ModuleDict, pairs=PAIRS) -> MIGroup:
    """A group with the values of `modules`."""
    return MIGroup(dict(modules), pairs)


def together(group: MIGroup, given) -> dict[str, Estimate]:
    return group(given).apart()


def by_name(group: MIGroup, grads: bool = False) -> dict[str, Tensor]:
    return {f"{name}.{part}": t for name in group.names for part, t in group.tensors(name, grads).items()}


def one_by_one(modules, given) -> dict[str, Estimate]:
    return {name: modules[name](given[x], given[y]) for name, (x, y) in PAIRS.items()}


def weighted(found: dict[str, Estimate], what: str) -> Tensor:
    return sum((1 + n) * getattr(estimate, what) for n, estimate in enumerate(found.values()))


def assert_same(found: dict[str, Estimate], alone: dict[str, Estimate]) -> None:
    assert list(found) == list(alone)
    for name in alone:
        for what in ("value", "surrogate", "loss"):
            torch.testing.assert_close(
                getattr(found[name], what), getattr(alone[name], what), rtol=1e-5, atol=1e-5, msg=f"{name}.{what}"
            )
        assert not found[name].value.requires_grad


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("what", ["surrogate", "loss"])
def test_values_and_gradients(bound: str, what: str):
    modules, given, given_others = estimators(bound=bound), features(), features()
    group = grouped(modules)
    for _ in range(2):  # MINE's average moves
        found, alone = together(group, given), one_by_one(modules, given_others)
        assert_same(found, alone)
    weighted(found, what).backward()
    weighted(alone, what).backward()
    for name in DIMS:
        torch.testing.assert_close(given[name].grad, given_others[name].grad, rtol=1e-4, atol=1e-6)
    gradients, values = by_name(group, grads=True), by_name(group)
    for name, p in modules.named_parameters():
        torch.testing.assert_close(
            gradients[name], p.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name, b in modules.named_buffers():
        torch.testing.assert_close(values[name], b, msg=lambda text, name=name: f"{name}: {text}")
    assert set(values) == set(modules.state_dict())


@pytest.mark.parametrize("rows", [2, 63, 64, 65, 130])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_batch_sizes(rows: int, backend: str):
    modules = estimators()
    with use_backend(backend):
        assert_same(together(grouped(modules), features(rows)), one_by_one(modules, features(rows)))


def test_double_precision():
    modules, given = estimators().double(), features(dtype=torch.float64)
    found = together(grouped(modules), given)
    for name, estimate in one_by_one(modules, given).items():
        torch.testing.assert_close(found[name].value, estimate.value, rtol=1e-12, atol=1e-12)


def test_training_is_the_same():
    """Adam on stacked parameters: twenty steps end where those of separate estimators end."""
    # in float64: Adam's first steps are signs of gradients, and blow float32's rounding up where they are near zero
    modules = estimators().double()
    given = {k: v.detach() for k, v in features(40, torch.float64).items()}
    group = grouped(modules)
    for network, evaluate in (
        (group, lambda g: together(group, g)),
        (modules, lambda g: one_by_one(modules, g)),
    ):
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            weighted(evaluate(given), "loss").backward()
            optimizer.step()
    assert_same(together(group, given), one_by_one(modules, given))
    before = {name: estimate.value for name, estimate in one_by_one(estimators().double(), given).items()}
    assert all(estimate.value > before[name] + 0.05 for name, estimate in together(group, given).items())


def test_the_kernel_takes_the_parameters_and_gives_their_gradients(monkeypatch):
    """No copy of a parameter goes in; what comes out is the parameters' gradient, not parts of one."""
    from engine.kernels.critics import op

    taken, call = [], op.call

    def watched(name, *arguments):
        if name == "critics_grouped_infonce":
            taken.extend([*arguments[2], *arguments[3]])
        return call(name, *arguments)

    monkeypatch.setattr(op, "call", watched)
    group = grouped(estimators())
    group(features()).surrogate.sum().backward()
    own = list(group.parameters())
    assert [t.data_ptr() for t in taken] == [p.data_ptr() for p in own]
    assert len({p.grad.untyped_storage().data_ptr() for p in own}) == 1


def test_parameters_and_their_order():
    """One tensor for each feature's first layers, one for each further layer; two of each with the biases."""
    group = grouped(estimators())
    shapes = {name: tuple(p.shape) for name, p in group.named_parameters()}
    assert shapes["first.0.weight"] == (3, 24, 7) and shapes["first.1.weight"] == (3, 24, 5)  # F three times, T three
    assert shapes["rest.0.weight"] == (10, 24, 24) and shapes["rest.2.bias"] == (10, 6)
    assert len(shapes) == 2 * (4 + 3)


def test_a_single_estimator_is_a_group_of_one():
    modules, given = estimators({"ft": PAIRS["ft"]}), features()
    group = grouped(modules)
    assert all(len(p) in (1, 2) for p in group.parameters())
    found = together(group, given)
    assert_same(found, {"ft": modules["ft"](given["F"], given["T"])})


def test_single_values(tmp_path):
    """A group's state comes back; one estimator's part can be read, changed in place, and copied."""
    group, given = grouped(estimators()), features()
    found = together(group, given)
    checkpoint.save(tmp_path / "a.safetensors", group.state_dict())
    loaded, _ = checkpoint.load(tmp_path / "a.safetensors")
    torch.manual_seed(9)
    fresh = grouped(
        torch.nn.ModuleDict({n: MIEstimator(DIMS[x], DIMS[y], hidden=24, embed=6) for n, (x, y) in PAIRS.items()})
    )
    fresh.load_state_dict(loaded)
    assert_same(together(fresh, given), found)
    with torch.no_grad():
        fresh.tensors("fa")["critic.g.0.weight"].mul_(2)
    alone = fresh.copy_of("fa")
    assert isinstance(alone, MIEstimator) and torch.equal(
        alone.critic.g[0].weight, 2 * group.copy_of("fa").critic.g[0].weight
    )
    changed = together(fresh, given)
    assert {name for name in found if not torch.equal(changed[name].value, found[name].value)} == {"fa"}
    torch.testing.assert_close(alone(given["F"], given["A"]).value, changed["fa"].value)
    fresh.run("fa", given["F"], given["A"]).loss.backward()
    gradient = fresh.tensors("fa", grads=True)["critic.g.0.weight"]
    alone(given["F"], given["A"]).loss.backward()
    torch.testing.assert_close(gradient, alone.critic.g[0].weight.grad)


@pytest.mark.parametrize("move", ["deepcopy", "double and back", "assign", "data", "pickle"])
def test_parameters_that_were_moved(move: str, tmp_path):
    """Results follow the parameters, wherever they are."""
    group, given = grouped(estimators()), features()
    first = together(group, given)
    if move == "deepcopy":
        group = copy.deepcopy(group)
    elif move == "double and back":
        group.double().float()
    elif move == "assign":
        group.load_state_dict({k: v.clone() for k, v in group.state_dict().items()}, assign=True)
    elif move == "data":
        group.rest[0].weight.data = group.rest[0].weight.data.clone()
    else:
        torch.save(group, tmp_path / "group.pt")
        group = torch.load(tmp_path / "group.pt", weights_only=False)
    assert_same(together(group, given), first)
    with torch.no_grad():
        group.rest[-1].weight.mul_(2)
    assert_same(together(group, given), {n: group.run(n, given[x], given[y]) for n, (x, y) in PAIRS.items()})
    weighted(together(group, given), "loss").backward()
    assert all(p.grad is not None for p in group.parameters())


def test_a_copy_is_frozen_and_in_the_mode_of_its_group():
    group = grouped(estimators(bound="mine"))
    for learns in (True, False):
        copied = group.train(learns).requires_grad_(learns).copy_of("fa")
        assert copied.training == learns and all(p.requires_grad == learns for p in copied.parameters())


def test_a_change_between_forward_and_backward_is_an_error():
    group, given = grouped(estimators()), features()
    loss = group(given).surrogate.sum()
    with torch.no_grad():
        group.tensors("ft")["critic.g.0.weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_without_gradients():
    group, given = grouped(estimators()), features()
    group.requires_grad_(False)
    group(given).surrogate.sum().backward()
    assert all(p.grad is None for p in group.parameters()) and given["F"].grad is not None
    group.requires_grad_(True)
    group({k: v.detach() for k, v in given.items()}).surrogate.sum().backward()
    assert all(p.grad is not None for p in group.parameters())
    with torch.no_grad():
        assert not group(given).surrogate.requires_grad


def test_eval_mode_keeps_mines_average():
    group, given = grouped(estimators(bound="mine")), features()
    group(given)
    group.eval()
    before, place = group.log_ema.clone(), group.log_ema.data_ptr()
    assert before.shape == (5,) and before.isfinite().all()
    group({k: 2 * v for k, v in given.items()})
    assert torch.equal(group.log_ema, before)
    group.train()
    group({k: 2 * v for k, v in given.items()})
    assert not (group.log_ema == before).any() and group.log_ema.data_ptr() == place


@pytest.mark.parametrize(
    "settings",
    [{"critic": "concat"}, {"activation": "tanh"}, {"baseline": "unnormalized"}],
)
def test_others_form_no_group(settings: dict):
    assert all(MIGroup.alike(e) is None for e in estimators(**settings).values())


def test_only_equal_estimators_form_a_group():
    modules = estimators()
    modules["fv"] = MIEstimator(7, 5, hidden=16, embed=6)
    modules["tv"] = MIEstimator(5, 5, hidden=24, embed=6, bound="nwj")
    modules["ta"].critic.g[1] = torch.nn.GELU()
    keys = {name: MIGroup.alike(e) for name, e in modules.items()}
    assert keys["ft"] == keys["fa"] is not None and keys["ta"] is None
    assert len({keys[n] for n in ("ft", "fv", "tv")}) == 3


def test_batches_without_a_bound():
    given = {k: v.detach().clone() for k, v in features().items()}
    one = {k: v[:1] for k, v in given.items()}
    given["A"][3, 2] = math.nan
    with pytest.raises(EstimatorError, match="a batch of 1"):
        grouped(estimators())(one)
    with pytest.raises(EstimatorError, match="non-finite scores"):
        grouped(estimators())(given)
    with pytest.raises(EstimatorError, match=r"x \[20, 7\] and y \[19, 5\]"):
        grouped(estimators())({**features(), "T": features()["T"][:19]})
    group = grouped(estimators(on_degenerate="skip"))
    found = together(group, given)
    skipped = {name for name, estimate in found.items() if "skipped" in estimate.details}
    assert skipped == {"fa", "ta"}
    assert all(estimate.value.isfinite() for estimate in found.values())
    weighted(found, "loss").backward()
    assert all(p.grad.isfinite().all() for p in group.parameters())


def test_a_batch_that_cannot_run_together_moves_mines_average_too():
    given = {k: v.detach().clone() for k, v in features().items()}
    given["A"][3, 2] = math.nan
    group = grouped(estimators(bound="mine", on_degenerate="skip"))
    group(given)
    assert group.log_ema.isfinite().tolist() == [name not in ("fa", "ta") for name in group.names]
    unread = grouped(estimators(bound="mine", on_degenerate="skip"))
    with registry.static():  # as on a GPU, which computes all of them together
        found = together(unread, given)
    assert [name for name in found if found[name].value == 0] == ["fa", "ta"]
    torch.testing.assert_close(unread.log_ema, group.log_ema)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda dtype: None)
    modules = estimators()
    assert_same(together(grouped(modules), features()), one_by_one(modules, features()))


def test_an_objective_of_a_group_of_which_one_estimator_skips_the_batch():
    """It is left out of the loss, whose sign stays, and is marked under the name of its term."""
    settings = ObjectiveConfig(hidden=24, embed=6, on_degenerate="skip")
    torch.manual_seed(0)
    objective = Objective([MI("F", "T"), MI("F", "A")], dims=DIMS, settings=settings)
    given = {name: value.detach().clone() for name, value in features().items()}
    given["A"][3, 2] = math.nan
    found = objective.estimators(given).by_term
    assert "skipped" not in found["I(F;T)"].details and found["I(F;A)"].details["skipped"] == 1
    assert objective.estimator_loss(given).loss.item() == pytest.approx(-found["I(F;T)"].value.item())
    view = objective.estimators["I(F;T)"]
    state = view.state_dict()
    for wrong in (state | {"critic.g.0.bias": torch.zeros(3)}, {"critic.g.0.bias": torch.zeros(24)}):
        with pytest.raises(ConfigError, match="a state that differs in critic"):
            view.load_state_dict(wrong)
