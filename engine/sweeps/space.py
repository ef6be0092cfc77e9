"""The search space of a tuning: ranges and choices of settings, read from a file or from the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from engine.config import Config, changed, read_value, setting_type
from engine.config.section import is_section
from engine.errors import ConfigError
from engine.sweeps.settings import FIXED, split_list, value_of, value_text

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"\s*({NUMBER})\s*\.\.\s*({NUMBER})\s*(?::(.*))?")
EXPECTED = "a range {low: 1e-4, high: 1e-2, log: true} or a list of choices"
MOST_CHOICES = 1000


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        step: distance between two values; None: any number (any integer where `whole`).
        log: drawn evenly on a logarithmic scale.
        whole: integers only.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False
    whole: bool = False

    def plain(self) -> dict[str, Any]:
        """As the file writes it."""
        step = {} if self.step is None else {"step": self.step}
        return {"low": self.low, "high": self.high, **step, **({"log": True} if self.log else {})}

    def text(self) -> str:
        """As the command line writes it."""
        more = ":log" if self.log else "" if self.step is None else f":step={value_text(self.step)}"
        return f"{value_text(self.low)}..{value_text(self.high)}{more}"


@dataclass(frozen=True)
class Choice:
    """Values to choose among, of any type. A study knows them by their texts."""

    values: tuple[Any, ...]

    @property
    def labels(self) -> list[str]:
        return [value_text(value) for value in self.values]

    def plain(self) -> list[Any]:
        return list(self.values)

    def text(self) -> str:
        return ",".join(self.labels)


Space = dict[str, Range | Choice]
"""{dotted key: what it may be}."""


def read_space(values: Mapping[str, Any], base: Config, where: str = "space") -> Space:
    """The space of plain values, as a YAML file has them. Keys may stand in groups.

    >>> space = read_space({"train.lr": {"low": "1e-4", "high": 0.01, "log": True}, "batch_size": [16, 32]}, Config())
    >>> space["train.lr"], space["batch_size"].labels
    (Range(low=0.0001, high=0.01, step=None, log=True, whole=False), ['16', '32'])

    Raises:
        ConfigError: an unknown key, a value out of range, text for a number, or no range and no list.
    """
    space = _read(values, base, where)
    if not space:
        raise ConfigError(where, "no settings", "at least one setting to search", "Add one, such as train.lr.")
    return space


def _read(values: Any, base: Config, where: str, above: str = "") -> Space:
    if not isinstance(values, Mapping):
        raise ConfigError(where, f"{values!r}"[:60], "a mapping of settings", "Write key: {low: ..., high: ...}.")
    space: Space = {}
    for name, value in values.items():
        name = f"{above}{name}"
        annotation = setting_type(name, base.task)
        if is_section(annotation):
            inner = _read(value, base, f"{where}, {name}", f"{name}.")
        else:
            inner = {name: _one(name, value, annotation, base, f"{where}, {name}")}
        if twice := space.keys() & inner.keys():
            raise ConfigError(f"{where}, {min(twice)}", "the key twice", "each key once", "Drop one of them.")
        space |= inner
    return space


def read_space_words(words: Sequence[str], base: Config) -> Space:
    """The space of the words `key=low..high[:log|:step=S]` and `key=a,b,c` of a command line."""
    space: Space = {}
    for word in words:
        name, _, text = word.partition("=")
        name = name.strip()
        annotation = setting_type(name, base.task)
        if found := RANGE.fullmatch(text):
            value: Any = {"low": found[1], "high": found[2]} | _flag(name, found[3])
        else:
            value = [read_value(name, part, base.task) for part in split_list(text)]
        if name in space:
            raise ConfigError(name, "the key twice", "each key once", "Drop one of them.")
        space[name] = _one(name, value, annotation, base, name)
    return space


def is_searched(word: str) -> bool:
    """Whether the word `key=text` of a command line has a range or several values.

    >>> is_searched("train.lr=1e-4..1e-2:log"), is_searched("batch_size=16,32"), is_searched("epochs=3")
    (True, True, False)
    """
    text = word.partition("=")[2]
    return RANGE.fullmatch(text) is not None or len(split_list(text)) > 1


def _flag(name: str, flag: str | None) -> dict[str, Any]:
    if flag is None:
        return {}
    if flag == "log":
        return {"log": True}
    if found := re.fullmatch(rf"step=({NUMBER})", flag):
        return {"step": found[1]}
    raise ConfigError(
        name, f":{flag}", ":log or :step=S after the range", "Write it as 1e-4..1e-2:log or 0..1:step=0.1."
    )


def _one(name: str, value: Any, annotation: Any, base: Config, where: str) -> Range | Choice:
    if name in FIXED:
        raise ConfigError(where, "a setting that is the same for all trials", "another key", "Set it for all of them.")
    if isinstance(value, Mapping):
        return _range(name, value, annotation, base, where)
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_CHOICES:
        raise ConfigError(where, f"{value!r}"[:60], EXPECTED, "Write one of them.")
    choice = Choice(tuple(value_of(changed(base, {name: one}), name) for one in value))
    if len(set(choice.labels)) < len(choice.labels):
        raise ConfigError(where, f"{choice.text()}, which repeats a value", "each value once", "Drop the repeats.")
    return choice


def _range(name: str, value: Mapping[str, Any], annotation: Any, base: Config, where: str) -> Range:
    if unknown := [str(key) for key in value if key not in ("low", "high", "step", "log")]:
        raise ConfigError(where, f"the word {unknown[0]!r}", "low, high, step and log", "Drop it.")
    if "low" not in value or "high" not in value:
        raise ConfigError(where, "a range without low and high", EXPECTED, "Write both.")
    kinds = _kinds(annotation)
    if not kinds & {int, float}:
        raise ConfigError(where, "a range for a setting that is no number", "a list of choices", "Write [a, b].")
    whole, log = float not in kinds, value.get("log", False)
    low, high = (_number(value[key], whole, f"{where}, {key}") for key in ("low", "high"))
    step = None if value.get("step") is None else _number(value["step"], whole, f"{where}, step")
    if type(log) is not bool:
        raise ConfigError(f"{where}, log", f"{log!r}"[:60], "true or false", "Change the value.")
    if low > high:
        raise ConfigError(where, f"low {low:g} above high {high:g}", "low at most high", "Exchange them.")
    if log and low <= 0:
        raise ConfigError(where, f"low {low:g} on a logarithmic scale", "a number above 0", "Raise low.")
    if step is not None and (log or step <= 0):
        found = "log and step together" if log else f"a step of {step:g}"
        raise ConfigError(where, found, "a step above 0, without log", "Change or drop the step.")
    if step is not None and step > (high - low) * (1 + 1e-9):
        raise ConfigError(where, f"a step of {step:g} from {low:g} to {high:g}", "a step within the range", "Lower it.")
    for bound in (low, high):
        changed(base, {name: bound})
    if step is not None:  # the last value that the steps reach
        high = low + math.floor((high - low) / step + 1e-9) * step
    return Range(low, high, step, log, whole)


def _number(value: Any, whole: bool, where: str) -> float:
    """A number, also where YAML reads it as text (1e-4)."""
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(where, f"{value!r}"[:60], "a number", "Change the value.") from None
    if not math.isfinite(number) or (whole and number != int(number)):
        raise ConfigError(where, f"{value!r}"[:60], "an integer" if whole else "a finite number", "Change the value.")
    return int(number) if whole else number


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that a setting may have."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(args[0])
    # Of a list, too: where one number stands for all of them, checking the bounds accepts it.
    if origin in (Union, list, tuple) or type(annotation).__name__ == "UnionType":
        return {kind for arg in args for kind in _kinds(arg)}
    return {annotation} if isinstance(annotation, type) else {origin}
