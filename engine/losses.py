"""Task losses: what stage 2 minimises besides the information terms.

Values and gradients are those of the published code. Where that code divides by zero, a rule holds here: RMSE at
zero error has a zero gradient; the CCC loss of two constants is 1 with a zero gradient, because the denominator has
1e-10 added.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import ConfigError, DataError
from engine.vocabulary import LOSSES, MODEL_TASKS, REGRESSION_LOSSES

_ONE_OF_MANY = ("CE", "Focal")


def task_loss(name: str, num_class: int = 1, task: str | None = None) -> nn.Module:
    """The loss called `name`: a module `(output, target) -> 0-d tensor`, the mean over the batch.

    >>> task_loss("MAE")(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(1.)

    Args:
        name: MAE MSE RMSE SIMSE CCC for regression; CE Focal for one of `num_class` >= 2 classes; BCE for one logit, or
            one per class.
        num_class: width of the model's output.
        task: `regression` or `classification`; None takes the one that the loss is for.

    `output` is [B, num_class], or [B] where num_class is 1. For regression, `target` has as many values as `output`, in
    any shape. For CE and Focal it holds class numbers, [B] or [B, 1], integers or integral floats. For BCE it holds
    class numbers too, or 0 and 1 for each class, [B, num_class].

    Raises:
        ConfigError: the loss is unknown, or does not fit the task or the number of outputs.
        DataError: (when called) sizes, types or devices do not fit, or a label is no class (for BCE with
            [B, num_class]: outside 0 to 1).
    """
    if name not in LOSSES:
        raise ConfigError("train.loss", repr(name), " ".join(LOSSES), "Choose one of these.")
    if task not in (None, *MODEL_TASKS):
        raise ConfigError("model.task", repr(task), " or ".join(MODEL_TASKS), "Choose one of these.")
    if num_class < 1:
        raise ConfigError("model.num_class", str(num_class), "at least 1", "Set it to the number of outputs.")
    kind = "regression" if name in REGRESSION_LOSSES else "classification"
    if task is not None and task != kind:
        fitting = " ".join(loss for loss in LOSSES if (loss in REGRESSION_LOSSES) == (task == "regression"))
        raise ConfigError("train.loss", f"{name} with model.task={task}", fitting, "Change train.loss or model.task.")
    if kind == "regression" and num_class > 1 and task is None:
        raise ConfigError(
            "train.loss",
            f"{name} with model.num_class={num_class}",
            "CE BCE or Focal for classes, or num_class=1 for regression",
            "Change train.loss or model.num_class.",
        )
    if name in _ONE_OF_MANY and num_class < 2:
        raise ConfigError(
            "train.loss",
            f"{name} with model.num_class={num_class}",
            "num_class of at least 2 (BCE takes 1)",
            "Set model.num_class to the number of classes.",
        )
    if kind == "regression":
        return _Regression(name)
    return BCE(num_class) if name == "BCE" else _OneOfMany(name, num_class)


def rmse(output: Tensor, target: Tensor) -> Tensor:
    """Root of the mean squared error, without eps. At zero error value and gradient are 0 (sqrt's is infinite)."""
    mean = (output - target).square().mean()
    # The inner `where` keeps sqrt away from 0 in the backward pass too: 0 x inf would be NaN.
    return torch.where(mean > 0, torch.where(mean > 0, mean, 1.0).sqrt(), mean)


def simse(output: Tensor, target: Tensor) -> Tensor:
    """(sum of errors)^2 / n^2: only the term that the scale-invariant MSE subtracts, as the published code has it."""
    return (output - target).sum().square() / output.numel() ** 2


def ccc(output: Tensor, target: Tensor) -> Tensor:
    """1 - concordance correlation of the batch, with population moments and 1e-10 added to the denominator.

    It depends on the batch size. A constant target gives 1 with a zero gradient, and so do two equal constants.
    """
    mean_o, mean_t = output.mean(), target.mean()
    covariance = ((output - mean_o) * (target - mean_t)).mean()
    spread = (output - mean_o).square().mean() + (target - mean_t).square().mean() + (mean_o - mean_t).square()
    return 1 - 2 * covariance / (spread + 1e-10)


def focal(output: Tensor, target: Tensor) -> Tensor:
    """(1 - e^-CE)^2 CE, where CE is the mean cross entropy of the batch. It is not the mean of per-sample terms."""
    entropy = F.cross_entropy(output, target)
    return (1 - torch.exp(-entropy)).square() * entropy


_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "MAE": F.l1_loss,
    "MSE": F.mse_loss,
    "RMSE": rmse,
    "SIMSE": simse,
    "CCC": ccc,
    "CE": F.cross_entropy,
    "Focal": focal,
}


class _Loss(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def extra_repr(self) -> str:
        return self.name


class _Regression(_Loss):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        _check(self.name, output, target)
        # Flattened first: [B, 1] against [B] would silently broadcast to [B, B].
        output, target = output.reshape(-1), target.reshape(-1).to(output.dtype)
        if output.numel() != target.numel() or not output.numel():
            raise DataError(
                f"{self.name} loss",
                f"{output.numel()} predictions and {target.numel()} labels",
                "equal numbers of both, and at least one",
                "Set model.num_class to the number of labels a sample has.",
            )
        return _FUNCTIONS[self.name](output, target)


class _OneOfMany(_Loss):
    def __init__(self, name: str, num_class: int):
        super().__init__(name)
        self.num_class = num_class

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        _check(self.name, output, target)
        output = _scores(self.name, output, self.num_class)
        return _FUNCTIONS[self.name](output, _classes(self.name, target, len(output), self.num_class))


class BCE(_Loss):
    """Binary cross entropy on logits: one logit per sample, or one per class."""

    def __init__(self, num_class: int):
        super().__init__("BCE")
        self.num_class = num_class

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        _check(self.name, output, target)
        output = _scores(self.name, output, self.num_class)
        if self.num_class == 1:
            wanted = _classes(self.name, target, len(output), 2)[:, None]
        elif target.numel() == output.numel():
            wanted = _shares(self.name, target.reshape(output.shape))
        else:
            wanted = F.one_hot(_classes(self.name, target, len(output), self.num_class), self.num_class)
        return F.binary_cross_entropy_with_logits(output, wanted.to(output.dtype))


def _check(name: str, output: Tensor, target: Tensor) -> None:
    for what, tensor in (("output", output), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise DataError(f"{name} loss", f"a {type(tensor).__name__} as {what}", "a torch.Tensor", "Convert it.")
    if not output.is_floating_point() or target.is_complex():
        types = f"output of {output.dtype} and labels of {target.dtype}"
        raise DataError(
            f"{name} loss", types, "floating-point output and real labels", "Give predictions, then labels."
        )
    if output.device != target.device:
        devices = f"output on {output.device} and labels on {target.device}"
        raise DataError(f"{name} loss", devices, "both on one device", "Move the labels with .to(device).")


def _shares(name: str, target: Tensor) -> Tensor:
    outside = ~((target >= 0) & (target <= 1))
    if outside.any():
        label = f"label {target[outside][0].item():g}"
        raise DataError(
            f"{name} loss", label, "0 or 1 for each class", "Give one-hot labels, or one class number per sample."
        )
    return target


def _scores(name: str, output: Tensor, num_class: int) -> Tensor:
    if output.numel() == 0 or output.numel() % num_class or (output.ndim > 1 and output.shape[-1] != num_class):
        raise DataError(
            f"{name} loss",
            f"output of shape {list(output.shape)}",
            f"[batch, {num_class}]",
            "Set model.num_class to the width of the output.",
        )
    return output.reshape(-1, num_class)


def _classes(name: str, target: Tensor, batch: int, num_class: int) -> Tensor:
    flat = target.reshape(-1)
    if flat.numel() != batch:
        raise DataError(
            f"{name} loss",
            f"{flat.numel()} labels for {batch} samples",
            "one class number per sample",
            "Check the labels.",
        )
    classes = flat.long()
    bad = (classes < 0) | (classes >= num_class) | (classes.to(flat.dtype) != flat)
    if bad.any():
        raise DataError(
            f"{name} loss",
            f"label {flat[bad][0].item():g}",
            f"class numbers 0 to {num_class - 1}",
            "Set model.num_class to the number of classes, or use a regression loss for real-valued labels.",
        )
    return classes
