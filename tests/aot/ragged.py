"""Padding of ragged sequences."""

from __future__ import annotations

from engine.kernels.ragged import triton as kernels
from tests.aot.compiling import AotCase


def cases() -> list[AotCase]:
    """Frames of both precisions at MOSEI's widths, and tokens."""
    cases = []
    for name, kind, d in (("fp32", "fp32", 74), ("fp16", "fp16", 35), ("int32", "i32", 1)):
        signature = {
            "values": f"*{kind}", "offsets": "*i64", "rows": "*i64", "out": "*i64" if kind == "i32" else "*fp32",
            "lengths": "*i64", "width": "i32", "d": "i32", "fill": "i32", "closing": "i32",
        }  # fmt: skip
        cases.append(
            AotCase(
                f"ragged.pad/d{d}/{name}", kernels.pad_kernel, signature, kernels._blocks(d), num_warps=kernels.WARPS
            )
        )
    return cases
