"""MIMRL as a task of the engine."""

from __future__ import annotations

from collections.abc import Mapping

from engine.config import Config, Section
from engine.mimrl import settings
from engine.task import Task


class MIMRLTask(Task):
    """The published model, its eleven estimators and its eight information terms."""

    name = "mimrl"
    modes = ("fast", "faithful")
    sections: Mapping[str, type[Section]] = {
        "model": settings.MIMRLModelConfig,
        "objective": settings.MIMRLObjectiveConfig,
    }
    presets = "engine.mimrl.presets"

    def check(self, config: Config) -> None:
        """Raise `ConfigError` where two settings of its own are at odds."""
        settings.check(config)

    def resolve(self, config: Config) -> None:
        """Replace every `auto` of its own settings in `config` by the value that it stands for."""
        settings.resolve(config)


MIMRL_TASK = MIMRLTask()
