"""torch.compile for training: a model's repeated layers, or whole stages of the step.

By default the repeated layers are compiled. They run the same code, so one graph serves them all, and compiling takes
seconds for a model of any depth. Compiling a whole stage as one graph takes minutes. Tests use it to show that nothing
in a stage breaks the graph.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# The step captures CUDA graphs itself. Those of torch would be recorded again for every length of a text.
REGION_MODES = {
    "default": "default",
    "reduce-overhead": "default",
    "max-autotune": "max-autotune-no-cudagraphs",
}


def regions(model: nn.Module) -> list[nn.Module]:
    """The layers that `model` repeats.

    They are the members of a `ModuleList` of two or more modules with submodules, of one class and of equal sizes.
    """
    if isinstance(model, nn.ModuleList) and _repeats(model):
        return list(model)
    return [layer for child in model.children() for layer in regions(child)]


def compile_regions(model: nn.Module, mode: str) -> int:
    """Compile each of a model's `regions` at its first call in training. Evaluation runs them uncompiled.

    Args:
        model: changed in place; its parameters, their names and its results stay the same.
        mode: "default", "reduce-overhead" or "max-autotune". See `REGION_MODES`.

    Returns:
        the number of layers that share graphs, 0 where the model repeats none.
    """
    layers = regions(model)
    shared: dict[type, Callable[..., Any]] = {}
    for layer in layers:
        kind = type(layer)
        if kind not in shared:
            shared[kind] = torch.compile(kind.forward, mode=REGION_MODES[mode], dynamic=True)
        layer.compiled_forward = shared[kind]
        layer.forward = types.MethodType(_run_region, layer)
    return len(layers)


def compile_stages(step: Any, mode: str) -> None:
    """Compile the forward pass and the losses of both stages of a `TwoStageStep`, each as one graph.

    Work that depends on values (product rows, the layout of texts) is done outside the graphs.
    """
    step.compile = mode
    step._run_forward, step._run_stage1, step._run_stage2 = (
        torch.compile(f, mode=mode, fullgraph=True, dynamic=True)
        for f in (step.forward, step._stage1_loss, step._stage2_loss)
    )


def _repeats(layers: nn.ModuleList) -> bool:
    kinds = {(type(layer), *(p.shape for p in layer.parameters())) for layer in layers}
    return len(layers) > 1 and len(kinds) == 1 and next(layers[0].children(), None) is not None


def _run_region(layer: nn.Module, *args: Any, **named: Any) -> Any:
    run = layer.compiled_forward if layer.training else type(layer).forward
    return run(layer, *args, **named)
