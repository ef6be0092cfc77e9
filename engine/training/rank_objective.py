"""An objective on several ranks: each computes its rows of a batch that all ranks hold, against the rows of all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.knn_product import ProductRows
from engine.objective import Objective, ObjectiveOutput, Rows
from engine.ranks import Ranks


class ObjectiveOnRanks:
    """An `Objective` for the step of a run: its losses take the features of the whole batch on every rank.

    Where the ranks can share a batch evenly, each passes on its own rows, and `objective.gather` ("gather" or "ring")
    says how the rows of the others get there. Any other batch is computed whole on every rank. Everything else is the
    objective's own.

    Raises:
        ConfigError: the objective's setting is gather="off".
    """

    def __init__(self, objective: Objective, ranks: Ranks):
        if objective.gather == "off":
            raise ConfigError(
                "objective.gather", f"off on {ranks.size} ranks", "gather or ring",
                "Train in one process with a smaller batch_size for terms that see fewer rows.",
            )  # fmt: skip
        self._objective, self._ranks, self._gather, self._apart = objective, ranks, objective.gather, False
        objective.gather = "off"  # whoever else calls it does so with all rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Within the context each rank computes batches of its own."""
        before, self._apart = self._apart, True
        try:
            yield
        finally:
            self._apart = before

    def estimator_loss(
        self, features: Mapping[str, Tensor], products: Mapping[str, Rows] | None = None
    ) -> ObjectiveOutput:
        """`Objective.estimator_loss` of the whole batch."""
        return self._loss("estimators", features, products)

    def model_loss(self, features: Mapping[str, Tensor], products: Mapping[str, Rows] | None = None) -> ObjectiveOutput:
        """`Objective.model_loss` of the whole batch."""
        return self._loss("model", features, products)

    def _loss(self, stage: str, features: Mapping[str, Tensor], products: Mapping[str, Rows] | None) -> ObjectiveOutput:
        objective, ranks = self._objective, self._ranks
        count = len(next(iter(features.values())))
        if not ranks.together or self._apart or not self._shared(count, products):
            return objective(features, products, stage=stage)
        objective.gather = self._gather
        try:
            own = {name: self._own(value) for name, value in features.items()}
            rows = {name: self._own_products(value) for name, value in (products or {}).items()}
            return objective(own, rows if products is not None else None, stage=stage)
        finally:
            objective.gather = "off"

    def _shared(self, count: int, products: Mapping[str, Rows] | None) -> bool:
        """Whether the ranks can have equally many joint rows, and queries of product rows for all of them."""
        size = self._ranks.size
        return count % size == 0 and all(
            isinstance(rows, ProductRows) and len(rows.x) == count and len(rows.y) % size == 0
            for rows in (products or {}).values()
        )

    def _own(self, rows: Tensor) -> Tensor:
        size = len(rows) // self._ranks.size
        return rows[self._ranks.rank * size : (self._ranks.rank + 1) * size]

    def _own_products(self, rows: ProductRows) -> ProductRows:
        return ProductRows(*(self._own(part) for part in (rows.x, rows.y, rows.z)), rows.k)
