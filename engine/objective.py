"""Declare which information terms a model's features should have.

    from engine import CMI, MI, Objective

    objective = Objective(
        [0.1 * MI("Z", "Y"), -0.1 * CMI("Z", "S", given="Y").named("leak")],
        dims={"Z": 64, "Y": 8, "S": 1},
    )

`MI` and `CMI` build expressions; sums and differences of them are expressions again. An objective collects the distinct
terms of its expressions, owns one estimator for each, and gives the two losses of two-stage training: `estimator_loss`
(stage 1, moves the estimators) and `model_loss` (stage 2, moves the features). Nothing here knows of MIMRL but the
declaration at the end, `mimrl_objective`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from engine.config import ObjectiveConfig
from engine.errors import ConfigError, EstimatorError
from engine.kernels.knn_product import Bank, EpochProducts, ProductRows, ProductSampler, draw_epoch
from engine.model.cmi import CMIEstimator
from engine.model.estimators import Estimate, MIEstimator
from engine.model.grouped import GroupedMI
from engine.model.grouped_cmi import GroupedCMI

Rows = Sequence[Tensor]
"""Product rows of one term: x, y and z, [rows, width] each."""


@dataclass(frozen=True)
class Term:
    """One information quantity between named features: I(x;y), or I(x;y|given). In nats."""

    x: str
    y: str
    given: str | None = None

    def __str__(self) -> str:
        return f"I({self.x};{self.y})" if self.given is None else f"I({self.x};{self.y}|{self.given})"

    @property
    def key(self) -> str:
        """The term's estimator in `Objective.estimators` (module names may hold neither dots nor brackets)."""
        if self.given is None:
            return f"{self.x}_{self.y}"
        if len(self.x) == len(self.y) == len(self.given) == 1:
            return f"{self.x}{self.y}_{self.given}"
        return f"{self.x}_{self.y}_given_{self.given}"


@dataclass(frozen=True)
class Expression:
    """A weighted sum of terms, with the weight and the name under which an objective uses it.

    `value = Σ coefficient · term`; an objective MAXIMISES `weight · value`. `w * expression` scales the weight, so that
    the reported value stays in nats; within a sum, weights fold into the coefficients.
    """

    coefficients: tuple[tuple[Term, float], ...]
    weight: float = 1.0
    label: str | None = None

    @property
    def name(self) -> str:
        if self.label is not None:
            return self.label
        parts = []
        for term, coefficient in self.coefficients:
            size = "" if abs(coefficient) == 1 else f"{abs(coefficient):g}·"
            parts.append(f"{'-' if coefficient < 0 else '+'}{size}{term}")
        return "".join(parts).removeprefix("+")

    def named(self, label: str) -> Expression:
        """The same expression, reported as `label`."""
        return replace(self, label=label)

    def _folded(self) -> dict[Term, float]:
        return {term: self.weight * coefficient for term, coefficient in self.coefficients}

    def __add__(self, other: Expression) -> Expression:
        if not isinstance(other, Expression):
            return NotImplemented
        total = self._folded()
        for term, coefficient in other._folded().items():
            total[term] = total.get(term, 0.0) + coefficient
        return Expression(tuple(total.items()))

    def __sub__(self, other: Expression) -> Expression:
        if not isinstance(other, Expression):
            return NotImplemented
        return self + -other

    def __neg__(self) -> Expression:
        return -1.0 * self

    def __rmul__(self, factor: float) -> Expression:
        return replace(self, weight=float(factor) * self.weight)

    __mul__ = __rmul__


def MI(x: str, y: str) -> Expression:
    """Mutual information I(x;y) between two named features, in nats."""
    return Expression(((Term(x, y), 1.0),))


def CMI(x: str, y: str, *, given: str) -> Expression:
    """Conditional mutual information I(x;y|given) between named features, in nats."""
    return Expression(((Term(x, y, given), 1.0),))


@dataclass
class ObjectiveOutput:
    """What one evaluation of an objective gives.

    Attributes:
        loss: 0-d, to be minimised: the weighted sum of `losses`.
        losses: 0-d each, unweighted; by term in stage 1, by expression name in stage 2. They carry gradients.
        values: detached 0-d each, nats, same keys as `losses`.
        estimates: every term's `Estimate`.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    values: dict[str, Tensor]
    estimates: dict[str, Estimate]


class Objective(nn.Module):
    """Information terms on named features: the estimators they need and the two losses of two-stage training.

    Args:
        expressions: what to maximise (negative weights minimise). Names must differ.
        dims: width of every feature named in an expression: features are float [B, width].
        discrete: features whose values are categories or few-valued labels; product rows conditioned on one of them are
            drawn within strata of equal value instead of among nearest neighbours (with compat="none").
        estimators: order and stage-1 weights of the estimators, as {term: weight}; default: every term with weight 1,
            in order of appearance, MI before CMI.
        settings: estimators' settings; `compat` must be resolved ("none" or "mimrl").

    Raises:
        ConfigError: a feature without a width, two expressions of one name, a weight for an unused term.
    """

    def __init__(
        self,
        expressions: Iterable[Expression],
        dims: Mapping[str, int],
        *,
        discrete: Iterable[str] = (),
        estimators: Mapping[Term, float] | None = None,
        settings: ObjectiveConfig | None = None,
    ):
        super().__init__()
        self.expressions = tuple(expressions)
        self.settings = s = settings or ObjectiveConfig(compat="none")
        self.discrete = frozenset(discrete)
        used = _terms(self.expressions)
        names = [e.name for e in self.expressions]
        if repeated := {n for n in names if names.count(n) > 1}:
            raise ConfigError(
                "objective", f"several expressions named {sorted(repeated)}", "distinct names", "Call .named()."
            )
        if estimators is None:
            estimators = dict.fromkeys(used, 1.0)
        if unused := [str(t) for t in estimators if t not in used]:
            raise ConfigError(
                "objective.estimators", f"{unused}", f"terms among {[str(t) for t in used]}", "Drop them."
            )
        if missing := [str(t) for t in used if t not in estimators]:
            raise ConfigError("objective.estimators", f"no weight for {missing}", "one for every term", "Add them.")
        self.stage1_weights = dict(estimators)
        self.terms = tuple(self.stage1_weights)
        for term in self.terms:
            for feature in (term.x, term.y, term.given):
                if feature is not None and feature not in dims:
                    raise ConfigError(
                        f"objective term {term}",
                        f"no width for feature {feature!r}",
                        f"one of {sorted(dims)}",
                        "Add it to dims.",
                    )
        self.estimators = nn.ModuleDict({t.key: _estimator(t, dims, s) for t in self.terms})
        # names made once: a compiled graph cannot make them
        self._weights = [(str(t), weight) for t, weight in self.stage1_weights.items()]
        self._sums = [(e.name, [(str(t), c) for t, c in e.coefficients], e.weight) for e in self.expressions]
        weights = {"_of_terms": self.stage1_weights.values(), "_of_sums": [e.weight for e in self.expressions]}
        for name, numbers in weights.items():
            self.register_buffer(name, torch.tensor(list(numbers), dtype=torch.float32), persistent=False)
        by_name = {str(t): self.estimators[t.key] for t in self.terms}
        self._mi = GroupedMI(
            {str(t): by_name[str(t)] for t in self.terms if t.given is None},
            {str(t): (t.x, t.y) for t in self.terms if t.given is None},
        )
        self._cmi = GroupedCMI(
            {str(t): by_name[str(t)] for t in self.terms if t.given is not None},
            {str(t): (t.x, t.y, t.given) for t in self.terms if t.given is not None},
        )

    # -- product rows ------------------------------------------------------------------------------

    @property
    def needs_products(self) -> bool:
        """Whether any term is conditional, so that `estimator_loss` and `model_loss` need product rows."""
        return any(t.given is not None for t in self.terms)

    @property
    def min_batch(self) -> int:
        """Smallest batch on which every term is defined: 2, or k_neighbor where product rows are needed."""
        return max(2, self.settings.k_neighbor) if self.needs_products else 2

    def sample_products(
        self, bank: Mapping[str, Tensor], batch_size: int, generator: torch.Generator | None = None
    ) -> dict[str, ProductRows]:
        """Draw rows of q(x,y,z) = p(x|z) p(y,z) for every conditional term from a bank of features.

        Args:
            bank: features of N samples, [N, width] each, without gradients. Where many batches are drawn from one
                bank, make it an `engine.kernels.knn_product.Bank`: what the search needs is then prepared once.
            batch_size: number of joint rows they will be compared with; m = batch_size // k_neighbor queries of
                k_neighbor rows each are drawn.
            generator: source of randomness, on the CPU.

        Returns:
            {str(term): (x, y, z)}, [m·k, width] each. With compat="none" terms of equal condition share their draw.

        Raises:
            EstimatorError: the batch or the bank is too small for k_neighbor.
        """
        reference = self.settings.compat == "mimrl"
        sampler = ProductSampler(
            bank if isinstance(bank, Bank) else Bank(bank),
            self.settings.k_neighbor,
            discrete=() if reference else self.discrete,
            shared=not reference,
        )
        return sampler.draw([t for t in self.terms if t.given is not None], batch_size, generator)

    def sample_epoch(
        self, bank: Mapping[str, Tensor], batch_sizes: Sequence[int], generator: torch.Generator | None = None
    ) -> EpochProducts:
        """Draw the product rows of all batches of an epoch at once; `EpochProducts.take` gives those of one batch.

        For the same queries and keys the rows are those of `sample_products`; the random stream is another one.

        Args:
            bank: features of N samples, [N, width] each, without gradients.
            batch_sizes: joint rows of every batch, of several passes one after another. A batch smaller than
                k_neighbor gets no rows.
            generator: source of randomness. One on the CPU gives the same draws on every device, one on a GPU draws
                there.

        Raises:
            EstimatorError: the bank is too small for k_neighbor and a batch, or not finite.
        """
        reference = self.settings.compat == "mimrl"
        sampler = ProductSampler(
            bank if isinstance(bank, Bank) else Bank(bank),
            self.settings.k_neighbor,
            discrete=() if reference else self.discrete,
            shared=not reference,
        )
        return draw_epoch(sampler, [t for t in self.terms if t.given is not None], batch_sizes, generator)

    # -- the two losses ----------------------------------------------------------------------------

    def estimate(
        self, features: Mapping[str, Tensor], products: Mapping[str, Rows] | None = None
    ) -> dict[str, Estimate]:
        """Every term's estimate on one batch.

        Args:
            features: float [B, width] each.
            products: from `sample_products`; may be omitted where no term is conditional.
        """
        found = self._mi(features)
        if self.needs_products:
            if products is None:
                term = next(t for t in self.terms if t.given is not None)
                raise EstimatorError(
                    f"objective term {term}", "no product rows", "rows from Objective.sample_products",
                    "Pass products=.",
                )  # fmt: skip
            found |= self._cmi(features, products)
        return {name: found[name] for name, _ in self._weights}

    def estimator_loss(
        self, features: Mapping[str, Tensor], products: Mapping[str, Rows] | None = None
    ) -> ObjectiveOutput:
        """Stage 1: Σ weight · (the estimator's own loss). Pass detached features: only estimators should learn."""
        estimates = self.estimate(features, products)
        losses = {name: estimates[name].loss for name, _ in self._weights}
        total = _weighted(losses.values(), self._of_terms)
        return ObjectiveOutput(total, losses, {k: e.value for k, e in estimates.items()}, estimates)

    def model_loss(self, features: Mapping[str, Tensor], products: Mapping[str, Rows] | None = None) -> ObjectiveOutput:
        """Stage 2: −Σ weight · expression, with gradients to the features."""
        estimates = self.estimate(features, products)
        losses, values = {}, {}
        for name, parts, _ in self._sums:
            value = sum(c * estimates[term].surrogate for term, c in parts)
            losses[name] = -value
            values[name] = value.detach()
        total = _weighted(losses.values(), self._of_sums)
        return ObjectiveOutput(total, losses, values, estimates)


def _weighted(losses: Iterable[Tensor], weights: Tensor) -> Tensor:
    return (torch.stack(list(losses)) * weights).sum()


def _terms(expressions: Sequence[Expression]) -> list[Term]:
    """Distinct terms in order of appearance, MI before CMI."""
    seen = dict.fromkeys(term for e in expressions for term, _ in e.coefficients)
    return sorted(seen, key=lambda term: term.given is not None)


def _estimator(term: Term, dims: Mapping[str, int], s: ObjectiveConfig) -> nn.Module:
    if term.given is None:
        return MIEstimator(
            dims[term.x],
            dims[term.y],
            critic=s.critic,
            bound=s.bound,
            baseline=s.baseline,
            hidden=s.hidden,
            embed=s.embed,
            compat=s.compat,
            alpha=s.alpha,
            smile_tau=s.smile_tau,
            ema_rate=s.ema_rate,
            on_degenerate=s.on_degenerate,
        )
    return CMIEstimator(
        max(dims[term.x], dims[term.y], dims[term.given]),
        hidden=s.hidden,
        estimator=s.cmi_estimator,
        compat=s.compat,
        last_activate=s.cmi_last_activate,
        on_degenerate=s.on_degenerate,
    )


MIMRL_ESTIMATORS = (
    *(Term("F", "T"), Term("F", "A"), Term("F", "V"), Term("T", "A"), Term("T", "V")),
    *(Term("A", "C", "T"), Term("T", "A", "C"), Term("V", "C", "T"), Term("T", "V", "C")),
    *(Term("T", "C", "A"), Term("T", "C", "V")),
)
"""MIMRL's eleven estimators in the order of `objective.c1`."""


def mimrl_expressions(c2: Sequence[float]) -> list[Expression]:
    """MIMRL's eight information terms, maximised with weights `c2`: fused, invariant, specific and complementary."""
    ac_t, ta_c = CMI("A", "C", given="T"), CMI("T", "A", given="C")
    vc_t, tv_c = CMI("V", "C", given="T"), CMI("T", "V", given="C")
    tc_a, tc_v = CMI("T", "C", given="A"), CMI("T", "C", given="V")
    terms = [
        MI("F", "T"),
        MI("F", "A"),
        MI("F", "V"),
        (MI("T", "A") + MI("T", "V")).named("inv"),
        (tc_a + tc_v - ta_c - tv_c).named("spec_t"),
        (ac_t - ta_c).named("spec_a"),
        (vc_t - tv_c).named("spec_v"),
        (ta_c + tv_c).named("comp"),
    ]
    return [c * term for c, term in zip(c2, terms, strict=True)]


def mimrl_objective(settings: ObjectiveConfig, fused_dim: int, d_common: int) -> Objective:
    """The objective of MIMRL on features F [B, fused_dim], T, A, V [B, d_common] and label C [B, 1]."""
    if len(settings.c1) != len(MIMRL_ESTIMATORS):
        raise ConfigError("objective.c1", f"{len(settings.c1)} weights", f"{len(MIMRL_ESTIMATORS)}", "Give one a term.")
    if len(settings.c2) != 8:
        raise ConfigError("objective.c2", f"{len(settings.c2)} weights", "8", "Give one an expression.")
    return Objective(
        mimrl_expressions(settings.c2),
        dims={"F": fused_dim, "T": d_common, "A": d_common, "V": d_common, "C": 1},
        discrete=("C",),
        estimators=dict(zip(MIMRL_ESTIMATORS, settings.c1, strict=True)),
        settings=settings,
    )
