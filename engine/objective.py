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

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import MODALITIES, ObjectiveConfig
from engine.constant import Constant
from engine.errors import ConfigError, EstimatorError
from engine.kernels.knn_product import Bank, EpochProducts, ProductRows, ProductSampler, draw_epoch
from engine.model.cmi import CMIEstimator
from engine.model.estimators import Estimate, MIEstimator
from engine.model.term_estimators import TermEstimates, TermEstimators
from engine.readings import Reading

MOST_PAIRED = 256
"""Rows that are read at once where every pair of rows costs a pass of a network: a few percent of an epoch of MOSI."""

MakeEstimator = Callable[["Term", Mapping[str, int], ObjectiveConfig], nn.Module]
"""Builds a term's estimator from the term, the features' widths and the estimators' settings."""

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


class Sums:
    """The values of expressions from those of terms, as one matrix of coefficients.

    Args:
        expressions: sums of terms.
        terms: all terms, in the order of their values.
    """

    def __init__(self, expressions: Sequence[Expression], terms: Sequence[Term]):
        rows = [[dict(e.coefficients).get(term, 0.0) for term in terms] for e in expressions]
        self.names = [e.name for e in expressions]
        self._coefficients = Constant(rows)
        self._used = Constant([[float(c != 0) for c in row] for row in rows])

    def __call__(self, values: Tensor) -> Tensor:
        """[terms] -> [expressions]. What is not finite in one term spoils only the expressions that use it."""
        used = self._used(values, torch.bool)
        return torch.where(used, self._coefficients(values) * values, 0.0).sum(1)


@dataclass
class ObjectiveOutput:
    """What one evaluation of an objective gives. All but `loss` is computed when it is first asked for.

    Attributes:
        loss: 0-d, to be minimised: the weighted sum of `losses`.
        terms: the estimates as they were made, as vectors.
        sums: in stage 2 what makes expressions of terms.
    """

    loss: Tensor
    terms: TermEstimates
    sums: Sums | None = None

    @property
    def names(self) -> list[str]:
        """Keys of `losses` and `values`: names of terms in stage 1, of expressions in stage 2."""
        return list(self.terms.names) if self.sums is None else self.sums.names

    @cached_property
    def stacked_values(self) -> Tensor:
        """`values` as one tensor, [names], detached, in nats."""
        with torch.no_grad():
            values = self.terms.surrogates().detach()
            return values if self.sums is None else self.sums(values)

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """Detached 0-d each, in nats, same keys as `losses`."""
        return dict(zip(self.names, self.stacked_values.unbind(), strict=True))

    @cached_property
    def losses(self) -> dict[str, Tensor]:
        """0-d each, unweighted; by term in stage 1, by expression name in stage 2. They carry gradients."""
        if self.sums is None:
            return {name: estimate.loss for name, estimate in self.estimates.items()}
        with torch.set_grad_enabled(self.loss.requires_grad):
            return dict(zip(self.names, (-self.sums(self.terms.surrogates())).unbind(), strict=True))

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Every term's `Estimate`."""
        with torch.set_grad_enabled(self.loss.requires_grad):
            return self.terms.by_term


class Objective(nn.Module):
    """Information terms on named features: the estimators they need and the two losses of two-stage training.

    Args:
        expressions: what to maximise (negative weights minimise). Names must differ.
        dims: width of every feature named in an expression: features are float [B, width].
        discrete: features whose values are categories or few-valued labels; product rows conditioned on one of them are
            drawn within strata of equal value instead of among nearest neighbours.
        estimators: order and stage-1 weights of the estimators, as {term: weight}; default: every term with weight 1,
            in order of appearance, MI before CMI.
        settings: the estimators' settings.
        make_estimator: builds a term's estimator from the term, `dims` and `settings`; by default
            `default_estimator`, an `MIEstimator` or a `CMIEstimator`. See `replace` for how it is called.
        shared_draws: whether terms of equal condition share their product rows.

    `estimators[term]` is a single term's estimator; estimators of one shape share their parameters, and `replace`,
    `freeze` and `split` take one out of them.

    Raises:
        ConfigError: a feature without a width, two expressions of one name, a weight for an unused term or one that is
            not finite.
    """

    def __init__(
        self,
        expressions: Iterable[Expression],
        dims: Mapping[str, int],
        *,
        discrete: Iterable[str] = (),
        estimators: Mapping[Term, float] | None = None,
        settings: ObjectiveConfig | None = None,
        make_estimator: MakeEstimator | None = None,
        shared_draws: bool = True,
    ):
        super().__init__()
        self.expressions = tuple(expressions)
        self.settings = settings or ObjectiveConfig()
        self.discrete, self.shared_draws = frozenset(discrete), shared_draws
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
        numbers = [c for e in self.expressions for c in e._folded().values()]
        if wrong := [x for x in (*numbers, *self.stage1_weights.values()) if not math.isfinite(x)]:
            raise ConfigError("objective", f"a weight of {wrong[0]}", "finite weights", "Mend it.")
        for term in self.terms:
            for feature in (term.x, term.y, term.given):
                if feature is not None and feature not in dims:
                    raise ConfigError(
                        f"objective term {term}",
                        f"no width for feature {feature!r}",
                        f"one of {sorted(dims)}",
                        "Add it to dims.",
                    )
        read = {t: (t.x, t.y) if t.given is None else (t.x, t.y, t.given) for t in self.terms}
        self._readers = {name: term for term, names in read.items() for name in names}
        self._conditional = tuple(str(t) for t in self.terms if t.given is not None)
        self.estimators = TermEstimators(
            {t.key: (make_estimator or default_estimator)(t, dims, self.settings) for t in self.terms},
            {t.key: str(t) for t in self.terms},
            {t.key: names for t, names in read.items()},
        )
        self._stage1: dict[tuple[int, ...], Constant] = {}
        self._sums = Sums(self.expressions, self.terms)
        folded = [e._folded() for e in self.expressions]
        self._stage2 = Constant([-sum(f.get(term, 0.0) for f in folded) for term in self.terms])
        self._make_constants()

    # -- single estimators -------------------------------------------------------------------------

    def split(self, term: Term | str) -> nn.Module:
        """A term's estimator as a module of its own, to change as one likes: `MIEstimator` or `CMIEstimator`.

        Estimators of one shape share tensors ([estimators, out, in]). This one leaves them: it has its own parameters
        from now on, with the same values, which an optimiser has to be told of. The shared tensors stay as they are.

        Args:
            term: a `Term`, its name ("I(a;b)") or its key in `estimators` ("a_b").

        Raises:
            ConfigError: there is no such term.
        """
        return self.estimators.split(term)

    def replace(self, term: Term | str, module: nn.Module) -> None:
        """Use another module as a term's estimator, from now on. An optimiser has to be told of its parameters.

        Args:
            term: as for `split`.
            module: called as `MIEstimator` is, module(x, y), or for a conditional term as `CMIEstimator` is,
                module((x, y, z), (x, y, z)) with joint and product rows. It returns an `Estimate`.

        Raises:
            ConfigError: there is no such term, or `module` is none.
        """
        self.estimators.replace(term, module)

    def freeze(self, term: Term | str) -> nn.Module:
        """Keep a term's estimator as it is: its parameters are never updated, whatever the optimiser's settings.

        It is `split` off, and its parameters require no gradients. (MINE's moving average still follows the scores.)
        `requires_grad_(True)` on the module that this returns frees it again.
        """
        return self.split(term).requires_grad_(False)

    def estimator_state(self, grads: bool = False) -> dict[str, Tensor | None]:
        """All parameters and buffers under the names that they have in single estimators, detached.

        "estimators.a_b.critic.g.0.weight", and so on: names that do not depend on which estimators share tensors. Such
        a state dict loads, too. The tensors are views; copy what is to be kept.

        Args:
            grads: the gradients instead, None where there is none.
        """
        return {f"estimators.{name}": tensor for name, tensor in self.estimators.tensors(grads).items()}

    def _arranged(self) -> Constant:
        """Weights of stage 1 for losses as the estimators give them, signs included."""
        signs = self.estimators.signs
        if signs not in self._stage1:
            weights = self.stage1_weights.values()
            self._stage1[signs] = Constant([s * w for s, w in zip(signs, weights, strict=True)])
        return self._stage1[signs]

    def _apply(self, *args: Any, **kwargs: Any) -> Objective:
        moved = super()._apply(*args, **kwargs)
        self._make_constants()
        return moved

    @torch.no_grad()
    def _make_constants(self) -> None:
        """On the device that the estimators are on, so that no step has to."""
        example = next(self.parameters(), None)
        if example is not None and not example.is_meta:
            values = example.new_zeros(len(self.terms))
            self._arranged()(values), self._stage2(values), self._sums(values)

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
            {str(term): (x, y, z)}, [m·k, width] each.

        Raises:
            EstimatorError: the batch or the bank is too small for k_neighbor.
        """
        return self._sampler(bank).draw([t for t in self.terms if t.given is not None], batch_size, generator)

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
        conditional = [t for t in self.terms if t.given is not None]
        return draw_epoch(self._sampler(bank), conditional, batch_sizes, generator)

    def _sampler(self, bank: Mapping[str, Tensor]) -> ProductSampler:
        bank = bank if isinstance(bank, Bank) else Bank(bank)
        return ProductSampler(bank, self.settings.k_neighbor, discrete=self.discrete, shared=self.shared_draws)

    # -- readings ----------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, features: Mapping[str, Tensor], batch_size: int) -> dict[str, Reading]:
        """All terms and expressions on all rows at once. It changes nothing and has random numbers of its own.

        InfoNCE cannot read more than log(rows), in a batch as here; here the rows are many. Critics whose scores are
        not streamed (concat critics, estimators that left their group) see `MOST_PAIRED` rows, evenly spread.
        Conditional terms are read as DV on about as many product rows as rows, drawn from `features` in the portions
        that batches draw.

        Args:
            features: float [N, width] each, such as a bank's or those of an evaluated split.
            batch_size: of training.

        Returns:
            {name: reading}, terms first; empty where N is too small to draw product rows. NaN where a term was skipped.

        Raises:
            EstimatorError: a feature is missing; as in training, such as for an estimate that is not finite.
        """
        self._check_features(features)
        count = len(next(iter(features.values())))
        read = count if self.estimators.streams else min(count, MOST_PAIRED)
        size = min(batch_size, read)
        if count < self.min_batch or count - size // self.settings.k_neighbor < self.settings.k_neighbor:
            return {}
        chosen = torch.linspace(0, count - 1, read, dtype=torch.float64).round().long()
        rows = {name: value.index_select(0, chosen.to(value.device)) for name, value in features.items()}
        mode = self.training
        self.eval()
        try:
            products = self._many_products(features, size, read // size) if self.needs_products else None
            found = self.estimators(rows, products).by_term
        finally:
            self.train(mode)
        values = torch.stack([found[str(t)].details.get("dv", found[str(t)].value) for t in self.terms]).tolist()
        terms = {
            t: Reading(math.nan if "skipped" in found[str(t)].details else value, self._ceiling(t, read))
            for t, value in zip(self.terms, values, strict=True)
        }
        return {str(t): reading for t, reading in terms.items()} | {e.name: _summed(e, terms) for e in self.expressions}

    def _many_products(self, bank: Mapping[str, Tensor], size: int, draws: int) -> dict[str, ProductRows]:
        """The product rows of many batches of one size, put together."""
        epoch = self.sample_epoch(bank, [size] * draws, torch.Generator().manual_seed(0))
        parts = [epoch.take(number) for number in range(draws)]
        return {
            term: ProductRows(*(torch.cat([getattr(p[term], part) for p in parts]) for part in "xyz"), epoch.k)
            for term in self._conditional
        }

    def _ceiling(self, term: Term, rows: int) -> float | None:
        """The most that a term can read on so many rows; None where its estimator has no such limit, or is foreign."""
        estimator = self.estimators[term.key]
        match getattr(estimator, "bound", None):
            case "infonce":
                return math.log(rows)
            case "interpolate":
                return 1 + math.log((rows - 1) / estimator.alpha)
        return None

    # -- the two losses ----------------------------------------------------------------------------

    def estimate(
        self, features: Mapping[str, Tensor], products: Mapping[str, Rows] | None = None
    ) -> dict[str, Estimate]:
        """Every term's estimate on one batch.

        Args:
            features: float [B, width] each.
            products: from `sample_products`; may be omitted where no term is conditional.
        """
        return self._estimate(features, products).by_term

    def _estimate(self, features: Mapping[str, Tensor], products: Mapping[str, Rows] | None) -> TermEstimates:
        self._check_features(features)
        for term in self._conditional:
            if products is None or term not in products:
                raise EstimatorError(
                    f"objective term {term}", "no product rows", "rows from Objective.sample_products",
                    "Pass products=.",
                )  # fmt: skip
        return self.estimators(features, products)

    def _check_features(self, features: Mapping[str, Tensor]) -> None:
        for name, term in self._readers.items():
            if name not in features:
                raise EstimatorError(
                    f"objective term {term}", f"no feature {name!r}", f"one among {sorted(features)}", "Pass it, too."
                )

    def estimator_loss(
        self, features: Mapping[str, Tensor], products: Mapping[str, Rows] | None = None
    ) -> ObjectiveOutput:
        """Stage 1: Σ weight · (the estimator's own loss). Pass detached features: only estimators should learn."""
        found = self._estimate(features, products)
        losses = found.losses()
        return ObjectiveOutput(torch.dot(losses, self._arranged()(losses)), found)

    def model_loss(self, features: Mapping[str, Tensor], products: Mapping[str, Rows] | None = None) -> ObjectiveOutput:
        """Stage 2: −Σ weight · expression, with gradients to the features."""
        found = self._estimate(features, products)
        values = found.surrogates()
        return ObjectiveOutput(torch.dot(values, self._stage2(values)), found, self._sums)


def _summed(expression: Expression, terms: Mapping[Term, Reading]) -> Reading:
    """An expression's reading; it has a ceiling where all its terms have one and none is subtracted."""
    parts = [(c, terms[t]) for t, c in expression.coefficients if c != 0]
    limits = [c * r.ceiling for c, r in parts if c > 0 and r.ceiling is not None]
    return Reading(sum(c * r.value for c, r in parts), sum(limits) if len(limits) == len(parts) else None)


def _terms(expressions: Sequence[Expression]) -> list[Term]:
    """Distinct terms in order of appearance, MI before CMI."""
    seen = dict.fromkeys(term for e in expressions for term, _ in e.coefficients)
    return sorted(seen, key=lambda term: term.given is not None)


def default_estimator(term: Term, dims: Mapping[str, int], settings: ObjectiveConfig) -> nn.Module:
    """The estimator that an objective builds for a term: `MIEstimator`, or `CMIEstimator` for a conditional one."""
    s = settings
    if term.given is None:
        return MIEstimator(
            dims[term.x],
            dims[term.y],
            critic=s.critic,
            bound=s.bound,
            baseline=s.baseline,
            hidden=s.hidden,
            embed=s.embed,
            alpha=s.alpha,
            smile_tau=s.smile_tau,
            ema_rate=s.ema_rate,
            on_degenerate=s.on_degenerate,
        )
    return CMIEstimator(
        max(dims[term.x], dims[term.y], dims[term.given]),
        hidden=s.hidden,
        estimator=s.cmi_estimator,
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


def without_features(expressions: Iterable[Expression], absent: Iterable[str]) -> list[Expression]:
    """The expressions without the terms that name a feature of `absent`; one that loses all its terms is left out."""
    absent = set(absent)
    kept = [
        replace(e, coefficients=tuple((t, c) for t, c in e.coefficients if not absent & {t.x, t.y, t.given}))
        for e in expressions
    ]
    return [e for e in kept if e.coefficients]


def mimrl_objective(
    settings: ObjectiveConfig, fused_dim: int, d_common: int, modalities: Sequence[str] = MODALITIES
) -> Objective:
    """The objective of MIMRL on features F [B, fused_dim], T, A, V [B, d_common] and label C [B, 1].

    Args:
        modalities: of text, audio and vision those that there are. Terms that name another are left out.
    """
    if len(settings.c1) != len(MIMRL_ESTIMATORS):
        raise ConfigError("objective.c1", f"{len(settings.c1)} weights", f"{len(MIMRL_ESTIMATORS)}", "Give one a term.")
    if len(settings.c2) != 8:
        raise ConfigError("objective.c2", f"{len(settings.c2)} weights", "8", "Give one an expression.")
    from engine.mimrl.published import published_estimator

    published = settings.compat == "mimrl"
    absent = {m[0].upper() for m in MODALITIES if m not in modalities}
    weights = dict(zip(MIMRL_ESTIMATORS, settings.c1, strict=True))
    return Objective(
        without_features(mimrl_expressions(settings.c2), absent),
        dims={"F": fused_dim, "T": d_common, "A": d_common, "V": d_common, "C": 1},
        discrete=() if published else ("C",),
        shared_draws=not published,
        make_estimator=published_estimator if published else default_estimator,
        estimators={term: w for term, w in weights.items() if not absent & {term.x, term.y, term.given}},
        settings=settings,
    )
