"""What the published MIMRL code computes, faults included: for runs that must reproduce its numbers.

The differences from `MIEstimator` and `CMIEstimator`:

- JS is trained for JS but evaluated as NWJ, at a critic that is off by 1;
- SMILE clips at tau = 1;
- the interpolated bound takes the baseline of the column in its marginal term, its leave-one-out mean is unstable for
  dominant scores, and its alpha is .5025;
- MINE minimises a loss with the wrong sign, whose moving average begins anew in every batch;
- the concat critic's scores are transposed, and weights start as PyTorch makes them;
- the classifier of conditional terms has two clamped outputs, and its value is not I(X;Y|Z) but 1 + J/2;
- every conditional term draws its own product rows, and labels get no strata (`Objective(shared_draws=False)`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.errors import EstimatorError
from engine.kernels.cmi import READINGS, cmi_values
from engine.kernels.mi_bounds import bound_value
from engine.kernels.mi_bounds.reference import full_precision
from engine.mimrl.settings import LastActivation
from engine.model.cmi import CMIEstimator
from engine.model.estimators import MIEstimator, check_choice
from engine.vocabulary import BOUNDS, VARIATIONAL_BOUNDS

if TYPE_CHECKING:
    from engine.config import ObjectiveConfig
    from engine.objective import Term

ALPHA = 1 / (1 + math.exp(-0.01))
"""The published interpolation weight: sigmoid of its alpha_logit of .01."""

SMILE_TAU = 1.0
LOGIT_LIMIT = 10.0
EPS = 1e-6
HARDTANH_MARGIN = 1e-4

CHANGED_BOUNDS = ("mine", "js", "smile", "interpolate")
"""The bounds that `published_bound` or `mine_loss` computes in another way than `bound_value`."""


class PublishedMIEstimator(MIEstimator):
    """`MIEstimator` as the published code has it. `alpha`, `smile_tau` and MINE's average cannot be set.

    Args:
        dim_x, dim_y, critic, bound, options: as for `MIEstimator`.

    >>> PublishedMIEstimator(4, 3, bound="smile").smile_tau
    1.0
    """

    keeps_average = False

    def __init__(self, dim_x: int, dim_y: int, critic: str = "separate", bound: str = "infonce", **options: Any):
        if bound in VARIATIONAL_BOUNDS:
            raise EstimatorError(
                "PublishedMIEstimator", f"bound={bound}", f"one of {', '.join(BOUNDS)}", "Use mode=fast or MIEstimator."
            )
        super().__init__(dim_x, dim_y, critic, bound, alpha=ALPHA, smile_tau=SMILE_TAU, **options)
        self.critic.transpose = critic == "concat"

    @staticmethod
    def initialise(layer: nn.Linear) -> None:
        """PyTorch's own weights, and biases of 0.

        PyTorch's weights are 1/sqrt(3) of Xavier's where widths are equal. The scores of a separate critic pass eight
        layers, so they start 81 times smaller.
        """
        nn.init.zeros_(layer.bias)

    @property
    def group_key(self) -> tuple | None:
        alone = self.bound in CHANGED_BOUNDS or type(self) is not PublishedMIEstimator
        return None if alone else self._settings()

    def read_scores(self, scores: Tensor, log_baseline: Tensor, log_ema: Tensor | None) -> tuple[Tensor, Tensor]:
        return published_bound(scores, self.bound, log_baseline, alpha=self.alpha)

    def loss_of(self, scores: Tensor, surrogate: Tensor) -> Tensor:
        return mine_loss(scores) if self.bound == "mine" else -surrogate


class PublishedCMIEstimator(CMIEstimator):
    """`CMIEstimator` as the published code has it: two logits clamped to ±10, a value of 1 + J/2 (`published_cmi`).

    Joint rows are cut to the number of product rows. `estimator` only matters for `details`, which are read from the
    same log ratios. Weights and biases start as PyTorch makes them.

    Args:
        last_activate: "sigmoid" or "hardtanh", after the clamp.
        dim, hidden, estimator, on_degenerate: as for `CMIEstimator`.

    >>> PublishedCMIEstimator(8, 16).classifier[-1].out_features
    2
    """

    outputs = 2

    def __init__(
        self,
        dim: int = 128,
        hidden: int = 256,
        estimator: str = "ldr",
        last_activate: str = "sigmoid",
        on_degenerate: str = "raise",
    ):
        check_choice("last_activate", last_activate, get_args(LastActivation))
        super().__init__(dim, hidden, estimator, on_degenerate)
        self.last_activate = last_activate

    @staticmethod
    def initialise(layer: nn.Linear) -> None:
        """Weights and biases stay as PyTorch makes them."""

    @property
    def group_key(self) -> tuple | None:
        return (*self._settings(), self.last_activate) if type(self) is PublishedCMIEstimator else None

    def joint_rows(self, joint: int, product: int) -> int:
        if product > joint:
            raise EstimatorError(
                self._where(),
                f"{product} product rows beside {joint} joint rows",
                "no more product than joint rows",
                "Draw batch_size // k_neighbor queries.",
            )
        return product

    def read_logits(self, joint: Tensor, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = published_classifier_loss(joint, product, self.last_activate)
        joint, product = (published_log_ratio(t, self.last_activate) for t in (joint, product))
        values = cmi_values(joint.detach(), product.detach())
        return loss, published_cmi(joint, product), torch.stack([values[name] for name in READINGS])


def published_estimator(term: Term, dims: Mapping[str, int], settings: ObjectiveConfig) -> nn.Module:
    """The published estimator of a term, for `Objective(make_estimator=published_estimator, shared_draws=False)`."""
    s = settings
    if term.given is None:
        return PublishedMIEstimator(
            dims[term.x], dims[term.y], critic=term.critic or s.critic, bound=term.bound or s.bound,
            baseline=s.baseline, hidden=s.hidden, embed=s.embed, on_degenerate=s.on_degenerate,
        )  # fmt: skip
    if term.bound == "club":
        raise EstimatorError(f"objective term {term}", "no published estimator", "another bound", "Use mode=fast.")
    return PublishedCMIEstimator(
        max(dims[term.x], dims[term.y], dims[term.given]),
        hidden=s.hidden,
        estimator=term.bound or s.cmi_estimator,
        last_activate=getattr(s, "cmi_last_activate", "sigmoid"),
        on_degenerate=s.on_degenerate,
    )


# -- bounds of mutual information --------------------------------------------------------------------------------------


def published_bound(
    scores: Tensor, bound: str, log_baseline: Tensor | None = None, *, alpha: float = ALPHA
) -> tuple[Tensor, Tensor]:
    """(value, surrogate) of scores [B, B], as `bound_value` gives them; MINE's are those of DV."""
    if bound == "js":
        value, objective = bound_value(scores, "nwj")[0], bound_value(scores, "js_fgan")[1]
        return value, value + (objective - objective.detach())
    if bound != "interpolate":
        return bound_value(scores, bound, log_baseline, smile_tau=SMILE_TAU)
    bound_value(scores.detach(), bound, log_baseline, alpha=alpha)  # which refuses what does not fit
    with torch.autocast(scores.device.type, enabled=False):
        scores = full_precision(scores)
        a = scores.new_zeros(len(scores)) if log_baseline is None else log_baseline[:, 0].to(scores.dtype)
        value = _interpolated(scores, a, alpha)
        return value.detach(), value


def _interpolated(scores: Tensor, a: Tensor, alpha: float) -> Tensor:
    """The interpolated bound with e^(S_ij - A_jj): row i gets the baseline of y_j.

    Its leave-one-out sum is S + log(expm1(d)), d = LSE - S, with d = 1 where d rounds to 0.
    """
    count = len(scores)
    pairs = count * (count - 1)
    log_alpha, log_rest = (math.log(weight) if weight > 0 else -math.inf for weight in (alpha, 1 - alpha))
    distance = scores.logsumexp(1, keepdim=True) - scores
    distance = torch.where(distance == 0, 1.0, distance)
    leave_one_out = scores + distance + (-torch.expm1(-distance)).log() - math.log(count - 1)
    mixture = torch.logaddexp(log_alpha + leave_one_out, (log_rest + a)[:, None])
    eye = torch.eye(count, dtype=torch.bool, device=scores.device)
    marginal = (_off_diagonal(scores - mixture.diagonal()[None, :]).logsumexp((0, 1)) - math.log(pairs)).exp()
    return 1 + scores.diagonal().mean() - mixture.masked_fill(eye, 0).sum() / pairs - marginal


def mine_loss(scores: Tensor) -> Tensor:
    """What the published code minimises for MINE: mean D - E / ma, 0-d.

    E = (1/B^2) sum over i != j of e^S, ma = .99 + .01 E held constant. The sign is wrong (minimising it lowers the
    bound), the average is begun anew in every batch, and the mean counts the diagonal.
    """
    with torch.autocast(scores.device.type, enabled=False):
        scores = full_precision(scores)
        log_e = _off_diagonal(scores).logsumexp((0, 1)) - 2 * math.log(len(scores))
        log_ma = torch.logaddexp(log_e.new_tensor(math.log(0.99)), log_e.detach() + math.log(0.01))
        return scores.diagonal().mean() - (log_e - log_ma).exp()


def _off_diagonal(scores: Tensor) -> Tensor:
    return scores.masked_fill(torch.eye(len(scores), dtype=torch.bool, device=scores.device), -math.inf)


# -- the classifier of conditional terms ----------------------------------------------------------------------------


def published_classifier_loss(joint: Tensor, product: Tensor, last_activate: LastActivation) -> Tensor:
    """Mean BCE of two independent outputs, targets [1, 0] for joint [..., n, 2], [0, 1] for product logits; [...]."""
    probabilities = _probabilities(torch.cat([joint, product], -2), last_activate)
    target = torch.zeros_like(probabilities)
    target[..., : joint.shape[-2], 0].fill_(1)
    target[..., joint.shape[-2] :, 1].fill_(1)
    return functional.binary_cross_entropy(probabilities, target, reduction="none").mean((-2, -1))


def published_log_ratio(logits: Tensor, last_activate: LastActivation) -> Tensor:
    """log g / (1 − g + 1e-6) of the first output g, [..., n, 2] -> [..., n]."""
    g = _probabilities(logits, last_activate)[..., 0]
    return torch.log(g / (1 - g + EPS))


def published_cmi(joint: Tensor, product: Tensor) -> Tensor:
    """1 + (Σ joint − Σ product) / 2n of n log ratios each, [..., n] -> [...].

    With the exact ratio this is 1 + J/2, J = KL(p|q) + KL(q|p), not I(X;Y|Z): it reads 1 under independence.
    """
    return 1 + (joint.sum(-1) - product.sum(-1)) / (joint.shape[-1] + product.shape[-1])


def _probabilities(logits: Tensor, last_activate: LastActivation) -> Tensor:
    logits = logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    if last_activate == "sigmoid":
        return torch.sigmoid(logits)
    return functional.hardtanh(logits, HARDTANH_MARGIN, 1 - HARDTANH_MARGIN)
