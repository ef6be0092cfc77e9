"""Fusion encoders: from one aligned sequence per modality to one feature. `register_fusion` adds your own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from engine.config import Config
from engine.errors import ConfigError
from engine.model.cubemlp import CubeMLP, compose
from engine.model.encoders import masked_mean


class FusionEncoder(Protocol):
    """The interface of a fusion encoder: an nn.Module with a `dim` and this forward.

    The result for a sample must not depend on the other rows of the batch.
    """

    dim: int

    def __call__(self, x: Tensor, mask: Tensor) -> Tensor:
        """x float32 [B, L, K, D], mask bool [B, L, K], true at valid positions -> [B, dim].

        K is the number of data.modalities: of text, audio and vision, in this order. L is data.time_len. In fast mode x
        is zero where mask is false. Text holds the mean of the sentence there, unless model.text_padding is zero.
        """
        ...


class CubeMLPFusion(CubeMLP):
    """CubeMLP, whose modality and time axes are then removed by mean, sum or cat. It reads no mask."""

    def __init__(self, *args, compose_k: str = "mean", compose_t: str = "mean", **kwargs):
        super().__init__(*args, **kwargs)
        self.compose_k, self.compose_t = compose_k, compose_t
        time, modality, channel = self.d_out
        self.dim = channel * (modality if compose_k == "cat" else 1) * (time if compose_t == "cat" else 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = super().forward(x)
        if x.is_cuda and self.compose_k == self.compose_t == "mean":
            return x.mean((1, 2))  # one launch each way in place of two
        return compose(compose(x, 2, self.compose_k), 1, self.compose_t)


class TensorFusion(nn.Module):
    """Tensor fusion (Zadeh et al., EMNLP 2017) on masked means: all products of up to one factor per modality.

    The mean of each modality is projected to `factors` values. The outer product of [1; t], [1; a] and [1; v] holds
    every unimodal, bimodal and trimodal product, and one Linear maps it to `dim`. Absent modalities are left out.
    """

    def __init__(self, dim: int, modalities: int = 3, factors: int = 16):
        super().__init__()
        self.dim = dim
        self.factor = nn.ModuleList(nn.Sequential(nn.Linear(dim, factors), nn.ReLU()) for _ in range(modalities))
        self.out = nn.Linear((factors + 1) ** modalities, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        z = [f(masked_mean(x[:, :, k], mask[:, :, k])) for k, f in enumerate(self.factor)]
        product, *others = (torch.cat([torch.ones_like(u[:, :1]), u], dim=1) for u in z)
        for u in others:
            product = torch.einsum("bi,bj->bij", product, u).flatten(1)
        return self.out(product)


class TransformerFusion(nn.Module):
    """A small transformer over all valid positions of all modalities at once, then their mean.

    Padded positions are masked out as keys and left out of the mean.
    """

    def __init__(self, dim: int, time_len: int, modalities: int = 3, layers: int = 2, dropout: float = 0.0):
        super().__init__()
        self.dim = dim
        heads = next(n for n in (4, 2, 1) if dim % n == 0)
        self.time_embedding = nn.Parameter(torch.randn(time_len, 1, dim) * 0.02)
        self.modality_embedding = nn.Parameter(torch.randn(1, modalities, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = (x + self.time_embedding + self.modality_embedding).flatten(1, 2)
        mask = mask.flatten(1)
        return masked_mean(self.encoder(x, src_key_padding_mask=~mask), mask)


def _cubemlp(config: Config) -> CubeMLPFusion:
    model, cube = config.model, config.model.cubemlp
    return CubeMLPFusion(
        (config.data.time_len, len(config.data.modalities), model.d_common),
        cube.d_hiddens,
        cube.d_outs,
        cube.activate,
        cube.bias,
        cube.ln_first,
        cube.res_project,
        cube.dropout,
        compose_k=model.compose_k,
        compose_t=model.compose_t,
    )


BUILT_IN: dict[str, Callable[[Config], nn.Module]] = {
    "cubemlp": _cubemlp,
    "tfn": lambda config: TensorFusion(config.model.d_common, len(config.data.modalities)),
    "transformer": lambda config: TransformerFusion(
        config.model.d_common, config.data.time_len, len(config.data.modalities)
    ),
}
_REGISTERED: dict[str, Callable[[Config], nn.Module]] = {}


def register_fusion(name: str, factory: Callable[[Config], nn.Module]) -> None:
    """Let `model.fusion: name` build `factory(config)`, a FusionEncoder. Registering a name again replaces the factory.

    >>> register_fusion("small", lambda config: TensorFusion(config.model.d_common, factors=4))
    >>> config = Config(model={"fusion": "small", "d_common": 8})
    >>> make_fusion(config).dim
    8

    Raises:
        ConfigError: the name is a built-in one.
    """
    if name in BUILT_IN:
        raise ConfigError("register_fusion", repr(name), "a name that is not built in", "Choose another name.")
    _REGISTERED[name] = factory


def make_fusion(config: Config) -> nn.Module:
    """The fusion encoder that `model.fusion` names. Raises ConfigError if it is unknown or has no `dim`."""
    factories = BUILT_IN | _REGISTERED
    name = config.model.fusion
    if name not in factories:
        raise ConfigError(
            "model.fusion", repr(name), "one of " + ", ".join(factories), "Choose one, or add it by register_fusion."
        )
    fusion = factories[name](config)
    if not isinstance(getattr(fusion, "dim", None), int):
        raise ConfigError(
            f"model.fusion={name}",
            "an encoder without .dim",
            "the width of its output",
            "Set self.dim in its __init__.",
        )
    return fusion
