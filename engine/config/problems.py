"""Errors of settings: pydantic's errors and unknown keys, each as one line in the user's words."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import ValidationError

from engine.config.section import TRUE_AS_NUMBER, Section, is_section
from engine.errors import ConfigError

_LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def short(value: Any) -> str:
    """A value on one line of at most 60 characters."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = "a number of too many digits"
    text = " ".join(text.split()) or "nothing"
    return text if len(text) <= 60 else text[:57] + "..."


def wrong_choice(where: str, value: Any, choices: Sequence[str]) -> ConfigError:
    """The error of a word that is not among `choices`; it suggests the nearest one.

    >>> print(wrong_choice("mode", "fsat", ["fast", "faithful"]))
    mode: found fsat; expected one of fast, faithful. Did you mean fast?
    """
    near = difflib.get_close_matches(str(value), choices, n=1)
    do = f"Did you mean {near[0]}?" if near else "Choose one of these."
    return ConfigError(where, short(value), f"one of {', '.join(choices)}", do)


def unknown_key(path: list[str], section: Any, task: str) -> ConfigError:
    """The error of a key that the settings of `task` do not have; it suggests keys with a similar name.

    Args:
        path: the key's parts, `["train", "lrr"]`.
        section: type of the group that was searched for the last part.
    """
    from engine.config.help import annotations, keys

    name = ".".join(path)
    every = [key.name for key in keys(task)]
    if name in every and "." in path[-1]:
        *groups, last = name.split(".")
        written = "".join(f"{group}: {{" for group in groups) + f"{last}: ..." + "}" * len(groups)
        return ConfigError(name, "a key with dots", "groups, as YAML has them", f"Write {written}.")
    by_last_part = defaultdict(list)
    for key in every:
        by_last_part[key.rpartition(".")[2]].append(key)
    near = difflib.get_close_matches(name, every, n=3, cutoff=0.7)
    for match in difflib.get_close_matches(path[-1], by_last_part, n=3, cutoff=0.75):
        near += [key for key in by_last_part[match] if key not in near]
    siblings = list(annotations(section, task)) if is_section(section) else []
    group = ".".join(path[:-1])
    expected = f"one of {', '.join(siblings)}" if siblings else f"no key below {group}, which is a single value"
    do = f"Did you mean {' or '.join(near[:3])}?" if near else "`engine config --keys` lists every key."
    return ConfigError(name, "an unknown key", expected + (f" in {group}" if siblings and group else ""), do)


def translate(cause: ValidationError, root: type[Section], task: str | None = None) -> ConfigError:
    """The first of pydantic's errors as one line in the user's words.

    Args:
        root: the type that was validated.
        task: whose sections the settings have; None: those of settings that name no task.
    """
    from engine.config.help import annotations
    from engine.task import DEFAULT

    task = task if isinstance(task, str) else DEFAULT
    error = cause.errors()[0]
    parts: list[str] = []
    section: Any = root
    annotation: Any = root
    for part in error["loc"]:
        if isinstance(part, int):
            parts[-1] += f"[{part}]"
        elif is_section(annotation):
            parts.append(str(part))
            section = annotation
            annotation = annotations(section, task).get(part)
    name, value = ".".join(parts), short(error["input"])
    if error["type"] == "no_such_attribute":
        return unknown_key([str(error["loc"][0])], root, task)
    if error["type"] == "extra_forbidden":
        return unknown_key(parts, section, task)
    if error["type"] in ("model_type", "model_attributes_type", "dict_type") and is_section(annotation):
        return ConfigError(name, value, "a group of settings", f"Set one of {', '.join(annotation.model_fields)}.")
    context = error.get("ctx", {})
    limit = next((f"{sign} {context[k]}" for k, sign in _LIMITS.items() if k in context), None)
    if error["type"] == "literal_error":
        choices = get_args(annotation)
        if choices and all(isinstance(choice, str) for choice in choices):  # else of a list's items
            return wrong_choice(name, error["input"], choices)
        return ConfigError(name, value, context["expected"], "Choose one of these.")
    if limit:
        return ConfigError(name, value, f"a value {limit}", "Change the value.")
    if error["type"] == "too_short":
        return ConfigError(name, value, f"at least {context['min_length']} of them", "Change the value.")
    if error["type"] == "string_pattern_mismatch":
        return ConfigError(name, value, section.model_fields[parts[-1]].description, "Change the value.")
    if error["type"] == "missing":
        return ConfigError(name, "nothing", "a value", "Add it.")
    expected = error["msg"].removeprefix("Input should be ")
    if error["type"] == TRUE_AS_NUMBER:
        return ConfigError(name, value, expected, "Change the value.")
    expected = expected.split(", ")[0].replace("valid ", "")
    expected = {"a integer": "an integer", "a boolean": "true or false"}.get(expected, expected)
    return ConfigError(name, value, expected, "Change the value.")
