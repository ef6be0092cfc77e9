"""Whether a run folder, settings and data belong together, and what may differ when a run is resumed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from engine import checkpoint
from engine.config import Config, load_config, text_of
from engine.errors import CheckpointError
from engine.loaders.dataset import Dataset
from engine.loaders.store import is_named
from engine.model.described import without_memory
from engine.precision import autocast_dtype
from engine.run_folder import CONFIG, DIVERGED, NORMALIZER, verify
from engine.task import Inputs, find_task
from engine.training import parts

WIDEST_INPUT = 1_000_000
"""Columns that audio or vision features may have."""

FREE = {
    "preset", "epochs", "threads", "device", "output",
    "data.path", "data.loader", "data.workers",  # which loader makes the batches does not change them
    "data.label_scale",  # what is reported does not change the training
    "train.graphs",  # how the steps are launched changes no more than rounding
    "train.checkpoint_minutes", "train.checkpoint_steps",  # what is saved does not change the training
    "train.timeout",
    "train.shard",  # who holds the weights changes no more than rounding
}  # fmt: skip
"""Settings and sections that may change when a run is resumed."""
ADVISED = {"train.lr", "train.clip_norm", "train.non_finite", "objective.on_degenerate"}
"""Settings that may also change when a run is resumed after it diverged."""


def settings_of(folder: Path, meta: dict[str, Any]) -> Config:
    """The settings that a checkpoint was trained with. Older versions kept them only in config.yaml."""
    if "settings" not in meta:
        return load_config(folder / CONFIG).resolve()
    settings = meta["settings"]
    return Config(**{str(k): v for k, v in settings.items()} if isinstance(settings, dict) else {"settings": settings})


def differences(saved: Config, given: Config, free: set[str]) -> list[str]:
    """`key=value, not value` for every setting that differs and is not free."""
    x, y = _flat(saved.model_dump(mode="json"), free), _flat(given.model_dump(mode="json"), free)
    return [f"{key}={text_of(y.get(key))}, not {text_of(x.get(key))}" for key in {**x, **y} if x.get(key) != y.get(key)]


def _flat(values: dict[str, Any], free: set[str], prefix: str = "") -> dict[str, Any]:
    """{section.key: value} without the free ones."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if (name := prefix + key) in free:
            continue
        flat |= _flat(value, free, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def differing_splits(dataset: Dataset, meta: dict[str, Any]) -> list[str]:
    """The splits whose content differs from the run's data. Older checkpoints do not record it."""
    known = meta.get("data", dataset.fingerprints)
    return sorted(name for name in {*known, *dataset.fingerprints} if known.get(name) != dataset.fingerprints.get(name))


def divergences(folder: Path) -> list[dict[str, Any]]:
    """For each time that a run diverged: the last finished epoch, and the error."""
    if not (folder / DIVERGED).is_file():
        return []
    verify(folder, DIVERGED)
    return json.loads((folder / DIVERGED).read_text(encoding="utf-8"))


def require_unchanged(folder: Path, config: Config, meta: dict[str, Any]) -> None:
    """Compare config.yaml with the settings of the best model, and the normaliser with its checksum.

    Raises:
        CheckpointError: one of the two files was changed.
    """
    if "settings" not in meta:  # a run of an older version
        return verify(folder, CONFIG, NORMALIZER)
    # A text encoder may lie elsewhere now.
    free = {*FREE, "text_encoder", *(ADVISED if divergences(folder) else ())}
    differing = differences(settings_of(folder, meta), config, free)
    if differing:
        raise CheckpointError(
            str(folder / CONFIG),
            f"settings that its model was not trained with ({', '.join(differing)})",
            "those of the training",
            "The file is damaged or was edited: put the original back.",
        )
    return verify(folder, NORMALIZER)


def require_described(
    path: Path, config: Config, state: dict[str, Any], meta: dict[str, Any], trained: bool = False
) -> None:
    """Compare what a checkpoint says of its model with its tensors, before any memory is taken for the model.

    Args:
        trained: whether it must record its epoch. An imported run may not know it.

    Raises:
        CheckpointError, ConfigError: it has another form, or its tensors are not those of such a model.
    """
    dims = [meta.get("audio_dim"), meta.get("vision_dim")]
    encoder, settings = meta.get("text_encoder"), meta.get("settings", {})
    if (
        not all(type(dim) is int and 0 <= dim <= WIDEST_INPUT for dim in dims)
        or type(meta.get("epoch", "")) not in ((int,) if trained else (int, type(None)))
        or not isinstance(settings, dict)
        or not is_named(meta.get("columns", {}))
        or not isinstance(encoder, (dict, type(None)))
        or (encoder is None) == ("text" in config.data.modalities)
        or not {"model", "objective"} <= set(state)
    ):
        raise CheckpointError(
            str(path), "a description of another form", "what engine train writes", "Use the file as it was written."
        )
    with without_memory(), checkpoint.taken_apart(str(path)):
        model, objective = parts.build(find_task(config.task), config, Inputs(*dims), parts.saved_encoder(meta))
    checkpoint.compare(model, state["model"], f"{path}: model")
    checkpoint.compare(objective, state["objective"], f"{path}: objective")


def arithmetic(device: torch.device, amp: str) -> dict[str, Any]:
    """What the last digits of a run depend on, apart from its settings and data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the step says it again
        products = str(autocast_dtype(amp, device) or torch.float32).removeprefix("torch.")
    facts: dict[str, Any] = {"torch": torch.__version__, "device": device.type, "products": products}
    if device.type == "cuda":
        return facts | {"gpu": torch.cuda.get_device_name(device)}
    return facts | {"threads": torch.get_num_threads(), "processor": torch.backends.cpu.get_cpu_capability()}


def warn_of_other_arithmetic(folder: Path, meta: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn about what changed since the run was stopped and keeps it from ending bit-equal."""
    before = meta.get("arithmetic", now)
    alone = {"ranks": 1, "shard": False}  # what a process on its own does not say
    before, now = alone | before, alone | now
    changed = [f"{k} {now.get(k)}, not {before.get(k)}" for k in {**before, **now} if before.get(k) != now.get(k)]
    if changed:
        warnings.warn(
            f"{folder}: the run goes on with {', '.join(changed)}: it will not end bit-equal to one that was not "
            "interrupted",
            stacklevel=2,
        )
