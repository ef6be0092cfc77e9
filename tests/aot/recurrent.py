"""Between the recurrences: turning rows round, joining directions, LayerNorm of their sum."""

from __future__ import annotations

from engine.kernels.recurrent import triton as kernels
from tests.aot.compiling import AotCase


def cases() -> list[AotCase]:
    """MOSI's frames, and the common width; LayerNorm of wider ones, too."""
    sizes = dict.fromkeys(("n", "texts", "hidden", "step_stride", "text_stride"), "i32")
    length = {"lengths": "*i64"}
    cases = []
    for width in (5, 74):
        pointers = dict.fromkeys(("x", "plain", "turned", "start"), "*fp32")
        numbers = dict.fromkeys(("n", "texts", "width", "text_stride", "step_stride", "n_start"), "i32")
        signature = pointers | length | numbers
        cases.append(AotCase(f"recurrent.turn/d{width}", kernels.turn_kernel, signature, kernels._blocks(width)))
    for name, absent in (("on", {}), ("last", {"turned": None})):
        pointers = dict.fromkeys({"forward", "backward", "joined", "turned"} - absent.keys(), "*fp32")
        fixed = kernels._blocks(128) | absent
        cases.append(AotCase(f"recurrent.join/{name}", kernels.join_kernel, pointers | length | sizes, fixed))
    for name, absent in (("on", {}), ("last", {"turned_grad": None})):
        pointers = dict.fromkeys({"grad", "turned_grad", "of_forward", "of_backward"} - absent.keys(), "*fp32")
        fixed, signature = kernels._blocks(128) | absent, pointers | length | sizes
        cases.append(AotCase(f"recurrent.join_backward/{name}", kernels.join_backward_kernel, signature, fixed))
    numbers = dict.fromkeys(("n", "texts", "steps", "hidden"), "i32") | {"eps": "fp32"}
    given = dict.fromkeys(("forward", "backward", "weight", "shift"), "*fp32") | length | numbers
    more = dict.fromkeys(("grad", "of_forward", "of_backward", "parts"), "*fp32")
    for hidden in (128, 512):
        blocks = kernels._norm_blocks(hidden)
        warps, fixed = blocks.pop("num_warps"), blocks | {"CLEAR": True}
        for kernel, own in ((kernels.norm_kernel, {"y": "*fp32"}), (kernels.norm_backward_kernel, more)):
            title = f"recurrent.{kernel.__name__.removesuffix('_kernel')}/H{hidden}"
            cases.append(AotCase(title, kernel, given | own, fixed, num_warps=warps))
            if hidden == 128:
                whole = fixed | {"CLEAR": False}
                cases.append(AotCase(f"{title}/padded", kernel, given | own, whole, num_warps=warps, archs=(90,)))
    return cases
