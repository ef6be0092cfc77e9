"""Estimator of conditional mutual information as a module: a classifier of joint against product rows. Nats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import EstimatorError
from engine.kernels.cmi import LOGIT_LIMIT, READINGS, classifier_loss, cmi_values
from engine.model.estimators import (
    Estimate,
    build_mlp,
    check_choice,
    finite,
    or_zero,
    own_type,
    raise_or_skip,
    ranks_of,
    refuse_compat,
    run_mlp,
    scalars,
    xavier,
)
from engine.vocabulary import ON_DEGENERATE

Rows = tuple[Tensor, Tensor, Tensor]


class CMIEstimator(nn.Module):
    """An estimate of I(X;Y|Z) with its trainable classifier, MLP(3·dim → hidden → hidden → hidden → logit), ReLU.

    The classifier runs once per call. Its logits give the loss (binary cross-entropy) and the values (see
    `engine.kernels.cmi`). The loss uses the logits as they are. Values are read from logits clamped to ±`LOGIT_LIMIT`,
    so that LDR cannot exceed 9.21 nats, NWJ 10.21 and DV 18.42. Rows beyond the limit have no gradient in the
    surrogate. Gradients reach the joint rows, and the product rows if they require grad. Values may be negative and are
    never clipped.

    >>> estimator = CMIEstimator(dim=8)
    >>> joint, product = ([torch.randn(n, 8) for _ in range(3)] for n in (32, 30))
    >>> sorted(estimator(joint, product).details)
    ['dv', 'ldr', 'nwj']

    Args:
        dim: width of x, y and z for the classifier. Columns of narrower features are repeated up to it.
        hidden: width of the hidden layers.
        estimator: which of "ldr", "dv" and "nwj" is the value. `details` holds all three.
        on_degenerate: what to do with a joint batch of one, no product rows or non-finite logits. "raise" raises an
            EstimatorError. "skip" gives 0 as value, surrogate and loss, with zero gradients, and
            `details["skipped"]` = 1.
        gather, group: as for `engine.kernels.infonce`: estimate from the joint and product rows of all ranks. The
            logits are gathered, for "ring", too: they are one number a row.
        compat: no longer an option. Anything but "none" is refused, with the class to use instead.

    Biases start at 0, weights Xavier-uniform. `state_dict` names: classifier.{0,2,4,6}.{weight,bias}.

    A subclass may change the number of logits (`outputs`), how layers start (`initialise`), how many joint rows are
    used (`joint_rows`) and what logits give (`read_logits`). It then runs alone, unless it gives a `group_key`.
    """

    outputs = 1
    """Logits per row."""

    def __init__(
        self,
        dim: int = 128,
        hidden: int = 256,
        estimator: str = "ldr",
        on_degenerate: str = "raise",
        *,
        gather: bool | str = False,
        group: Any = None,
        compat: str = "none",
    ):
        super().__init__()
        self.gather, self.group = gather, group
        refuse_compat("CMIEstimator", compat)
        check_choice("estimator", estimator, READINGS)
        check_choice("on_degenerate", on_degenerate, ON_DEGENERATE)
        self.dim, self.estimator, self.on_degenerate = dim, estimator, on_degenerate
        self.classifier = build_mlp(3 * dim, self.outputs, hidden, 2, "relu", self.initialise)

    @staticmethod
    def initialise(layer: nn.Linear) -> None:
        """Set the initial weights of a fresh layer of the classifier."""
        xavier(layer)

    @property
    def group_key(self) -> tuple | None:
        """Equal for estimators that one `CMIGroup` may compute at once; None for one that runs alone.

        A group runs the classifiers together and calls `read_logits` on the logits of all of them.
        """
        return self._settings() if type(self) is CMIEstimator else None

    def _settings(self) -> tuple:
        return type(self), self.dim, self.estimator, self.on_degenerate

    def joint_rows(self, joint: int, product: int) -> int:
        """How many of `joint` joint rows are used beside `product` product rows."""
        return joint

    def read_logits(self, joint: Tensor, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss [...], surrogate [...], and LDR, DV and NWJ [3, ...], detached, of logits [..., rows, outputs]."""
        joint, product = joint[..., 0], product[..., 0]
        values = cmi_values(joint.clamp(-LOGIT_LIMIT, LOGIT_LIMIT), product.clamp(-LOGIT_LIMIT, LOGIT_LIMIT))
        readings = torch.stack([values[name].detach() for name in READINGS])
        return classifier_loss(joint, product), values[self.estimator], readings

    def forward(self, joint: Rows, product: Rows) -> Estimate:
        """One estimate.

        Args:
            joint: (x, y, z) of b samples, [b, width <= dim] each.
            product: (x, y, z) of b' rows of p(x|z) p(y,z), e.g. from `engine.kernels.knn_product`.

        Returns:
            `details` holds "ldr", "dv" and "nwj", detached.

        Raises:
            EstimatorError: shapes, types or devices that do not fit; a degenerate batch under on_degenerate="raise".
        """
        if self.gather is not False and (ranks := ranks_of(self)) is not None:
            from engine.model.over_ranks import cmi_estimate

            return cmi_estimate(self, joint, product, ranks)
        self._check_shapes("joint", joint)
        self._check_shapes("product", product)
        parts = own_type(self._where(), self, *joint, *product)
        joint, product = tuple(parts[:3]), tuple(parts[3:])
        b = self.joint_rows(len(joint[0]), len(product[0]))
        whole, joint = joint, tuple(part[:b] for part in joint)
        if len(whole[0]) < 2:
            return self._degenerate(f"a batch of {len(whole[0])}", "at least 2 samples", whole, product)
        if len(product[0]) == 0:
            return self._degenerate(
                f"no product rows for a batch of {len(whole[0])}", "a batch of k_neighbor or more", whole, product
            )
        rows = torch.cat([self._row(joint), self._row(product)])
        logits = run_mlp(self.classifier, rows)
        if not finite(logits):
            return self._degenerate("non-finite logits", "finite logits", whole, product)
        with torch.autocast(logits.device.type, enabled=False):
            loss, surrogate, readings = self.read_logits(logits[:b], logits[b:])
        surrogate, loss = (or_zero(t, self.on_degenerate) for t in (surrogate, loss))
        return Estimate(surrogate.detach(), surrogate, loss, dict(zip(READINGS, scalars(readings), strict=True)))

    def _row(self, parts: Rows) -> Tensor:
        return torch.cat([part.repeat(1, -(-self.dim // part.shape[1]))[:, : self.dim] for part in parts], 1)

    def _check_shapes(self, which: str, parts: Rows) -> None:
        shapes = [list(part.shape) for part in parts]
        fits = len(parts) == 3 and all(len(s) == 2 and s[0] == shapes[0][0] and 1 <= s[1] <= self.dim for s in shapes)
        if not fits:
            raise EstimatorError(
                self._where(),
                f"{which} rows {shapes}",
                f"x, y and z [rows, width] with as many rows and 1 <= width <= {self.dim}",
                "Give the three features of the same samples, no wider than the estimator's dim.",
            )

    def _where(self) -> str:
        return "conditional mutual information"

    def _degenerate(self, found: str, expected: str, joint: Rows, product: Rows) -> Estimate:
        return raise_or_skip(self, self._where(), found, expected, *joint, *product)
