"""A bank's conditions, prepared for the search of neighbours, and the searches as operations of torch."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from engine.errors import EstimatorError
from engine.kernels.arguments import exact_type
from engine.kernels.gradients import refuse_vmap
from engine.kernels.knn_product import reference
from engine.kernels.knn_product.reference import Strata, label_strata, narrow
from engine.kernels.registry import backend_for, call, lazy, register

Ties = Literal["random", "first"]

# Launches of the searches of scalars on a GPU. There they are torch's operations, each counted as one kernel.
LINE_LAUNCHES, STRATA_LAUNCHES, DISTINCT_LAUNCHES = 95, 39, 4


# -- registration -----------------------------------------------------------------------------------------------------


def _neighbours_like(query: Tensor, k: int) -> Tensor:
    return query.new_empty(*query.shape, k)


register(
    "knn_nearest",
    "(Tensor z, Tensor coarse, Tensor bounds, Tensor unit, Tensor query, Tensor key, int k, bool first,"
    " bool isolate=True) -> Tensor",
    cpu=lazy("engine.kernels.knn_product.cpu", "nearest"),
    cuda=lazy("engine.kernels.knn_product.triton", "nearest"),
    fake=lambda z, coarse, bounds, unit, query, key, k, first, isolate=True: _neighbours_like(query, k),
    launches=lambda *args: 4 if args[8:] != (False,) else 3,  # who is a query: zeros and a scatter
)
register(
    "knn_nearest_on_line",
    "(Tensor ascending, Tensor order, Tensor query, Tensor key, int k) -> Tensor",
    cpu=lazy("engine.kernels.knn_product.cpu", "nearest_on_line"),
    cuda=reference.nearest_on_line,  # sorting is done: what is left are small device operations
    fake=lambda ascending, order, query, key, k: _neighbours_like(query, k),
    launches=lambda ascending, order, query, key, k: LINE_LAUNCHES + DISTINCT_LAUNCHES * k,
)
register(
    "knn_within_strata",
    "(Tensor ascending, Tensor order, Tensor group, Tensor start, Tensor stop, Tensor query, Tensor key, int k)"
    " -> Tensor",
    cpu=lazy("engine.kernels.knn_product.cpu", "within_strata"),
    cuda=reference.within_strata,
    fake=lambda ascending, order, group, start, stop, query, key, k: _neighbours_like(query, k),
    launches=lambda *args: LINE_LAUNCHES + STRATA_LAUNCHES + 2 * DISTINCT_LAUNCHES * args[-1],
)
register(
    "knn_take",
    "(Tensor features, Tensor query, Tensor neighbour, Tensor counter, Tensor plan, int m, int size) -> Tensor",
    cpu=lazy("engine.kernels.knn_product.cpu", "take"),
    cuda=lazy("engine.kernels.knn_product.triton", "take"),
    fake=lambda features, query, neighbour, counter, plan, m, size: features.new_empty(size),
    launches=1,
)


# -- conditions -------------------------------------------------------------------------------------------------------


class Space:
    """A bank's condition z [N, d], prepared for nearest neighbours in d dimensions.

    Args:
        z: [N, d], of any real dtype.

    Raises:
        EstimatorError: z is not finite.
    """

    def __init__(self, z: Tensor):
        refuse_vmap("condition")
        exact_type("condition", z, integers=True)
        self.z = narrow(z.reshape(len(z), -1)).contiguous()
        if not torch.isfinite(self.z).all():
            raise EstimatorError(
                "condition", "a feature that is NaN or infinite in the bank", "finite features",
                "Check the features and the learning rate.",
            )  # fmt: skip
        self._prepared: dict[str, tuple[Tensor, ...]] = {}

    def neighbours(self, query: Tensor, key: Tensor, k: int, ties: Ties = "random", isolate: bool = True) -> Tensor:
        """The k nearest non-query rows of each query; query and key int64 [T, m] -> int64 [T, m, k].

        With `isolate=False` any row may be a neighbour, even the query itself.
        """
        backend = backend_for(self.z, "knn_nearest")
        if backend == "reference":
            return reference.nearest(self.z, query, key, k, ties == "first", isolate)
        if backend not in self._prepared:
            if backend == "cpu":
                from engine.kernels.knn_product.cpu import prepare
            else:
                from engine.kernels.knn_product.triton import prepare
            self._prepared[backend] = prepare(self.z)
        return call("knn_nearest", self.z, *self._prepared[backend], query, key, k, ties == "first", isolate)


class Line:
    """A bank's scalar condition z [N], sorted.

    Args:
        z: float [N] or [N, 1].

    Raises:
        EstimatorError: z is not finite.
    """

    def __init__(self, z: Tensor):
        refuse_vmap("condition")
        exact_type("condition", z, integers=True)
        z = narrow(z.reshape(-1))
        if not torch.isfinite(z).all():
            raise EstimatorError(
                "condition", "a label that is NaN or infinite", "finite labels", "Correct or drop these samples."
            )
        self.z = z
        self.ascending, self.order = torch.sort(z, stable=True)
        self._strata: dict[int, Strata] = {}

    def holds(self, z: Tensor) -> bool:
        """Whether z [N] or [N, 1] has the values of this condition. Waits for a GPU."""
        z = narrow(z.reshape(-1))
        return len(z) == len(self.order) and torch.equal(z[self.order], self.ascending)

    def neighbours(self, query: Tensor, key: Tensor, k: int) -> Tensor:
        """The k nearest non-query rows of each query, ties at random; int64 [T, m] -> int64 [T, m, k]."""
        return self._run("knn_nearest_on_line", reference.nearest_on_line, query, key, k)

    def strata(self, k: int) -> Strata:
        """`label_strata` of this condition, kept."""
        if k not in self._strata:
            self._strata[k] = label_strata(self.z, k)
        return self._strata[k]

    def within_strata(self, query: Tensor, key: Tensor, k: int, strata: Strata | None = None) -> Tensor:
        """k non-query rows of each query's stratum; int64 [T, m] -> int64 [T, m, k]."""
        s = strata or self.strata(k)
        return self._run("knn_within_strata", reference.within_strata, s.group, s.start, s.stop, query, key, k)

    def _run(self, name: str, formula: Any, *args: Any) -> Tensor:
        if backend_for(self.z, name) == "reference":
            return formula(self.ascending, self.order, *args)
        return call(name, self.ascending, self.order, *args)
