"""All mutual-information estimators of one shape evaluated together: few large products in place of many small ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from engine.kernels.critics.op import grouped_infonce, grouped_infonce_of_parts, grouped_mlp
from engine.kernels.mi_bounds.op import mi_lower_bound
from engine.kernels.registry import backend_for
from engine.model.estimators import Estimate, MIEstimator, apart, finite, mlp_layers, or_zero

# What compat="mimrl" computes in another way than the corrected bounds.
DIFFERENT_IN_MIMRL = ("mine", "js", "smile", "interpolate")


class GroupedMI(nn.Module):
    """Evaluates several `MIEstimator`s at once, with the results and gradients of calling each of them.

    The estimators stay the owners of their parameters: names in state dicts, optimizers and checkpoints do not change.
    Their storage does: parameters of one layer of all critics become neighbours in one block of memory (as
    `torch.nn.RNN.flatten_parameters` does), and so do their gradients, so that nothing is copied in a step. Where
    parameters have been moved since (another device, a deep copy), they are brought together anew.

    Estimators run together if they have separate critics with ReLU, a constant baseline and equal settings and widths
    of hidden layers; widths of x and y may differ. The others run one by one.

    Args:
        estimators: by the name under which the result is reported.
        pairs: for every estimator the names of the features that are its x and y.
    """

    def __init__(self, estimators: Mapping[str, MIEstimator], pairs: Mapping[str, tuple[str, str]]):
        super().__init__()
        # Not registered as submodules: they belong to another module, whose state dict must not list them twice.
        self._estimators = dict(estimators)
        self._pairs = dict(pairs)
        self._groups = [_Group({n: self._estimators[n] for n in names}, self._pairs) for names in self._alike()]

    @property
    def groups(self) -> list[list[str]]:
        """Names of the estimators that run together."""
        return [list(group.estimators) for group in self._groups]

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Estimate]:
        """features [B, width] each -> every estimator's `Estimate`, in the order they were given in.

        Raises:
            EstimatorError: as the estimators do.
        """
        found: dict[str, Estimate] = {}
        for group in self._groups:
            found |= group.estimate(features) or {}
        for name, estimator in self._estimators.items():
            if name not in found:
                x, y = self._pairs[name]
                found[name] = estimator(features[x], features[y])
        return {name: found[name] for name in self._estimators}

    def _alike(self) -> list[list[str]]:
        alike: dict[tuple, list[str]] = {}
        for name, estimator in self._estimators.items():
            key = _key(estimator)
            if key is not None:
                alike.setdefault(key, []).append(name)
        return [names for names in alike.values() if len(names) > 1]


def _key(estimator: MIEstimator) -> tuple | None:
    """Equal for estimators that can run together; None for those that cannot."""
    e = estimator
    if e.critic.kind != "separate" or e.critic.activation != "relu" or e.baseline.kind != "constant":
        return None
    if e.compat == "mimrl" and e.bound in DIFFERENT_IN_MIMRL:
        return None
    towers = [[tuple(w.shape) for w, _ in mlp_layers(tower)] for tower in (e.critic.g, e.critic.h)]
    shapes = [(first[0], *further) for first, *further in towers]
    if shapes[0] != shapes[1]:
        return None
    return (e.bound, e.compat, e.alpha, e.smile_tau, e.ema_rate, *shapes[0])


class _Group:
    """Estimators of one shape. Their towers are ordered by the feature that they read."""

    def __init__(self, estimators: Mapping[str, MIEstimator], pairs: Mapping[str, tuple[str, str]]):
        self.estimators = dict(estimators)
        self.sources = list(dict.fromkeys(name for e in estimators for name in pairs[e]))
        towers = [
            (source, name, which)
            for source in self.sources
            for name in estimators
            for which, read in zip("gh", pairs[name], strict=True)
            if read == source
        ]
        self.counts = [sum(tower[0] == source for tower in towers) for source in self.sources]
        self.towers = [(name, which) for _, name, which in towers]
        modules = [
            [m for m in getattr(estimators[name].critic, which) if isinstance(m, nn.Linear)]
            for _, name, which in towers
        ]
        # by stack: of the first layer by feature, then by layer
        self.layers: list[list[nn.Linear]] = []
        begin = 0
        for count in self.counts:
            self.layers.append([tower[0] for tower in modules[begin : begin + count]])
            begin += count
        self.layers += [[tower[level] for tower in modules] for level in range(1, len(modules[0]))]
        self.widths = [layers[0].in_features for layers in self.layers[: len(self.counts)]]
        # places of the towers of x, and of y, in the order of the estimators
        self.of_x, self.of_y = ([self.towers.index((name, which)) for name in estimators] for which in "gh")
        self.stacks: list[Tensor] = []
        self.places: list[int] = []  # of parameters and stacks in memory, where the former are parts of the latter

    def parameters(self) -> list[list[Tensor]]:
        """For every stack the parameters in it; stacks of weights and of biases alternate."""
        return [part for ls in self.layers for part in ([m.weight for m in ls], [m.bias for m in ls])]

    def estimate(self, features: Mapping[str, Tensor]) -> dict[str, Estimate] | None:
        """All estimates; None where one of the estimators has something to say about the batch."""
        inputs = [features[source] for source in self.sources]
        if not self._fits(inputs):
            return None
        example = next(iter(self.estimators.values()))
        if example.bound == "infonce" and not torch.compiler.is_compiling() and self._on_cpu(inputs):
            parts = self._parts()
            value = grouped_infonce_of_parts(inputs, self.stacks, parts, self.of_y, self.of_x)
            return self._estimates(value) if finite(value) else None
        stacked = self._stacked()
        split = 2 * len(inputs)
        first, rest = (list(zip(s[::2], s[1::2], strict=True)) for s in (stacked[:split], stacked[split:]))
        if example.bound == "infonce":
            value = grouped_infonce(inputs, first, rest, self.of_y, self.of_x)
            return self._estimates(value) if finite(value) else None
        embedded = grouped_mlp(inputs, first, rest)
        towers = embedded.unbind()
        q, k = (torch.stack([towers[n] for n in places]) for places in (self.of_y, self.of_x))
        ema = None
        if example.bound == "mine":
            ema = torch.stack([e.log_ema for e in self.estimators.values()])
        value = mi_lower_bound(
            q, k, bound=example.bound, alpha=example.alpha, smile_tau=example.smile_tau, log_ema=ema,
            ema_rate=example.ema_rate,
        )  # fmt: skip
        if ema is not None:
            value, ema = value
        # A non-finite score leaves no bound finite, except where a formula cuts it off: those look at the embeddings.
        if not finite(value, embedded):
            return None
        if ema is not None:
            for estimator, log_ema in zip(self.estimators.values(), ema, strict=True):
                if estimator.training:
                    estimator.log_ema.copy_(log_ema)
        return self._estimates(value)

    def _estimates(self, value: Tensor) -> dict[str, Estimate]:
        value = or_zero(value, next(iter(self.estimators.values())).on_degenerate)
        values, surrogates, losses = apart(value.detach()), apart(value), apart(-value)
        return {name: Estimate(values[n], surrogates[n], losses[n]) for n, name in enumerate(self.estimators)}

    def _fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the batch is one the estimators accept; if not, they say themselves what is wrong."""
        rows = len(inputs[0])
        return rows >= 2 and all(x.shape == (rows, width) for x, width in zip(inputs, self.widths, strict=True))

    def _on_cpu(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the CPU's kernel takes inputs and parameters as they are."""
        dtype = self.layers[0][0].weight.dtype
        return backend_for(inputs[0], "critics_mlp_forward") == "cpu" and all(
            x.dtype == dtype in (torch.float32, torch.float64) and x.is_contiguous() for x in inputs
        )

    def _stacked(self) -> list[Tensor]:
        if torch.compiler.is_compiling():
            return [torch.stack(part) for part in self.parameters()]
        parts = self._parts()
        return list(_Stacked.apply(self.stacks, [len(stack) for stack in self.stacks], *parts))

    def _parts(self) -> list[Tensor]:
        """The parameters, which are now entries of `stacks`, in their order."""
        parameters = self.parameters()
        flat = [p for part in parameters for p in part]
        if [t.data_ptr() for t in (*flat, *self.stacks)] != self.places:
            self._bring_together(parameters)
        return flat

    @torch.no_grad()
    def _bring_together(self, parameters: Sequence[Sequence[Tensor]]) -> None:
        self.stacks = [torch.stack([p.detach() for p in part]) for part in parameters]
        for part, stack in zip(parameters, self.stacks, strict=True):
            for p, place in zip(part, stack.unbind(), strict=True):
                p.data = place
        self.places = [t.data_ptr() for part in (*parameters, self.stacks) for t in part]


class _Stacked(torch.autograd.Function):
    """The stacks that parameters are part of, as functions of them; their gradients are parts of the stacks' ones."""

    @staticmethod
    def forward(ctx, stacks, counts, *parameters):
        ctx.counts = counts
        # not read in backward, but checked: a parameter that changed since makes the gradient wrong
        ctx.save_for_backward(*parameters)
        return tuple(stack.detach() for stack in stacks)

    @staticmethod
    def backward(ctx, *grads):
        _ = ctx.saved_tensors
        found = []
        for grad, count in zip(grads, ctx.counts, strict=True):
            found += [None] * count if grad is None else grad.unbind()
        return None, None, *found
