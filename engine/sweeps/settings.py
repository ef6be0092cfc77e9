"""What a sweep runs: the grid of its settings, read from a file or from the command line, each with a name."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import Config, changed, read_value, setting_type, text_of
from engine.config.reading import read_settings
from engine.config.section import is_section
from engine.errors import ConfigError
from engine.files import user_path

MOST_RUNS = 10_000
FIXED = ("preset", "task", "seed", "device", "threads")
"""Settings that are the same for all runs, the seed excepted, which has a place of its own."""


@dataclass(frozen=True)
class Setting:
    """One cell of a sweep: its name, which is its folder's too, and the settings in which it differs from the base."""

    name: str
    values: dict[str, Any]
    config: Config


def split_list(text: str) -> list[str]:
    """The values of `key=1,2,3`. Commas within brackets or quotes do not separate.

    >>> split_list("[1,2],MI(F, T)")
    ['[1,2]', 'MI(F, T)']
    """
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not depth and not quote:
            parts.append("")
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not parts[-1].strip():
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        parts[-1] += letter
    return [part.strip() for part in parts]


def read_words(words: Sequence[str], task: str) -> dict[str, list[Any]]:
    """{key: values} of the words `key=a,b` of a command line."""
    grid: dict[str, list[Any]] = {}
    for word in words:
        name, _, text = word.partition("=")
        name = name.strip()
        if name in grid:
            raise ConfigError(name, "the key twice", "each key once", "Give all its values at once: key=1,2,3.")
        grid[name] = [read_value(name, part, task) for part in split_list(text)]
    return grid


def read_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file of a search space: plain values only."""
    path = user_path(path)
    return read_settings(path, str(path))


def flat(values: Mapping[str, Any], task: str, where: str) -> dict[str, Any]:
    """{dotted key: value} of settings in groups, or with dotted keys, or both. Keys are checked.

    >>> flat({"train": {"lr": 1, "schedule": {"rate": 2}}, "epochs": 3}, "mimrl", "space")
    {'train.lr': 1, 'train.schedule.rate': 2, 'epochs': 3}
    """
    found: dict[str, Any] = {}
    if not isinstance(values, Mapping):
        raise ConfigError(where, f"{values!r}"[:60], "settings such as train.lr: ...", "Write key: value.")
    for name, value in values.items():
        name = str(name)
        if is_section(setting_type(name, task)):
            inner = {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, Mapping) else value
            inner = flat(inner, task, f"{where}, {name}")
        else:
            inner = {name: value}
        if twice := found.keys() & inner.keys():
            raise ConfigError(f"{where}, {min(twice)}", "the key twice", "each key once", "Drop one of them.")
        found |= inner
    for name in found:
        if name in FIXED:
            do = "Give seeds instead." if name == "seed" else "Set it for all runs."
            raise ConfigError(f"{where}, {name}", "a setting that is the same for all runs", "another key", do)
    return found


def grid_of(
    base: Config, grid: Mapping[str, Sequence[Any]], named: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Setting]:
    """Every combination of the values of `grid`, within each of the named settings.

    Args:
        grid: {key: its values}.
        named: {name: {key: value}}, whole sets of settings.

    Raises:
        ConfigError: an unknown key, a value out of range, settings that contradict each other, or a combination that
            is given twice.
    """
    axes = flat(grid, base.task, "grid")
    for name, values in axes.items():
        if not isinstance(values, (list, tuple)) or not values:
            raise ConfigError(f"grid, {name}", f"{values!r}"[:60], "a list of values", f"Write {name}: [1, 2].")
    if not isinstance(named, (Mapping, type(None))):
        raise ConfigError("settings", f"{named!r}"[:60], "{name: {key: value}}", "Give each set of settings a name.")
    sets = {
        str(name): flat(values or {}, base.task, f"settings, {name}") for name, values in (named or {"": {}}).items()
    }
    for name, values in sets.items():
        if twice := values.keys() & axes.keys():
            raise ConfigError(f"settings, {name}", f"{min(twice)}, which the grid has too", "one place", "Drop one.")
    count = len(sets)
    for values in axes.values():
        count *= len(values)
    if count > MOST_RUNS:
        raise ConfigError("grid", f"{count} settings", f"at most {MOST_RUNS}", "Use fewer values.")
    found: list[Setting] = []
    folders: dict[str, str] = {}
    for name, fixed in sets.items():
        for point in itertools.product(*axes.values()):
            values = fixed | dict(zip(axes, point, strict=True))
            config = changed(base, values)
            own = {key: value_of(config, key) for key in axes}
            label = (
                ",".join(filter(None, [name, *(f"{key}={value_text(value)}" for key, value in own.items())])) or "base"
            )
            folder = folder_name(label)
            if folder.lower() in folders:
                raise ConfigError("grid", f"{label} twice", "each combination once", "Drop the repeated value.")
            folders[folder.lower()] = label
            found.append(Setting(folder, {key: value_of(config, key) for key in values}, config))
    return found


def value_of(config: Config, name: str) -> Any:
    """The value of a dotted key, as plain data."""
    value: Any = config.model_dump(mode="json")
    for part in name.split("."):
        value = value[part]
    return value


def value_text(value: Any) -> str:
    """A value as one would write it after `key=`, with all its digits.

    >>> value_text(0.0005), value_text(True), value_text(None), value_text(0.12345678)
    ('0.0005', 'true', 'none', '0.12345678')
    """
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return text_of(value)


def folder_name(label: str) -> str:
    """A folder's name that tells a setting: plain characters, with a checksum where that changes the label.

    >>> folder_name("train.lr=0.001"), folder_name("../x")
    ('train.lr=0.001', 'x-1fb8ad98')
    """
    plain = re.sub(r"[^\w.=,+-]+", "-", label, flags=re.ASCII).strip("-.,")[:100]
    if plain == label:
        return plain
    return f"{plain}-{zlib.crc32(label.encode()):08x}".lstrip("-")


def differences(saved: Mapping[str, Any], given: Mapping[str, Any], what: str = "") -> list[str]:
    """`key value, not value` for everything in which two mappings of plain values differ."""
    found = []
    for key in {**saved, **given}:
        x, y = saved.get(key), given.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found += differences(x, y, f"{what}{key}.")
        elif x != y:
            found.append(f"{what}{key} {_shown(y)}, not {_shown(x)}")
    return found


def _shown(value: Any) -> str:
    return "nothing" if value is None else value_text(value) if not isinstance(value, Mapping) else str(dict(value))
