"""Whether a step runs only known code: the engine's and its libraries'. It changes weights in updates alone.

What is not known: a model, an estimator, an optimiser or a task loss of a user's own; a hook on a module, a parameter
or an optimiser; a method that was replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer

if TYPE_CHECKING:
    from engine.step import TwoStageStep

# modules whose classes change no parameter in a forward or a backward pass. Wrappers for several ranks are not among
# them: their communication hooks may
CLASSES = ("engine.", "torch.nn.modules.", "torch.optim.", "torch.amp.", "transformers.")
FUNCTIONS = (*CLASSES, "torch.")
HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks",
)  # fmt: skip
OF_OPTIMIZERS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class KnownCode:
    """Looks at a step, whose modules and optimisers must stay those that they are.

    Args:
        step: its model, its objective, its optimisers and its functions are looked at.
    """

    def __init__(self, step: TwoStageStep):
        self._step = step
        modules = [m for root in (step.model, step.objective) if root is not None for m in root.modules()]
        optimizers = [o for o in (step.main_optimizer, step.estimator_optimizer) if o is not None]
        self._parameters = [p for m in modules for p in m._parameters.values() if p is not None]
        self._hooks: list[dict] = [
            *(getattr(m, name) for m in modules for name in HOOKS),
            *(getattr(o, name, {}) for o in optimizers for name in OF_OPTIMIZERS),
            *(value for name, value in vars(torch_module).items() if name.startswith("_global_") and _is_hooks(value)),
            *(getattr(torch_optimizer, f"_global_optimizer_{when}_hooks", {}) for when in ("pre", "post")),
        ]
        self._known = all(map(is_known, [*modules, *optimizers]))

    def alone(self) -> bool:
        """Whether nothing but known code runs in the step's stages now."""
        step = self._step
        return (
            self._known
            and not any(self._hooks)
            and not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self._parameters)
            and _named(type(step), CLASSES)
            and (step.scaler is None or _named(type(step.scaler), CLASSES))
            and all(_is_known_function(f) for f in _functions(step) if f is not step.model and f is not step.objective)
        )


def is_known(thing: Any) -> bool:
    """Whether an object is of a known class, and no function that it holds is of a user's own."""
    renormalises = getattr(thing, "max_norm", None) is not None  # nn.Embedding writes its weight in a forward pass
    return not renormalises and _named(type(thing), CLASSES) and all(map(_is_known_function, _functions(thing)))


def _is_hooks(value: Any) -> bool:
    return isinstance(value, dict)


def _functions(thing: Any) -> Iterator[Callable]:
    """What an object holds that can be called."""
    return (value for value in vars(thing).values() if callable(value) and not isinstance(value, type))


def _is_known_function(function: Callable) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)  # of a bound method
    if isinstance(function, nn.Module):
        return all(map(is_known, function.modules()))
    return _named(function if hasattr(function, "__name__") else type(function), FUNCTIONS)


def _named(thing: Any, known: tuple[str, ...]) -> bool:
    """Whether a class or a function was defined in one of these modules."""
    return f"{getattr(thing, '__module__', '')}.".startswith(known)
