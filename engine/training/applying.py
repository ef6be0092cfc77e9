"""A trained run applied to data: its best model, read from the run folder alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import checkpoint, checks
from engine.config import Config, load_config
from engine.config.section import LONGEST
from engine.errors import CheckpointError, ConfigError, DataError, printable
from engine.files import user_path
from engine.loaders.dataset import Dataset, DataWarning, Split
from engine.loaders.normalize import Normalizer
from engine.loaders.text import PRECOMPUTED, Tokenizer, load_tokenizer
from engine.objective import Objective
from engine.run_folder import BEST, CONFIG, NORMALIZER, TOKENIZER, verify
from engine.step.averages import EpochResult
from engine.task import Inputs, find_task
from engine.training import parts
from engine.training.passes import Passes
from engine.training.same_run import require_described, require_unchanged


@dataclass
class Run:
    """A run folder's best model, ready to predict.

    Attributes:
        meta: epoch, input widths, the text encoder's configuration.
        text_encoder: the model's; None without text.
        tokenizer: the folder's own; None where it has none.
    """

    folder: Path
    config: Config
    model: nn.Module
    objective: Objective
    normalizer: Normalizer
    meta: dict[str, Any]
    text_encoder: nn.Module | None = None
    tokenizer: Tokenizer | None = None


def load_run(run: str | Path, device: str | torch.device = "cpu") -> Run:
    """The best model of a run folder.

    Raises:
        CheckpointError: the folder holds no run, or one of its files is damaged or was changed.
    """
    folder = user_path(run)
    if not (folder / CONFIG).exists() or not (folder / BEST).exists():
        raise CheckpointError(
            str(folder),
            "no config.yaml and best.safetensors",
            "a run folder",
            "Name the --out folder of `engine train`.",
        )
    config = load_config(folder / CONFIG).resolve()
    state, meta = checkpoint.load(folder / BEST)
    require_unchanged(folder, config, meta)
    require_described(folder / BEST, config, state, meta)
    encoder, inputs = parts.saved_encoder(meta), Inputs(meta["audio_dim"], meta["vision_dim"])
    model, objective = parts.build(find_task(config.task), config, inputs, encoder)
    checkpoint.load_into(model, state["model"], f"{folder / BEST}: model")
    checkpoint.load_into(objective, state["objective"], f"{folder / BEST}: objective")
    model, objective = model.to(device).eval(), objective.to(device).eval()
    normalizer, tokenizer = Normalizer.load(folder / NORMALIZER), own_tokenizer(folder, config)
    return Run(folder, config, model, objective, normalizer, meta, encoder, tokenizer)


def own_tokenizer(folder: Path, config: Config) -> Tokenizer | None:
    """The tokeniser that lies in a run folder, so that the text encoder's own folder need not be there."""
    beside = folder / "text_encoder"  # where an imported run asks for the files of its tokeniser
    place = next((p for p in (folder, beside) if (p / "tokenizer.json").is_file()), None)
    if place is None or "text" not in config.data.modalities or config.text_encoder == PRECOMPUTED:
        return None
    if place == folder:
        verify(folder, *TOKENIZER)
    return replace(load_tokenizer(str(place)), name=config.text_encoder)


def open_split(run: Run, data: str | Path, split: str | None) -> tuple[str, Dataset]:
    """Data to apply a run to, and the split that is meant: None is test, or the only one.

    Raises:
        ConfigError: there is no such split, or the features have other widths than the run's.
    """
    # `format` and `loader` are what the training data and machine allowed: this may be another format and machine
    config = run.config.model_copy()
    config.data = config.data.model_copy(update={"format": "auto", "loader": "auto", "workers": None})
    dataset = find_task(config.task).open_data(
        config, str(data), normalizer=run.normalizer, tokenizer=run.tokenizer, training=False
    )
    there = list(dataset.splits)
    if split is None:
        split = there[0] if len(there) == 1 else "test"
    if split not in there:
        raise ConfigError(
            "split", f"{split!r}, which {data} does not have", f"one of {', '.join(there)}", "Name a split of the data."
        )
    for kind in [m for m in config.data.modalities if m != "text"]:
        width, expected = getattr(dataset, f"{kind}_dim"), run.meta[f"{kind}_dim"]
        if width != expected:
            raise ConfigError(
                f"{data}: {kind}",
                f"{width} features per frame",
                f"{expected}, as the run was trained with",
                "Use its features.",
            )
        _compare_columns(f"{data}: {kind}", dataset.columns.get(kind), run.meta.get("columns", {}).get(kind))
    return split, dataset


def _compare_columns(where: str, found: list[str] | None, trained: list[str] | None) -> None:
    """Compare the names of feature columns with those of the training data, if both have names.

    Raises:
        ConfigError: they are in another order, which gives the model other features.
    """
    pairs = list(zip(map(str.lower, found or ()), map(str.lower, trained or ()), strict=False))
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if found is None or trained is None or place is None:
        return
    if sorted(a for a, _ in pairs) == sorted(b for _, b in pairs):
        raise ConfigError(
            where,
            f"the columns in another order ({found[place]!r} as column {place + 1})",
            f"{trained[place]!r} there, as the run was trained with",
            "Write the columns in that order.",
        )
    message = (
        f"{where}: other column names than the run was trained with ({found[place]!r}, not {trained[place]!r}): "
        "columns are taken by their place"
    )
    warnings.warn(printable(message), DataWarning, stacklevel=3)


def require_labels(split: Split, where: str) -> None:
    """Raise DataError unless every sample has a label."""
    gone = torch.nonzero(split.label[:, 0].isnan())
    if len(gone):
        row = int(gone[0])
        raise DataError(
            where,
            f"no label for {len(gone)} of {len(split)} samples, row {row} (id {split.ids[row]}) the first",
            "a label for every sample",
            "Add the labels, or use engine predict, which needs none.",
        )


def apply(run: Run, dataset: Dataset, split: str, batch_size: int | None, labels: str) -> EpochResult:
    """The best model's predictions on a split.

    Args:
        batch_size: None: that of the training.
        labels: "regression" or "classification": how the labels are read.
    """
    c, device = run.config, next(run.model.parameters()).device
    if batch_size is not None and (type(batch_size) is not int or not 1 <= batch_size <= LONGEST):
        raise ConfigError("batch_size", str(batch_size)[:60], f"a number from 1 to {LONGEST}", "Change the number.")
    padded = find_task(c.task).pad_tokens(c)
    loader = dataset.loader(
        split,
        batch_size or c.batch_size,
        shuffle=False,
        seed=c.seed,
        pad_tokens_to=padded,
        task=labels,
        device=device,
    )
    checks.text_fits(c, dataset, run.text_encoder, padded, [split])
    return parts.predictor(run.model).evaluate(Passes(loader, device, parts.preparation(run.model)))
