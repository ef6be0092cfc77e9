"""Estimators of one shape as one module: each layer of all of them is one parameter, [N, out, in].

A group computes a few large products instead of many small ones, and an optimiser updates a few large tensors. The
kernels read these parameters directly; no step copies or stacks them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.kernels.cmi.op import classifier_logits, cmi
from engine.kernels.compiling import as_read
from engine.kernels.critics.op import entries, grouped_mlp, infonce_of_towers
from engine.kernels.gradients import update_buffer
from engine.kernels.knn_product.op import ProductRows
from engine.kernels.mi_bounds.op import mi_lower_bound
from engine.model.cmi import CMIEstimator
from engine.model.estimators import Estimate, Estimates, MIEstimator, finite, mlp_layers, or_zero

if TYPE_CHECKING:
    from engine.kernels.ranks.group import Ranks

Rows = Sequence[Tensor]


class StackedLinear(nn.Module):
    """One linear layer of N MLPs: `weight` [N, out, in] and `bias` [N, out]."""

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))


class Group(nn.Module):
    """Several estimators of one shape and one setting, computed together by `MIGroup` or `CMIGroup`.

    Where a batch cannot be computed together, such as a degenerate one, the estimators run one after another. Results
    and errors are therefore always those of the single estimators.

    Args:
        estimators: by name; their values are copied.
        features: the names of the features that each estimator reads.
    """

    def __init__(self, estimators: Mapping[str, nn.Module], features: Mapping[str, tuple[str, ...]]):
        super().__init__()
        self.names = list(estimators)
        self.features = [tuple(features[name]) for name in self.names]
        # The estimators without values. In a dict, so that they are not registered as submodules.
        self._templates = {name: copy.deepcopy(estimator).to("meta") for name, estimator in estimators.items()}
        # For each parameter and buffer of the group: (estimator, name in the estimator) of every entry.
        self._entries: dict[str, list[tuple[str, str]]] = {}

    def _stack(self, name: str, layers: Sequence[tuple[str, str, nn.Linear]]) -> StackedLinear:
        """`layers`: (estimator, name in the estimator, the layer). `name`: of the stack in the group."""
        for kind in ("weight", "bias"):
            self._entries[f"{name}.{kind}"] = [(estimator, f"{path}.{kind}") for estimator, path, _ in layers]
        return StackedLinear([layer for _, _, layer in layers])

    @property
    def example(self) -> Any:
        """One of the estimators, without values. All have the same settings."""
        return self._templates[self.names[0]]

    # -- one estimator's part ----------------------------------------------------------------------

    def tensors(self, name: str, grads: bool = False) -> dict[str, Tensor | None]:
        """One estimator's parameters and buffers (or gradients) as views, under the names that they have in it."""
        own = dict(self.named_buffers()) | dict(self.named_parameters())
        if grads:
            own = {stack: t.grad if isinstance(t, nn.Parameter) else None for stack, t in own.items()}
        parts: dict[str, Tensor | None] = {}
        for stack, members in self._entries.items():
            whole = own[stack]
            for n, (estimator, part) in enumerate(members):
                if estimator == name:
                    parts[part] = None if whole is None else whole[n]
        return {part: parts[part] for part in self._templates[name].state_dict()}

    def template(self, name: str) -> nn.Module:
        """One estimator without values."""
        return self._templates[name].train(self.training)

    def copy_of(self, name: str) -> nn.Module:
        """One estimator as a module of its own, with a copy of its values."""
        estimator = copy.deepcopy(self.template(name))
        estimator.load_state_dict({part: t.detach().clone() for part, t in self.tensors(name).items()}, assign=True)
        learns = next(self.parameters()).requires_grad
        return estimator.requires_grad_(learns)

    def run(self, name: str, *arguments: Any) -> Estimate:
        """One estimator's estimate; its gradients reach the group's parameters."""
        return torch.func.functional_call(self.template(name), self.tensors(name), arguments)

    def one_by_one(self, arguments: Mapping[str, tuple[Any, ...]]) -> Estimates:
        return Estimates.of({name: self.run(name, *arguments[name]) for name in self.names})

    @property
    def entries(self) -> dict[str, list[tuple[str, str]]]:
        """For each parameter and buffer of the group: (estimator, name in the estimator) of every entry."""
        return self._entries

    def restack(self, state: dict[str, Tensor], parts: str, prefix: str, absent: Iterable[str] = ()) -> list[str]:
        """Stack the tensors of single estimators in a state dict as this group stacks them.

        Args:
            state: changed in place. Misshapen entries stay as they are, and so does a state without single estimators.
            parts: prefix of the estimators' names in `state`.
            prefix: prefix of the group's own tensors.
            absent: estimators whose values are taken from the group itself.

        Returns:
            The names of entries that were missing, in a stack of the state, too. Their values are taken from the group
            itself.
        """
        own, missing, absent = self.state_dict(), [], set(absent)
        given = {
            name
            for stack, members in self._entries.items()
            for e, part in members
            if (name := f"{parts}{e}.{part}") in state and state[name].shape == own[stack].shape[1:] and e not in absent
        }
        if not given:
            return []
        for stack, members in self._entries.items():
            names = [f"{parts}{e}.{part}" for e, part in members]
            rest = state.get(f"{prefix}{stack}")
            if rest is None or rest.shape != own[stack].shape:
                rest = own[stack]
                missing += [n for n, (e, _) in zip(names, members, strict=True) if n not in given and e not in absent]
            singles = [state.pop(n) if n in given else rest[i] for i, n in enumerate(names)]
            like = next((t for t, n in zip(singles, names, strict=True) if n in given), singles[0])
            state[f"{prefix}{stack}"] = torch.stack([t.to(like) for t in singles])
        return missing


class MIGroup(Group):
    """`MIEstimator`s with separate critics: all towers at once.

    They run together if they have ReLU, a constant baseline, and equal settings and widths of hidden layers. Widths of
    x and y may differ. See `alike`.

    Parameters: `first.{i}` holds the first layers of the towers that read the i-th feature, `rest.{l}` the further
    layers of all towers in the order of `first`. MINE has a buffer `log_ema`, [estimators].
    """

    def __init__(self, estimators: Mapping[str, MIEstimator], features: Mapping[str, tuple[str, str]]):
        super().__init__(estimators, features)
        self.sources = list(dict.fromkeys(source for read in self.features for source in read))
        towers = [
            (source, name, which)
            for source in self.sources
            for name, read in zip(self.names, self.features, strict=True)
            for which, of_tower in zip("gh", read, strict=True)
            if of_tower == source
        ]
        # numbers of the towers of y, and of x, in the order of the estimators
        order = [tower[1:] for tower in towers]
        self.rows, self.columns = ([order.index((name, which)) for name in self.names] for which in "hg")
        linear = {
            tower: [(f"critic.{tower[2]}.{n}", m) for n, m in enumerate(modules) if isinstance(m, nn.Linear)]
            for tower in towers
            for modules in [getattr(estimators[tower[1]].critic, tower[2])]
        }

        def layer(level: int, of: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, nn.Linear]]:
            return [(tower[1], *linear[tower][level]) for tower in of]

        reading = [[tower for tower in towers if tower[0] == source] for source in self.sources]
        self.first = nn.ModuleList(self._stack(f"first.{i}", layer(0, of)) for i, of in enumerate(reading))
        levels = range(1, len(linear[towers[0]]))
        self.rest = nn.ModuleList(self._stack(f"rest.{level - 1}", layer(level, towers)) for level in levels)
        if hasattr(self.example, "log_ema"):
            self.register_buffer("log_ema", torch.stack([e.log_ema for e in estimators.values()]))
            self._entries["log_ema"] = [(name, "log_ema") for name in self.names]

    @staticmethod
    def alike(estimator: nn.Module) -> tuple | None:
        """Equal for estimators that can form a group; None for those that cannot."""
        e = estimator
        if not isinstance(e, MIEstimator) or e.group_key is None:
            return None
        if e.critic.kind != "separate" or e.critic.activation != "relu" or e.baseline.kind != "constant":
            return None
        towers = [mlp_layers(tower) for tower in (e.critic.g, e.critic.h)]
        if None in towers:
            return None
        of_g, of_h = ([(len(layers[0][0]), *(w.shape for w, _ in layers[1:]))] for layers in towers)
        if of_g != of_h:
            return None
        return (e.group_key, *of_g)

    def arguments(self, features: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """What each estimator is called with."""
        return {name: (features[x], features[y]) for name, (x, y) in zip(self.names, self.features, strict=True)}

    def forward(self, features: Mapping[str, Tensor], ranks: Ranks | None = None) -> Estimates:
        """features [B, width] each -> all estimates.

        Args:
            features: of this process.
            ranks: estimate from the joined batch of these ranks.

        Raises:
            EstimatorError: as the estimators do.
        """
        if ranks is not None:
            from engine.model.over_ranks import mi_group_estimates

            return mi_group_estimates(self, features, ranks)
        inputs = [features[source] for source in self.sources]
        value = self._together(inputs) if self._fits(inputs) else None
        if value is None:
            estimates = self.one_by_one(self.arguments(features))
            estimates.loss = None  # it is -surrogate for all estimators that can form a group
            return estimates
        return Estimates(self.names, or_zero(value, self.example.on_degenerate))

    def _fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the estimators accept the batch. If not, they run one by one and raise their own errors."""
        rows, widths = len(inputs[0]), [layer.weight.shape[2] for layer in self.first]
        return rows >= 2 and all(x.shape == (rows, width) for x, width in zip(inputs, widths, strict=True))

    def _together(self, inputs: Sequence[Tensor]) -> Tensor | None:
        """Values [estimators]; None where an estimator would find the batch degenerate."""
        e = self.example
        if e.bound == "infonce":
            stacks = [t for layers in (self.first, self.rest) for layer in layers for t in (layer.weight, layer.bias)]
            value = infonce_of_towers(inputs, stacks, self.rows, self.columns)
            return value if finite(value) else None
        first, rest = ([(layer.weight, layer.bias) for layer in layers] for layers in (self.first, self.rest))
        embedded = grouped_mlp(inputs, first, rest)
        q, k = entries(embedded, self.rows), entries(embedded, self.columns)
        settings = {"bound": e.bound, "alpha": e.alpha, "smile_tau": e.smile_tau}
        log_ema = None
        if e.bound == "mine":
            average = as_read("MINE's moving average", self.log_ema, self.training)
            value, log_ema = mi_lower_bound(q, k, log_ema=average, ema_rate=e.ema_rate, **settings)
        else:
            value = mi_lower_bound(q, k, **settings)
        # A non-finite score makes every bound non-finite, unless its formula clips scores. So check embeddings, too.
        if not finite(value, embedded):
            return None
        if log_ema is not None and self.training:
            update_buffer("MINE's moving average", self.log_ema, log_ema, e.on_degenerate == "skip")
        return value


class CMIGroup(Group):
    """`CMIEstimator`s of equal dim, hidden width and settings: all classifiers at once. See `alike`.

    They run one by one where product rows require gradients or differ in number.

    Parameters: `layers.{l}` holds the l-th layer of all classifiers.
    """

    def __init__(self, estimators: Mapping[str, CMIEstimator], features: Mapping[str, tuple[str, str, str]]):
        super().__init__(estimators, features)
        self.sources = list(dict.fromkeys(source for read in self.features for source in read))
        self.slots = [tuple(self.sources.index(source) for source in read) for read in self.features]
        places = [n for n, m in enumerate(self.example.classifier) if isinstance(m, nn.Linear)]
        self.layers = nn.ModuleList(
            self._stack(
                f"layers.{level}", [(name, f"classifier.{n}", e.classifier[n]) for name, e in estimators.items()]
            )
            for level, n in enumerate(places)
        )

    @staticmethod
    def alike(estimator: nn.Module) -> tuple | None:
        """Equal for estimators that can form a group; None for those that cannot."""
        if not isinstance(estimator, CMIEstimator) or estimator.group_key is None:
            return None
        layers = mlp_layers(estimator.classifier)
        return None if layers is None else (estimator.group_key, *(w.shape for w, _ in layers))

    def arguments(self, features: Mapping[str, Tensor], products: Mapping[str, Rows]) -> dict[str, tuple[Rows, Rows]]:
        """What each estimator is called with."""
        return {
            name: (tuple(features[f] for f in read), tuple(products[name]))
            for name, read in zip(self.names, self.features, strict=True)
        }

    def forward(
        self, features: Mapping[str, Tensor], products: Mapping[str, Rows], ranks: Ranks | None = None
    ) -> Estimates:
        """All estimates.

        Args:
            features: [B, width] each, of the joint rows.
            products: the product rows (x, y, z) of each estimator. y and z of `ProductRows` are not repeated.
            ranks: estimate from the joint and product rows of these ranks.

        Raises:
            EstimatorError: as the estimators do.
        """
        if ranks is not None:
            from engine.model.over_ranks import cmi_group_estimates

            return cmi_group_estimates(self, features, products, ranks)
        return self._together(features, products) or self.one_by_one(self.arguments(features, products))

    def _together(self, features: Mapping[str, Tensor], products: Mapping[str, Rows]) -> Estimates | None:
        logits = self.logits(features, products)
        return None if logits is None else self.read(*logits)

    def logits(self, features: Mapping[str, Tensor], products: Mapping[str, Rows]) -> tuple[Tensor, Tensor] | None:
        """Logits of joint [n, B, outputs] and of product rows; None where the estimators cannot run together."""
        joint = [features[source] for source in self.sources]
        rows = [products[name] for name in self.names]
        ks = {r.k if isinstance(r, ProductRows) else 1 for r in rows}
        parts = [(r.x, r.y, r.z) if isinstance(r, ProductRows) else tuple(r) for r in rows]
        k = max(ks)
        if len(ks) > 1 or not _fit(joint, self.slots, parts, k, self.example.dim):
            return None
        used = self.example.joint_rows(len(joint[0]), len(parts[0][0]))
        if used < len(joint[0]):
            joint = [j[:used] for j in joint]
        first, *rest = ((layer.weight, layer.bias) for layer in self.layers)
        return classifier_logits(first, rest, joint, self.slots, parts, k)

    def read(self, of_joint: Tensor, of_product: Tensor) -> Estimates | None:
        """All estimates from the logits; None where an estimator would find the batch degenerate."""
        if not finite(of_joint, of_product):
            return None
        with torch.autocast(of_joint.device.type, enabled=False):
            if type(self.example) is CMIEstimator:  # its `read_logits` is one kernel for all
                loss, surrogate, readings = cmi(of_joint.squeeze(2), of_product.squeeze(2), self.example.estimator)
            else:
                loss, surrogate, readings = self.example.read_logits(of_joint, of_product)
        loss, surrogate = (or_zero(t, self.example.on_degenerate) for t in (loss, surrogate))
        return Estimates(self.names, surrogate, loss, readings)


def _fit(joint: Sequence[Tensor], slots: Sequence[Sequence[int]], parts: Sequence[Rows], k: int, dim: int) -> bool:
    """Whether the rows have the shapes with which the estimators can run together."""
    if any(t.dim() != 2 for t in joint) or any(len(three) != 3 or any(t.dim() != 2 for t in three) for three in parts):
        return False
    b, p = len(joint[0]), len(parts[0][0])
    fits = b >= 2 and p > 0 and p % k == 0
    fits &= all(len(j) == b and 1 <= j.shape[1] <= dim for j in joint)
    for three, places in zip(parts, slots, strict=True):
        for i, (part, s) in enumerate(zip(three, places, strict=True)):
            fits &= part.shape == (p if i == 0 else p // k, joint[s].shape[1]) and not part.requires_grad
    return fits
