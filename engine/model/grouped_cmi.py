"""All conditional estimators of one shape evaluated together: few large products in place of many small ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from engine.kernels.cmi.op import ESTIMATORS, classifier_logits, cmi
from engine.kernels.cmi.reference import cmi_values, mimrl_classifier_loss, mimrl_cmi, mimrl_log_ratio
from engine.kernels.knn_product.op import ProductRows
from engine.model.cmi import CMIEstimator
from engine.model.estimators import Estimate, apart, finite, mlp_layers, or_zero
from engine.model.grouped import _Stacked

Rows = Sequence[Tensor]


class GroupedCMI(nn.Module):
    """Evaluates several `CMIEstimator`s at once, with the results and gradients of calling each of them.

    The estimators stay the owners of their parameters: names in state dicts, optimizers and checkpoints do not change.
    Their storage does, as in `engine.model.grouped.GroupedMI`: parameters of one layer of all classifiers become
    neighbours in one block of memory.

    Estimators run together if dim, hidden width and settings are equal. One by one run the others, all of them where
    product rows require gradients or differ in number, and where a batch is degenerate.

    Args:
        estimators: by the name under which the result is reported.
        triples: for every estimator the names of the features that are its x, y and z.
    """

    def __init__(self, estimators: Mapping[str, CMIEstimator], triples: Mapping[str, tuple[str, str, str]]):
        super().__init__()
        # Not registered as submodules: they belong to another module, whose state dict must not list them twice.
        self._estimators = dict(estimators)
        self._triples = dict(triples)
        alike: dict[tuple, list[str]] = {}
        for name, e in self._estimators.items():
            settings = (e.dim, e.classifier[0].out_features, e.estimator, e.compat, e.last_activate)
            alike.setdefault(settings, []).append(name)
        self._groups = [
            _Group({n: self._estimators[n] for n in names}, self._triples) for names in alike.values() if len(names) > 1
        ]

    @property
    def groups(self) -> list[list[str]]:
        """Names of the estimators that run together."""
        return [list(group.estimators) for group in self._groups]

    def forward(self, features: Mapping[str, Tensor], products: Mapping[str, Rows]) -> dict[str, Estimate]:
        """Every estimator's `Estimate`, in the order they were given in.

        Args:
            features: [B, width] each, of the joint rows.
            products: for every estimator its product rows (x, y, z); of `ProductRows` y and z are not repeated.

        Raises:
            EstimatorError: as the estimators do.
        """
        found: dict[str, Estimate] = {}
        for group in self._groups:
            found |= group.estimate(features, products) or {}
        for name, estimator in self._estimators.items():
            if name not in found:
                joint = tuple(features[f] for f in self._triples[name])
                found[name] = estimator(joint, tuple(products[name]))
        return {name: found[name] for name in self._estimators}


class _Group:
    """Estimators of one shape and setting."""

    def __init__(self, estimators: Mapping[str, CMIEstimator], triples: Mapping[str, tuple[str, str, str]]):
        self.estimators = dict(estimators)
        self.sources = list(dict.fromkeys(f for name in estimators for f in triples[name]))
        self.slots = [tuple(self.sources.index(f) for f in triples[name]) for name in estimators]
        self.stacks: list[Tensor] = []
        self.addresses: list[int] = []

    def estimate(self, features: Mapping[str, Tensor], products: Mapping[str, Rows]) -> dict[str, Estimate] | None:
        """All estimates; None where the estimators have to run one by one."""
        example = next(iter(self.estimators.values()))
        joint = [features[source] for source in self.sources]
        rows = [products[name] for name in self.estimators]
        k = rows[0].k if isinstance(rows[0], ProductRows) else 1
        parts = [(r.x, r.y, r.z) if isinstance(r, ProductRows) else tuple(r) for r in rows]
        if any((r.k if isinstance(r, ProductRows) else 1) != k for r in rows):
            return None
        if not _fit(joint, self.slots, parts, k, example.dim):
            return None
        count = len(parts[0][0])
        if example.compat == "mimrl":
            if count > len(joint[0]):
                return None
            if count < len(joint[0]):
                joint = [j[:count] for j in joint]
        first, *rest = self._stacked()
        of_joint, of_product = classifier_logits(first, rest, joint, self.slots, parts, k)
        if not finite(of_joint.detach().sum() + of_product.detach().sum()):
            return None
        with torch.autocast(of_joint.device.type, enabled=False):
            loss, surrogate, readings = _read(example, of_joint, of_product)
        loss, surrogate = (or_zero(t, example.on_degenerate) for t in (loss, surrogate))
        values, surrogates, losses = apart(surrogate.detach()), apart(surrogate), apart(loss)
        readings = [dict(zip(ESTIMATORS, apart(of_one), strict=True)) for of_one in readings.unbind(1)]
        return {
            name: Estimate(values[n], surrogates[n], losses[n], readings[n]) for n, name in enumerate(self.estimators)
        }

    def _stacked(self) -> list[tuple[Tensor, Tensor]]:
        """(weight [G, out, in], bias [G, out]) of every layer."""
        layers = [mlp_layers(e.classifier) for e in self.estimators.values()]
        parameters = [[layer[n][i] for layer in layers] for n in range(len(layers[0])) for i in (0, 1)]
        if torch.compiler.is_compiling():
            stacks = [torch.stack(part) for part in parameters]
        else:
            flat = [p for part in parameters for p in part]
            if [p.data_ptr() for p in flat] != self.addresses:
                self._bring_together(parameters)
            stacks = list(_Stacked.apply(self.stacks, [len(part) for part in parameters], *flat))
        return list(zip(stacks[::2], stacks[1::2], strict=True))

    @torch.no_grad()
    def _bring_together(self, parameters: Sequence[Sequence[Tensor]]) -> None:
        self.stacks = [torch.stack([p.detach() for p in part]) for part in parameters]
        for part, stack in zip(parameters, self.stacks, strict=True):
            for p, place in zip(part, stack.unbind(), strict=True):
                p.data = place
        self.addresses = [p.data_ptr() for part in parameters for p in part]


def _fit(joint: Sequence[Tensor], slots: Sequence[Sequence[int]], parts: Sequence[Rows], k: int, dim: int) -> bool:
    """Whether the rows are such that the estimators can run together."""
    if any(t.dim() != 2 for t in joint) or any(len(three) != 3 or any(t.dim() != 2 for t in three) for three in parts):
        return False
    b, p = len(joint[0]), len(parts[0][0])
    fits = b >= 2 and p > 0 and p % k == 0
    fits &= all(len(j) == b and 1 <= j.shape[1] <= dim for j in joint)
    for three, places in zip(parts, slots, strict=True):
        for i, (part, s) in enumerate(zip(three, places, strict=True)):
            fits &= part.shape == (p if i == 0 else p // k, joint[s].shape[1]) and not part.requires_grad
    return fits


def _read(example: CMIEstimator, joint: Tensor, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [G], surrogate [G], and LDR, DV, NWJ [3, G], detached, of logits [G, b, out] and [G, b', out]."""
    if example.compat == "none":
        return cmi(joint[:, :, 0], product[:, :, 0], example.estimator)
    loss = mimrl_classifier_loss(joint, product, example.last_activate)
    joint, product = (mimrl_log_ratio(t, example.last_activate) for t in (joint, product))
    values = cmi_values(joint.detach(), product.detach())
    return loss, mimrl_cmi(joint, product), torch.stack([values[e] for e in ESTIMATORS])
