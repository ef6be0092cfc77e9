"""MIMRL as a task of the engine."""

from __future__ import annotations

from engine.task import Task


class MIMRLTask(Task):
    """The published model, its eleven estimators and its eight information terms."""

    name = "mimrl"
    modes = ("fast", "faithful")


MIMRL_TASK = MIMRLTask()
