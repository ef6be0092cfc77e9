"""Estimators of mutual information as modules: critic, log-baseline, bound. All values are in nats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from engine.errors import EstimatorError
from engine.kernels.arguments import exact_type
from engine.kernels.critics import ACTIVATIONS, concat_infonce, concat_scores, mlp
from engine.kernels.gradients import transformed, update_buffer
from engine.kernels.mi_bounds import BOUNDS, bound_value, mimrl_mine_loss, update_log_ema
from engine.kernels.mi_bounds.reference import check_settings, full_precision
from engine.kernels.registry import is_static
from engine.vocabulary import BASELINES, CRITICS

READINGS = ("ldr", "dv", "nwj")

MODULES = {"relu": nn.ReLU, "elu": nn.ELU, "gelu": nn.GELU, "leakyrelu": nn.LeakyReLU, "tanh": nn.Tanh}

# sigmoid of the published MIMRL code's alpha_logit of .01
MIMRL_ALPHA = 1 / (1 + math.exp(-0.01))


@dataclass
class Estimate:
    """One estimate from one batch; value and loss are told apart because their signs differ.

    Attributes:
        value: the estimate in nats, detached, 0-d.
        surrogate: 0-d, numerically equal to `value`, carries the gradient that *increases* the information.
        loss: 0-d, what the estimator's own parameters minimise.
        details: detached extras by name; `details["skipped"]` = 1 where a degenerate batch was skipped.
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
    def of(cls, found: Mapping[str, Estimate]) -> Estimates:
        """From estimates that were made one by one."""
        return cls(
            list(found),
            torch.stack([e.surrogate for e in found.values()]),
            torch.stack([e.loss for e in found.values()]),
            details={name: e.details for name, e in found.items()},
        )

    def apart(self) -> dict[str, Estimate]:
        """Every term's `Estimate`; its tensors are views of the vectors."""
        loss = -self.surrogate if self.loss is None else self.loss
        parts = zip(*(_entries(t) for t in (self.surrogate.detach(), self.surrogate, loss)), strict=True)
        found = {name: Estimate(*of_one) for name, of_one in zip(self.names, parts, strict=True)}
        for n, (name, estimate) in enumerate(found.items()):
            if self.readings is not None:
                estimate.details |= dict(zip(READINGS, _entries(self.readings[:, n]), strict=True))
            estimate.details |= self.details.get(name, {})
        return found


class MIEstimator(nn.Module):
    """A lower bound on (or, for DV, SMILE and JS, an estimate of) I(X;Y), with its trainable critic and log-baseline.

    The bounds are defined in `engine.kernels.mi_bounds`. Values may be negative and are never clipped: a negative value
    means a critic that is not trained yet. InfoNCE cannot exceed log B, the interpolated bound
    1 + log((B - 1) / alpha).

    Args:
        dim_x, dim_y: widths of x and y.
        critic: "separate", h(y) g(x)^T, or "concat", f([x; y]) on all pairs.
        bound: one of `engine.kernels.mi_bounds.BOUNDS`.
        baseline: log a(y), used by `tuba` and `interpolate`: "constant" (0), "unnormalized" (an MLP), "gaussian" (see
            `LogBaseline`).
        hidden, embed, layers, activation: MLPs of `layers` + 1 hidden layers of width `hidden`; `embed` is the width of
            the separate critic's g and h.
        compat: "none": the corrected bounds, the default. "mimrl": what the published MIMRL code computes: see
            `bound_value`; MINE is minimised by that code's loss, the concat critic's scores come out transposed, and
            `alpha` and `smile_tau` are that code's (.5025 and 1) whatever is given.
        alpha: interpolate: weight of the multi-sample baseline.
        smile_tau: smile: scores are clipped to +-tau in the partition function.
        ema_rate: mine: rate of the moving average of mean e^S, kept in the log domain in the buffer `log_ema`, which
            state_dict carries. The first batch begins it; eval mode reads it without changing it.
        on_degenerate: a batch of one, non-finite scores or a non-finite estimate: "raise" an EstimatorError, or "skip":
            value, surrogate and loss are 0 with zero gradients, and `details["skipped"]` is 1.

    All biases start at 0; weights are Xavier-uniform, which keeps the scores of standardised inputs of order 1 at the
    start, where every bound still has a gradient. compat="mimrl" begins as that code does, with PyTorch's own weights.
    """

    def __init__(
        self,
        dim_x: int,
        dim_y: int,
        critic: str = "separate",
        bound: str = "infonce",
        baseline: str = "constant",
        hidden: int = 256,
        embed: int = 128,
        layers: int = 2,
        activation: str = "relu",
        compat: str = "none",
        alpha: float = 0.01,
        smile_tau: float = 5.0,
        ema_rate: float = 0.01,
        on_degenerate: str = "raise",
    ):
        super().__init__()
        _one_of("bound", bound, BOUNDS)
        _one_of("compat", compat, ("none", "mimrl"))
        _one_of("on_degenerate", on_degenerate, ("raise", "skip"))
        check_settings("MIEstimator", alpha, smile_tau, ema_rate)
        self.dim_x, self.dim_y = dim_x, dim_y
        self.bound, self.compat, self.on_degenerate = bound, compat, on_degenerate
        self.alpha = MIMRL_ALPHA if compat == "mimrl" else alpha
        self.smile_tau, self.ema_rate = smile_tau, ema_rate
        self.critic = Critic(dim_x, dim_y, critic, hidden, embed, layers, activation, compat)
        self.baseline = LogBaseline(dim_y, baseline, hidden, layers, activation, compat)
        if bound == "mine" and compat == "none":
            # -inf is the logarithm of an average that has not begun
            self.register_buffer("log_ema", torch.tensor(-math.inf))

    def forward(self, x: Tensor, y: Tensor) -> Estimate:
        """x [B, dim_x], y [B, dim_y], row i of both from the same sample.

        Raises:
            EstimatorError: shapes, types or devices that do not fit; a degenerate batch under on_degenerate="raise".
        """
        self._check_shapes(x, y)
        x, y = own_type(self._where(), self, x, y)
        if len(x) < 2:
            return self._degenerate(
                f"a batch of {len(x)}",
                "at least 2 samples: one alone has no product samples",
                x,
                y,
            )
        if self.bound == "infonce" and self.critic.has_infonce:
            value = self.critic.infonce(x, y)
            if not finite(value):
                return self._degenerate("non-finite scores", "finite scores", x, y)
            value = or_zero(value, self.on_degenerate)
            return Estimate(value.detach(), value, -value)
        scores, log_baseline = self.critic(x, y), self.baseline(y)
        if not finite(scores):
            return self._degenerate("non-finite scores", "finite scores", x, y)
        log_ema = None
        if self.bound == "mine" and self.compat == "none":
            log_ema = update_log_ema(self.log_ema, scores, self.ema_rate)
        value, surrogate = bound_value(
            scores,
            self.bound,
            log_baseline,
            alpha=self.alpha,
            smile_tau=self.smile_tau,
            log_ema=log_ema,
            compat=self.compat,
        )
        if not finite(value):
            size = scores.detach().abs().max().item()
            return self._degenerate(
                f"the estimate {value.item()} from scores of up to {size:.3g}", "a finite estimate", x, y
            )
        if log_ema is not None and self.training:
            update_buffer("MINE's moving average", self.log_ema, log_ema)
        loss = mimrl_mine_loss(scores) if self.bound == "mine" and self.compat == "mimrl" else -surrogate
        value, surrogate, loss = (or_zero(t, self.on_degenerate) for t in (value, surrogate, loss))
        return Estimate(value, surrogate, loss)

    def reset_average(self) -> None:
        """Forget MINE's moving average: the next batch begins it anew. Nothing to do for the other bounds."""
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

    def _degenerate(self, found: str, expected: str, x: Tensor, y: Tensor) -> Estimate:
        if self.on_degenerate == "raise":
            raise EstimatorError(
                self._where(), found, expected, 'Check the features and the learning rate, or set on_degenerate="skip".'
            )
        zero = zero_with_gradients(x, y, *self.parameters())
        return Estimate(zero.detach(), zero, zero, {"skipped": torch.ones((), device=x.device)})


class Critic(nn.Module):
    """Scores of every x against every y: `scores[i, j] = f(x_j, y_i)`, [B, B], fp32.

    kind "separate": <h(y_i), g(x_j)>; "concat": f([x_j; y_i]). compat="mimrl" transposes the scores of "concat", as the
    published MIMRL code does.
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
        compat: str = "none",
    ):
        super().__init__()
        _one_of("critic", kind, CRITICS)
        self.kind, self.activation = kind, activation
        self.transpose = kind == "concat" and compat == "mimrl"
        if kind == "separate":
            self.g = build_mlp(dim_x, embed, hidden, layers, activation, compat)
            self.h = build_mlp(dim_y, embed, hidden, layers, activation, compat)
        else:
            self.f = build_mlp(dim_x + dim_y, 1, hidden, layers, activation, compat)

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
        """Whether `infonce` applies: to the MLP of "concat", as it was built."""
        return self.kind == "concat" and mlp_layers(self.f, self.activation) is not None

    def infonce(self, x: Tensor, y: Tensor) -> Tensor:
        """The InfoNCE bound of the scores of "concat", 0-d, without storing them; NaN if one is not finite."""
        layers = mlp_layers(self.f, self.activation)
        return concat_infonce(x, y, layers, self.activation, transpose=self.transpose)


class LogBaseline(nn.Module):
    """log a(y), [B, dim_y] -> [B, 1], fp32.

    kind "constant": 0. "unnormalized": an MLP. "gaussian": the sum over the columns of y of log N(y; 0, 1), without
    parameters. It falls by .92 nats or more a column, so in many dimensions e^(S - log a) overflows: use it for few.
    """

    def __init__(
        self,
        dim_y: int,
        kind: str = "constant",
        hidden: int = 256,
        layers: int = 2,
        activation: str = "relu",
        compat: str = "none",
    ):
        super().__init__()
        _one_of("baseline", kind, BASELINES)
        self.kind, self.activation = kind, activation
        if kind == "unnormalized":
            self.mlp = build_mlp(dim_y, 1, hidden, layers, activation, compat)

    def forward(self, y: Tensor) -> Tensor:
        if self.kind == "unnormalized":
            return run_mlp(self.mlp, y, self.activation)
        y = full_precision(y)
        if self.kind == "gaussian":
            return -0.5 * (y.square() + math.log(2 * math.pi)).sum(1, keepdim=True)
        return y.new_zeros(len(y), 1)


def build_mlp(
    dim_in: int, dim_out: int, hidden: int, layers: int, activation: str, compat: str = "none", zero_bias: bool = True
) -> nn.Sequential:
    """`layers` + 1 hidden layers, Xavier-uniform weights; with compat="mimrl", weights as PyTorch makes them.

    PyTorch's are 1/sqrt(3) of Xavier's where widths are equal: the scores of a separate critic, which pass eight
    layers, begin 81 times smaller.
    """
    _one_of("activation", activation, tuple(ACTIVATIONS))
    widths = [dim_in] + [hidden] * (layers + 1) + [dim_out]
    modules: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        linear = nn.Linear(width_in, width_out)
        if compat == "none":
            nn.init.xavier_uniform_(linear.weight)
        if zero_bias:
            nn.init.zeros_(linear.bias)
        modules += [linear, MODULES[activation]()]
    return nn.Sequential(*modules[:-1])


def mlp_layers(tower: nn.Module, activation: str = "relu") -> list[tuple[Tensor, Tensor]] | None:
    """(weight, bias) of each linear layer, for the functions of `engine.kernels.critics`.

    None where `tower` is not, or no longer, what `build_mlp` makes: another module or activation, one layer more, a
    hook. Such a tower has to be called.
    """
    if type(tower) is not nn.Sequential or _has_hooks(tower):
        return None
    modules = list(tower)
    linear, between = modules[::2], modules[1::2]
    fits = len(linear) == len(between) + 1 and not any(_has_hooks(m) for m in modules)
    fits = fits and all(type(m) is nn.Linear and m.bias is not None for m in linear)
    if not (fits and all(type(m) is MODULES[activation] and _has_defaults(m) for m in between)):
        return None
    return [(m.weight, m.bias) for m in linear]


def run_mlp(tower: nn.Module, x: Tensor, activation: str = "relu") -> Tensor:
    """[B, d] -> [B, n], fp32 (fp64 for fp64): by the kernels' `mlp`, or by the module itself where it was changed."""
    layers = mlp_layers(tower, activation)
    return full_precision(tower(x)) if layers is None else mlp(x, layers, activation)


def own_type(where: str, estimator: nn.Module, *features: Tensor) -> list[Tensor]:
    """Features as torch's layers multiply them with the estimator's parameters: whole numbers become that type.

    Raises:
        EstimatorError: another floating type (but for autocast), complex numbers, or another device.
    """
    own = next(estimator.parameters(), None)
    exact_type(where, *features, own, integers=True)
    if own is None:
        return list(features)
    mixed = torch.is_autocast_enabled(own.device.type)
    for feature in features:
        if feature.is_floating_point() and feature.dtype != own.dtype and not mixed:
            raise EstimatorError(
                where, f"features of {feature.dtype} for parameters of {own.dtype}", "one type",
                "Convert the features with .to(dtype), or the estimator.",
            )  # fmt: skip
    return [f if f.is_floating_point() else f.to(own.dtype) for f in features]


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _has_defaults(activation: nn.Module) -> bool:
    """Whether an activation's settings are those of `ACTIVATIONS`."""
    defaults = {"negative_slope": 0.01, "alpha": 1.0, "approximate": "none"}
    return all(getattr(activation, name, value) == value for name, value in defaults.items())


def waits_for(tensor: Tensor) -> bool:
    """Whether Python may look at values of `tensor`: a GPU would have to be waited for; a graph and vmap have none."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not (is_static() or transformed())


def finite(*tensors: Tensor) -> bool:
    """Whether all values are finite. True without a look where `waits_for` is not: a trainer then checks its means."""
    return not waits_for(tensors[0]) or all(_all_finite(t.detach()) for t in tensors)


def _all_finite(tensor: Tensor) -> bool:
    # one sum tells it; only a sum that overflows needs a second look
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def or_zero(tensor: Tensor, on_degenerate: str) -> Tensor:
    """With on_degenerate="skip" and unchecked values: 0 where not finite. (Gradients may still be NaN there.)"""
    if on_degenerate == "raise" or waits_for(tensor):
        return tensor
    return torch.where(tensor.isfinite(), tensor, torch.zeros_like(tensor))


def _entries(vector: Tensor) -> list[Tensor]:
    """x[0], x[1], ...: views, or copies where torch.compile would have to return views of one tensor."""
    parts = list(vector.unbind())
    return [part.clone() for part in parts] if torch.compiler.is_compiling() else parts


def zero_with_gradients(*tensors: Tensor) -> Tensor:
    """0, whose gradient is zero for every one of `tensors`, even for those that hold NaN or infinity."""
    total = sum(tensor.sum() for tensor in tensors)
    return torch.where(torch.zeros_like(total, dtype=torch.bool), total, torch.zeros_like(total))


def _one_of(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise EstimatorError(what, repr(value), f"one of {', '.join(choices)}", "Choose one of these.")
