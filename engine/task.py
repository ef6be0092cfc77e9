"""Tasks: what the engine trains. A task names the settings, the model, the information terms, the loss and the metrics.

    class Mine(Task):
        name = "mine"

        def model(self, config, inputs, text_encoder): ...

    engine.train(config, "runs/mine", task=Mine())

The trainer asks a task for its parts and knows nothing else of the model. `find_task` finds a task by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from engine.config import Config, Section
    from engine.loaders.dataset import Dataset
    from engine.objective import Objective

DEFAULT = "mimrl"
"""The task of settings that name none."""

TASKS = {"mimrl": "engine.mimrl:MIMRL_TASK"}
"""Where the tasks that come with the engine are, as module:attribute."""


@dataclass(frozen=True)
class Inputs:
    """Widths of a frame of each modality, 0 where the data has none of it.

    `text` is the width of precomputed text features, and None where the text comes as tokens.
    """

    audio: int
    vision: int
    text: int | None = None


class Task:
    """What a run trains. Subclass it and give `name` and `model`; everything else has a default.

    Attributes:
        name: how settings, run folders and the command line call it.
        modes: values that the setting `mode` may have, the first one by default.
        sections: settings of its own: {"model": a Section, "objective": a Section}. They replace the general ones.
        presets: package that holds its presets, or None.
    """

    name: str = ""
    modes: tuple[str, ...] = ("fast",)
    sections: Mapping[str, type[Section]] = {}
    presets: str | None = None

    def check(self, config: Config) -> None:
        """Raise `ConfigError` where two settings of its own are at odds."""

    def resolve(self, config: Config) -> None:
        """Replace every `auto` of its own settings in `config` by the value that it stands for."""

    def open_data(self, config: Config, **options: Any) -> Dataset:
        """The data that `config.data.path` names."""
        from engine.loaders import open_dataset

        return open_dataset(config.data.path, config.data, config.text_encoder, **options)

    def model(self, config: Config, inputs: Inputs, text_encoder: nn.Module | None) -> nn.Module:
        """A fresh model: `model(batch)` gives predictions and named features, as `engine.model.ModelOutput`."""
        raise NotImplementedError

    def objective(self, config: Config, model: nn.Module) -> Objective:
        """The information terms on the model's features; by default those of `objective.terms`."""
        raise NotImplementedError

    def loss(self, config: Config) -> nn.Module:
        """The task loss: (prediction, label) -> 0-d."""
        from engine.losses import task_loss

        return task_loss(config.train.loss, config.model.num_class, config.model.task)

    def start(self, config: Config, model: nn.Module, dataset: Dataset) -> None:
        """Change a fresh model before its first epoch, such as its first prediction."""

    def commands(self) -> Sequence[Any]:
        """Commands of its own for the command line."""
        return ()


def find_task(name: str) -> Task:
    """A task by its name, or as `module:attribute` of one that is not the engine's own.

    Raises:
        ConfigError: there is no such task.
    """
    place = TASKS.get(name, name)
    module, colon, attribute = place.partition(":")
    if not colon:
        raise ConfigError("task", repr(name), f"one of {', '.join(TASKS)}, or module:attribute", "Name a task.")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as cause:
        raise ConfigError("task", f"{name!r} ({cause})", "a task that can be imported", "Check the name.") from cause
