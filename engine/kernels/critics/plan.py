"""Which algorithm critics run by on a GPU: their candidates in the dispatch table.

    concat_critic    slabs: library products on a slab of pairs; half_slabs: on slabs of half as many; fused: a tile of
                     pairs stays on the chip
    critic_towers    fused: one launch per layer for all towers; plain: library products. The tiles of the former are
                     an operation of their own, `engine.kernels.mlp.plan`

For both, eager torch is taken where it was measured to be faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from engine.kernels import dispatch
from engine.kernels.critics.plain import FEW_ROWS
from engine.kernels.mlp import plan  # noqa: F401  (registers the towers' tiles)

WIDEST, DEEPEST = 256, 2  # hidden layers that the fused concat critic takes: their width, how many after the first
EAGER_NUMBERS = 1 << 28  # numbers of one layer of all pairs that eager torch may keep
HIDDEN, EMBED = 256, 128  # widths of the critics that `dispatch.measure` times


def concat_algorithm(x: Tensor, layers: Sequence[Tensor]) -> str:
    """The algorithm for x [M, dx] and layers (weight, bias, ...)."""
    sizes = {"rows": x.shape[0], "hidden": layers[0].shape[0], "depth": len(layers) // 2 - 2}
    return dispatch.choose("concat_critic", dtype=x.dtype, device=x.device, sizes=sizes)


def tower_algorithm(x: Tensor) -> str:
    """The algorithm for towers that read x [B, d]."""
    return dispatch.choose("critic_towers", dtype=x.dtype, device=x.device, sizes={"rows": x.shape[0]})


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).mul_(shape[-1] ** -0.5).to(dtype).requires_grad_()


def _measured_concat(device: torch.device, dtype: torch.dtype, sizes: dispatch.Sizes) -> Callable[[], None]:
    from engine.kernels.critics.op import concat_infonce

    x, y = (_random(device, dtype, sizes["rows"], EMBED) for _ in "xy")
    hidden = sizes["hidden"]
    widths = [2 * EMBED, *[hidden] * (sizes["depth"] + 1), 1]
    layers = [(_random(device, dtype, o, i), _random(device, dtype, o)) for i, o in pairwise(widths)]
    leaves = [x, y, *(t for layer in layers for t in layer)]
    return lambda: torch.autograd.grad(concat_infonce(x, y, layers), leaves)


def measured_towers(device: torch.device, dtype: torch.dtype, sizes: dispatch.Sizes) -> Callable[[], None]:
    from engine.kernels.critics.op import grouped_infonce

    inputs = [_random(device, dtype, sizes["rows"], EMBED) for _ in range(4)]
    read = 3, 3, 2, 2  # MIMRL's five pairs of four features
    first = [(_random(device, dtype, n, HIDDEN, EMBED), _random(device, dtype, n, HIDDEN)) for n in read]
    widths = (HIDDEN, HIDDEN, HIDDEN, EMBED)
    rest = [
        (_random(device, dtype, sum(read), o, i), _random(device, dtype, sum(read), o)) for i, o in pairwise(widths)
    ]
    leaves = [*inputs, *(t for layer in (*first, *rest) for t in layer)]
    rows, columns = [1, 3, 4, 6, 9], [0, 2, 5, 7, 8]
    return lambda: torch.autograd.grad(grouped_infonce(inputs, first, rest, rows, columns).sum(), leaves)


dispatch.register(
    "concat_critic",
    ("rows", "hidden", "depth"),
    {
        "slabs": lambda sizes: True,
        "half_slabs": lambda sizes: True,
        "fused": lambda sizes: sizes["hidden"] <= WIDEST and sizes["depth"] <= DEEPEST,
        "eager": lambda sizes: math.prod((sizes["rows"], sizes["rows"], sizes["hidden"])) <= EAGER_NUMBERS,
    },
    lambda precision, sizes: "slabs",
    work=_measured_concat,
    classes=[{"rows": rows, "hidden": HIDDEN, "depth": 2} for rows in (32, 128, 256, 1024)],
)
dispatch.register(
    "critic_towers",
    ("rows",),
    {
        "fused": lambda sizes: sizes["rows"] <= FEW_ROWS,
        "plain": lambda sizes: True,
        "eager": lambda sizes: sizes["rows"] <= 4 * FEW_ROWS,
    },
    lambda precision, sizes: "fused" if sizes["rows"] <= FEW_ROWS else "plain",
    work=measured_towers,
    classes=[{"rows": rows} for rows in (32, 128, 512, 2048)],
)
