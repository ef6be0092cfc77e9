"""Estimator of conditional mutual information as a module: a classifier of joint against product rows. Nats."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.errors import EstimatorError
from engine.kernels.cmi import (
    LOGIT_LIMIT,
    classifier_loss,
    cmi_values,
    mimrl_classifier_loss,
    mimrl_cmi,
    mimrl_log_ratio,
)
from engine.model.estimators import (
    READINGS,
    Estimate,
    build_mlp,
    finite,
    or_zero,
    own_type,
    run_mlp,
    zero_with_gradients,
)

Rows = tuple[Tensor, Tensor, Tensor]
ESTIMATORS = READINGS
LAST_ACTIVATIONS = ("sigmoid", "hardtanh")


class CMIEstimator(nn.Module):
    """An estimate of I(X;Y|Z) with its trainable classifier, MLP(3·dim → hidden → hidden → hidden → logit), ReLU.

    The classifier runs once a call; its logits give the loss (binary cross-entropy) and the values (see
    `engine.kernels.cmi`). Values are read from logits clamped to ±`LOGIT_LIMIT`: LDR cannot exceed 9.21 nats, NWJ
    10.21, DV 18.42, and rows beyond the limit have no gradient in the surrogate. The loss uses the logits as they are.
    Gradients reach the joint rows and, where they require grad, the product rows. Values may be negative and are never
    clipped.

    Args:
        dim: width to which x, y and z are brought by repeating their columns (a label of one column fills `dim`).
        hidden: width of the hidden layers.
        estimator: which of "ldr", "dv", "nwj" is the value; the others are in `details`.
        compat: "none": one logit, the default. "mimrl": what the published MIMRL code computes: two logits clamped to
            ±10, `last_activate`, joint rows cut to the number of product rows, and a value of 1 + J/2 (see
            `mimrl_cmi`); `estimator` then only matters for `details`, which are read from the same log ratios.
        last_activate: compat="mimrl" only: "sigmoid" or "hardtanh".
        on_degenerate: a joint batch of one, no product rows, or non-finite logits: "raise" an EstimatorError, or
            "skip": value, surrogate and loss are 0 with zero gradients, and `details["skipped"]` is 1.

    Biases start at 0, weights Xavier-uniform; compat="mimrl": both as PyTorch makes them. `state_dict` names:
    classifier.{0,2,4,6}.{weight,bias}.
    """

    def __init__(
        self,
        dim: int = 128,
        hidden: int = 256,
        estimator: str = "ldr",
        compat: str = "none",
        last_activate: str = "sigmoid",
        on_degenerate: str = "raise",
    ):
        super().__init__()
        for what, value, choices in (
            ("estimator", estimator, ESTIMATORS),
            ("compat", compat, ("none", "mimrl")),
            ("last_activate", last_activate, LAST_ACTIVATIONS),
            ("on_degenerate", on_degenerate, ("raise", "skip")),
        ):
            if value not in choices:
                raise EstimatorError(what, repr(value), f"one of {', '.join(choices)}", "Choose one of these.")
        self.dim, self.estimator, self.compat = dim, estimator, compat
        self.last_activate, self.on_degenerate = last_activate, on_degenerate
        published = compat == "mimrl"
        self.classifier = build_mlp(3 * dim, 2 if published else 1, hidden, 2, "relu", compat, zero_bias=not published)

    def forward(self, joint: Rows, product: Rows) -> Estimate:
        """One estimate.

        Args:
            joint: (x, y, z) of b samples, [b, width <= dim] each.
            product: (x, y, z) of b' rows of p(x|z) p(y,z), e.g. from `engine.kernels.knn_product`; b' <= b for
                compat="mimrl".

        Returns:
            `details` holds "ldr", "dv" and "nwj", detached.

        Raises:
            EstimatorError: shapes, types or devices that do not fit; a degenerate batch under on_degenerate="raise".
        """
        self._check_shapes("joint", joint)
        self._check_shapes("product", product)
        parts = own_type(self._where(), self, *joint, *product)
        joint, product = tuple(parts[:3]), tuple(parts[3:])
        if self.compat == "mimrl":
            if len(product[0]) > len(joint[0]):
                raise EstimatorError(
                    self._where(),
                    f"{len(product[0])} product rows beside {len(joint[0])} joint rows",
                    "no more product than joint rows (compat=mimrl)",
                    "Draw batch_size // k_neighbor queries.",
                )
            whole, joint = joint, tuple(part[: len(product[0])] for part in joint)
        else:
            whole = joint
        if len(whole[0]) < 2:
            return self._degenerate(f"a batch of {len(whole[0])}", "at least 2 samples", whole, product)
        if len(product[0]) == 0:
            return self._degenerate(
                f"no product rows for a batch of {len(whole[0])}", "a batch of k_neighbor or more", whole, product
            )
        b = len(joint[0])
        rows = torch.cat([self._row(joint), self._row(product)])
        logits = run_mlp(self.classifier, rows)
        if not finite(logits):
            return self._degenerate("non-finite logits", "finite logits", whole, product)
        with torch.autocast(logits.device.type, enabled=False):
            return self._estimate(logits[:b], logits[b:])

    def _estimate(self, joint: Tensor, product: Tensor) -> Estimate:
        if self.compat == "mimrl":
            loss = mimrl_classifier_loss(joint, product, self.last_activate)
            joint, product = (mimrl_log_ratio(t, self.last_activate) for t in (joint, product))
            values = cmi_values(joint, product)
            surrogate = mimrl_cmi(joint, product)
        else:
            joint, product = joint[:, 0], product[:, 0]
            loss = classifier_loss(joint, product)
            values = cmi_values(joint.clamp(-LOGIT_LIMIT, LOGIT_LIMIT), product.clamp(-LOGIT_LIMIT, LOGIT_LIMIT))
            surrogate = values[self.estimator]
        surrogate, loss = (or_zero(t, self.on_degenerate) for t in (surrogate, loss))
        return Estimate(surrogate.detach(), surrogate, loss, {name: v.detach() for name, v in values.items()})

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
        if self.on_degenerate == "raise":
            raise EstimatorError(
                self._where(), found, expected, 'Check the features and the learning rate, or set on_degenerate="skip".'
            )
        zero = zero_with_gradients(*joint, *product, *self.parameters())
        return Estimate(zero.detach(), zero, zero, {"skipped": torch.ones((), device=zero.device)})
