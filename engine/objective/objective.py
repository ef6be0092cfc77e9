"""The objective itself: one estimator per distinct term, and the two losses of two-stage training.

Stage 1, `estimator_loss`, moves the estimators. Stage 2, `model_loss`, moves the features. Its expressions come from
`engine.objective.terms`.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import ObjectiveConfig
from engine.constant import Constant
from engine.errors import ConfigError, EstimatorError
from engine.kernels.knn_product import Bank, EpochProducts, ProductRows, ProductSampler, draw_epoch
from engine.kernels.ranks.agreement import checked
from engine.kernels.ranks.group import find_ranks
from engine.model.default import default_estimator
from engine.model.estimators import Estimate, outside_inference
from engine.model.term_estimators import TermEstimates, TermEstimators
from engine.objective.checks import as_expressions, as_settings, by_term, check_terms
from engine.objective.minimised import advice
from engine.objective.output import ObjectiveOutput
from engine.objective.readings import Reading
from engine.objective.terms import Expression, Sums, Term, distinct_terms
from engine.objective.weights import restored
from engine.vocabulary import GATHERS

MOST_PAIRED = 256
"""The most rows that are read at once where each pair of rows takes a pass of a network. It keeps reading cheap."""

STAGES = ("estimators", "model")
"""What the estimators minimise, and what the model does."""

MakeEstimator = Callable[[Term, Mapping[str, int], ObjectiveConfig], nn.Module]
"""Builds a term's estimator from the term, the features' widths and the estimators' settings."""

Rows = Sequence[Tensor]
"""Product rows of one term: x, y and z, [rows, width] each."""


class Objective(nn.Module):
    """Information terms on named features: the estimators they need and the two losses of two-stage training.

    The metadata of its state dict hold the weights that `set_weights` gave, so a resumed loop goes on with them. They
    also say which estimators share a tensor.

    Args:
        expressions: what to maximise. A negative weight minimises. Names must differ. `set_weights` changes weights.
        dims: the width of every feature that an expression names. Features are float [B, width].
        discrete: features that hold categories or few-valued labels. Product rows given one of them are drawn within
            strata of equal value instead of among nearest neighbours. {feature: number of classes} says that it holds
            0 ... classes - 1, or one-hot rows. The bounds "club", "club_sample", "l1out" and "ba" then predict classes;
            without a number (None) they predict numbers.
        estimators: order and stage-1 weights of the estimators, as {term or its name: weight}. By default every term
            has weight 1, in order of appearance, MI before CMI.
        settings: the estimators' settings.
        make_estimator: builds a term's estimator from the term, `dims` and `settings`; by default
            `default_estimator`, an `MIEstimator` or a `CMIEstimator`. See `replace` for how it is called.
        shared_draws: whether terms of equal condition share their product rows.
        advise: whether to warn of a lower bound that is minimised and of an upper bound that is maximised.
        gather: of several processes, whether estimates are those of the batch that all ranks hold together: "off",
            "gather" or "ring"; see `engine.kernels.infonce`. None: as `settings.gather` says, by default "gather".
            Without a process group it changes nothing.
        group: the process group; None for the default one.

    `estimators[term]` is the estimator of one term. Estimators of one shape share their parameters; `replace`, `freeze`
    and `split` take one out.

    >>> from engine import MI
    >>> objective = Objective([MI("Z", "Y")], dims={"Z": 8, "Y": 2})
    >>> features = {"Z": torch.randn(16, 8), "Y": torch.randn(16, 2)}
    >>> objective.estimator_loss(features).names
    ['I(Z;Y)']

    Raises:
        ConfigError: what is no expression, a feature without a width, two expressions of one name, a weight for an
            unused term or one that is not finite, a discrete feature without a width.
    """

    def __init__(
        self,
        expressions: Iterable[Expression],
        dims: Mapping[str, int],
        *,
        discrete: Iterable[str] | Mapping[str, int | None] = (),
        estimators: Mapping[Term, float] | None = None,
        settings: ObjectiveConfig | None = None,
        make_estimator: MakeEstimator | None = None,
        shared_draws: bool = True,
        advise: bool = True,
        gather: str | None = None,
        group: Any = None,
    ):
        super().__init__()
        self._expressions = as_expressions(expressions)
        self._built_with = [e.weight for e in self._expressions]
        self.settings = as_settings(settings)
        discrete = (discrete,) if isinstance(discrete, str) else discrete
        self.discrete, self.shared_draws = frozenset(discrete), shared_draws
        self.classes = {name: n for name, n in discrete.items() if n} if isinstance(discrete, Mapping) else {}
        self.gather, self.group = self.settings.gather if gather is None else gather, group
        if self.gather not in GATHERS:
            raise ConfigError("objective.gather", repr(gather), f"one of {', '.join(GATHERS)}", "Choose one.")
        terms = distinct_terms(self.expressions)
        estimators = dict.fromkeys(terms, 1.0) if estimators is None else by_term(estimators, terms)
        check_terms(self.expressions, estimators, dims, discrete)
        self._stage1_weights = dict(estimators)
        self.terms = tuple(self._stage1_weights)
        self._readers = {name: term for term in self.terms for name in term.features}
        self._conditional = tuple(t for t in self.terms if t.needs_products)
        make_estimator = make_estimator or partial(default_estimator, classes=self.classes)
        self.estimators = TermEstimators(
            {t.key: make_estimator(t, dims, self.settings) for t in self.terms},
            {t.key: str(t) for t in self.terms},
            {t.key: t.features for t in self.terms},
        )
        self._off: set[str] | None = None  # parameters that were frozen before all of them were
        self._stage1: dict[tuple[int, ...], Constant] = {}
        self._sums = Sums(self.expressions, self.terms)
        self._stage2 = Constant(self._weights_of_terms())
        self._make_constants()
        if advise:
            for text in advice(self.expressions, self.settings.bound, self.settings.cmi_estimator):
                warnings.warn(text, stacklevel=2)

    # -- weights -----------------------------------------------------------------------------------

    @property
    def expressions(self) -> tuple[Expression, ...]:
        """What is maximised, with its weights. `set_weights` changes these; other terms need another objective."""
        return self._expressions

    @expressions.setter
    def expressions(self, _: Any) -> None:
        do = "Call set_weights, or build another objective and load this one's state with strict=False."
        raise ConfigError("objective.expressions", "other expressions", "those it was built with", do)

    @property
    def stage1_weights(self) -> Mapping[Term, float]:
        """The weights of the estimators' losses in stage 1, which cannot be changed."""
        return MappingProxyType(self._stage1_weights)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the weights of expressions from now on, as a schedule does. The names and values stay as they are.

        A captured CUDA graph reads the weights anew at every replay. The weights are part of the state: see
        `changed_weights`.

        >>> from engine import MI
        >>> objective = Objective([0.1 * MI("Z", "Y")], dims={"Z": 8, "Y": 2})
        >>> objective.set_weights({"I(Z;Y)": 0.2})
        >>> objective.expressions[0].weight
        0.2

        Args:
            weights: {name of an expression: its new weight}; those that are not named keep theirs.

        Raises:
            ConfigError: an unknown name, or a weight that is no finite number.
        """
        names = [e.name for e in self._expressions]
        for name, weight in weights.items():
            if name not in names:
                raise ConfigError("objective.set_weights", f"{name!r}", f"one of {names}", "Name an expression.")
            if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
                raise ConfigError(f"weight of {name}", repr(weight), "a finite number", "Correct it.")
        self._expressions = tuple(replace(e, weight=float(weights.get(e.name, e.weight))) for e in self._expressions)
        self._stage2.set(self._weights_of_terms())

    def changed_weights(self) -> dict[str, list[float]]:
        """{name: [the weight that it was built with, the present one]} of the expressions that `set_weights` changed.

        The metadata of `state_dict()` holds them, and `load_state_dict` puts them back. Where the state is copied into
        a plain dict, save them yourself, and give them to `restore_weights`.
        """
        pairs = zip(self._expressions, self._built_with, strict=True)
        return {e.name: [built, e.weight] for e, built in pairs if e.weight != built}

    def restore_weights(self, changed: Mapping[str, Sequence[float]]) -> None:
        """Put back the weights of a state, as `changed_weights` gave them. All others become those of the beginning.

        An expression that began with another weight here than in that state keeps it, with a warning.
        """
        built_with = {e.name: built for e, built in zip(self._expressions, self._built_with, strict=True)}
        self.set_weights(restored(changed, built_with))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["weights"] = self.changed_weights()

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if "weights" in local_metadata:  # older states have none
            self.restore_weights(local_metadata["weights"])

    def _weights_of_terms(self) -> list[float]:
        """What stage 2 minimises of each term."""
        folded = [e.folded() for e in self._expressions]
        return [-sum(f.get(term, 0.0) for f in folded) for term in self.terms]

    # -- single estimators -------------------------------------------------------------------------

    def split(self, term: Term | str) -> nn.Module:
        """Make a term's estimator a module of its own, which can be changed freely, and return it.

        Estimators of one shape share tensors ([estimators, out, in]). This one leaves them: from now on it has its own
        parameters, with the same values. Give them to the optimiser. The shared tensors stay as they are.

        Args:
            term: a `Term`, its name ("I(a;b)") or its key in `estimators` ("a_b").

        Raises:
            ConfigError: there is no such term.
        """
        return self.estimators.split(term)

    def replace(self, term: Term | str, module: nn.Module) -> None:
        """Use another module as a term's estimator from now on. Give its parameters to the optimiser.

        Args:
            term: as for `split`.
            module: returns an `Estimate`. It is called as module(x, y), like `MIEstimator`; for a conditional term as
                module((x, y, z), (x, y, z)) with joint and product rows, like `CMIEstimator`; for one by "club" as
                module(x, y, z), like `StratifiedCLUB`.

        Raises:
            ConfigError: there is no such term, or `module` is no module.
        """
        self.estimators.replace(term, module)

    def requires_grad_(self, requires_grad: bool = True) -> Objective:
        """As every module's, but off and on again leaves alone what was frozen before.

        A loop of its own turns the estimators off while their terms move the model; frozen ones then stay frozen.
        """
        if not requires_grad:
            off = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
            self._off = off if self._off is None else self._off & off  # without those that were freed since
        frozen, self._off = self._off or set(), None if requires_grad else self._off
        for name, parameter in self.named_parameters():
            # one that learns was freed since, by `requires_grad_` of its own module
            parameter.requires_grad_(requires_grad and (name not in frozen or parameter.requires_grad))
        return self

    def freeze(self, term: Term | str) -> nn.Module:
        """Keep a term's estimator as it is: its parameters are never updated, whatever the optimiser does.

        The estimator is `split` off and its parameters require no gradients. MINE's moving average still follows the
        scores. Call `requires_grad_(True)` on the returned module to train it again.
        """
        own = self.split(term).requires_grad_(False)
        if self._off is not None:
            self._off |= {f"estimators.{self.estimators.key(term)}.{name}" for name, _ in own.named_parameters()}
        return own

    def estimator_state(self, grads: bool = False) -> dict[str, Tensor | None]:
        """All parameters and buffers, detached, under the names that they have in single estimators.

        The names, such as "estimators.a_b.critic.g.0.weight", do not depend on which estimators share tensors, and
        such a state dict can be loaded. The tensors are views: copy what you want to keep.

        Args:
            grads: give the gradients instead, None where there is none.
        """
        return {f"estimators.{name}": tensor for name, tensor in self.estimators.tensors(grads).items()}

    def _arranged(self) -> Constant:
        """The weights of stage 1 with the signs that the estimators' losses come with."""
        signs = self.estimators.signs
        if signs not in self._stage1:
            weights = self._stage1_weights.values()
            self._stage1[signs] = Constant([s * w for s, w in zip(signs, weights, strict=True)])
        return self._stage1[signs]

    def _apply(self, *args: Any, **kwargs: Any) -> Objective:
        moved = super()._apply(*args, **kwargs)
        self._make_constants()
        return moved

    @torch.no_grad()
    def _make_constants(self) -> None:
        """Put the constants on the estimators' device now, so that no step has to."""
        example = next(self.parameters(), None)
        if example is not None and not example.is_meta:
            values = example.new_zeros(len(self.terms))
            self._arranged()(values), self._stage2(values), self._sums(values)

    # -- product rows ------------------------------------------------------------------------------

    @property
    def needs_products(self) -> bool:
        """Whether `estimator_loss` and `model_loss` need product rows, as conditional terms by a classifier do."""
        return bool(self._conditional)

    @property
    def min_batch(self) -> int:
        """The smallest batch on which every term is defined.

        2; k_neighbor where product rows are needed; and one more row than a condition has classes where rows of one
        class are compared, because two of them must be there.
        """
        least = [self.classes[t.given] + 1 for t in self.terms if t.given in self.classes and t.from_above]
        return max(2, self.settings.k_neighbor if self.needs_products else 2, *least)

    def sample_products(
        self, bank: Mapping[str, Tensor], batch_size: int, generator: torch.Generator | None = None
    ) -> dict[str, ProductRows]:
        """Draw rows of q(x,y,z) = p(x|z) p(y,z) for every conditional term from a bank of features.

        Args:
            bank: features of N samples, [N, width] each, without gradients. If you draw many batches from one bank,
                make it an `engine.kernels.knn_product.Bank`, which prepares the search once.
            batch_size: number of joint rows that they will be compared with. m = batch_size // k_neighbor queries of
                k_neighbor rows each are drawn.
            generator: source of randomness, on the CPU.

        Returns:
            {str(term): (x, y, z)}, [m·k, width] each. Terms of equal condition share their draw (`shared_draws`).

        Raises:
            EstimatorError: the batch or the bank is too small for k_neighbor.
        """
        return self._sampler(bank).draw(self._conditional, batch_size, generator)

    def sample_epoch(
        self, bank: Mapping[str, Tensor], batch_sizes: Sequence[int], generator: torch.Generator | None = None
    ) -> EpochProducts:
        """Draw the product rows of all batches of an epoch at once. `EpochProducts.take` gives those of one batch.

        For the same queries and keys the rows are those of `sample_products`, but its random stream is another one.

        Args:
            bank: features of N samples, [N, width] each, without gradients.
            batch_sizes: joint rows of every batch; several passes follow one another. A batch smaller than k_neighbor
                gets no rows.
            generator: source of randomness. On the CPU it gives the same draws for every device; on a GPU it draws
                there.

        Raises:
            EstimatorError: the bank is too small for k_neighbor and a batch, or not finite.
        """
        return draw_epoch(self._sampler(bank), self._conditional, batch_sizes, generator)

    def _sampler(self, bank: Mapping[str, Tensor]) -> ProductSampler:
        bank = bank if isinstance(bank, Bank) else Bank(bank)
        return ProductSampler(bank, self.settings.k_neighbor, discrete=self.discrete, shared=self.shared_draws)

    # -- readings ----------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, features: Mapping[str, Tensor], batch_size: int) -> dict[str, Reading]:
        """Estimate all terms and expressions on all rows at once.

        InfoNCE cannot exceed log(rows). Many rows raise this ceiling. Critics that must store their scores (concat
        critics, estimators that left their group) read `MOST_PAIRED` rows, evenly spread. Conditional terms are read as
        DV, on about as many product rows as rows. The product rows are drawn from `features` in portions of the size
        that batches draw. Reading changes no state and uses its own random numbers.

        Args:
            features: float [N, width] each, such as a bank's or those of an evaluated split.
            batch_size: the batch size of training.

        Returns:
            {name: reading}, terms first. Empty where N is too small to draw product rows; NaN where a term was skipped.

        Raises:
            EstimatorError: a feature is missing, or an estimate fails as in training, such as by not being finite.
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
            estimates = list(self.estimators(rows, products).by_term.values())
        finally:
            self.train(mode)
        values = torch.stack([e.details.get("dv", e.value) for e in estimates]).tolist()
        readings = {
            term: Reading(math.nan if "skipped" in estimate.details else value, self._ceiling(term, read))
            for term, estimate, value in zip(self.terms, estimates, values, strict=True)
        }
        sums = {e.name: Reading.of_sum([(c, readings[t]) for t, c in e.coefficients]) for e in self.expressions}
        return {str(term): reading for term, reading in readings.items()} | sums

    def _many_products(self, bank: Mapping[str, Tensor], size: int, draws: int) -> dict[str, ProductRows]:
        """The product rows of `draws` batches of one size, put together."""
        epoch = self.sample_epoch(bank, [size] * draws, torch.Generator().manual_seed(0))
        parts = [epoch.take(number) for number in range(draws)]
        return {
            str(t): ProductRows(*(torch.cat([getattr(p[str(t)], part) for p in parts]) for part in "xyz"), epoch.k)
            for t in self._conditional
        }

    def _ceiling(self, term: Term, rows: int) -> float | None:
        """The most that a term can read on so many rows. None where its estimator has no known limit."""
        estimator = self.estimators[term.key]
        match getattr(estimator, "bound", None):
            case "infonce":
                return math.log(rows)
            case "interpolate":
                return 1 + math.log((rows - 1) / estimator.alpha)
        return None

    # -- the two losses ----------------------------------------------------------------------------

    def forward(
        self,
        features: Mapping[str, Tensor],
        products: Mapping[str, Rows] | None = None,
        stage: str = "estimators",
    ) -> ObjectiveOutput:
        """`estimator_loss` for stage "estimators", `model_loss` for "model". It is what DDP and FSDP wrap.

        Raises:
            ConfigError: another stage.
        """
        if stage not in STAGES:
            raise ConfigError("Objective.forward", f"stage {stage!r}", f"one of {', '.join(STAGES)}", "Choose one.")
        loss = self.estimator_loss if stage == "estimators" else self.model_loss
        return loss(features, products)

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
        if not self.terms:
            raise EstimatorError("objective", "no terms", "one expression at least", "Leave the objective out.")
        ranks = None
        if self.gather != "off":
            ranks = find_ranks("objective", {"gather": True}.get(self.gather, self.gather), self.group)
        with contextlib.nullcontext() if ranks is None else checked(ranks, *features.values()):
            self._check_features(features)
            self._check_products(products)
        return self.estimators({name: outside_inference(features[name]) for name in self._readers}, products, ranks)

    def _check_features(self, features: Mapping[str, Tensor]) -> None:
        for name, term in self._readers.items():
            if name not in features:
                raise EstimatorError(
                    f"objective term {term}",
                    f"no feature {name!r}",
                    f"one among {sorted(features)}",
                    "Pass it with the others.",
                )
            if not isinstance(features[name], Tensor):
                what = f"a {type(features[name]).__name__} as feature {name!r}"
                raise EstimatorError(f"objective term {term}", what, "a torch.Tensor", "Call torch.as_tensor on it.")

    def _check_products(self, products: Mapping[str, Rows] | None) -> None:
        for term in self._conditional:
            if products is None or str(term) not in products:
                raise EstimatorError(
                    f"objective term {term}", "no product rows", "rows from Objective.sample_products",
                    "Pass products=.",
                )  # fmt: skip

    def estimator_loss(
        self, features: Mapping[str, Tensor], products: Mapping[str, Rows] | None = None
    ) -> ObjectiveOutput:
        """Stage 1: Σ weight · (the estimator's own loss). Pass detached features, so that only estimators learn."""
        estimates = self._estimate(features, products)
        losses = estimates.losses()
        return ObjectiveOutput(torch.dot(losses, self._arranged()(losses)), estimates)

    def model_loss(self, features: Mapping[str, Tensor], products: Mapping[str, Rows] | None = None) -> ObjectiveOutput:
        """Stage 2: −Σ weight · expression, with gradients to the features."""
        estimates = self._estimate(features, products)
        values = estimates.surrogates()
        return ObjectiveOutput(torch.dot(values, self._stage2(values)), estimates, self._sums)
