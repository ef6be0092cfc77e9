"""The text encoder of a run in parts, so that each rank holds its share of weights, gradients and optimiser state.

FSDP2 collects a layer's weights on every rank while the layer computes. docs/ranks.md tells what that changes.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.config import Config
from engine.errors import ConfigError
from engine.model.text_encoder import TextEncoder
from engine.precision import autocast_dtype
from engine.ranks import Ranks
from engine.sharded import gathered, is_sharded
from engine.step.compiled import regions

if TYPE_CHECKING:
    from engine.training.parts import Parts


def check_shard(config: Config, encoder: nn.Module | None, device: torch.device, ranks: Ranks) -> None:
    """Raise ConfigError where `train.shard` cannot be done. On one rank it changes nothing, and a warning says so."""
    if not config.train.shard:
        return
    if not isinstance(encoder, TextEncoder):
        raise ConfigError(
            "train.shard", "true in a run without a text encoder", "a text encoder, which it shards",
            "Set train.shard=false.",
        )  # fmt: skip
    if ranks.size == 1:
        warnings.warn("train.shard=true changes nothing on one rank", stacklevel=2)
        return
    for setting, found, wrong in (
        ("train.compile", config.train.compile, config.train.compile != "off"),
        ("train.amp", "fp16", autocast_dtype(config.train.amp, device) == torch.float16),
    ):
        if wrong:
            raise ConfigError(
                setting, f"{found} with train.shard=true", "off, or train.shard=false",
                f"Set {setting}=off, or train.shard=false.",
            )  # fmt: skip


def held_elsewhere(config: Config, encoder: nn.Module | None, ranks: Ranks) -> int:
    """How many trained elements of the text encoder only other ranks hold."""
    if encoder is None or not config.train.shard:
        return 0
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    return trained - -(-trained // ranks.size)


class ShardedText:
    """The text encoder of a run in parts, one for each rank, until `undo`.

    Its optimiser state and its moving average are in parts, too. All ranks must make it, with equal weights.

    Raises:
        ConfigError: FSDP2 cannot shard the encoder.
    """

    def __init__(self, parts: Parts):
        self.parts, self.encoder = parts, parts.text_encoder
        model = self.sharded = self.encoder.model
        empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
        self._plain = copy.deepcopy(model, empty)  # the same modules without weights
        before = dict(model.named_parameters())
        _shard(model, parts.device)
        pairs = {p: model.get_parameter(name) for name, p in before.items()}
        for optimizer in parts.optimizers.values():
            _replace(optimizer, pairs)
        self._change_average(_like)
        parts.sharded = True

    @torch.no_grad()
    def undo(self) -> None:
        """Put the whole weights into a plain encoder in the place of the sharded one. All ranks must call it.

        The optimisers keep their parts: they cannot train on.
        """
        self._plain.load_state_dict(gathered(self.sharded.state_dict()), assign=True)
        self._change_average(lambda value, present: gathered(value))
        for module in (self.encoder, *self.parts.model.modules()):
            for name, child in list(module.named_children()):
                if child is self.sharded:
                    setattr(module, name, self._plain)
        self.parts.sharded = False

    def _change_average(self, change: Any) -> None:
        average = self.parts.step.average
        for name, present in self.parts.model.state_dict().items() if average is not None else ():
            if is_sharded(present):
                average.values[name] = change(average.values[name], present)


def _shard(model: nn.Module, device: torch.device) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    count, mesh = len(list(model.parameters())), DeviceMesh.from_group(dist.group.WORLD, device.type)
    try:
        for unit in (*regions(model), model):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        problem = "layers that share weights" if len(list(model.parameters())) != count else None
    except (RuntimeError, ValueError, NotImplementedError) as cause:
        problem = " ".join(str(cause).split())[:200]
    if problem:
        raise ConfigError(
            "train.shard", f"a text encoder that FSDP2 cannot shard ({problem})", "another one, or train.shard=false",
            "Set train.shard=false.",
        )  # fmt: skip


def _like(value: Tensor, present: Tensor) -> Tensor:
    """This rank's part of a whole tensor, divided as `present` is."""
    from torch.distributed.tensor import distribute_tensor

    part = distribute_tensor(value, present.device_mesh, present.placements, src_data_rank=None)
    return part.clone()  # which does not keep the whole tensor's memory


def _replace(optimizer: torch.optim.Optimizer, pairs: dict[nn.Parameter, nn.Parameter]) -> None:
    """Give an optimiser the parameters in parts instead of the whole ones, with their state."""
    for group in optimizer.param_groups:
        if not any(p in pairs for p in group["params"]):
            continue
        group["params"] = [pairs.get(p, p) for p in group["params"]]
        if isinstance(optimizer, torch.optim.SGD):  # whose fused form DTensor does not have
            group["fused"], group["foreach"] = False, True
    if isinstance(optimizer, torch.optim.SGD):
        optimizer.register_state_dict_post_hook(_say_fused)
    for old, new in pairs.items():
        if old in optimizer.state:
            optimizer.state[new] = {
                name: _like(value, new) if isinstance(value, Tensor) and value.shape == old.shape else value
                for name, value in optimizer.state.pop(old).items()
            }


def _say_fused(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """A checkpoint says what a run without shards takes."""
    for group in state["param_groups"]:
        group["fused"], group["foreach"] = True, None
