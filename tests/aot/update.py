"""The fused update: a step's look at its gradients, and the pass that moves its weights."""

from __future__ import annotations

from engine.kernels.update import triton as kernels
from engine.kernels.update.tables import BLOCK, COLUMNS
from tests.aot.compiling import AotCase


def cases() -> list[AotCase]:
    """The flagship's update (average, no norm), without an average, and with everything; gradients in buckets, too.

    Of each the moving pass also with 16-bit copies, as under autocast.
    """
    tables = {"sizes": "*i64", "blocks": "*i64", "gradients": "*i64"}
    cases = [
        AotCase(
            "update.combine/fp32", kernels.combine_kernel, {"parts": "*fp32", "stats": "*fp32", "count": "i32"},
            {"MANY": kernels.MANY},
        )
    ]  # fmt: skip
    for everything in (False, True):
        name, optional = ("all", _given) if everything else ("plain", _left_out)
        signature, constants = optional("stats", "skip")
        signature |= {"steps": "*i64", "group": "*i64", "settings": "*fp64", "rates": "*fp32", "factors": "*fp32"}
        signature |= {"shared": "*fp32", "norm": "fp32", "n": "i32"}
        constants |= {"WEIGHTS": kernels.WEIGHTS, "COLUMNS": COLUMNS}
        cases.append(AotCase(f"update.prepare/{name}/fp32", kernels.prepare_kernel, signature, constants))
        for aligned in (True, False):
            where = "aligned" if aligned else "anywhere"
            blocks = {"BLOCK": BLOCK, "ALIGNED": aligned}
            signature, constants = optional("inverse")
            signature |= tables | {"parts": "*fp32", "count": "i32", "limit": "fp32"}
            cases.append(
                AotCase(
                    f"update.inspect/{name}/{where}/fp32", kernels.inspect_kernel, signature, constants | blocks,
                    num_warps=kernels.WARPS,
                )
            )  # fmt: skip
            signature, constants = optional("inverse")
            signature |= tables | {"addresses": "*i64", "group": "*i64", "settings": "*fp64", "rates": "*fp32"}
            signature |= {"average": "*fp32", "factors": "*fp32", "shared": "*fp32", "n": "i32", "count": "i32"}
            signature |= {"limit": "fp32"}
            for low in kernels.LOW.values():
                fixed = constants | blocks | {"COLUMNS": COLUMNS, "LOW": low, "INTERPRETED": False}
                title = f"update.move/{name}/{where}/{low or 'fp32'}"
                cases.append(AotCase(title, kernels.move_kernel, signature, fixed, num_warps=kernels.WARPS))
                if aligned and not everything:
                    bare, fixed = {k: v for k, v in signature.items() if k != "average"}, fixed | {"average": None}
                    title = f"update.move/bare/aligned/{low or 'fp32'}"
                    cases.append(AotCase(title, kernels.move_kernel, bare, fixed, num_warps=kernels.WARPS, archs=(90,)))
    return cases


def _given(*names: str) -> tuple[dict[str, str], dict[str, None]]:
    return dict.fromkeys(names, "*fp32"), {}


def _left_out(*names: str) -> tuple[dict[str, str], dict[str, None]]:
    return {}, dict.fromkeys(names)
