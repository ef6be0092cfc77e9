"""Loading settings: presets, YAML files that start from one, and `key=value` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from engine.config.config import Config
from engine.config.help import annotations
from engine.config.problems import short, unknown_key
from engine.config.reading import parse_yaml, read_settings
from engine.config.section import is_section
from engine.errors import ConfigError
from engine.files import user_path
from engine.task import DEFAULT, find_task, task_names


class Preset(NamedTuple):
    """A recipe that comes with a task.

    Attributes:
        summary: the first comment line of its file.
    """

    name: str
    task: str
    summary: str


def presets(task: str | None = None) -> list[Preset]:
    """The packaged presets of a task, or of all tasks that are known.

    >>> "mosi" in [preset.name for preset in presets()]
    True
    """
    listed = []
    for name in task_names() if task is None else [task]:
        files = [file for file in _folder(name) if file.name.endswith(".yaml")]
        for file in sorted(files, key=lambda file: file.name.removesuffix(".yaml")):
            summary = file.read_text("utf-8").split("\n", 1)[0].lstrip("# ")
            listed.append(Preset(file.name.removesuffix(".yaml"), name, summary))
    return listed


def load_config(source: str | Path | None, overrides: Iterable[str] = (), task: str | None = None) -> Config:
    """A configuration from a preset's name or a YAML file's path, then `key=value` overrides in order.

    Keys are dotted (`train.lr=5e-4`). Values are read as YAML; CubeMLP shapes also as `20-3-128=10-3-128`.

    >>> load_config("mosi", ["train.lr=5e-4"]).train.lr
    0.0005

    Args:
        source: None: the task's defaults.
        task: the task that is trained, where the settings do not name it.

    Raises:
        ConfigError: no such preset or file, an unknown key, a value out of range, or settings that contradict each
            other.
    """
    overrides = _words(overrides)
    if source is None:
        return _build({} if task is None else {"task": task}, overrides)
    if not isinstance(source, (str, Path)):
        do = "For single values use engine.Config(...), or give overrides."
        raise ConfigError("source", _of_type(source), "the name of a preset or the path of a YAML file", do)
    known = [preset.name for preset in presets()]
    if (
        isinstance(source, Path)
        or source.endswith((".yaml", ".yml"))
        or (source not in known and user_path(source).is_file())
    ):
        return load_file(source, overrides, task)
    return _build({"preset": source} | ({} if task is None else {"task": task}), overrides)


def load_file(path: str | Path, overrides: Iterable[str] = (), task: str | None = None) -> Config:
    """A configuration from a YAML file. Arguments and errors as `load_config`."""
    path, overrides = user_path(path), _words(overrides)
    values = read_settings(path, str(path))
    return _build(values if task is None else {"task": task, **values}, overrides)


def require_config(value: Any) -> None:
    """Raise `ConfigError` if `value` is no `Config`: a mapping, a preset's name, or nothing at all."""
    if not isinstance(value, Config):
        do = 'Make one with engine.load_config("mosi", ["epochs=2"]), or from a mapping with engine.Config(**values).'
        raise ConfigError("config", _of_type(value), "an engine.Config", do)


def _of_type(value: Any) -> str:
    return f"{short(value)} ({type(value).__name__})"


def _words(overrides: Any) -> list[str]:
    """Overrides as a list, if they are a list of text."""
    words = None if isinstance(overrides, (str, Mapping)) or not isinstance(overrides, Iterable) else list(overrides)
    if words is None or not all(isinstance(word, str) for word in words):
        found = _of_type(overrides)
        raise ConfigError("overrides", found, 'a list such as ["train.lr=5e-4"]', "Write them that way.")
    return words


# -- presets ----------------------------------------------------------------------------------------


def _folder(task: str) -> list[Any]:
    """The files in a task's package of presets."""
    package = find_task(task).presets
    return [] if package is None else list(resources.files(package).iterdir())


def _preset(name: Any, task: str | None, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a preset, on those of the preset that it starts from.

    Args:
        task: whose preset it is; None: of the only task that has one of that name.
        above: the presets that start from this one.
    """
    name = name if isinstance(name, str) else short(name)
    known = presets(task)
    tasks = [preset.task for preset in known if preset.name == name]
    if not tasks:
        names = [preset.name for preset in known]
        near = difflib.get_close_matches(name, names, n=1)
        raise ConfigError(
            f"preset {name!r}",
            "no preset of that name" + ("" if task is None else f" for the task {task}"),
            f"one of {', '.join(names)}, or the path of a YAML file" if names else "the path of a YAML file",
            f"Did you mean {near[0]}?" if near else "Choose a preset, or check the path.",
        )
    if len(tasks) > 1:
        raise ConfigError(f"preset {name!r}", f"one for each of {', '.join(tasks)}", "one task", "Name it by task=.")
    if name in above:
        raise ConfigError(f"preset {name!r}", "a preset that starts from itself", "another one", "Correct the file.")
    file = next(file for file in _folder(tasks[0]) if file.name == f"{name}.yaml")
    values = read_settings(file, f"preset {name}")
    base = values.pop("preset", None)
    if base is not None:
        values = _merge(_preset(base, tasks[0], (*above, name)), values)
    return {**values, "preset": name, "task": tasks[0]}


def _merge(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _build(values: dict[str, Any], overrides: Iterable[str]) -> Config:
    """The configuration of a file's values on its preset's, with the overrides."""
    overrides = list(overrides)
    named = [override.partition("=")[2] for override in overrides if override.partition("=")[0].strip() == "task"]
    task = named[-1] if named else values.get("task")
    if task is not None:
        find_task(task if isinstance(task, str) else short(task))
    if values.get("preset"):
        base = _preset(values["preset"], task)
        task = base["task"]
        values = _merge(base, values)
    for override in overrides:
        values = _merge(values, _override(override, DEFAULT if task is None else task))
    return Config(**{str(key): value for key, value in values.items()})


# -- single settings --------------------------------------------------------------------------------


def changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """A checked copy of `config` in which dotted keys have other values.

    >>> changed(load_config("mosi"), {"train.lr": 5e-4}).train.lr
    0.0005

    Raises:
        ConfigError: an unknown key, a value out of range, or settings that contradict each other.
    """
    values = config.model_dump(mode="json")
    for name, value in settings.items():
        setting_type(name, config.task)
        group = values
        *above, last = name.split(".")
        for part in above:
            group = group[part]
        group[last] = value
    return Config(**values)


def setting_type(name: str, task: str) -> Any:
    """The type of the setting, or of the group of settings, with this dotted key.

    Raises:
        ConfigError: the settings of `task` have no such key.
    """
    path = name.split(".")
    annotation: Any = Config
    for depth, part in enumerate(path):
        inside = annotations(annotation, task) if is_section(annotation) else {}
        if part not in inside:
            raise unknown_key(path[: depth + 1] if is_section(annotation) else path, annotation, task)
        annotation = inside[part]
    return annotation


def read_value(name: str, text: str, task: str) -> Any:
    """The value that `text` stands for in `name=text`: the text itself, or what it is as YAML.

    Raises:
        ConfigError: an unknown key, no YAML, or one value for a group of settings.
    """
    annotation = setting_type(name, task)
    value: Any = text
    if annotation is not str:
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            raise ConfigError(name, short(text), "a YAML value", "Put quotes around the text.") from None
    if is_section(annotation) and not isinstance(value, dict):
        inside = ", ".join(f"{name}.{key}" for key in annotation.model_fields)
        raise ConfigError(name, f"one value for a group of settings ({short(text)})", inside, "Set one of its keys.")
    return value


def _override(text: str, task: str) -> dict[str, Any]:
    """{"a": {"b": value}} from "a.b=value"."""
    name, equals, raw = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError(f"setting {text!r}", "no key=value", "key=value such as train.lr=5e-4", "Write it that way.")
    if name == "preset":
        raise ConfigError(
            "preset", f"a setting ({short(text)})", "the preset chosen at the start", "Use --preset NAME."
        )
    value = read_value(name, raw, task)
    for part in reversed(name.split(".")):
        value = {part: value}
    return value
