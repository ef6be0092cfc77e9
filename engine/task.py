"""Tasks: what the engine trains. A task names the model, the information terms, the loss, the metrics and the settings.

    class Mine(Task):
        name = "mine"
        terms = ("0.1 * MI(Z, A)",)

        def model(self, config, inputs, text_encoder):
            return MyModel(inputs.audio, text_encoder)

    engine.train(config, "runs/mine", task=Mine())

The trainer asks a task for its parts and knows nothing else of the model. Settings and run folders give a task's name,
which finds only tasks that the running program knows. `load_task` imports a task; only the user's own word calls it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from engine.cli.command import Command
    from engine.config import Config, Section
    from engine.loaders.dataset import Dataset
    from engine.objective import Objective
    from engine.objective.terms import Expression, Term
    from engine.report.words import Words

DEFAULT = "mimrl"
"""The task of settings that name none."""

TASKS = {"mimrl": "engine.mimrl.task:MIMRL_TASK", "mmim": "engine.mmim.task:MMIM_TASK"}
"""Where the engine's own tasks are, as module:attribute."""

_REGISTERED: dict[str, Task] = {}
"""Tasks that the running program registered."""


@dataclass(frozen=True)
class Inputs:
    """Widths of a frame of audio and of vision; 0 where `data.modalities` leaves the modality out."""

    audio: int
    vision: int


class Task:
    """What a run trains. Subclass it and give `name` and `model`; everything else has a default.

    Attributes:
        name: how settings, run folders and the command line call it.
        modes: values that the setting `mode` may have, the first one by default.
        sections: settings of its own, such as {"model": MyModelConfig}. They replace the general sections.
        presets: package that holds its presets, or None.
        terms: information terms of settings that name none, as text ("0.1 * MI(Z, A)") or as expressions.
        discrete: features whose values are categories or few-valued labels.

    Example:
        >>> class Mine(Task):
        ...     name, terms = "mine", ("0.1 * MI(Z, A)",)
        >>> from engine import Config
        >>> [term.name for term in Mine().expressions(Config())]
        ['I(Z;A)']
    """

    name: str = ""
    modes: tuple[str, ...] = ("fast",)
    sections: Mapping[str, type[Section]] = {}
    presets: str | None = None
    terms: Sequence[str | Expression] = ()
    discrete: Sequence[str] = ("C",)

    # -- settings ----------------------------------------------------------------------------------

    def check(self, config: Config) -> None:
        """Raise `ConfigError` if two settings of its own contradict each other."""

    def resolve(self, config: Config) -> None:
        """Replace every `auto` of its own settings in `config` by the value that it stands for."""

    # -- data --------------------------------------------------------------------------------------

    def open_data(self, config: Config, path: str, **options: Any) -> Dataset:
        """The data at `path`. `options`: as `engine.loaders.open_dataset` takes them."""
        from engine.loaders import open_dataset

        return open_dataset(path, config.data, config.text_encoder, **options)

    def pad_tokens(self, config: Config) -> int | None:
        """Length to which every text is padded. None: the longest text of the batch."""
        return None

    def exact_widths(self, config: Config) -> bool:
        """Whether the model needs a batch's width before it was rounded up to one of a few lengths."""
        return False

    # -- the model and what trains it --------------------------------------------------------------

    def model(self, config: Config, inputs: Inputs, text_encoder: nn.Module | None) -> nn.Module:
        """A fresh model. `model(batch)` gives a prediction [B, n] and named features {name: [B, width]}.

        Its attribute `feature_dims` tells the widths of the features, {name: width}.
        """
        raise ConfigError(
            f"task {self.name}", "no method `model`", "a method that makes the model", "Define it in the task."
        )

    def expressions(self, config: Config) -> list[Expression]:
        """The information terms: those of `objective.terms`, or else the task's own."""
        from engine.objective.expressions import parse_expression

        texts = config.objective.terms or self.terms
        return [parse_expression(text) if isinstance(text, str) else text for text in texts]

    def objective(self, config: Config, model: nn.Module) -> Objective:
        """Estimators of the information terms on the model's features. The label is the feature C."""
        from engine.objective import Objective
        from engine.objective.expressions import stage1_weights

        expressions, widths = self.expressions(config), getattr(model, "feature_dims", None)
        if expressions and widths is None:
            raise ConfigError(
                f"task {self.name}",
                "a model without the attribute feature_dims",
                "{feature: width}",
                "Set it in the model.",
            )
        return Objective(
            expressions,
            dims={"C": 1, **(widths or {})},
            discrete={name: label_classes(config).get(name) for name in self.discrete},
            estimators=stage1_weights(expressions, config.objective.estimator_weights),
            settings=config.objective,
            advise=False,  # `warnings` does so, once in a run
        )

    def loss(self, config: Config) -> nn.Module:
        """The task loss: (prediction, label) -> 0-d."""
        from engine.losses import task_loss

        return task_loss(config.train.loss, config.model.num_class, config.model.task)

    def start(self, config: Config, model: nn.Module, dataset: Dataset) -> None:
        """Change a fresh model before its first epoch, such as its first prediction."""

    def warnings(self, config: Config, objective: Objective) -> Sequence[str]:
        """What to tell the user once before training: by default, which terms have a bound that does not suit them."""
        from engine.objective.minimised import advice

        terms, c = objective.expressions, config.objective
        return advice(terms, c.bound, c.cmi_estimator) if c.enabled else ()

    def minimised(self, config: Config, objective: Objective) -> list[Term]:
        """The terms that a probe examines after training: by default, those of negative total weight."""
        from engine.objective.minimised import minimised_terms

        return minimised_terms(objective.expressions)

    def held_bytes(self, config: Config, batch_size: int) -> int:
        """Bytes of the largest tensor that a training step holds several times. 0: not known before the run."""
        return 0

    # -- what is reported --------------------------------------------------------------------------

    def metrics(self, config: Config) -> Callable[..., dict[str, float]]:
        """(predictions, labels) as arrays -> {name: value}."""
        from engine.metrics import metrics_for

        return metrics_for(config.data.dataset, config.model.task, config.data.label_scale)

    def selection(self, config: Config) -> tuple[str, bool]:
        """The metric that chooses the best epoch, and whether higher is better."""
        from engine.metrics import selection

        return selection(config.data.dataset, config.model.task, config.data.label_scale)

    def report_words(self) -> Words | None:
        """What the report says about its terms and features; None: nothing but their names."""
        return None

    def commands(self) -> Sequence[Command]:
        """Commands of its own for the command line."""
        return ()


def label_classes(config: Config) -> dict[str, int]:
    """{"C": number of classes} for a classification, whose label C holds classes; {} for a regression."""
    return {"C": config.model.num_class} if config.model.task == "classification" else {}


def register_task(task: Task) -> Task:
    """Make a task known by its name, so that settings and run folders find it.

    >>> register_task(find_task("mmim")).name
    'mmim'

    Raises:
        ConfigError: it has no name, or the name of one of the engine's own tasks.
    """
    if not isinstance(task, Task) or not re.fullmatch(r"[A-Za-z][\w-]{0,63}", task.name):
        found = f"the name {task.name!r}" if isinstance(task, Task) else type(task).__name__
        raise ConfigError("task", found, "an instance of Task with a name such as my_task", "Set its `name`.")
    if task.name in TASKS and task is not find_task(task.name):
        raise ConfigError("task", f"another task named {task.name!r}", "a name that is free", "Rename the task.")
    if task.name not in TASKS:
        _REGISTERED[task.name] = task
    return task


def task_names() -> list[str]:
    """Names of the known tasks: the engine's own, then the registered ones."""
    return [*TASKS, *_REGISTERED]


def find_task(name: str) -> Task:
    """A known task by its name. Nothing but the engine's own modules is imported.

    >>> find_task("mimrl").name
    'mimrl'

    Raises:
        ConfigError: no task of that name is known.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in TASKS:
        raise ConfigError(
            "task",
            f"{name!r}, which is not known here",
            f"one of {', '.join(task_names())}",
            "Name a task of your own with --task module:attribute, or as task= in Python.",
        )
    return _imported(TASKS[name])


def load_task(place: str | Task) -> Task:
    """A task that the user named: a `Task`, a known name, or `module:attribute`, which is imported and registered.

    >>> load_task("mimrl").name
    'mimrl'

    Raises:
        ConfigError: it cannot be imported, or is no task.
    """
    if isinstance(place, Task):
        return register_task(place)
    if not isinstance(place, str):
        found = f"a {type(place).__name__} ({place!r})"[:90]
        raise ConfigError("task", found, "a Task, a name or module:attribute", "Give one of these.")
    return register_task(_imported(place)) if ":" in place else find_task(place)


def _imported(place: str) -> Any:
    """The attribute of `module:attribute`."""
    module, _, attribute = place.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as cause:
        problem = " ".join(str(cause).split())
        raise ConfigError(f"task {place!r}", problem, "a module and its attribute", "Check the name.") from cause
