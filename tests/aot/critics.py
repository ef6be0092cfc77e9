"""The concat critic, fused and by slabs of pairs, and the towers of separate critics."""

from __future__ import annotations

from engine.kernels.critics import slabs, towers
from engine.kernels.critics import triton as fused
from engine.kernels.mlp import plan
from engine.kernels.mlp.triton import PRECISIONS
from tests.aot.compiling import AotCase


def cases() -> list[AotCase]:
    return _fused_cases() + _slab_cases() + _tower_cases()


def _fused_cases() -> list[AotCase]:
    """The flagship's critic, three hidden layers of 256, in every precision; shallower ones in fp32."""
    collected = []
    for precision in PRECISIONS.values():
        for depth in (2, 1, 0) if precision == "tf32x3" else (2,):
            dot, quick = depth > 0, precision != "tf32" and depth == 2
            common = {"HIDDEN": 256, "DEPTH": depth, "PRECISION": precision, "BLOCK_H": 256}
            name = f"{depth + 1}_layers/{'fp32' if precision == 'tf32x3' else precision}"
            i, j, k, m, warps, stages = fused.SCORES[precision]
            blocks = {"BLOCK_I": i, "BLOCK_J": j, "BLOCK_K": k, "BLOCK_M": m}
            for kernel in (fused._scores, fused._statistics):
                collected.append(_case(kernel, name, common | blocks, warps, stages, dot, quick))
            p, k, m, warps, stages = fused.TOP[precision]
            for given in (False, True):
                constexprs = common | {"GIVEN": given, "BLOCK": fused.TILE, "BLOCK_P": p, "BLOCK_K": k, "BLOCK_M": m}
                variant = f"{name.replace('/', '_given/') if given else name}"
                collected.append(
                    _case(fused._top_backward, variant, constexprs, warps, stages, dot, quick and not given)
                )
        for first in (False, True):
            name = f"{'first' if first else 'further'}/{'fp32' if precision == 'tf32x3' else precision}"
            common = {"FIRST": first, "HIDDEN": 256, "BLOCK": fused.TILE, "PRECISION": precision}
            p, k, warps, stages = fused.LAYER[precision]
            blocks = {"BLOCK_H": 256, "BLOCK_P": p, "BLOCK_K": k}
            collected.append(_case(fused._layer_backward, name, common | blocks, warps, stages, True, quick))
            o, n, s, warps, stages = fused.WEIGHT[precision]
            blocks = {"BLOCK_O": o, "BLOCK_N": n, "BLOCK_S": s}
            collected.append(_case(fused._weight_gradient, name, common | blocks, warps, stages, True, quick))
    collected.append(
        _case(fused._sides, "fp32", {"HIDDEN": 256, "BLOCK": fused.TILE, "BLOCK_F": fused.SIDES}, 4, 2, False, True)
    )
    return collected


def _case(
    kernel: object, variant: str, constexprs: dict[str, object], warps: int, stages: int, dot: bool, quick: bool
) -> AotCase:
    integers = (
        "rows", "columns", "count", "row0", "column0", "row_tiles", "column_tiles", "slots", "run",
    )  # fmt: skip
    # a slab's buffers are of the products' type
    half = constexprs.get("PRECISION") == "bf16"
    buffers = {
        "_top_backward": ("kept_ptr", "out_ptr"),
        "_layer_backward": ("grad_ptr", "kept_ptr", "out_ptr"),
        "_weight_gradient": ("grad_ptr", "below_ptr"),
    }.get(kernel.__name__, ())
    signature = {}
    for name in kernel.arg_names:
        if name not in constexprs:
            element = "bf16" if half and name in buffers else "fp32"
            signature[name] = "i32" if name in integers else f"*{element}"
    return AotCase(
        f"critics.{kernel.__name__[1:]}/{variant}", kernel, signature, constexprs, warps, stages, dot=dot, quick=quick
    )


def _slab_cases() -> list[AotCase]:
    """The flagship's critic, with layers in fp32 and in bf16."""
    collected = []
    tile = {"PAIRS": slabs.PAIRS, "FEATURES": slabs.FEATURES}
    kernels = (
        (slabs._outer, tile, ("out_ptr",)),
        (slabs._bias_relu, tile, ("layer_ptr",)),
        (slabs._output, tile | {"HAS_BIAS": True}, ("layer_ptr",)),
        (slabs._losses, {"GRADS": True, "COLUMNS": slabs.COLUMNS}, ()),
        (slabs._output_backward, tile | {"BIAS": True}, ("layer_ptr", "grad_ptr")),
        (slabs._relu_backward, tile, ("layer_ptr", "grad_ptr")),
        (slabs._sides, tile, ("grad_ptr",)),
    )
    for kernel, constexprs, stored in kernels:
        for element in ("fp32", "bf16") if stored else ("fp32",):
            signature = {}
            for name in kernel.arg_names:
                if name.endswith("_ptr"):
                    signature[name] = f"*{element}" if name in stored else "*fp32"
                elif name not in constexprs:
                    signature[name] = "i32"
            name = f"critics.slab_{kernel.__name__[1:]}/{element}"
            collected.append(AotCase(name, kernel, signature, constexprs, slabs.WARPS, 2))
    return collected


def _tower_cases() -> list[AotCase]:
    """MIMRL's five critics in every precision."""
    collected = []
    for precision, (m, n, k, warps, stages) in plan.WIDE.items():
        constant = {"Q": (1, 3, 4, 6, 9), "K": (0, 2, 5, 7, 8), "CRITICS": 5, "WIDTH": 128, "PRECISION": precision}
        variant = "fp32" if precision == "tf32x3" else precision
        pointers = {"out_ptr": "*fp32", "slope_ptr": "*fp32", "loss_ptr": "*fp32", "rows": "i32"}
        scores = constant | {"GRADS": True, "BLOCK_M": towers.SCORE_ROWS, "BLOCK_N": towers.SCORE_COLUMNS, "BLOCK_K": k}
        collected.append(
            AotCase(f"critics.grouped_scores/{variant}", towers._scores, pointers, scores, towers.WARPS, stages, True)
        )
        products = constant | {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
        pointers = pointers | {"of_out_ptr": "*fp32", "mean_ptr": "*fp32", "row_tiles": "i32", "column_tiles": "i32"}
        name = f"critics.embedding_gradients/{variant}"
        collected.append(AotCase(name, towers._embedding_gradients, pointers, products, warps, stages, True))
    return collected
