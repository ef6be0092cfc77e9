"""Checks before the first epoch. Every problem is one line, and nothing has been written yet."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from engine import limits, metrics
from engine.config import Config, TrainConfig
from engine.errors import ConfigError, DataError, OutputError
from engine.model.text_encoder import TextEncoder

if TYPE_CHECKING:
    from engine.loaders.dataset import Dataset, Split
    from engine.objective import Objective

STATES = {"gru": (24, 15), "lstm": (16, 10), "conv": (4, 3)}
"""Numbers that training on a CPU holds at least, by `model.encoder`, in units of model.d_common for each frame: for the
backward pass of all modalities, and in addition while that of one modality runs. Measured with torch 2.13."""
UNSEEN = 20  # sequences longer than so many times data.time_len get a warning that most of them is not seen
ENOUGH = 20  # labels of a scale from which on some lie on both sides of 0
HELD = 8  # tensors as large as the largest one that a step holds at least

PLAIN = "MAE, Corr, CCC and RMSE"
OTHERS = "mosi (classes of [-3, 3]) or sims (of [-1, 1])"


def label_scale(config: Config, dataset: Dataset) -> str:
    """The scale whose metrics a run reports.

    It is the declared scale, or "none" if no scale is known or the labels do not fit it. In that case a DataWarning
    says once that only regression metrics are reported.

    Raises:
        ConfigError: labels outside the scale that `data.label_scale` names.
    """
    from engine.loaders.dataset import DataWarning

    declared = config.data.label_scale
    if config.model.task == "classification":
        return declared
    scale = metrics.scale_of(config.data.dataset, declared)
    labels = np.concatenate([split.label[:, 0].numpy() for split in dataset.splits.values()])
    labels = labels[np.isfinite(labels)]
    low, high = (float(labels.min()), float(labels.max())) if len(labels) else (0.0, 0.0)
    found = f"labels from {low:g} to {high:g}"
    if declared != "auto":
        if scale in metrics.SCALES and not _within(scale, low, high):
            first, last = metrics.SCALES[scale]
            raise ConfigError(
                f"data.label_scale={scale}", found, f"labels in [{first:g}, {last:g}]",
                "Name the scale of the labels, or none for regression metrics only.",
            )  # fmt: skip
        return scale
    if scale == "none":
        why = f"data.dataset={config.data.dataset} does not say what scale its labels have ({found})"
    elif not _fits(scale, low, high):
        first, last = metrics.SCALES[scale]
        why = (
            f"{found} do not look like those of data.dataset={config.data.dataset}, on a scale of [{first:g}, {last:g}]"
        )
    else:
        return scale
    warnings.warn(f"{why}: only {PLAIN} are reported. {_advice(scale, low, high)}", DataWarning, stacklevel=2)
    return "none"


def _advice(scale: str, low: float, high: float) -> str:
    if scale == "phq8":
        return "Divide the scores by 25."
    if scale == "mosi" and low < 0 and not _within("mosi", low, high):
        return "Cut the labels to [-3, 3] for accuracies, or set data.label_scale=none."
    return f"Set data.label_scale={OTHERS} for accuracies, or none."


def evaluated_scale(config: Config, split: Split) -> str:
    """The scale for the metrics of `split`: the run's, or "none" with a warning if the labels leave that scale."""
    from engine.loaders.dataset import DataWarning

    declared, labels = config.data.label_scale, split.label[:, 0].numpy()
    scale, labels = metrics.scale_of(config.data.dataset, declared), labels[np.isfinite(labels)]
    if config.model.task == "classification" or scale not in metrics.SCALES or not len(labels):
        return declared
    low, high = float(labels.min()), float(labels.max())
    first, last = metrics.SCALES[scale]
    if _within(scale, low, high):
        if len(labels) >= ENOUGH and not _fits(scale, low, high):
            warnings.warn(
                f"labels from {low:g} to {high:g}: the accuracies are right only if they are on the scale of the run's "
                f"training data, [{first:g}, {last:g}].",
                DataWarning,
                stacklevel=2,
            )
        return declared
    why = f"labels from {low:g} to {high:g} leave the scale of the run's training data, [{first:g}, {last:g}]"
    warnings.warn(f"{why}: only {PLAIN} are reported.", DataWarning, stacklevel=2)
    return "none"


def _within(scale: str, low: float, high: float) -> bool:
    first, last = metrics.SCALES[scale]
    return first <= low and high <= last


def _fits(scale: str, low: float, high: float) -> bool:
    """Whether labels from `low` to `high` can be of `scale`. Sentiment has both signs; MOSI's labels go beyond +-1."""
    if scale == "phq8":
        return _within(scale, low, high)
    return _within(scale, low, high) and low < 0 < high and (scale != "mosi" or max(-low, high) > 1)


def last_batch(config: Config, dataset: Dataset) -> None:
    """Warn if every epoch leaves one sample out. Information terms need two samples in a batch."""
    from engine.loaders.dataset import DataWarning

    size, count = config.batch_size, len(dataset.splits["train"])
    if 1 < size < count and count % size == 1 and not config.data.drop_last:
        warnings.warn(
            f"{config.data.path}: {count} training samples in batches of {size}: a last batch of one sample, which has "
            "nothing to contrast it with, is left out of every epoch. Change batch_size to train on all samples.",
            DataWarning,
            stacklevel=2,
        )


def class_numbers(config: Config, dataset: Dataset, splits: Iterable[str] | None = None) -> None:
    """Raise DataError if a label is no class number below `model.num_class`. `splits`: None checks all."""
    if config.model.task != "classification":
        return
    for name in dataset.splits if splits is None else splits:
        split = dataset.splits[name]
        label = split.label[:, 0].numpy()
        whole = (label >= 0) & (label == np.floor(label)) | np.isnan(label)
        if not whole.all():
            row = int(np.flatnonzero(~whole)[0])
            raise DataError(
                f"{name}, label, row {row} (id {split.ids[row]})",
                f"label {label[row]:g} ({np.count_nonzero(~whole)} of {len(label)} labels are no class numbers)",
                f"class numbers 0 to {config.model.num_class - 1}",
                "Set model.task=regression, or number the classes.",
            )
        wrong = np.flatnonzero(label >= config.model.num_class)
        if len(wrong):
            row = int(wrong[0])
            known = label[~np.isnan(label)]
            from_one = known.min() >= 1 and known.max() <= config.model.num_class
            raise DataError(
                f"{name}, label, row {row} (id {split.ids[row]})",
                f"class {label[row]:g} ({len(wrong)} of {len(label)} labels are not below model.num_class)",
                f"class numbers 0 to {config.model.num_class - 1}",
                "Subtract 1 from all labels: classes are counted from 0."
                if from_one
                else "Set model.num_class to the number of classes.",
            )


def text_fits(
    config: Config,
    dataset: Dataset,
    encoder: nn.Module | None,
    pad_tokens_to: int | None = None,
    splits: Iterable[str] | None = None,
) -> None:
    """Raise if tokens of `splits` (None: all) exceed the text encoder's vocabulary or its number of positions.

    Args:
        pad_tokens_to: length to which every text is padded; None: to the longest of its batch.

    Raises:
        ConfigError: in one line, with the sample.
    """
    if not isinstance(encoder, TextEncoder):
        return
    for name in dataset.splits if splits is None else splits:
        split = dataset.splits[name]
        if split.tokens is not None and len(split.tokens.values):
            _vocabulary(config, split, f"{name} split", encoder, dataset.pad_id)
            _positions(config, split, f"{name} split", encoder, pad_tokens_to is not None)


def _vocabulary(config: Config, split: Split, where: str, encoder: TextEncoder, pad: int) -> None:
    values, size = split.tokens.values, encoder.vocabulary
    place = int(values.argmax())
    if max(int(values[place]), pad) < size:
        return
    row = int(np.searchsorted(split.tokens.offsets, place, side="right")) - 1
    token = f"token {values[place]} (id {split.ids[row]})" if values[place] >= size else f"padding token {pad}"
    raise ConfigError(
        f"text_encoder={config.text_encoder}, {where}",
        token,
        f"tokens 0 to {size - 1}, which its {size} embeddings allow",
        "Its tokeniser and its weights do not belong together: use the tokeniser it was trained with.",
    )


def _positions(config: Config, split: Split, where: str, encoder: TextEncoder, padded: bool) -> None:
    most, cap = encoder.positions, config.data.time_len
    if most is None or cap <= most:
        return
    lengths = split.tokens.lengths
    row = int(lengths.argmax())
    if padded or split.draws_words:  # padded to the cap; or words are drawn anew
        longest = f"texts of {cap} tokens"
    elif lengths[row] > most:
        longest = f"a text of {lengths[row]} tokens (id {split.ids[row]})"
    else:
        return
    raise ConfigError(
        f"data.time_len={cap}, {where}", longest, f"at most {most}, the positions of {config.text_encoder}",
        f"Set data.time_len={most} or less: longer texts are cut.",
    )  # fmt: skip


def bank_size(config: Config, objective: Objective, samples: int) -> None:
    """Raise ConfigError if a bank of `samples` rows is too small to draw product rows from."""
    k, m = config.objective.k_neighbor, config.batch_size // config.objective.k_neighbor
    if config.objective.enabled and objective.needs_products and samples - min(m, samples) < k:
        raise ConfigError(
            "objective.k_neighbor", f"{k} neighbours for {m} queries from a bank of {samples} training samples",
            f"at least {m + k} training samples", "Lower objective.k_neighbor or batch_size.",
        )  # fmt: skip


def memory(config: Config, parts: Iterable[nn.Module], largest: int, device: torch.device, elsewhere: int = 0) -> None:
    """Raise ConfigError if training needs more memory than the machine has. Most such settings are mistyped sizes.

    Args:
        parts: modules that are trained; their tensors may be on the meta device.
        largest: bytes of the largest tensor that a step holds several times.
        elsewhere: trained elements that only other ranks hold.
    """
    have = _memory_of(device)
    if have is None:
        return
    trained = 4 * (sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad) - elsewhere)
    weights = trained * (2 + 2 * (config.train.optimizer == "adam") + (config.train.average is not None))
    need = weights + HELD * largest
    if need > have:
        raise ConfigError(
            "model" if weights > HELD * largest else "data.time_len",
            f"settings that take about {need / 1e9:.0f} GB of memory ({weights / 1e9:.1f} for weights, gradients and "
            f"optimiser; {HELD * largest / 1e9:.1f} for a batch of {config.batch_size})",
            f"at most the {have / 1e9:.0f} GB of this machine",
            "Lower the sizes in the section model, data.time_len or batch_size.",
        )


def long_sequences(config: Config, dataset: Dataset, device: torch.device) -> None:
    """Check that a batch of long recordings fits into memory, and warn where the fusion encoder sees little of them.

    The encoders keep several states of width `model.d_common` for every frame of a batch. MIMRL's fusion encoder sees
    the first `data.time_len` frames. Memory is checked on a CPU only: there the system kills a process that takes too
    much, without a message, while on a GPU torch raises an error.

    Raises:
        ConfigError: a batch needs more memory than the machine has.
    """
    states, width = STATES.get(getattr(config.model, "encoder", "")), getattr(config.model, "d_common", None)
    train = dataset.splits["train"]
    lengths = {m: train.lengths(m) for m in ("audio", "vision") if m in config.data.modalities}
    if width is None or states is None or not lengths:
        return
    frames = {m: float(np.median(n)) for m, n in lengths.items()}
    steps = {m: max(2, round(n * _pooled(config, m) / config.data.time_len)) for m, n in frames.items()}
    have = _memory_of(device)
    if device.type == "cpu" and have is not None:
        batch = min(config.batch_size, len(train))
        padded = [float(np.quantile(n, 1 - 1 / batch)) for n in lengths.values()]  # about the longest of a batch
        need = 4 * batch * width * (states[0] * sum(padded) + states[1] * max(padded))
        longest = max(frames, key=frames.__getitem__)
        if need > have:
            raise ConfigError(
                f"data.pool_{longest}", f"{longest} of {frames[longest]:.0f} frames (median): a batch of {batch} takes "
                f"about {need / 1e9:.0f} GB of memory", f"at most the {have / 1e9:.0f} GB of this machine",
                f"Average frames, for example with data.pool_{longest}={steps[longest]}, or lower batch_size.",
            )  # fmt: skip
    if hasattr(config.model, "fusion"):
        _warn_of_unseen(frames, steps, config.data.time_len)


def _warn_of_unseen(frames: Mapping[str, float], steps: Mapping[str, int], most: int) -> None:
    """Warn of modalities of which the fusion encoder sees little.

    Args:
        frames: {modality: median length of the training sequences}.
        steps: {modality: the number of frames to average}.
        most: length of the fusion encoder's time axis.
    """
    from engine.loaders.dataset import DataWarning

    for modality, length in frames.items():
        if length > UNSEEN * most:
            warnings.warn(
                f"{modality}: half of the training sequences have {length:.0f} frames or more. The fusion encoder sees "
                f"only the first {most} (data.time_len); means are taken over all frames. To average frames, set "
                f"data.pool_{modality}={steps[modality]}",
                DataWarning,
                stacklevel=3,
            )


def _pooled(config: Config, modality: str) -> int:
    """The number of frames that are averaged already."""
    return config.data.pool_audio if modality == "audio" else config.data.pool_vision


def _memory_of(device: torch.device) -> int | None:
    """Total memory of a device in bytes, within the limits of a container or a batch job; None if it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return limits.total_memory()


def disk_space(out: Path, model: nn.Module, objective: nn.Module, train: TrainConfig, present: Iterable[Path]) -> None:
    """Raise OutputError if `out` has no room for the checkpoints of a run.

    A run keeps the best model, the last checkpoint and the one before it. A new checkpoint is written before the oldest
    is removed.

    Args:
        present: checkpoints that a resumed run already has.
    """
    tensors = [t for part in (model, objective) for t in part.state_dict().values()]
    best = sum(t.numel() * t.element_size() for t in tensors)
    trained = sum(p.numel() * 4 for part in (model, objective) for p in part.parameters() if p.requires_grad)
    last = best + trained * (2 if train.optimizer == "adam" else 1) + (best if train.average is not None else 0)
    need = best + 3 * last - sum(path.stat().st_size for path in present if path.exists())
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise OutputError(
            str(out), f"{free / 1e6:.0f} MB of free space", f"about {need / 1e6:.0f} MB for the run's checkpoints",
            "Free some space, or choose another --out.",
        )  # fmt: skip
