"""The kernels of the classifiers, and those that read losses and values from their logits."""

from __future__ import annotations

import itertools

from engine.kernels.cmi import classifiers
from engine.kernels.cmi import triton as read
from engine.kernels.mlp import plan
from tests.aot.compiling import AotCase


def cases() -> list[AotCase]:
    return _read_cases() + _classifier_cases()


def _read_cases() -> list[AotCase]:
    pointers = {"joint_ptr": "*fp32", "product_ptr": "*fp32"}
    sizes = {"b": "i32", "p": "i32"}
    common = {"LIMIT": 9.21, "BLOCK": read.BLOCK}
    outputs = {"loss_ptr": "*fp32", "values_ptr": "*fp32", "groups": "i32"}
    collected = [AotCase("cmi.read/fp32", read._read, pointers | outputs | sizes, common, read.WARPS)]
    for name, has_loss, has_value, which in (("loss", True, False, 0), ("ldr", False, True, 0), ("dv", True, True, 1)):
        grads = {"loss_grad_ptr": has_loss, "value_grad_ptr": has_value, "of_product_ptr": has_loss or which > 0}
        given = {key: "*fp32" for key, has in grads.items() if has} | {"of_joint_ptr": "*fp32"}
        absent = {key: None for key, has in grads.items() if not has}
        settings = {"HAS_LOSS": has_loss, "HAS_VALUE": has_value, "WHICH": which}
        constexprs = common | settings | absent
        collected.append(
            AotCase(
                f"cmi.read_backward/{name}/fp32", read._read_backward, pointers | given | sizes, constexprs, read.WARPS
            )
        )
    return collected


def _classifier_cases() -> list[AotCase]:
    """MIMRL's six classifiers in every precision, with weights' gradients alone and with all."""
    widths = tuple(1 if s == 3 else 128 for s in (1, 3, 0, 0, 1, 3, 2, 3, 0, 0, 2, 3, 0, 3, 1, 0, 3, 2))
    rows, sizes = ("*fp32",) * 18, {"b": "i32", "rows": "i32", "k": "i32"}
    collected = []
    for kind, precision in itertools.product(plan.FIRST, plan.WIDE):
        m, n, c, warps, stages = plan.FIRST[kind][precision]
        common = {"WIDTHS": widths, "PLACES": 18, "DIM": 128, "HIDDEN": 256, "PRECISION": precision}
        common |= {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": c}
        deep = "deep_" if kind == "deep" else ""
        variant = deep + ("fp32" if precision == "tf32x3" else precision)
        pointers = {"joint": rows, "product": rows, "first_ptr": "*fp32"}
        signature = pointers | {"bias_ptr": "*fp32", "out_ptr": "*fp32"} | sizes
        collected.append(
            AotCase(f"cmi.first_forward/{variant}", classifiers._first_forward, signature, common, warps, stages, True)
        )
        more = ("grad_ptr", "of_first_ptr", "of_bias_ptr")
        if kind == "deep":
            continue
        m, n, c, warps, stages = plan.FIRST_BACKWARD[precision]
        common |= {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": c}
        signature = pointers | dict.fromkeys(more, "*fp32") | {"of_joint": ("*fp32",) * 4} | sizes
        signature |= {"weight_tiles": "i32", "row_tiles": "i32"}
        for both in (False, True):
            constexprs = common | {"USES": (1, 2, 4, 8), "SOURCES": 4, "WEIGHTS": True, "ROWS": both}
            name = f"cmi.first_backward/{'all' if both else 'weights'}/{variant}"
            collected.append(
                AotCase(name, classifiers._first_backward, signature, constexprs, warps, stages, True, both)
            )
    return collected
