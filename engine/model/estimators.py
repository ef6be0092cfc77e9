"""Estimators of mutual information as modules: critic, log-baseline, bound; or a learned conditional. In nats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import EstimatorError
from engine.kernels.arguments import exact_type
from engine.kernels.cmi import READINGS
from engine.kernels.compiling import as_read
from engine.kernels.critics import concat_infonce, concat_scores
from engine.kernels.gradients import transformed, update_buffer
from engine.kernels.mi_bounds import BOUNDS, bound_value, update_log_ema
from engine.kernels.mi_bounds.reference import check_settings, full_precision
from engine.kernels.registry import is_static
from engine.model.custom_critics import CustomCritic
from engine.model.mlps import Initialise as Initialise
from engine.model.mlps import build_mlp as build_mlp
from engine.model.mlps import check_choice as check_choice
from engine.model.mlps import mlp_layers as mlp_layers
from engine.model.mlps import run_mlp as run_mlp
from engine.model.mlps import xavier as xavier
from engine.model.variational import (
    CategoricalMarginal,
    GaussianMarginal,
    check_classes,
    check_conditional,
    club,
    club_sample,
    conditional_net,
    learns,
    leave_one_out_bound,
    other_rows,
)
from engine.vocabulary import BASELINES, CRITICS, ON_DEGENERATE, VARIATIONAL_BOUNDS


@dataclass
class Estimate:
    """One estimate from one batch. Value and loss are separate because their signs differ.

    Attributes:
        value: the estimate in nats, detached, 0-d.
        surrogate: 0-d, numerically equal to `value`. Its gradient *increases* the information.
        loss: 0-d, minimised by the estimator's own parameters.
        details: detached extras by name. `details["skipped"]` = 1 where a degenerate batch was skipped.
    """

    value: Tensor
    surrogate: Tensor
    loss: Tensor
    details: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Estimates:
    """Estimates of several terms from one batch, as vectors in the order of `names`; see `Estimate`.

    Attributes:
        names: of the n terms.
        surrogate: [n].
        loss: [n]; None where it is -surrogate.
        readings: LDR, DV and NWJ of conditional terms, [3, n], detached.
        details: of terms that were evaluated alone.
    """

    names: Sequence[str]
    surrogate: Tensor
    loss: Tensor | None = None
    readings: Tensor | None = None
    details: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, estimates: Mapping[str, Estimate]) -> Estimates:
        """From estimates that were made one by one."""
        return cls(
            list(estimates),
            torch.stack([e.surrogate for e in estimates.values()]),
            torch.stack([e.loss for e in estimates.values()]),
            details={name: e.details for name, e in estimates.items()},
        )

    def apart(self) -> dict[str, Estimate]:
        """Each term's `Estimate`. Its tensors are views of the vectors."""
        loss = -self.surrogate if self.loss is None else self.loss
        parts = zip(*(scalars(t) for t in (self.surrogate.detach(), self.surrogate, loss)), strict=True)
        estimates = {name: Estimate(*of_one) for name, of_one in zip(self.names, parts, strict=True)}
        for n, (name, estimate) in enumerate(estimates.items()):
            if self.readings is not None:
                estimate.details |= dict(zip(READINGS, scalars(self.readings[:, n]), strict=True))
            estimate.details |= self.details.get(name, {})
        return estimates


class MIEstimator(nn.Module):
    """An estimate of I(X;Y), with its trainable critic and log-baseline, or with a learned conditional q(y|x).

    The bounds of scores are defined in `engine.kernels.mi_bounds`. DV, SMILE and JS are estimates without being bounds.
    Values are never clipped; a negative value means that the critic is not trained yet. InfoNCE cannot exceed log B,
    and the interpolated bound cannot exceed 1 + log((B - 1) / alpha).

    The bounds of a conditional are defined in `engine.model.variational`: "club", "club_sample" and "l1out" are upper
    bounds where q is near p(y|x), and "ba" is a lower bound. Their loss is the negative log-likelihood of q, and not
    the negated bound.

    >>> estimator = MIEstimator(dim_x=8, dim_y=4)
    >>> estimate = estimator(torch.randn(32, 8), torch.randn(32, 4))
    >>> estimate.loss.item() == -estimate.value.item()
    True

    Args:
        dim_x, dim_y: widths of x and y.
        critic: "separate", h(y) g(x)^T, or "concat", f([x; y]) on all pairs; or a module that maps x [B, dim_x] and
            y [B, dim_y] to scores [B, B], `scores[i, j] = f(x_j, y_i)`. A conditional needs none and ignores the name.
        bound: one of `engine.vocabulary.BOUNDS` or `VARIATIONAL_BOUNDS`.
        baseline: log a(y), used by `tuba` and `interpolate`: "constant" (0), "unnormalized" (an MLP) or "gaussian" (see
            `LogBaseline`).
        hidden, embed, layers, activation: the MLPs have `layers` + 1 hidden layers of width `hidden`. `embed` is the
            output width of the separate critic's g and h.
        alpha: interpolate: weight of the multi-sample baseline.
        smile_tau: smile: scores are clipped to +-tau in the partition function.
        ema_rate: mine: rate of the moving average of mean e^S. The buffer `log_ema` keeps its logarithm, and state_dict
            carries it. The first batch starts the average; eval mode uses it without changing it.
        on_degenerate: what to do with a batch of one, non-finite scores or a non-finite estimate. "raise" raises an
            EstimatorError. "skip" gives 0 as value, surrogate and loss, with zero gradients, and
            `details["skipped"]` = 1.
        classes: for bounds of a conditional, where y holds classes: their number. y is [B, 1] with 0 ... classes - 1,
            or [B, classes] with one-hot rows. None: y is continuous and q is Gaussian.
        gather, group: as for `engine.kernels.infonce`: estimate from the batch that all ranks hold together. x and y
            stay this rank's. Within an `Objective` its setting `gather` decides.
        compat: no longer an option. Anything but "none" is refused, with the class to use instead.

    "club_sample" pairs each row with one other row. The buffer `draw` determines the pairs. It starts at random and
    rises by 1 in every batch of training mode; eval mode leaves it. A Gaussian q standardises y by a moving mean and
    variance, which follow training mode, too. The bounds do not depend on them.

    Biases start at 0 and weights Xavier-uniform. Scores of standardised inputs are then of order 1, where every bound
    has a gradient.

    A subclass may change how layers start (`initialise`), what scores give (`read_scores`) and what the estimator
    minimises (`loss_of`). It then runs alone, unless its `group_key` says that a group computes the same.
    """

    keeps_average = True
    """Whether MINE's gradient is normalised by a moving average over batches."""

    def __init__(
        self,
        dim_x: int,
        dim_y: int,
        critic: str | nn.Module = "separate",
        bound: str = "infonce",
        baseline: str = "constant",
        hidden: int = 256,
        embed: int = 128,
        layers: int = 2,
        activation: str = "relu",
        alpha: float = 0.01,
        smile_tau: float = 5.0,
        ema_rate: float = 0.01,
        on_degenerate: str = "raise",
        *,
        classes: int | None = None,
        gather: bool | str = False,
        group: Any = None,
        compat: str = "none",
    ):
        super().__init__()
        self.gather, self.group = gather, group
        refuse_compat("MIEstimator", compat)
        check_choice("bound", bound, BOUNDS + VARIATIONAL_BOUNDS)
        check_choice("on_degenerate", on_degenerate, ON_DEGENERATE)
        check_settings("MIEstimator", alpha, smile_tau, ema_rate)
        self.dim_x, self.dim_y = dim_x, dim_y
        self.bound, self.on_degenerate = bound, on_degenerate
        self.alpha, self.smile_tau, self.ema_rate = alpha, smile_tau, ema_rate
        self.classes = classes
        check_conditional(bound, critic, dim_y, classes)
        if bound in VARIATIONAL_BOUNDS:
            self.q = conditional_net(dim_x, dim_y, classes, hidden, layers, activation, self.initialise)
            if bound == "ba":
                self.marginal = GaussianMarginal(dim_y) if classes is None else CategoricalMarginal(classes)
            if bound == "club_sample":
                self.register_buffer("draw", torch.randint(2**31, ()))
            return
        if isinstance(critic, nn.Module):
            self.critic = CustomCritic(critic)
        else:
            self.critic = Critic(dim_x, dim_y, critic, hidden, embed, layers, activation, self.initialise)
        self.baseline = LogBaseline(dim_y, baseline, hidden, layers, activation, self.initialise)
        if bound == "mine" and self.keeps_average:
            # -inf is the logarithm of an average that has not begun
            self.register_buffer("log_ema", torch.tensor(-math.inf))

    @staticmethod
    def initialise(layer: nn.Linear) -> None:
        """Set the initial weights of a fresh layer of the critic or the baseline."""
        xavier(layer)

    @property
    def group_key(self) -> tuple | None:
        """Equal for estimators that one `MIGroup` may compute at once; None for one that runs alone.

        A group computes the bounds of `engine.kernels.mi_bounds`, and the negated bound as the loss.
        """
        own = type(self) is MIEstimator and self.bound in BOUNDS and isinstance(self.critic, Critic)
        return self._settings() if own else None

    @property
    def streams(self) -> bool:
        """Whether the memory of one estimate grows with the rows only, and not with their pairs."""
        return self.bound in VARIATIONAL_BOUNDS and self.bound != "l1out"

    def _settings(self) -> tuple:
        return type(self), self.bound, self.alpha, self.smile_tau, self.ema_rate, self.on_degenerate

    def read_scores(self, scores: Tensor, log_baseline: Tensor, log_ema: Tensor | None) -> tuple[Tensor, Tensor]:
        """(value, surrogate) of scores [B, B], as `bound_value` gives them."""
        limits = {"alpha": self.alpha, "smile_tau": self.smile_tau}
        return bound_value(scores, self.bound, log_baseline, log_ema=log_ema, **limits)

    def loss_of(self, scores: Tensor, surrogate: Tensor) -> Tensor:
        """What the estimator's own parameters minimise, 0-d."""
        return -surrogate

    def forward(self, x: Tensor, y: Tensor) -> Estimate:
        """One estimate from x [B, dim_x] and y [B, dim_y]. Row i of both comes from the same sample.

        Raises:
            EstimatorError: shapes, types or devices that do not fit; a degenerate batch under on_degenerate="raise".
        """
        if self.gather is not False and (ranks := ranks_of(self)) is not None:
            from engine.model.over_ranks import mi_estimate

            return mi_estimate(self, x, y, ranks)
        x, y = own_type(self._where(), self, x, y)
        self._check_shapes(x, y)
        if len(x) < 2:
            return self._degenerate(
                f"a batch of {len(x)}", "at least 2 samples: one alone has no product samples", x, y
            )
        if self.bound in VARIATIONAL_BOUNDS:
            return self._of_conditional(x, y)
        if self.bound == "infonce" and self.critic.has_infonce:
            value = self.critic.infonce(x, y)
            if not finite(value):
                return self._degenerate("non-finite scores", "finite scores", x, y)
            value = or_zero(value, self.on_degenerate)
            return Estimate(value.detach(), value, -value)
        scores, log_baseline = self.critic(x, y), self.baseline(y)
        if isinstance(self.critic, CustomCritic) and readable(scores):
            self.critic.check_orientation(x, y)
        if not finite(scores):
            return self._degenerate("non-finite scores", "finite scores", x, y)
        log_ema = None
        if self.bound == "mine" and self.keeps_average:
            average = as_read("MINE's moving average", self.log_ema, self.training)
            log_ema = update_log_ema(average, scores, self.ema_rate)
        value, surrogate = self.read_scores(scores, log_baseline, log_ema)
        if not finite(value):
            size = scores.detach().abs().max().item()
            return self._degenerate(
                f"the estimate {value.item()} from scores of up to {size:.3g}", "a finite estimate", x, y
            )
        if log_ema is not None and self.training:
            update_buffer("MINE's moving average", self.log_ema, log_ema, self.on_degenerate == "skip")
        loss = self.loss_of(scores, surrogate)
        value, surrogate, loss = (or_zero(t, self.on_degenerate) for t in (value, surrogate, loss))
        return Estimate(value, surrogate, loss)

    def _of_conditional(self, x: Tensor, y: Tensor) -> Estimate:
        """The estimate of a bound by q(y|x)."""
        if self.classes is not None and readable(y):
            check_classes(self._where(), y, self.classes)
        q, given = self.q(x), y
        with torch.autocast(x.device.type, enabled=False):
            y = q.targets(y)
            own = q.log_prob(y)
            loss = -own.mean()
            if self.bound == "club":
                value = club(q, y)
            elif self.bound == "club_sample":
                draw = as_read("the pairs of club_sample", self.draw, self.training)
                value = club_sample(q, y, other_rows(len(y), draw))
            elif self.bound == "l1out":
                value = leave_one_out_bound(q, y)
            else:
                marginal = self.marginal(y)
                value, loss = (own - marginal).mean(), loss - marginal.mean()
        if not finite(value, loss):
            what = f"the estimate {value.item()} and the log-likelihood {-loss.item()}"
            return self._degenerate(what, "finite numbers", x, y)
        if learns(self.q):
            self.q.observe(given)
        if self.bound == "club_sample" and self.training:
            update_buffer("the pairs of club_sample", self.draw, self.draw + 1)
        value, loss = (or_zero(t, self.on_degenerate) for t in (value, loss))
        return Estimate(value.detach(), value, loss)

    def reset_average(self) -> None:
        """Forget MINE's moving average, so that the next batch starts it anew. Other bounds have none."""
        if hasattr(self, "log_ema"):
            self.log_ema.fill_(-math.inf)

    def _check_shapes(self, x: Tensor, y: Tensor) -> None:
        fits = x.dim() == y.dim() == 2 and x.shape[1] == self.dim_x and y.shape[1] == self.dim_y and len(x) == len(y)
        if not fits:
            raise EstimatorError(
                self._where(),
                f"x {list(x.shape)} and y {list(y.shape)}",
                f"x [B, {self.dim_x}] and y [B, {self.dim_y}]",
                "Give both features of the same samples, at the widths the estimator was built for.",
            )

    def _where(self) -> str:
        return f"mutual information ({self.bound})"

    def _degenerate(self, found: str, expected: str, *features: Tensor) -> Estimate:
        return raise_or_skip(self, self._where(), found, expected, *features)


class Critic(nn.Module):
    """Scores of every x against every y: `scores[i, j] = f(x_j, y_i)`, [B, B], fp32.

    Args:
        kind: "separate": <h(y_i), g(x_j)>; "concat": f([x_j; y_i]).
        initialise: sets the initial weights of a layer.

    Attributes:
        transpose: whether the scores of "concat" are given transposed. False by default.
    """

    def __init__(
        self,
        dim_x: int,
        dim_y: int,
        kind: str = "separate",
        hidden: int = 256,
        embed: int = 128,
        layers: int = 2,
        activation: str = "relu",
        initialise: Initialise | None = None,
    ):
        super().__init__()
        check_choice("critic", kind, CRITICS)
        self.kind, self.activation, self.transpose = kind, activation, False
        if kind == "separate":
            self.g = build_mlp(dim_x, embed, hidden, layers, activation, initialise)
            self.h = build_mlp(dim_y, embed, hidden, layers, activation, initialise)
        else:
            self.f = build_mlp(dim_x + dim_y, 1, hidden, layers, activation, initialise)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, dim_x], y [B, dim_y] -> [B, B]."""
        if self.kind == "separate":
            of_x, of_y = run_mlp(self.g, x, self.activation), run_mlp(self.h, y, self.activation)
            with torch.autocast(x.device.type, enabled=False):
                return of_y @ of_x.t()
        layers = mlp_layers(self.f, self.activation)
        if layers is not None:
            scores = concat_scores(x, y, layers, self.activation)
        else:
            pairs = torch.cat([x.repeat(len(y), 1), y.repeat_interleave(len(x), 0)], 1)
            scores = full_precision(self.f(pairs)).view(len(y), len(x))
        return scores.t() if self.transpose else scores

    @property
    def has_infonce(self) -> bool:
        """Whether `infonce` applies: "concat", with its MLP as it was built."""
        return self.kind == "concat" and mlp_layers(self.f, self.activation) is not None

    def infonce(self, x: Tensor, y: Tensor) -> Tensor:
        """The InfoNCE bound of "concat", 0-d, without storing the scores. NaN where a score is not finite."""
        layers = mlp_layers(self.f, self.activation)
        return concat_infonce(x, y, layers, self.activation, transpose=self.transpose)


class LogBaseline(nn.Module):
    """log a(y), [B, dim_y] -> [B, 1], fp32.

    kind "constant": 0. "unnormalized": an MLP. "gaussian": the sum over the columns of y of log N(y; 0, 1), without
    parameters. It falls by .92 nats or more per column, so e^(S - log a) overflows for a y of many columns.
    """

    def __init__(
        self,
        dim_y: int,
        kind: str = "constant",
        hidden: int = 256,
        layers: int = 2,
        activation: str = "relu",
        initialise: Initialise | None = None,
    ):
        super().__init__()
        check_choice("baseline", kind, BASELINES)
        self.kind, self.activation = kind, activation
        if kind == "unnormalized":
            self.mlp = build_mlp(dim_y, 1, hidden, layers, activation, initialise)

    def forward(self, y: Tensor) -> Tensor:
        if self.kind == "unnormalized":
            return run_mlp(self.mlp, y, self.activation)
        y = full_precision(y)
        if self.kind == "gaussian":
            return -0.5 * (y.square() + math.log(2 * math.pi)).sum(1, keepdim=True)
        return y.new_zeros(len(y), 1)


def own_type(where: str, estimator: nn.Module, *features: Tensor) -> list[Tensor]:
    """Features in the type of the estimator's parameters: whole numbers are converted.

    Raises:
        EstimatorError: another floating type outside of autocast, complex numbers, or another device.
    """
    exact_type(where, *features, own := next(estimator.parameters(), None), integers=True)
    if own is None:
        return list(features)
    mixed = torch.is_autocast_enabled(own.device.type)
    for feature in features:
        if feature.is_floating_point() and feature.dtype != own.dtype and not mixed:
            raise EstimatorError(
                where, f"features of {feature.dtype} for parameters of {own.dtype}", "one type",
                "Convert the features with .to(dtype), or the estimator.",
            )  # fmt: skip
    return [outside_inference(f) if f.is_floating_point() else f.to(own.dtype) for f in features]


def outside_inference(feature: Tensor) -> Tensor:
    """The feature itself, or a copy of one that was made in inference mode, from which no estimator could learn."""
    inside = torch.compiler.is_compiling() or torch.is_inference_mode_enabled()
    return feature if inside or not feature.is_inference() else feature.clone()


def readable(tensor: Tensor) -> bool:
    """Whether Python may look at the values of `tensor` now.

    It may not on a GPU, because the host would have to wait for it, nor within a graph or a transform of torch.func,
    where there are no values yet.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not (is_static() or transformed())


def finite(*tensors: Tensor) -> bool:
    """Whether all values are finite, as far as they are `readable`. Where they are not, a trainer checks its means."""
    return not readable(tensors[0]) or all(_all_finite(t.detach()) for t in tensors)


def _all_finite(tensor: Tensor) -> bool:
    # the sum is finite unless a value is not, or the sum overflows
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def or_zero(tensor: Tensor, on_degenerate: str) -> Tensor:
    """With on_degenerate="skip", 0 in place of values that are not finite, if `finite` could not look at them.

    Gradients may still be NaN there.
    """
    if on_degenerate == "raise" or readable(tensor):
        return tensor
    return torch.where(tensor.isfinite(), tensor, torch.zeros_like(tensor))


def scalars(vector: Tensor) -> list[Tensor]:
    """x[0], x[1], ... as views; as copies within torch.compile, which cannot return views of one tensor."""
    parts = list(vector.unbind())
    return [part.clone() for part in parts] if torch.compiler.is_compiling() else parts


def raise_or_skip(estimator: nn.Module, where: str, found: str, expected: str, *features: Tensor) -> Estimate:
    """What `on_degenerate` asks for: an EstimatorError, or an estimate of 0 with zero gradients."""
    if estimator.on_degenerate == "raise":
        raise EstimatorError(
            where, found, expected, 'Check the features and the learning rate, or set on_degenerate="skip".'
        )
    zero = _zero_with_gradients(*features, *estimator.parameters())
    return Estimate(zero.detach(), zero, zero, {"skipped": torch.ones((), device=zero.device)})


def _zero_with_gradients(*tensors: Tensor) -> Tensor:
    """0 with a zero gradient for each of `tensors`, even for those that hold NaN or infinity."""
    total = sum(tensor.sum() for tensor in tensors)
    return torch.where(torch.zeros_like(total, dtype=torch.bool), total, torch.zeros_like(total))


def ranks_of(estimator: Any) -> Any:
    """The ranks that an estimator's own `gather` and `group` name; None if it computes alone."""
    from engine.kernels.ranks.group import find_ranks

    return find_ranks(type(estimator).__name__, estimator.gather, estimator.group)


def refuse_compat(estimator: str, compat: str) -> None:
    """Refuse the former option `compat` for anything but its default."""
    if compat != "none":
        raise EstimatorError(
            f"{estimator}(compat=...)", repr(compat), "no such option", f"Use the class Published{estimator} instead."
        )
