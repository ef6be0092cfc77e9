"""The search for nearest neighbours, and taking the rows of a batch."""

from __future__ import annotations

import triton

from engine.kernels.knn_product import triton as kernels
from tests.aot.compiling import AotCase


def cases() -> list[AotCase]:
    """The kernels at MIMRL's sizes, as lists of the bank take them, and at more neighbours."""
    index = dict.fromkeys(("n", "m", "d", "parts"), "i32")
    bound = {"coarse": "*fp32", "norm": "*fp32", "query": "*i64", "taken": "*i8", "bound": "*fp32", "row": "*i32"}
    rank = {
        "z": "*fp32", "unit": "*fp64", "query": "*i64", "key": "*i64", "taken": "*i8", "bound": "*fp32", "row": "*i32",
        "found": "*i64",
    }  # fmt: skip
    take = {
        "features": "*fp32",
        "query": "*i64",
        "neighbour": "*i64",
        "counter": "*i64",
        "plan": "*i64",
        "out": "*fp32",
    }
    take |= dict.fromkeys(("width_of_all", "draws", "most", "m", "k"), "i32")
    blocks = {key: value for key, value in kernels.TAKE.items() if key.isupper()}
    cases = [AotCase("knn_product.take/fp32", kernels.take_kernel, take, blocks, num_warps=kernels.TAKE["num_warps"])]
    for k in (2, 11, 20):
        keep = triton.next_power_of_2(k)
        size = max(kernels.CANDIDATES, keep)
        sizes = {"K": k, "KEEP": keep, "PARTS": kernels.MOST_PARTS * size, "FIRST": False}
        searches = [(f"rank/k{k}", kernels.rank_kernel, rank | index, kernels.RANK, sizes)]
        if k != 11:  # its candidates are as many as those of 2
            searches.append(
                (f"bound/size{size}", kernels.bound_kernel, bound | index | {"tiles_each": "i32"}, kernels.BOUND, {})
            )
        for name, kernel, signature, setting, more in searches:
            blocks = {key: value for key, value in setting.items() if key.isupper()}
            cases.append(
                AotCase(
                    f"knn_product.{name}/fp32", kernel, signature, {"SIZE": size} | blocks | more,
                    num_warps=setting["num_warps"], num_stages=setting["num_stages"], quick=k == 2,
                )
            )  # fmt: skip
    return cases
