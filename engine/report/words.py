"""What a run's task says about its information terms and features. The report itself knows no model by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import ConfigError
from engine.report.folder import Run
from engine.task import DEFAULT, find_task

Settings = Mapping[str, Any]
"""The saved settings of a run, as they stand in its config.yaml."""


@dataclass(frozen=True)
class Words:
    """Words of a task.

    Attributes:
        terms: maps settings to {term: words}, in the order in which terms are shown.
        features: {feature: words}, in the order in which features are shown.
        note: maps settings to a sentence about how the estimates are to be read, or to "".
    """

    terms: Callable[[Settings], Mapping[str, str]] = lambda settings: {}
    features: Mapping[str, str] = field(default_factory=dict)
    note: Callable[[Settings], str] = lambda settings: ""


def words_of(run: Run) -> Words:
    """The words of the run's task; none if it has none or is not known here."""
    try:
        return find_task(str(run.setting("task", default=DEFAULT))).report_words() or Words()
    except ConfigError:
        return Words()
