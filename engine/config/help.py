"""The list of all settings, as help, documentation and errors show it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from engine.config.config import Config
from engine.config.section import COMMON, Section, is_section
from engine.task import DEFAULT, TASKS, find_task


class Key(NamedTuple):
    """One setting, as help and documentation show it."""

    name: str
    type: str
    default: str
    description: str
    common: bool = False


def common_keys(task: str = DEFAULT) -> list[Key]:
    """The settings that people change most, which `engine train --help` shows."""
    return [key for key in keys(task) if key.common]


def keys(task: str = DEFAULT) -> list[Key]:
    """Every setting of a task with its type, default and description, in the order of the YAML.

    >>> keys()[0].name
    'preset'
    """
    defaults = {"task": task, "mode": find_task(task).modes[0]}
    choices = {"task": " | ".join(TASKS), "mode": " | ".join(find_task(task).modes)}
    return [
        key._replace(default=defaults.get(key.name, key.default), type=choices.get(key.name, key.type))
        for key in _keys(Config, task, "")
    ]


def _keys(section: type[Section], task: str, prefix: str) -> list[Key]:
    listed = []
    for name, annotation in annotations(section, task).items():
        if is_section(annotation):
            listed += _keys(annotation, task, f"{prefix}{name}.")
            continue
        field = section.model_fields[name]
        common = field.json_schema_extra == COMMON
        listed.append(Key(prefix + name, _plain(annotation), text_of(field.default), field.description or "", common))
    return listed


def key_table(task: str = DEFAULT) -> str:
    """All settings of a task as the Markdown table of docs/config.md."""
    rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for key in keys(task):
        values, meaning = key.type.replace(" | ", ", "), key.description.replace("|", "\\|")
        rows.append(f"| `{key.name}` | `{key.default or '(empty)'}` | {values} | {meaning} |")
    return "\n".join(rows) + "\n"


def annotations(section: type[Section], task: str) -> dict[str, Any]:
    """The settings of a section with their types. Of `Config`, the sections are those of `task`."""
    own = Config.sections_of(task) if section is Config else {}
    return {name: own.get(name, field.annotation) for name, field in section.model_fields.items()}


def text_of(value: Any) -> str:
    """A value as one would write it after `key=`.

    >>> text_of([(20, 3, 128), (10, 3, 128)])
    '20-3-128=10-3-128'
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {text_of(v)}" for key, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], (list, tuple)):
            return "=".join(dash(v) for v in value)
        if len(value) > 1 and isinstance(value[0], float) and len(set(value)) == 1:
            return text_of(value[0])  # one number stands for all of them
        return "[" + ", ".join(text_of(v) for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def dash(shape: Iterable[int]) -> str:
    """A shape as settings write it.

    >>> dash((20, 3, 128))
    '20-3-128'
    """
    return "-".join(str(n) for n in shape)


def _plain(annotation: Any) -> str:
    """The type in words, without its limits, which an error gives where a value exceeds them."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain(args[0])
    if origin is Literal:
        return " | ".join(args)
    if origin is list:
        return f"list of {_plain(args[0])}"
    if origin is dict:
        return f"map of {_plain(args[0])} to {_plain(args[1])}"
    if origin is tuple:
        return f"{len(args)} {_plain(args[0])}"
    if origin is Union or type(annotation).__name__ == "UnionType":
        return " | ".join(_plain(a) for a in args)
    return {str: "text", float: "number", int: "integer", bool: "true | false", type(None): "none"}[annotation]
