"""The content of a run folder. A file that is missing or damaged does not keep the others from being read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine.config import FILE_BYTES, MOST_EPOCHS, parse_yaml
from engine.errors import CheckpointError, DataError
from engine.files import parse_json, read_text, user_path
from engine.metrics import Predictions, read_predictions, scale_of, selection
from engine.run_folder import CONFIG, FEATURES, HISTORY, LARGEST, PLAN, PREDICTIONS, TRUTH, verify

MOST_SHOWN = 100
"""Most terms, estimators or classes that a page shows."""

SCALE_MARKS = {"acc7": "mosi", "acc5_sims": "sims", "rmse_phq": "phq8", "rmse": "none"}
"""A metric that only runs of one scale have -> the scale."""

KINDS = {"mosi": "sentiment", "sims": "sims", "phq8": "avec2019"}


@dataclass
class Run:
    """What a run folder holds. `missing` has a sentence about each file that is absent or cannot be read."""

    folder: Path
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    predictions: dict[str, Predictions] = field(default_factory=dict)
    truth: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def setting(self, *keys: str, default: Any = None) -> Any:
        """A value of the saved configuration, or the default where the file lacks it."""
        value: Any = self.config
        for key in keys:
            if not isinstance(value, Mapping) or key not in value:
                return default
            value = value[key]
        return value

    @property
    def kind(self) -> str:
        """classification, or a kind by the scale of the labels: sentiment, sims, avec2019 or regression."""
        if self.setting("model", "task") == "classification" or "acc" in self.split_metrics("test"):
            return "classification"
        return KINDS.get(self.scale, "regression")

    @property
    def scale(self) -> str:
        """The scale of the labels, from the metrics where they tell it, else from the settings."""
        told = next((scale for key, scale in SCALE_MARKS.items() if key in self.split_metrics("test")), None)
        dataset, declared = (str(self.setting("data", k, default="auto")) for k in ("dataset", "label_scale"))
        return told or scale_of(dataset, declared)

    @property
    def selected_by(self) -> tuple[str, bool]:
        task = "classification" if self.kind == "classification" else "regression"
        return selection(str(self.setting("data", "dataset")), task, self.scale)

    @property
    def best_epoch(self) -> int | None:
        best = self.metrics.get("best_epoch")
        return best if isinstance(best, int) else None

    def split_metrics(self, name: str) -> dict[str, Any]:
        return dict(part(self.metrics, name))


def read_run(run: str | Path) -> Run:
    """Read everything but the features of a run folder.

    Raises:
        CheckpointError: it holds no run, or a file of it is not what the run wrote.
    """
    folder = user_path(run)
    if not folder.is_dir():
        raise CheckpointError(
            str(folder), "no such folder", "the output folder of `engine train`", "Give the folder passed to --out."
        )
    if (folder / PLAN).is_file() and not (folder / CONFIG).is_file():
        do = "Its report is written by the command that began it; or name a run below it."
        raise CheckpointError(str(folder), "a sweep or a tuning", "a run", do)
    if not any((folder / name).is_file() for name in ("metrics.json", "history.jsonl", "predictions_test.csv")):
        raise CheckpointError(
            str(folder),
            "neither metrics.json nor history.jsonl nor predictions_test.csv",
            "the output folder of `engine train`",
            "Give the folder passed to --out.",
        )
    verify(folder, CONFIG, "metrics.json", HISTORY, TRUTH, *PREDICTIONS, *FEATURES)
    content = Run(folder)
    _read(content, CONFIG, "settings", _read_config)
    _read(content, "metrics.json", "final metrics (training has not finished)", _read_metrics)
    _read(content, HISTORY, "curves", _read_history)
    for split in ("valid", "test"):
        path = folder / f"predictions_{split}.csv"
        try:
            content.predictions[split] = read_predictions(path)
        except DataError as problem:
            absent = "is missing" if not path.exists() else f"cannot be read ({problem.found})"
            content.missing.append(f"{path.name} {absent}: no predictions of the {split} split.")
    if (folder / TRUTH).is_file():
        _read(content, TRUTH, "comparison with the truth", _read_truth)
    return content


def _read(run: Run, name: str, what: str, parse: Callable[[Run, str], None]) -> None:
    path = run.folder / name
    try:
        parse(run, read_text(path, FILE_BYTES if name == CONFIG else LARGEST))
    except FileNotFoundError:
        run.missing.append(f"{name} is missing: no {what}.")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as problem:
        reason = " ".join(str(problem).split())[:120]
        run.missing.append(f"{name} cannot be read ({reason}): no {what}.")


def _read_config(run: Run, text: str) -> None:
    run.config_text = text
    loaded = parse_yaml(text)
    if not isinstance(loaded, dict):
        raise ValueError("not a mapping")
    run.config = loaded


def _read_metrics(run: Run, text: str) -> None:
    loaded = parse_json(text)
    if not isinstance(loaded, dict):
        raise ValueError("not a mapping")
    run.metrics = loaded


def _read_history(run: Run, text: str) -> None:
    rows = [line for line in text.splitlines() if line.strip()]
    for i, row in enumerate(rows):
        try:
            epoch = parse_json(row)
            if not isinstance(epoch, dict) or type(epoch.get("epoch")) is not int or abs(epoch["epoch"]) > MOST_EPOCHS:
                raise ValueError("no epoch number")
        except ValueError:
            # A run that was cut off leaves half a last line.
            run.missing.append(f"history.jsonl line {i + 1} cannot be read and is left out.")
            continue
        run.history.append(epoch)
    # A resumed run may have written an epoch twice. The later record counts.
    run.history = [by for _, by in sorted({epoch["epoch"]: epoch for epoch in run.history}.items())]


def _read_truth(run: Run, text: str) -> None:
    for row in parse_json(text)["latents"][:MOST_SHOWN]:
        estimates = row.get("estimates")
        run.truth.append(
            {**row, "name": str(row["name"]), "estimates": estimates if isinstance(estimates, dict) else {}}
        )


def part(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = mapping.get(key)
    return value if isinstance(value, Mapping) else {}
