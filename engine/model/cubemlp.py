"""CubeMLP: a stack of blocks, each mixing the time, modality and channel axes of a cube in turn."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.kernels.cube_mix import op
from engine.kernels.cube_mix.reference import axis_mix

AXES = ("time", "modality", "channel")
AXIS_KEYS = {"time": "data.time_len", "modality": "the number of modalities", "channel": "model.d_common"}
LAYER_NORM_EPS = 1e-6

_ACTIVATIONS = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "hardshrink": nn.Hardshrink,
    "hardtanh": nn.Hardtanh,
    "leakyrelu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "relu": nn.ReLU,
    "rrelu": nn.RReLU,
    "tanh": nn.Tanh,
}


def make_activation(name: str) -> nn.Module:
    """The activation that `model.cubemlp.activate` calls `name`. An unknown name raises ConfigError."""
    if name not in _ACTIVATIONS:
        raise ConfigError(
            "model.cubemlp.activate", repr(name), "one of " + ", ".join(_ACTIVATIONS), "Choose one of these."
        )
    return _ACTIVATIONS[name]()


def _shape(dims: Sequence[int]) -> str:
    return "-".join(str(n) for n in dims)


class AxisMix(nn.Module):
    """The parameters of one axis mix, and a call of it. [B, l, k, d] -> the same with `axis` resized to d_out."""

    def __init__(
        self,
        axis: int,
        d_in: int,
        d_hidden: int,
        d_out: int,
        activate: str = "gelu",
        bias: bool = True,
        ln_first: bool = False,
        res_project: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.axis, self.activate, self.ln_first, self.dropout = axis, activate, ln_first, dropout
        self.fc1 = nn.Linear(d_in, d_hidden, bias=bias)
        self.act = make_activation(activate)
        self.fc2 = nn.Linear(d_hidden, d_out, bias=bias)
        self.residual = nn.Linear(d_in, d_out, bias=False) if res_project else None
        self.norm = nn.LayerNorm(d_in if ln_first else d_out, eps=LAYER_NORM_EPS)

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        """In the order of `op.cube_mix`'s arguments."""
        residual = None if self.residual is None else self.residual.weight
        fc1, fc2, norm = self.fc1, self.fc2, self.norm
        return fc1.weight, fc1.bias, fc2.weight, fc2.bias, residual, norm.weight, norm.bias

    @property
    def has_kernel(self) -> bool:
        """Whether `op` knows this mix: its activation, and no dropout now."""
        return self.activate in op.ACTIVATIONS and not (self.training and self.dropout)

    def forward(self, x: Tensor) -> Tensor:
        settings = {"ln_first": self.ln_first, "eps": self.norm.eps}
        if self.has_kernel:
            return op.cube_mix(x, self.axis, *self.weights, activation=self.activate, **settings)
        settings |= {"dropout": self.dropout, "training": self.training}
        return axis_mix(x, self.axis, *self.weights, activation=self.act, **settings)


class CubeBlock(nn.Module):
    """Mixes time, then modality, then channel: [B, *d_in] -> [B, *d_out]."""

    def __init__(
        self,
        d_in: Sequence[int],
        d_hidden: Sequence[int],
        d_out: Sequence[int],
        activate: str,
        bias: bool,
        ln_first: bool,
        res_project: bool,
        dropout: Sequence[float],
    ):
        super().__init__()
        for i, axis in enumerate(AXES):
            mix = AxisMix(i + 1, d_in[i], d_hidden[i], d_out[i], activate, bias, ln_first, res_project, dropout[i])
            self.add_module(axis, mix)

    def forward(self, x: Tensor) -> Tensor:
        mixes = (self.time, self.modality, self.channel)
        if op.on_triton(x) and all(mix.has_kernel for mix in mixes):
            settings = {"activation": self.time.activate, "ln_first": self.time.ln_first, "eps": self.time.norm.eps}
            return op.cube_block(x, *(mix.weights for mix in mixes), **settings)
        return self.channel(self.modality(self.time(x)))


class CubeMLP(nn.Module):
    """The fusion encoder of CubeMLP (Sun et al., ACM MM 2022).

    Args:
        d_in: lengths (time, modality, channel) of the input cube.
        d_hiddens, d_outs: one (time, modality, channel) triple per block.
        activate: elu gelu hardshrink hardtanh leakyrelu prelu relu rrelu tanh (rrelu is random in training).
        bias: whether the two Linears of every mix have a bias. The residual projection has none.
        ln_first: LayerNorm on the MLP's input instead of on the sum.
        res_project: one flag per block; None for a projection in every block. False means an identity residual, for
            which d_in must equal d_out.
        dropout: of the (time, modality, channel) mixes.

    Raises:
        ConfigError: naming the key of `model.cubemlp` whose value does not fit.
    """

    def __init__(
        self,
        d_in: Sequence[int],
        d_hiddens: Sequence[Sequence[int]],
        d_outs: Sequence[Sequence[int]],
        activate: str = "gelu",
        bias: bool = True,
        ln_first: bool = False,
        res_project: Sequence[bool] | None = None,
        dropout: Sequence[float] = (0.0, 0.0, 0.0),
    ):
        super().__init__()
        res_project = (True,) * len(d_outs) if res_project is None else res_project
        self._check(d_in, d_hiddens, d_outs, res_project, dropout)
        shapes = [tuple(d_in), *(tuple(d) for d in d_outs)]
        self.d_in, self.d_out = shapes[0], shapes[-1]
        self.blocks = nn.ModuleList(
            CubeBlock(shapes[i], d_hiddens[i], shapes[i + 1], activate, bias, ln_first, res_project[i], dropout)
            for i in range(len(d_outs))
        )

    @torch.no_grad()
    def start_as_average(self) -> None:
        """Set a fresh model's residual projections to averages: output k is the mean of the k-th stretch of inputs.

        Where an axis keeps its length, this is the identity. The stack then starts near a mean over time. Random
        projections would mix positions and modalities, which costs a first epoch to undo.
        """
        for block in self.blocks:
            for axis in AXES:
                residual = getattr(block, axis).residual
                if residual is None:
                    continue
                n_out, n_in = residual.weight.shape
                residual.weight.zero_()
                for k in range(n_out):
                    first = k * n_in // n_out
                    last = max((k + 1) * n_in // n_out, first + 1)
                    residual.weight[k, first:last] = 1 / (last - first)

    @staticmethod
    def _check(d_in, d_hiddens, d_outs, res_project, dropout) -> None:
        key = "model.cubemlp"
        for name, value in (("d_hiddens", d_hiddens), ("res_project", res_project)):
            if len(value) != len(d_outs):
                raise ConfigError(
                    f"{key}.{name}",
                    f"{len(value)} entries",
                    f"one per block, {len(d_outs)} as in {key}.d_outs",
                    "Give d_hiddens, d_outs and res_project the same number of entries.",
                )
        if not d_outs:
            raise ConfigError(f"{key}.d_outs", "no block", "at least one", "Add a block, such as 10-3-128.")
        triples = [("d_in", d_in), *((f"d_hiddens[{i}]", d) for i, d in enumerate(d_hiddens))]
        triples += [(f"d_outs[{i}]", d) for i, d in enumerate(d_outs)]
        for name, dims in triples:
            if len(dims) != len(AXES) or min(dims) < 1:
                raise ConfigError(
                    f"{key}.{name}", _shape(dims), "three lengths of at least 1", "Write it as time-modality-channel."
                )
        if len(dropout) != len(AXES) or not all(0 <= p < 1 for p in dropout):
            raise ConfigError(
                f"{key}.dropout", str(list(dropout)), "three rates in [0, 1)", "Give time, modality and channel a rate."
            )
        d_before = d_in
        for i, d_out in enumerate(d_outs):
            unequal = [f"{a} {m} -> {n}" for a, m, n in zip(AXES, d_before, d_out, strict=True) if m != n]
            if unequal and not res_project[i]:
                raise ConfigError(
                    f"{key}.res_project[{i}]",
                    f"false where block {i} changes {', '.join(unequal)}",
                    f"true, or {key}.d_outs[{i}] = {_shape(d_before)}",
                    "An identity residual cannot change an axis' length.",
                )
            d_before = d_out

    def forward(self, x: Tensor) -> Tensor:
        """[B, *d_in] -> [B, *d_out]. ConfigError where the lengths of x's axes differ from d_in."""
        if tuple(x.shape[1:]) != self.d_in:
            wrong = next((a for a, n, m in zip(AXES, x.shape[1:], self.d_in, strict=False) if n != m), AXES[0])
            raise ConfigError(
                f"CubeMLP's {wrong} axis",
                f"an input of {_shape(x.shape[1:])}",
                _shape(self.d_in),
                f"Build the model with the {AXIS_KEYS[wrong]} that the data have.",
            )
        for block in self.blocks:
            x = block(x)
        return x


def compose(x: Tensor, dim: int, how: str) -> Tensor:
    """Remove axis `dim` of x by mean, sum, or cat. cat lays the slices end to end along the last axis.

    >>> compose(torch.ones(4, 3, 2), 1, "cat").shape
    torch.Size([4, 6])
    """
    if how == "mean":
        return x.mean(dim)
    if how == "sum":
        return x.sum(dim)
    return torch.cat(x.unbind(dim), dim=-1)
