"""Model outputs as other people's models have them, read into the parts that a training step needs.

A model may return a pair `(prediction, features)`, a dict, a dataclass, a `ModelOutput` of Hugging Face, or a tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.step.batches import Target, all_tensors

PREDICTIONS = ("prediction", "logits")
"""The entries of a model's output that hold its prediction."""

Features = Callable[[Any, Any], Mapping[str, Tensor]] | Mapping[str, str] | Iterable[str] | None


class ReadOutput(NamedTuple):
    """A model's output in parts. `loss` is what the model computed itself, or None."""

    prediction: Any
    features: dict[str, Tensor]
    loss: Tensor | None


def read_output(output: Any, inputs: Any, features: Features = None, wanted: Iterable[str] = ()) -> ReadOutput:
    """Prediction, features and own loss of a model's output.

    Args:
        output: a pair `(prediction, features)`; a dict, dataclass, named tuple or `ModelOutput` with an entry of
            `PREDICTIONS`; or a tensor, which is the prediction.
        inputs: what the model was given.
        features: what picks the features: a function of (output, inputs), a dict {feature: entry of the output}, or
            names of entries. None takes the pair's features or the entry "features", or else the entries of `wanted`.
        wanted: the features that an objective reads.

    Raises:
        ConfigError: the output holds no prediction in a form that is known, or not the features that were named.

    >>> output = {"logits": torch.ones(4, 1), "pooled": torch.zeros(4, 8)}
    >>> read_output(output, None, {"Z": "pooled"}).features["Z"].shape
    torch.Size([4, 8])
    """
    if isinstance(output, tuple) and not hasattr(output, "_asdict"):
        if len(output) != 2 or not isinstance(output[1], Mapping):
            kinds = ", ".join(type(part).__name__ for part in output)
            raise ConfigError(
                "the model's output", f"a tuple ({kinds})", "(prediction, {name: feature})",
                "Return the prediction and a dict of features, or one dict with the entry prediction.",
            )  # fmt: skip
        prediction, given, entries = output[0], output[1], {"features": output[1], **output[1]}
    elif isinstance(output, Tensor):
        prediction, given, entries = output, {}, {}
    else:
        entries = _entries(output)
        prediction = next((entries[name] for name in PREDICTIONS if entries.get(name) is not None), None)
        given = entries.get("features")
        if not isinstance(given, Mapping):  # a tensor there is a feature like any other entry
            given = {name: entries[name] for name in wanted if isinstance(entries.get(name), Tensor)}
    if features is not None:
        given = _picked(features, output, inputs, entries)
    _check_prediction(prediction)
    return ReadOutput(prediction, dict(given), entries.get("loss") if entries else None)


def _entries(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping):
        return dict(output)
    if hasattr(output, "_asdict"):
        return output._asdict()
    if dataclasses.is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    raise ConfigError(
        "the model's output", f"a {type(output).__name__}", "(prediction, features), a tensor, a dict or a dataclass",
        "Wrap the model in a module that returns (prediction, {name: feature}).",
    )  # fmt: skip


def _picked(features: Features, output: Any, inputs: Any, entries: Mapping[str, Any]) -> Mapping[str, Tensor]:
    if callable(features):
        given = features(output, inputs)
        if not isinstance(given, Mapping):
            raise ConfigError(
                "features=", f"a function that returns a {type(given).__name__}", "{name: tensor [B, width]}",
                "Return a dict.",
            )  # fmt: skip
        return given
    features = [features] if isinstance(features, str) else features
    names = features if isinstance(features, Mapping) else {name: name for name in features}
    for name, entry in names.items():
        if not isinstance(entries.get(entry), Tensor):
            found = "no such entry" if entry not in entries else f"a {type(entries[entry]).__name__}"
            raise ConfigError(
                f"features=, entry {entry!r} of the model's output", found, f"a tensor; entries are {sorted(entries)}",
                f"Name another entry, or pass a function: features=lambda output, inputs: {{{name!r}: ...}}.",
            )  # fmt: skip
    return {name: entries[entry] for name, entry in names.items()}


def _check_prediction(prediction: Any) -> None:
    if prediction is None or isinstance(prediction, Tensor) or all_tensors(prediction):
        return
    raise ConfigError(
        "the model's prediction", f"a {type(prediction).__name__}", "a tensor [B, ...], or a dict of tensors",
        "Return one tensor, name several in a dict, or move what is no prediction to the features.",
    )  # fmt: skip


def full_precision(x: Tensor) -> Tensor:
    """float32 for a tensor of lower precision."""
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


def check_prediction_rows(prediction: Any, rows: int) -> None:
    """Raise ConfigError for a prediction that has not one row per sample."""
    for part in prediction.values() if isinstance(prediction, dict) else [] if prediction is None else [prediction]:
        if part.dim() == 0 or len(part) != rows:
            raise ConfigError(
                "the model's prediction", f"shape {list(part.shape)} for a batch of {rows}", f"[{rows}, ...]",
                "Return one row per sample.",
            )  # fmt: skip


def with_label(features: dict[str, Tensor], label: str, target: Target, prediction: Any) -> dict[str, Tensor]:
    """The features with the target among them, as float [B, n]: a tensor as `label`, a dict's under their own names."""
    floats = isinstance(prediction, Tensor) and prediction.is_floating_point()
    dtype = prediction.dtype if floats else torch.float32
    added = {label: target} if isinstance(target, Tensor) else target
    if twice := sorted(features.keys() & added.keys()):
        raise ConfigError(
            f"feature {twice[0]!r}", "one from the model and the target under the same name", "two names",
            "Rename the model's, or the target with label= (a dict's target by its key); label=None leaves it out.",
        )  # fmt: skip
    return {**features, **{name: value.reshape(len(value), -1).to(dtype) for name, value in added.items()}}


def check_features(features: Mapping[str, Tensor], readers: Mapping[str, Any], rows: int) -> None:
    """Raise ConfigError for a feature that an objective's term cannot read.

    Args:
        features: of one batch.
        readers: {feature: a term that reads it}.
        rows: of the batch.
    """
    for name, value in features.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"feature {name!r}", f"a {type(value).__name__}", "a tensor [B, ...]",
                "Return only tensors as features, or pick some with features=.",
            )  # fmt: skip
    for name, term in readers.items():
        if name not in features:
            raise ConfigError(
                f"feature {name!r} of the objective's {term}", f"features {sorted(features)} from model and target",
                "one under this name",
                "Return it from the model, pick it with features=, or name the target with label=.",
            )  # fmt: skip
        value = features[name]
        if not isinstance(value, Tensor) or value.dim() != 2 or not value.is_floating_point():
            found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ConfigError(
                f"feature {name!r} of the objective's {term}", found, "float [B, width]",
                "Pool it to one row per sample, for example by a mean over time, and convert it with .float().",
            )  # fmt: skip
        if len(value) != rows:
            raise ConfigError(
                f"feature {name!r} of the objective's {term}", f"{len(value)} rows in a batch of {rows}",
                "one row per sample", "Check the feature's first dimension.",
            )  # fmt: skip
