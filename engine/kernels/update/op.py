"""The end of a training step as two operations: a look at the gradients, and one pass that moves everything.

    table = Table(weights, groups)
    gradients = table.gradients([p.grad for p in parameters])
    stats = inspect(table, gradients)                     # needed for a norm, and to leave out a step
    move(table, gradients, rates, norm=1.0, stats=stats)

The separate passes (unscaling, clipping, Adam, the moving average) read and write the weights some twenty times. `move`
reads the gradients once, and reads and writes the weights, both moments and the averages once. It also writes 16-bit
copies of weights, where there are any. It is Triton's; on a CPU torch's own optimisers are used (`engine.step.fused`).

The operations take addresses, as of `torch.Tensor.data_ptr`: what they change is no argument of theirs. So they are
neither differentiated nor compiled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.registry import call, register_from
from engine.kernels.update.tables import Gradients, Table

_add = register_from("engine.kernels.update", "update_")
_add(
    "inspect",
    "(Tensor sizes, Tensor blocks, Tensor gradients, bool aligned, float limit, Tensor? inverse) -> Tensor",
    "triton",
    lambda sizes, *_: sizes.new_empty(2, dtype=torch.float32),
    launches=2,
)
_add(
    "move",
    "(Tensor addresses, Tensor sizes, Tensor blocks, Tensor group, Tensor settings, Tensor gradients, bool aligned, "
    "Tensor rates, float limit, float norm, Tensor? stats, Tensor? inverse, Tensor? skip, Tensor? average, "
    "ScalarType? low) -> Tensor",
    "triton",
    lambda addresses, *_: addresses.new_empty(2, dtype=torch.float32),
    launches=2,
)


def inspect(
    table: Table, gradients: Gradients | Sequence[Tensor], *, limit: float = math.inf, inverse: Tensor | None = None
) -> Tensor:
    """Whether a value of the gradients is not finite, and the sum of their squares, after unscaling and clipping.

    Args:
        gradients: float32, each of the `layout` of its weight, in the table's order; or `table.gradients` of them.
        limit: elements are clipped to ±limit.
        inverse: 0-d float32, 1 / the scale of the loss; None for 1.

    Returns:
        float32 [2]: 1 if a value is not finite, else 0; and the sum of squares.
    """
    found, aligned = gradients if isinstance(gradients, Gradients) else table.gradients(gradients)
    return call("update_inspect", table.sizes, table.blocks, found, aligned, float(limit), inverse)


def move(
    table: Table, gradients: Gradients | Sequence[Tensor], rates: Tensor, *, limit: float = math.inf,
    norm: float = math.inf, stats: Tensor | None = None, inverse: Tensor | None = None, skip: Tensor | None = None,
    average: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Clip the gradients and move the table's weights, moments, step counters, averages and 16-bit copies.

    The gradients stay as they are.

    Args:
        gradients, limit, inverse: as of `inspect`.
        rates: float32 [groups], learning rates.
        norm: most that the norm of all clipped gradients may be. It needs `stats`, the result of `inspect`.
        skip: 0-d float32, 1 where nothing is to be changed, else 0; None for 0.
        average: 0-d float32, the weight of the new parameters in their averages; None leaves the averages.

    Returns:
        float32 [2]: 1 where nothing was changed, else 0; and the factor that bounds the norm.

    Example:
        >>> from engine.kernels.update.reference import Settings, Weight
        >>> p, first, second, step = torch.ones(3), torch.zeros(3), torch.zeros(3), torch.tensor(0.0)
        >>> table = Table([Weight(p, first, second, step, None, 0)], [Settings()])
        >>> _ = move(table, [torch.ones(3)], torch.tensor([0.1]))
        >>> p
        tensor([0.9000, 0.9000, 0.9000])
    """
    found, aligned = gradients if isinstance(gradients, Gradients) else table.gradients(gradients)
    return call(
        "update_move", table.addresses, table.sizes, table.blocks, table.group, table.settings, found, aligned, rates,
        float(limit), float(norm), stats if math.isfinite(norm) else None, inverse, skip, average, table.low,
    )  # fmt: skip
