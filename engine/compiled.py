"""torch.compile for training: a model's repeated layers, or whole stages of the step.

By region is the default. Layers of one class run the same code, so that one graph serves them all and compiling takes
seconds, however deep the model is. A whole stage as one graph takes minutes; it shows that nothing in a stage breaks
the graph.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# A region leaves CUDA graphs to the step: torch's own would be recorded anew for every length of a text.
REGION_MODES = {
    "default": "default",
    "reduce-overhead": "default",
    "max-autotune": "max-autotune-no-cudagraphs",
}


def regions(model: nn.Module) -> list[nn.Module]:
    """The layers that `model` repeats: members of its lists of two or more modules of one class and of equal sizes,
    with parts of their own. What lies within such a layer belongs to it."""
    if isinstance(model, nn.ModuleList) and _repeats(model):
        return list(model)
    return [layer for child in model.children() for layer in regions(child)]


def compile_regions(model: nn.Module, mode: str) -> int:
    """Have each of a model's `regions` compiled at its first call in training; evaluation runs them as they are.

    Args:
        model: changed in place; its parameters, their names and its results stay.
        mode: "default", "reduce-overhead" or "max-autotune". See `REGION_MODES`.

    Returns:
        the number of layers that share graphs, 0 where the model repeats none.
    """
    found = regions(model)
    shared: dict[type, Callable[..., Any]] = {}
    for layer in found:
        kind = type(layer)
        if kind not in shared:
            shared[kind] = torch.compile(kind.forward, mode=REGION_MODES[mode], dynamic=True)
        layer.compiled_forward = shared[kind]
        layer.forward = types.MethodType(_run_region, layer)
    return len(found)


def compile_stages(step: Any, mode: str) -> None:
    """Have both stages' losses of a `TwoStageStep`, and its forward pass, compiled whole, each as one graph.

    What depends on values (product rows, the layout of texts) is prepared outside the graphs.
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
