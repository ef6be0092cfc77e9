"""What a training step checks: the task's loss, the optimisers, and the bank. Every problem is one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from engine.errors import ConfigError
from engine.step.bank import FeatureBank
from engine.step.batches import Target

STAGE1_FEATURES = ("fresh", "cached", "bank")
"""Where stage 1 may take its features from."""


class _NoBroadcast(TorchFunctionMode):
    """Refuses an operation on a [B, 1] and a [B] tensor whose result would compare every sample with every other."""

    LOSSES = frozenset({"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "poisson_nll_loss"})

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        shapes = {tuple(x.shape) for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)}
        pair = next((s for s in shapes if len(s) == 2 and s[1] == 1 and (s[0],) in shapes and s[0] > 1), None)
        name = getattr(func, "__name__", "")
        result = None if pair and name in self.LOSSES else func(*args, **(kwargs or {}))
        if pair and (result is None or (isinstance(result, Tensor) and result.shape == (pair[0], pair[0]))):
            raise ConfigError(
                "task_loss", f"{name} of [{pair[0]}, 1] and [{pair[0]}], which broadcasts to [{pair[0]}, {pair[0]}]",
                "a prediction and a target of one shape",
                "Reshape one of them, for example target[:, None] or prediction[:, 0].",
            )  # fmt: skip
        return result


def task_of(
    task_loss: Any, prediction: Any, target: Target, own: Tensor | None, device: torch.device | None = None
) -> Tensor:
    """The task's loss on one batch, 0-d: `task_loss(prediction, target)`, the model's own, or 0 where there is none.

    Args:
        task_loss: a function, "model" or None, as of `TwoStageStep`.
        own: the loss that the model computed, or None.
        device: of the model, for the 0 of no prediction.

    Raises:
        ConfigError: there is no prediction, target or own loss where one is needed; an own loss that is not used; a
            loss that is no scalar; or one that broadcasts [B] against [B, 1].
    """
    if task_loss is None:
        if own is not None:
            raise ConfigError(
                "task_loss", "None, but the model returned a loss", "a loss that is used",
                'Pass task_loss="model" to train on the model\'s own loss, or return none.',
            )  # fmt: skip
        return torch.zeros((), device=next((t.device for t in pytree.tree_leaves(prediction) if t is not None), device))
    if task_loss == "model":
        if own is None:
            raise ConfigError(
                "task_loss", '"model", but the model\'s output has no loss', "an entry loss",
                "Give the model its target (in a dict batch, under labels), or pass a function as task_loss.",
            )  # fmt: skip
        loss = own
    else:
        loss = _computed_loss(task_loss, prediction, target)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        found = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ConfigError("task_loss", found, "a 0-d tensor", "Return the mean over the batch.")
    return loss


def check_task_loss(task_loss: Any) -> None:
    """Raise ConfigError for a task loss that is neither a function nor "model" nor None."""
    if task_loss is not None and task_loss != "model" and not callable(task_loss):
        raise ConfigError(
            "TwoStageStep", f"task_loss={task_loss!r}", 'a function of (prediction, target), "model" or None',
            "Pass for example torch.nn.functional.mse_loss.",
        )  # fmt: skip


def check_epoch(stage1_features: str, stage1_n: int, batch_size: int) -> None:
    """Raise ConfigError for settings of `train_epoch` that are none."""
    if stage1_features not in STAGE1_FEATURES:
        raise ConfigError(
            "train_epoch", f"stage1_features={stage1_features!r}", f"one of {', '.join(STAGE1_FEATURES)}", "Choose one."
        )
    if stage1_n < 0 or batch_size < 1:
        raise ConfigError(
            "train_epoch", f"stage1_n={stage1_n} and batch_size={batch_size}", "stage1_n >= 0 and batch_size >= 1",
            "Correct them.",
        )  # fmt: skip


def _computed_loss(task_loss: Callable[[Any, Any], Tensor], prediction: Any, target: Target) -> Tensor:
    if target is None or prediction is None:
        found, remedy = (
            ("no target in the batch", "Yield one (a dict holds it under y, label, labels or target)")
            if target is None
            else ("no prediction in the model's output", "Return one (a dict holds it under prediction or logits)")
        )
        raise ConfigError(
            "task_loss", found, "one, to compute the loss from",
            f"{remedy}, or pass task_loss=None to train on the information terms alone.",
        )  # fmt: skip
    columns = {x.dim(): x for x in (prediction, target) if isinstance(x, Tensor)}
    if not torch.compiler.is_compiling() and columns.keys() == {1, 2} and columns[2].shape[1] == 1:
        with _NoBroadcast():
            return task_loss(prediction, target)
    return task_loss(prediction, target)


def unwrapped(module: nn.Module | None) -> nn.Module | None:
    """The module within `DistributedDataParallel` or `DataParallel`, or the module itself."""
    while isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        module = module.module
    return module


def check_optimizer(
    name: str, optimizer: torch.optim.Optimizer, module: nn.Module, other: torch.optim.Optimizer | None
) -> None:
    """Raise ConfigError where an optimiser holds no parameter of its module, or one that the other optimiser holds.

    Args:
        name: of the argument, for the message.
        module: whose parameters it should move.
        other: the optimiser of the other stage.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    if trained and not held & trained:
        raise ConfigError(
            name, f"none of the {len(trained)} parameters of {type(module).__name__}", "parameters that it can move",
            "Make the optimiser from this module's parameters(), after the module was moved to its device.",
        )  # fmt: skip
    shared = held & {id(p) for group in other.param_groups for p in group["params"]} if other is not None else ()
    if shared:
        raise ConfigError(
            name, f"{len(shared)} parameters that the other stage's optimiser holds too",
            "model and estimators moved by one optimiser each",
            "Give model.parameters() to main_optimizer and objective.parameters() to estimator_optimizer.",
        )  # fmt: skip


def check_bank(bank: FeatureBank | None, size: int, readers: Mapping[str, str]) -> None:
    """Raise ConfigError for a bank of another size, or without a feature that an objective's term reads."""
    if bank is None:
        return
    if bank.size != size:
        raise ConfigError(
            "bank", f"a bank of {bank.size} samples with size={size}", "one size",
            "Pass the bank that the last epoch of this training set returned, or None.",
        )  # fmt: skip
    missing = [f"{name!r} of {term}" for name, term in readers.items() if bank.rows and name not in bank.rows]
    if missing:
        raise ConfigError(
            "bank", f"features {sorted(bank.rows)}", f"also {missing[0]}",
            "Pass the bank that this step's last epoch returned, or None.",
        )  # fmt: skip
