"""Multilayer perceptrons of estimators: how they are built, and run by the kernels where nobody changed them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn

from engine.errors import EstimatorError
from engine.kernels.arguments import check_count
from engine.kernels.critics import ACTIVATIONS, mlp
from engine.kernels.mi_bounds.reference import full_precision

MODULES = {"relu": nn.ReLU, "elu": nn.ELU, "gelu": nn.GELU, "leakyrelu": nn.LeakyReLU, "tanh": nn.Tanh}

Initialise = Callable[[nn.Linear], None]
"""Sets the initial weights of a fresh layer in place."""


def xavier(layer: nn.Linear) -> None:
    """Xavier-uniform weights, and biases of 0."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)


def build_mlp(
    dim_in: int, dim_out: int, hidden: int, layers: int, activation: str, initialise: Initialise | None = None
) -> nn.Sequential:
    """An MLP of `layers` + 1 hidden layers, each started by `initialise` (default: `xavier`)."""
    check_choice("activation", activation, tuple(ACTIVATIONS))
    for name, width in (("input width", dim_in), ("output width", dim_out), ("hidden width", hidden)):
        check_count("estimator", name, width)
    widths = [dim_in] + [hidden] * (layers + 1) + [dim_out]
    modules: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        linear = nn.Linear(width_in, width_out)
        (initialise or xavier)(linear)
        modules += [linear, MODULES[activation]()]
    return nn.Sequential(*modules[:-1])


def mlp_layers(tower: nn.Module, activation: str = "relu") -> list[tuple[Tensor, Tensor]] | None:
    """(weight, bias) of each linear layer, for the functions of `engine.kernels.critics`.

    None where `tower` is not, or no longer, what `build_mlp` makes: another module or activation, an extra layer, or a
    hook. Such a tower must be called as a module.
    """
    if type(tower) is not nn.Sequential or _has_hooks(tower):
        return None
    modules = list(tower)
    linear, between = modules[::2], modules[1::2]
    fits = len(linear) == len(between) + 1 and not any(_has_hooks(m) for m in modules)
    fits = fits and all(type(m) is nn.Linear and m.bias is not None for m in linear)
    if not (fits and all(type(m) is MODULES[activation] and _has_defaults(m) for m in between)):
        return None
    return [(m.weight, m.bias) for m in linear]


def run_mlp(tower: nn.Module, x: Tensor, activation: str = "relu") -> Tensor:
    """[B, d] -> [B, n], fp32 (fp64 for fp64): by the kernels' `mlp`, or by the module itself if it was changed."""
    layers = mlp_layers(tower, activation)
    return full_precision(tower(x)) if layers is None else mlp(x, layers, activation)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _has_defaults(activation: nn.Module) -> bool:
    """Whether an activation's settings are those of `ACTIVATIONS`."""
    defaults = {"negative_slope": 0.01, "alpha": 1.0, "approximate": "none"}
    return all(getattr(activation, name, value) == value for name, value in defaults.items())


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise EstimatorError(what, repr(value), f"one of {', '.join(choices)}", "Choose one of these.")
