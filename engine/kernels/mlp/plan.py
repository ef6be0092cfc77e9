"""Which tiles the layers of small MLPs are computed in on a GPU: candidates of the dispatch table.

A program works out a tile of a product, and takes so many terms of the sum at a time. With few rows it mostly waits:
for operands from memory, and for one multiplication to end before the next begins.

    wide    64 columns and 32 terms at a time
    deep    32 columns, and 64 terms at a time or loads further ahead: fewer or shorter waits, and twice the programs
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.kernels import dispatch

# By precision: rows, columns, terms of the sum taken at a time, warps, stages.
Tiles = dict[str, tuple[int, int, int, int, int]]
WIDE: Tiles = {"tf32x3": (32, 64, 32, 4, 2), "tf32": (32, 64, 32, 4, 3), "bf16": (32, 64, 32, 4, 2)}
# tf32x3 keeps both parts of each operand in registers: those of 64 terms spill
DEEP: Tiles = {"tf32x3": (32, 32, 32, 4, 3), "tf32": (32, 32, 64, 4, 3), "bf16": (32, 32, 64, 4, 3)}
LAYERS = {"wide": WIDE, "deep": DEEP}
# The classifiers' first layers read several features, which takes registers. Their gradients spill in deep tiles with
# triton 3.6, and in bf16 in wide ones.
FIRST = {"wide": WIDE, "deep": dict.fromkeys(WIDE, (32, 32, 32, 4, 4))}
FIRST_BACKWARD: Tiles = WIDE | {"bf16": (64, 32, 32, 4, 2)}


def tile(x: Tensor, rows: int, precision: str, tiles: dict[str, Tiles] = LAYERS) -> tuple[int, int, int, int, int]:
    """The tile for layers of `rows` samples, of the tensor x's type and device."""
    kind = dispatch.choose("tower_tiles", dtype=x.dtype, device=x.device, sizes={"rows": rows})
    return tiles[kind][precision]


def _measured(device: torch.device, dtype: torch.dtype, sizes: dispatch.Sizes) -> Callable[[], None]:
    from engine.kernels.critics.plan import measured_towers

    run = measured_towers(device, dtype, sizes)

    def fused() -> None:
        with dispatch.use(critic_towers="fused"):
            run()

    return fused


dispatch.register(
    "tower_tiles",
    ("rows",),
    # library products are a candidate of critic_towers
    {"wide": lambda sizes: True, "deep": lambda sizes: True, "eager": lambda sizes: False},
    lambda precision, sizes: "wide",
    work=_measured,
    classes=[{"rows": rows} for rows in (32, 128, 512)],
)
