"""`Config`: all settings of a run, with the sections of its task."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from engine.config.problems import wrong_choice
from engine.config.section import COMMON, LONGEST, MOST_EPOCHS, Section, none, one_line
from engine.config.sections import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OutputConfig,
    TextConfig,
    TrainConfig,
)
from engine.errors import ConfigError
from engine.files import write_text
from engine.task import DEFAULT, find_task
from engine.vocabulary import CLASSIFICATION_LOSSES, MODALITIES, REGRESSION_LOSSES

SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "text": TextConfig,
    "model": ModelConfig,
    "objective": ObjectiveConfig,
    "train": TrainConfig,
    "output": OutputConfig,
}
"""The general sections. `Task.sections` may name a subclass for each."""


def _of_the_task() -> Any:
    """The default of a section: the task's own type with its defaults."""
    return Field(default_factory=dict, validate_default=True)


class Config(Section):
    """Everything that a run depends on. Saving it as YAML and loading that file gives an equal one.

    >>> config = Config(epochs=3, train={"lr": 5e-4})
    >>> config.epochs, config.mode, config.train.lr
    (3, 'fast', 0.0005)
    """

    preset: str = Field("", description="the preset this configuration started from")
    task: str = Field(
        DEFAULT, description="what is trained: model, terms, loss and metrics; your own with --task module:attribute"
    )
    mode: str = Field(
        "",
        validate_default=True,
        description="faithful: the mathematics of the published code, faults included",
        json_schema_extra=COMMON,
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="one seed gives bit-equal runs on one CPU with one number of threads",
        json_schema_extra=COMMON,
    )
    epochs: int = Field(8, ge=1, le=MOST_EPOCHS, description="passes over the training set", json_schema_extra=COMMON)
    batch_size: int = Field(
        32, ge=2, le=LONGEST, description="samples per step; estimators need at least 2", json_schema_extra=COMMON
    )
    text_encoder: str = Field(
        "minilm",
        description="minilm, a local folder, a Hugging Face name, or features (precomputed)",
        json_schema_extra=COMMON,
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="auto, cpu, cuda, cuda:0, mps (auto takes cuda where there is one, else cpu, never mps)",
        json_schema_extra=COMMON,
    )
    threads: Annotated[int | None, none] = Field(
        None, ge=1, le=1024, description="CPU threads; none: all. Last digits depend on it"
    )
    data: SerializeAsAny[DataConfig] = _of_the_task()
    text: SerializeAsAny[TextConfig] = _of_the_task()
    model: SerializeAsAny[ModelConfig] = _of_the_task()
    objective: SerializeAsAny[ObjectiveConfig] = _of_the_task()
    train: SerializeAsAny[TrainConfig] = _of_the_task()
    output: SerializeAsAny[OutputConfig] = _of_the_task()

    @classmethod
    def model_validate(cls, *values: Any, **options: Any) -> Any:
        with one_line(cls):
            return super().model_validate(*values, **options)

    @classmethod
    def model_validate_json(cls, *values: Any, **options: Any) -> Any:
        with one_line(cls):
            return super().model_validate_json(*values, **options)

    @classmethod
    def sections_of(cls, task: str) -> dict[str, type[Section]]:
        """The sections that settings of a task have, by name.

        Raises:
            ConfigError: the task is not known, or a section of its own does not extend the general one.
        """
        own = find_task(task).sections
        for name, section in own.items():
            if name not in SECTIONS or not issubclass(section, SECTIONS[name]):
                expected = f"a subclass of {SECTIONS[name].__name__}" if name in SECTIONS else ", ".join(SECTIONS)
                raise ConfigError(
                    f"sections of the task {task}", f"{name}: {section}", expected, "Correct Task.sections."
                )
        return {**SECTIONS, **own}

    # -- validation --------------------------------------------------------------------------------

    @field_validator("task")
    @classmethod
    def _known_task(cls, name: str) -> str:
        find_task(name)
        return name

    @field_validator("mode")
    @classmethod
    def _known_mode(cls, mode: str, info: ValidationInfo) -> str:
        modes = find_task(info.data["task"]).modes if "task" in info.data else (mode,)
        if mode and mode not in modes:
            raise wrong_choice("mode", mode, modes)
        return mode or modes[0]

    @field_validator(*SECTIONS, mode="before")
    @classmethod
    def _section_of_the_task(cls, values: Any, info: ValidationInfo) -> Any:
        """`values` as the section that the task has for this field."""
        if "task" not in info.data:  # it was refused, and its error is the one that is reported
            return values
        section = cls.sections_of(info.data["task"])[info.field_name]
        if isinstance(values, section):
            return values
        if isinstance(values, Section):
            if not issubclass(section, type(values)):
                raise ConfigError(
                    info.field_name, f"a {type(values).__name__} of another task", section.__name__, "Use that class."
                )
            values = values.model_dump(exclude_unset=True)
        return section.model_validate(values)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        self.check()
        return self

    def check(self) -> None:
        """Raise `ConfigError` if two settings contradict each other. Loading and `resolve` call it."""
        for name, section in self.sections_of(self.task).items():
            if not isinstance(getattr(self, name), section):
                raise ConfigError(
                    "task",
                    f"{self.task!r} with the section {name} of another task",
                    "the task with which the settings were loaded",
                    f"Load them anew with task={self.task}.",
                )
        self._check_objective()
        self._check_labels()
        self._check_augment()
        milestones = self.train.schedule.milestones
        if sorted(set(milestones)) != milestones:
            raise ConfigError(
                "train.schedule.milestones", str(milestones), "epochs in rising order", "Sort them and drop repeats."
            )
        find_task(self.task).check(self)

    def _check_objective(self) -> None:
        neighbours, most = self.objective.k_neighbor, self.batch_size // 2
        if self.objective.enabled and neighbours > most:
            raise ConfigError(
                "objective.k_neighbor",
                f"{neighbours} with batch_size {self.batch_size}",
                f"at most {most} (half the batch, so that there is more than one query row)",
                "Lower objective.k_neighbor or raise batch_size.",
            )

    def _check_labels(self) -> None:
        data, model, loss = self.data, self.model, self.train.loss
        allowed = REGRESSION_LOSSES if model.task == "regression" else CLASSIFICATION_LOSSES
        if loss not in allowed:
            raise ConfigError(
                "train.loss",
                f"{loss} with model.task={model.task}",
                f"one of {', '.join(allowed)}",
                "Change train.loss or model.task.",
            )
        if (model.task == "regression") != (model.num_class == 1):
            raise ConfigError(
                "model.num_class",
                f"{model.num_class} with model.task={model.task}",
                "1" if model.task == "regression" else "2 or more",
                "Change model.num_class or model.task.",
            )
        if data.dataset != "avec2019":
            return
        if model.task != "regression":
            raise ConfigError(
                "model.task", f"{model.task} with data.dataset=avec2019", "regression", "Use data.dataset=custom."
            )
        if data.label_scale not in ("auto", "phq8", "none"):
            found = f"{data.label_scale} with data.dataset=avec2019"
            raise ConfigError("data.label_scale", found, "auto, phq8 or none", "Use data.dataset=custom.")

    def _check_augment(self) -> None:
        names = self.data.modalities
        if len(names) == len(MODALITIES):
            return
        for key, rate in self.data.augment.model_dump().items():
            if rate and (key.startswith("drop") or key.partition("_")[2] not in names):
                raise ConfigError(
                    f"data.augment.{key}",
                    f"{rate:g} with data.modalities=[{', '.join(names)}]",
                    "0: samples are dropped from among three modalities, and frames of what is there are masked",
                    f"Set data.augment.{key}=0.",
                )

    def resolve(self) -> Config:
        """A checked copy in which every `auto` that depends on the mode is replaced by its value.

        >>> Config(mode="faithful").resolve().train.amp
        'off'
        """
        c = self.model_copy(deep=True)
        find_task(c.task).resolve(c)
        if c.train.stage1_features == "auto":
            c.train.stage1_features = "cached"
        if c.train.average == "auto":
            c.train.average = 0.98
        if c.data.length_rule == "auto":
            c.data.length_rule = "recorded"
        if c.data.label_key == "auto" and c.model.task == "classification":
            c.data.label_key = "classes"
        c.check()
        return c

    # -- files -------------------------------------------------------------------------------------

    def to_yaml(self) -> str:
        """Every key with its value; `load_yaml` of it gives an equal configuration."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120)

    def save(self, path: str | Path) -> None:
        """Write `to_yaml` to `path`, whole or not at all. Raises `OutputError`."""
        write_text(path, self.to_yaml())

    @classmethod
    def load_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> Config:
        """Read a YAML file. A `preset:` in it names the preset whose values hold where the file has none.

        Raises:
            ConfigError: no such file, not YAML, an unknown key, or a value out of range.
        """
        from engine.config.presets import load_file

        return load_file(path, overrides)


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line, groups on lines of their own."""


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)
