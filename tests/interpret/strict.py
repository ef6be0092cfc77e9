"""What triton's interpreter lets pass and a GPU does not.

    with strict():
        out = forward(q, k)

- the order of programs and threads: see tests/interpret/races.py;
- an element that a load's mask leaves out, with no `other`, is undefined. Here it is NaN, or the largest integer;
- a product's tiles have a smallest depth, below which the compiler refuses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from tests.interpret.races import no_races


@contextmanager
def strict() -> Iterator[None]:
    """See the module's text."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype, interpreter_builder

    load = InterpreterBuilder.create_masked_load

    def poisoned_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        if other is None and not mask.data.all():
            kind = pointers.get_element_ty()
            other = TensorHandle(np.full(pointers.data.shape, poison(_get_np_dtype(kind))), kind)
        return load(self, pointers, mask, other, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", poisoned_load),
        mock.patch.dict(interpreter_builder.codegen_fns, min_dot_size=smallest_product),
        no_races(),
    ):
        yield


def poison(kind: np.dtype) -> np.generic:
    """bfloat16 is stored in the bits of 16-bit integers, the largest of which is NaN there too."""
    kind = np.dtype(kind)
    return kind.type(np.nan) if kind.kind == "f" else kind.type(True if kind.kind == "b" else np.iinfo(kind).max)


def smallest_product(left: Any, right: Any) -> tuple[int, int, int]:
    """M, N, K of the smallest tiles that tensor cores multiply, the larger of what triton 3.6 and newer ask for."""
    return 1, 1, 32 if left.scalar.primitive_bitwidth == 8 else 16
