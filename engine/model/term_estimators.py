"""The estimators of an objective's terms. Those of one shape form groups; the others are modules of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.errors import ConfigError, EstimatorError
from engine.model.estimators import Estimate, Estimates
from engine.model.groups import CMIGroup, Group, MIGroup, Rows

if TYPE_CHECKING:
    from engine.kernels.ranks.group import Ranks


@dataclass
class TermEstimates:
    """The estimates of all terms on one batch, in parts.

    Attributes:
        names: the names of all terms, in their order.
        parts: one per group, then one per single estimator.
        pieces: (part, start, stop): the entries of the parts that make up the vector of all terms.
    """

    names: Sequence[str]
    parts: Sequence[Estimates]
    pieces: Sequence[tuple[int, int, int]]

    def surrogates(self) -> Tensor:
        """[terms], with the gradient that increases the information."""
        return self._joined([part.surrogate for part in self.parts])

    def losses(self) -> Tensor:
        """[terms]; see `TermEstimators.signs`."""
        return self._joined([part.surrogate if part.loss is None else part.loss for part in self.parts])

    @cached_property
    def by_term(self) -> dict[str, Estimate]:
        estimates = {name: estimate for part in self.parts for name, estimate in part.apart().items()}
        return {name: estimates[name] for name in self.names}

    def _joined(self, vectors: Sequence[Tensor]) -> Tensor:
        pieces = [
            vectors[part] if (start, stop) == (0, len(vectors[part])) else vectors[part][start:stop]
            for part, start, stop in self.pieces
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class TermEstimators(nn.Module):
    """One estimator per term, by the term's key.

    Estimators of one shape form a group, whose parameters are one tensor per layer (see `engine.model.groups`). The
    others are submodules under their keys. `estimators[key]` is an `EstimatorView` for an estimator in a group, and the
    module itself otherwise. State dicts with one entry per estimator and parameter can be loaded, too. A state dict's
    metadata says which estimators a stack holds, so that the state of other terms, or of the same in another order, is
    loaded by name; with strict=False, terms that it lacks keep their values.

    Args:
        estimators: by key, in the order of the terms. Any module may take the place of an `MIEstimator` or
            `CMIEstimator`; see `Objective.replace`.
        names: the terms' names, by key.
        features: the names of the features that each term reads: x, y or x, y, z.
    """

    def __init__(
        self, estimators: Mapping[str, nn.Module], names: Mapping[str, str], features: Mapping[str, tuple[str, ...]]
    ):
        super().__init__()
        self._names, self._features = dict(names), dict(features)
        alike: dict[Any, list[str]] = {}
        for key, estimator in estimators.items():
            kind = MIGroup if len(features[key]) == 2 else CMIGroup
            shape = kind.alike(estimator)
            if shape is None:
                self.add_module(key, estimator)
            else:
                alike.setdefault((kind, shape), []).append(key)
        self.groups = nn.ModuleList(
            kind({key: estimators[key] for key in keys}, features) for (kind, _), keys in alike.items()
        )
        self._arrange()

    # -- evaluation --------------------------------------------------------------------------------

    def forward(
        self,
        features: Mapping[str, Tensor],
        products: Mapping[str, Rows] | None = None,
        ranks: Ranks | None = None,
    ) -> TermEstimates:
        """Every term's estimate.

        Args:
            features: [B, width] each.
            products: product rows of the conditional terms that need them, by the term's name.
            ranks: estimate from the joined batch of these ranks.
        """
        parts = []
        rows = {} if products is None else {k: products[n] for k, n in self._names.items() if n in products}
        for group in self.groups:
            given = (features,) if isinstance(group, MIGroup) else (features, rows)
            estimates = group(*given, ranks=ranks)
            estimates.names = [self._names[key] for key in estimates.names]
            estimates.details = {self._names[key]: of_one for key, of_one in estimates.details.items()}
            parts.append(estimates)
        for key in self._alone:
            given = tuple(features[f] for f in self._features[key])
            arguments = (given, tuple(rows[key])) if key in rows else given
            estimate = self._modules[key](*arguments) if ranks is None else _over(ranks, self._modules[key], arguments)
            if not hasattr(estimate, "surrogate"):
                raise EstimatorError(
                    f"objective term {self._names[key]}", f"a {type(estimate).__name__} from its estimator, a "
                    f"{type(self._modules[key]).__name__}", "an engine.model.estimators.Estimate", "Return one: value, "
                    "surrogate and loss, 0-d each.",
                )  # fmt: skip
            parts.append(Estimates.of({self._names[key]: estimate}))
        return TermEstimates(list(self._names.values()), parts, self._pieces)

    @property
    def signs(self) -> tuple[int, ...]:
        """±1 per term. The term's loss is this times its entry of `TermEstimates.losses`."""
        return self._signs

    @property
    def streams(self) -> bool:
        """Whether no unconditional term stores the scores of all pairs of rows. Groups never do."""
        alone = [self._modules[key] for key in self._alone if len(self._features[key]) == 2]
        return all(getattr(estimator, "streams", False) for estimator in alone)

    def _arrange(self) -> None:
        """Note where each term's entry stands. Called again whenever an estimator leaves its group."""
        self._alone = [key for key in self._names if key in self._modules]
        groups = [g for g in self.groups if any(key not in self._alone for key in g.names)]
        if len(groups) < len(self.groups):
            self.groups = nn.ModuleList(groups)
        places = {key: (g, n) for g, group in enumerate(groups) for n, key in enumerate(group.names)}
        places |= {key: (len(groups) + n, 0) for n, key in enumerate(self._alone)}
        pieces: list[tuple[int, int, int]] = []
        for key in self._names:
            part, n = places[key]
            if pieces and pieces[-1][0] == part and pieces[-1][2] == n:
                pieces[-1] = (part, pieces[-1][1], n + 1)
            else:
                pieces.append((part, n, n + 1))
        self._pieces = pieces
        of_mi = [isinstance(group, MIGroup) for group in groups] + [False] * len(self._alone)
        self._signs = tuple(-1 if of_mi[places[key][0]] else 1 for key in self._names)

    # -- one estimator -----------------------------------------------------------------------------

    def key(self, term: Any) -> str:
        """The key of a term, given as its key, its name or a `Term`."""
        known = next((key for key, name in self._names.items() if str(term) in (key, name)), None)
        if known is None:
            raise ConfigError("objective", f"no term {term}", f"one of {list(self._names.values())}", "Name a term.")
        return known

    def split(self, term: Any) -> nn.Module:
        """Take an estimator out of its group, with a copy of its values. One without a group is returned as it is.

        The group keeps its tensors, so that their optimisers stay valid. It still computes the estimator's entries, but
        nothing uses them.
        """
        key = self.key(term)
        group = self._group_of(key)
        if group is not None:
            self.replace(key, group.copy_of(key))
        return self._modules[key]

    def replace(self, term: Any, module: nn.Module) -> None:
        """Use another module as a term's estimator. See `Objective.replace`."""
        key = self.key(term)
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f"objective term {self._names[key]}", f"a {type(module).__name__}", "a module like MIEstimator or"
                " CMIEstimator", "Give a torch.nn.Module that returns an Estimate.",
            )  # fmt: skip
        self._modules.pop(key, None)
        self.add_module(key, module)
        self._arrange()

    def tensors(self, grads: bool = False) -> dict[str, Tensor | None]:
        """All parameters and buffers (or their gradients) under the names that they have in single estimators."""
        tensors: dict[str, Tensor | None] = {}
        for key in self._names:
            group = self._group_of(key)
            if group is not None:
                own = group.tensors(key, grads)
            else:
                own = self._modules[key].state_dict(keep_vars=True)
                own = {name: t.grad for name, t in own.items()} if grads else own
            tensors |= {f"{key}.{name}": None if t is None else t.detach() for name, t in own.items()}
        return tensors

    def _group_of(self, key: str) -> Group | None:
        return None if key in self._modules else next(group for group in self.groups if key in group.names)

    def __getitem__(self, term: Any) -> nn.Module | EstimatorView:
        key = self.key(term)
        return EstimatorView(self, key) if self._group_of(key) is not None else self._modules[key]

    def __setitem__(self, term: Any, module: nn.Module) -> None:
        self.replace(term, module)

    def __contains__(self, term: Any) -> bool:
        return str(term) in {*self._names, *self._names.values()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def keys(self) -> list[str]:
        return list(self._names)

    def values(self) -> list[nn.Module | EstimatorView]:
        return [self[key] for key in self._names]

    def items(self) -> list[tuple[str, nn.Module | EstimatorView]]:
        return [(key, self[key]) for key in self._names]

    def _stacks(self) -> dict[str, list[list[str]]]:
        """For each stacked tensor, the estimator and the name in it of every entry."""
        return {
            f"groups.{n}.{stack}": [list(member) for member in members]
            for n, group in enumerate(self.groups)
            for stack, members in group.entries.items()
        }

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):  # which estimators a stack holds cannot be seen from its shape
            destination._metadata[prefix[:-1]]["stacks"] = self._stacks()

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], *rest: Any,
    ) -> None:  # fmt: skip
        saved = local_metadata.get("stacks") or {}
        if saved != self._stacks():
            for stack, members in saved.items():
                whole = state_dict.pop(f"{prefix}{stack}", ())
                for (estimator, part), single in zip(members, whole, strict=False):
                    state_dict.setdefault(f"{prefix}{estimator}.{part}", single)  # one that left its group has its own
        # those that left their group here, but not in the state
        left = [key for key in self._alone if not any(name.startswith(f"{prefix}{key}.") for name in state_dict)]
        own = {f"{key}.{name}": t.shape for key in left for name, t in self._modules[key].state_dict().items()}
        for stack, members in saved.items() if own else ():  # a stack that FSDP shards cannot be taken apart
            for (estimator, part), single in zip(members, state_dict.get(f"{prefix}{stack}", ()), strict=False):
                if own.get(f"{estimator}.{part}") == single.shape:
                    state_dict[f"{prefix}{estimator}.{part}"] = single
        for n, group in enumerate(self.groups):
            missing_keys += group.restack(state_dict, prefix, f"{prefix}groups.{n}.", absent=self._alone)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)


def _over(ranks: Ranks, module: nn.Module, arguments: tuple[Any, ...]) -> Estimate:
    from engine.model.over_ranks import estimate_of

    return estimate_of(module, arguments, ranks)


class EstimatorView:
    """One estimator of a group, or a part of it, as if it were a module of its own.

    It can be called. Its tensors are views of the group's parameters: `view.critic.g[0].weight` can be read, or changed
    in place under `torch.no_grad()`. The views are no leaves; gradients belong to the group's parameters (see
    `Objective.estimator_state`). Setting an attribute (a tower, an activation, a setting) first takes the estimator out
    of its group, as `Objective.split` does, and then sets it on that module.
    """

    __slots__ = ("_key", "_owner", "_path")

    def __init__(self, owner: TermEstimators, key: str, path: str = ""):
        for name, value in (("_owner", owner), ("_key", key), ("_path", path)):
            object.__setattr__(self, name, value)

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """(name, view) of every parameter; of the whole estimator or of this part."""
        of_template = dict(self._template().named_parameters())
        return [(name, t) for name, t in self._tensors().items() if name in of_template]

    def parameters(self) -> list[Tensor]:
        return [tensor for _, tensor in self.named_parameters()]

    def state_dict(self) -> dict[str, Tensor]:
        """Values under the names that they have in the estimator; views without gradients."""
        return {name: tensor.detach() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy values of the same names and shapes into the group."""
        own = self.state_dict()
        if wrong := [n for n in {**own, **state} if n not in own or n not in state or own[n].shape != state[n].shape]:
            raise ConfigError(
                f"objective.estimators[{self._key!r}]", f"a state that differs in {sorted(wrong)[0]}",
                "the estimator's names and shapes", "Replace the estimator where another shape is wanted.",
            )  # fmt: skip
        for name, value in state.items():
            own[name].copy_(value)

    def requires_grad_(self, requires_grad: bool = True) -> nn.Module:
        """Freeze or free this estimator alone, or a part of it; it leaves its group."""
        return self._split().requires_grad_(requires_grad)

    def __call__(self, *arguments: Any) -> Any:
        if not self._path:
            return self._group().run(self._key, *arguments)
        return torch.func.functional_call(self._template(), self._tensors(), arguments)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self._gone():
            return getattr(self._split(), name)
        template = self._template()
        if name in self._tensors():
            return self._tensors()[name]
        if name in template._modules:
            return EstimatorView(self._owner, self._key, f"{self._path}{name}.")
        value = getattr(template, name, None)
        if callable(value) or not hasattr(template, name):
            raise AttributeError(f"{self!r} has no {name}: call objective.split({self._key!r}) for a module of its own")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._split(), name, value)

    def __getitem__(self, index: int) -> Any:
        if self._gone():
            return self._split()[index]
        return getattr(self, list(self._template()._modules)[index])

    def __setitem__(self, index: int, module: nn.Module) -> None:
        self._split()[index] = module

    def __len__(self) -> int:
        return len(self._split() if self._gone() else self._template())

    def __repr__(self) -> str:
        return f"objective.estimators[{self._key!r}]{'.' if self._path else ''}{self._path.removesuffix('.')}"

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return self._group().copy_of(self._key).get_submodule(self._path.removesuffix("."))

    def _gone(self) -> bool:
        """Whether the estimator has left its group since."""
        return self._owner._group_of(self._key) is None

    def _group(self) -> Group:
        return self._owner._group_of(self._key)

    def _template(self) -> nn.Module:
        return self._group().template(self._key).get_submodule(self._path.removesuffix("."))

    def _tensors(self) -> dict[str, Tensor]:
        whole = self._group().tensors(self._key)
        return {name.removeprefix(self._path): t for name, t in whole.items() if name.startswith(self._path)}

    def _split(self) -> nn.Module:
        return self._owner.split(self._key).get_submodule(self._path.removesuffix("."))
