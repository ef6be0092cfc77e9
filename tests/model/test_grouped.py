"""Estimators evaluated together give what each of them gives alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from engine import checkpoint
from engine.errors import EstimatorError
from engine.kernels.critics import cpu
from engine.kernels.mi_bounds import BOUNDS
from engine.kernels.registry import use_backend
from engine.model.estimators import Estimate, MIEstimator
from engine.model.grouped import GroupedMI

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


def grouped(modules: torch.nn.ModuleDict, pairs=PAIRS) -> GroupedMI:
    return GroupedMI(dict(modules), pairs)


def one_by_one(modules, given) -> dict[str, Estimate]:
    return {name: modules[name](given[x], given[y]) for name, (x, y) in PAIRS.items()}


def weighted(found: dict[str, Estimate], what: str) -> Tensor:
    return sum((1 + n) * getattr(estimate, what) for n, estimate in enumerate(found.values()))


def assert_same(together: dict[str, Estimate], alone: dict[str, Estimate]) -> None:
    assert list(together) == list(alone)
    for name in alone:
        for what in ("value", "surrogate", "loss"):
            torch.testing.assert_close(
                getattr(together[name], what), getattr(alone[name], what), rtol=1e-5, atol=1e-5, msg=f"{name}.{what}"
            )
        assert not together[name].value.requires_grad


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("what", ["surrogate", "loss"])
def test_values_and_gradients(bound: str, what: str):
    modules, given = estimators(bound=bound), features()
    others, given_others = copy.deepcopy(modules), features()
    together = grouped(modules)
    assert together.groups == [list(PAIRS)]
    for _ in range(2):  # MINE's average moves
        found, alone = together(given), one_by_one(others, given_others)
        assert_same(found, alone)
    weighted(found, what).backward()
    weighted(alone, what).backward()
    for name in DIMS:
        torch.testing.assert_close(given[name].grad, given_others[name].grad, rtol=1e-4, atol=1e-6)
    for (name, p), q in zip(modules.named_parameters(), others.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    for (name, b), c in zip(modules.named_buffers(), others.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("rows", [2, 63, 64, 65, 130])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_batch_sizes(rows: int, backend: str):
    modules = estimators()
    with use_backend(backend):
        assert_same(grouped(modules)(features(rows)), one_by_one(copy.deepcopy(modules), features(rows)))


def test_double_precision():
    modules, given = estimators().double(), features(dtype=torch.float64)
    found = grouped(modules)(given)
    for name, estimate in one_by_one(copy.deepcopy(modules), given).items():
        torch.testing.assert_close(found[name].value, estimate.value, rtol=1e-12, atol=1e-12)


def test_training_is_the_same():
    """Adam on parameters that share memory: twenty steps end where those of separate estimators end."""
    # in float64: Adam's first steps are signs of gradients, and blow float32's rounding up where they are near zero
    modules = estimators().double()
    given = {k: v.detach() for k, v in features(40, torch.float64).items()}
    others = copy.deepcopy(modules)
    together = grouped(modules)
    for network, evaluate in ((modules, together), (others, lambda g: one_by_one(others, g))):
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            weighted(evaluate(given), "loss").backward()
            optimizer.step()
    assert_same(together(given), one_by_one(others, given))
    before = {name: estimate.value for name, estimate in one_by_one(estimators().double(), given).items()}
    assert all(estimate.value > before[name] + 0.05 for name, estimate in together(given).items())


def test_nothing_is_copied_in_a_step():
    modules, given = estimators(), features()
    together = grouped(modules)
    weighted(together(given), "loss").backward()
    g, h = modules["ft"].critic.g, modules["fa"].critic.g
    assert g[2].weight.untyped_storage().data_ptr() == h[2].weight.untyped_storage().data_ptr()
    address = g[2].weight.data_ptr()
    together(given)
    assert g[2].weight.data_ptr() == address
    # accumulated gradients are the kernel's own output, not copies of it
    assert g[2].weight.grad.untyped_storage().data_ptr() == h[0].weight.grad.untyped_storage().data_ptr()


def test_state_dict_keeps_names_and_values(tmp_path):
    modules, given = estimators(), features()
    expected = copy.deepcopy(modules.state_dict())
    together = grouped(modules)
    found = together(given)
    state = modules.state_dict()
    assert list(state) == list(expected) and together.state_dict() == {}
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    checkpoint.save(tmp_path / "a.safetensors", state)
    loaded, _ = checkpoint.load(tmp_path / "a.safetensors")
    fresh = estimators()
    torch.nn.init.zeros_(fresh["ft"].critic.g[0].weight)
    other = grouped(fresh)
    other(given)
    fresh.load_state_dict(loaded)
    assert_same(other(given), found)


@pytest.mark.parametrize("move", ["deepcopy", "double and back", "assign", "data"])
def test_parameters_that_were_moved(move: str):
    """What replaces the parameters' memory is seen: results follow the parameters."""
    modules, given = estimators(), features()
    together = grouped(modules)
    first = together(given)
    if move == "deepcopy":
        modules, together = copy.deepcopy((modules, together))
    elif move == "double and back":
        modules.double().float()
    elif move == "assign":
        modules.load_state_dict({k: v.clone() for k, v in modules.state_dict().items()}, assign=True)
    else:
        modules["ft"].critic.g[0].weight.data = modules["ft"].critic.g[0].weight.data.clone()
    assert_same(together(given), first)
    with torch.no_grad():
        modules["tv"].critic.h[6].weight.mul_(2)
    assert_same(together(given), one_by_one(modules, given))
    weighted(together(given), "loss").backward()
    assert all(p.grad is not None for p in modules.parameters())


def test_a_change_between_forward_and_backward_is_an_error():
    modules, given = estimators(), features()
    loss = weighted(grouped(modules)(given), "loss")
    with torch.no_grad():
        modules["ft"].critic.g[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_without_gradients():
    modules, given = estimators(), features()
    together = grouped(modules)
    modules.requires_grad_(False)
    weighted(together(given), "surrogate").backward()
    assert all(p.grad is None for p in modules.parameters()) and given["F"].grad is not None
    modules.requires_grad_(True)
    weighted(together({k: v.detach() for k, v in given.items()}), "loss").backward()
    assert all(p.grad is not None for p in modules.parameters())
    with torch.no_grad():
        assert not together(given)["ft"].surrogate.requires_grad


def test_eval_mode_keeps_mines_average():
    modules, given = estimators(bound="mine"), features()
    together = grouped(modules)
    together(given)
    modules.eval()
    before = [e.log_ema.clone() for e in modules.values()]
    together({k: 2 * v for k, v in given.items()})
    assert all(torch.equal(e.log_ema, b) for e, b in zip(modules.values(), before, strict=True))
    modules.train()
    together({k: 2 * v for k, v in given.items()})
    assert not any(torch.equal(e.log_ema, b) for e, b in zip(modules.values(), before, strict=True))


@pytest.mark.parametrize(
    "settings",
    [{"critic": "concat"}, {"activation": "tanh"}, {"baseline": "unnormalized"}, {"compat": "mimrl", "bound": "js"}],
)
def test_others_run_one_by_one(settings: dict):
    modules, given = estimators(**settings), features()
    together = grouped(modules)
    assert together.groups == []
    assert_same(together(given), one_by_one(copy.deepcopy(modules), given))


def test_mixed_settings():
    modules, given = estimators(), features()
    modules["fv"] = MIEstimator(7, 5, hidden=16, embed=6)
    modules["tv"] = MIEstimator(5, 5, hidden=24, embed=6, bound="nwj")
    together = grouped(modules)
    assert together.groups == [["ft", "fa", "ta"]]
    assert_same(together(given), one_by_one(copy.deepcopy(modules), given))


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
    found = grouped(estimators(on_degenerate="skip"))(given)
    skipped = {name for name, estimate in found.items() if "skipped" in estimate.details}
    assert skipped == {"fa", "ta"}
    assert all(estimate.value.isfinite() for estimate in found.values())


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda dtype: None)
    modules = estimators()
    assert_same(grouped(modules)(features()), one_by_one(copy.deepcopy(modules), features()))
