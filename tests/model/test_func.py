"""torch.func and arguments of the wrong kind at the level of modules: right, or one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from engine import CMI, MI, Objective
from engine.config import ObjectiveConfig
from engine.errors import ConfigError, EngineError, EstimatorError
from engine.kernels import InfoNCE, MILowerBound
from engine.model.cmi import CMIEstimator
from engine.model.cubemlp import CubeMLP
from engine.model.encoders import SequenceEncoder
from engine.model.estimators import MIEstimator


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, Y = draw(8, 4), draw(8, 3, seed=1)
LENGTH = torch.tensor([5, 2, 3, 1, 4, 5, 5, 5])


X64, Y64, FRAMES = X.double(), Y.double(), draw(8, 5, 4).double()

# name -> (module, its scalar result, what it is given)
MODULES = {
    "InfoNCE": (InfoNCE(0.5, learnable=True), lambda m, x: m(x, x.flip(0)), X64),
    "MILowerBound": (MILowerBound("smile"), lambda m, x: m(x, x.flip(0)), X64),
    **{
        f"MI {critic} {bound}": (
            MIEstimator(4, 3, critic, bound, hidden=8, embed=4, layers=1).eval(), lambda m, x: m(x, Y64).loss, X64
        )
        for critic, bound in (("separate", "infonce"), ("separate", "mine"), ("concat", "infonce"), ("concat", "nwj"))
    },
    "CMI": (CMIEstimator(4, 8), lambda m, x: m((x, Y64, x), (x.flip(0), Y64, x)).loss, X64),
    "gru": (SequenceEncoder("gru", 4, 6), lambda m, x: m(x, LENGTH).square().mean(), FRAMES),
    "lstm": (SequenceEncoder("lstm", 4, 6), lambda m, x: m(x, LENGTH).square().mean(), FRAMES),
    "conv": (SequenceEncoder("conv", 4, 6), lambda m, x: m(x, LENGTH).square().mean(), FRAMES),
    "cubemlp": (
        CubeMLP((5, 1, 4), [(6, 2, 4)], [(2, 2, 3)], res_project=(True,)),
        lambda m, x: m(x[:, :, None]).square().mean(), FRAMES,
    ),
}  # fmt: skip


class Loss(nn.Module):
    """A module and what is made of its result, so that functional_call reaches it."""

    def __init__(self, inner: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.inner, self.run = inner, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.inner, x)


@pytest.mark.parametrize("name", MODULES)
def test_functional_call_and_transforms(name: str):
    """Gradients of parameters by torch.func are those of autograd; one call for each of a batch gives each."""
    inner, run, x = MODULES[name]
    module = Loss(inner.double(), run)
    parameters = {n: p.detach().clone() for n, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x,))

    expected = module(x)
    torch.testing.assert_close(loss(parameters, x), expected.detach())
    if parameters:
        moved = {n: p * 1.5 for n, p in parameters.items()}
        assert not torch.equal(loss(moved, x), expected)  # the parameters given are the ones used
        own = dict(module.named_parameters())
        grads = torch.autograd.grad(expected, list(own.values()), allow_unused=True)
        for (n, found), e in zip(torch.func.grad(loss)(parameters, x).items(), grads, strict=True):
            torch.testing.assert_close(found, torch.zeros_like(found) if e is None else e, msg=n)
    batch = torch.stack([x, 0.5 * x])
    found = torch.func.vmap(lambda x: loss(parameters, x))(batch)
    torch.testing.assert_close(found, torch.stack([module(x).detach() for x in batch]))


def test_an_average_in_training_mode():
    module = MILowerBound("mine")
    with pytest.raises(ConfigError, match=r"MINE's moving average.*\.eval\(\)") as caught:
        torch.func.vmap(lambda x: module(x, x))(draw(3, 8, 4))
    assert "\n" not in str(caught.value)
    torch.func.vmap(lambda x: module.eval()(x, x))(draw(3, 8, 4))


class TestTypesAndDevices:
    @pytest.mark.parametrize("name", ["separate", "concat"])
    def test_estimators(self, name: str):
        estimator = MIEstimator(4, 3, name, hidden=8, embed=4)
        for x, y, match in (
            (X.double(), Y, "torch.float64 for parameters of torch.float32"),
            (X, Y.bfloat16(), "torch.bfloat16 for parameters of torch.float32"),
            (X.to("meta"), Y, "tensors on"),
            (X.to(torch.complex64), Y, "complex64"),
        ):
            with pytest.raises(EstimatorError, match=match) as caught:
                estimator(x, y)
            assert "\n" not in str(caught.value)
        whole = (3 * Y).long()
        torch.testing.assert_close(estimator(X, whole).value, estimator(X, whole.float()).value)
        with torch.autocast("cpu", torch.bfloat16):
            assert estimator(X, Y.bfloat16()).value.isfinite()

    def test_conditional(self):
        estimator = CMIEstimator(4, 8)
        with pytest.raises(EstimatorError, match=r"torch\.float64 for parameters of torch\.float32"):
            estimator((X, Y, X.double()), (X, Y, X))
        label = torch.arange(8)[:, None] % 3
        found = estimator((X, Y, label), (X, Y, label))
        torch.testing.assert_close(found.loss, estimator((X, Y, label.float()), (X, Y, label.float())).loss)


class TestObjective:
    def objective(self, bound: str = "infonce") -> Objective:
        torch.manual_seed(0)
        settings = ObjectiveConfig(compat="none", bound=bound, hidden=8, embed=4, k_neighbor=2)
        expressions = [MI("Z", "Y"), CMI("Z", "Y", given="S"), MI("Z", "S")]
        return Objective(expressions, dims={"Z": 4, "Y": 3, "S": 1}, settings=settings)

    def features(self) -> dict[str, Tensor]:
        return {"Z": X, "Y": Y, "S": draw(8, 1, seed=2)}

    def loss(self, objective: Objective, features: dict[str, Tensor]) -> Tensor:
        bank = {n: f.detach().float() for n, f in features.items()}
        products = objective.sample_products(bank, 8, torch.Generator().manual_seed(0))
        return objective.estimator_loss(features, products).loss

    @pytest.mark.parametrize("bound", ["infonce", "smile"])
    def test_features_of_other_types(self, bound: str):
        """float64 features were once read as if they were the float32 ones of the parameters."""
        objective, features = self.objective(bound), self.features()
        expected = self.loss(objective, features)
        found = self.loss(objective, {n: f.double() for n, f in features.items()})
        torch.testing.assert_close(found, expected, check_dtype=False)
        label = features | {"S": torch.arange(8)[:, None] % 3}
        torch.testing.assert_close(self.loss(objective, label), self.loss(objective, label | {"S": label["S"].float()}))

    def test_refused_in_one_line(self):
        objective, features = self.objective(), self.features()
        bank = objective.sample_products(features, 8)
        for given, products, match in (
            ({"Z": X, "Y": Y}, bank, "found no feature 'S'"),
            (features, None, "no product rows"),
            (features, {}, "no product rows"),
            (features | {"Z": X.to("meta")}, bank, "tensors on"),
            (features | {"Z": X.to(torch.complex64)}, bank, "complex64"),
        ):
            with pytest.raises(EngineError, match=match) as caught:
                objective.estimator_loss(given, products)
            assert "\n" not in str(caught.value)
        with pytest.raises(EstimatorError, match="no feature 'Y' in the bank"):
            objective.sample_products({"Z": X, "S": features["S"]}, 8)
        with pytest.raises(EstimatorError, match="no feature 'Y' in the bank"):
            objective.sample_epoch({"Z": X, "S": features["S"]}, [8])

    @pytest.mark.parametrize("weight", [float("nan"), float("inf")])
    def test_weights(self, weight: float):
        with pytest.raises(ConfigError, match=f"a weight of {weight}"):
            Objective([weight * MI("Z", "Y")], dims={"Z": 4, "Y": 3})

    def test_second_gradients_are_refused(self):
        objective, features = self.objective(), self.features()
        z = X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(self.loss(objective, features | {"Z": z}), z, create_graph=True)
        with pytest.raises(ConfigError, match=r'use_backend\("reference"\)'):
            grad.square().sum().backward()
