"""The cube of a fusion encoder, out of the modalities' sequences."""

from __future__ import annotations

import torch

from engine.kernels.stacked import triton as kernels
from tests.aot.compiling import AotCase


def cases() -> list[AotCase]:
    """Three modalities in training, as the preset mosi has them, and in evaluation; two of one type."""
    cases = []
    numbers = dict.fromkeys(("length0", "length1", "length2", "size", "wide", "d"), "i32")
    mask, length = torch.zeros(1, 1), torch.zeros(1)
    for name, low, valid, rates, hidden in (
        ("training", "bf16", [mask, length, length], (0.1, 0.1, 0.1), (0.0, 0.5, 0.5)),
        ("evaluation", "bf16", [mask, length, length], (0.0,) * 3, (0.0,) * 3),
        ("two", "fp32", [length, length], (0.2, 0.0), (0.0, 0.5)),
    ):
        given = {f"valid{k}": "*i64" for k in range(3)} | numbers
        fixed = kernels._settings(valid, [len(valid) == 3, *[False] * (len(valid) - 1)], rates, hidden)
        fixed |= {"KINDS": len(valid)} | kernels._blocks(128)
        if any(rates):
            given["seed"] = "*i64"
        else:
            fixed["seed"] = None
        of = [low, "fp32", "fp32"]
        forward = {f"x{k}": f"*{t}" for k, t in enumerate(of)} | dict.fromkeys(
            ("cube", "mean0", "mean1", "mean2"), "*fp32"
        )
        backward = {f"dx{k}": f"*{t}" for k, t in enumerate(of)} | dict.fromkeys(
            ("grad", "mean_grad0", "mean_grad1", "mean_grad2"), "*fp32"
        )
        for kernel, own in ((kernels.stack_kernel, forward), (kernels.stack_backward_kernel, backward)):
            title = f"stacked.{kernel.__name__.removesuffix('_kernel')}/{name}/{low}"
            cases.append(AotCase(title, kernel, given | own, fixed))
    return cases
