"""Layers of many small MLPs."""

from __future__ import annotations

import itertools

from engine.kernels.mlp import plan
from engine.kernels.mlp import triton as kernels
from tests.aot.compiling import AotCase


def cases() -> list[AotCase]:
    """MIMRL's ten towers, of four features, in every precision and both kinds of tiles: first layer, hidden layer, and
    a last one in two parts as the classifiers have it."""
    first = {"BEGINS": (0, 3, 6, 8), "ENDS": (3, 6, 8, 10), "WIDTHS": (128,) * 4, "SECTIONS": 4, "SHARED": True}
    further = {"BEGINS": (0,), "ENDS": (10,), "WIDTHS": (256,), "SECTIONS": 1, "SHARED": False}
    places = tuple(n % 5 for n in range(10))
    layers = {
        "first": (first, {"OUT": 256, "RELU": True, "SPLIT": False, "SCALE": False, "PLACES": ()}),
        "hidden": (further, {"OUT": 256, "RELU": True, "SPLIT": False, "SCALE": False, "PLACES": ()}),
        "scaled": (further, {"OUT": 128, "RELU": False, "SPLIT": False, "SCALE": True, "PLACES": places}),
        "split": (further, {"OUT": 1, "RELU": False, "SPLIT": True, "SCALE": False, "PLACES": ()}),
    }
    collected = []
    for kind, precision in itertools.product(plan.LAYERS, plan.WIDE):
        m, n, k, warps, stages = plan.LAYERS[kind][precision]
        blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PRECISION": precision}
        for name, (sections, settings) in layers.items():
            constexprs = sections | settings | blocks | {"WEIGHTS": True, "BELOW": True}
            variant = f"{'deep_' if kind == 'deep' else ''}{name}/{'fp32' if precision == 'tf32x3' else precision}"
            # a first layer's gradients are computed in wide tiles
            both = (kernels._forward, kernels._backward) if (kind, name) != ("deep", "first") else (kernels._forward,)
            for kernel in both:
                collected.append(_case(kernel, variant, constexprs, warps, stages))
    return collected


def _case(kernel: object, variant: str, constexprs: dict[str, object], warps: int, stages: int) -> AotCase:
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name in ("rows", "split", "stride", "weight_tiles", "column_tiles"):
            signature[name] = "i32"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32"
        elif name not in constexprs:
            signature[name] = ("*fp32",) * constexprs["SECTIONS"]
    quick = variant.endswith(("fp32", "tf32")) and (not variant.startswith("deep") or variant.startswith("deep_hidden"))
    return AotCase(f"mlp.{kernel.__name__[1:]}/{variant}", kernel, signature, constexprs, warps, stages, True, quick)
