"""YAML that a stranger may have written: plain values, bounded in size and depth, each key once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from engine.errors import ConfigError
from engine.files import read_text

# What a settings file may cost. Those of this project have about 300 values, keys included, and 2 KB.
FILE_BYTES = 1 << 18
FILE_VALUES = 10_000
FILE_DEPTH = 20


_PLAIN_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)\Z")
_PLAIN_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?\Z|[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z")
_INT, _FLOAT, _DATE = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))


def _plain_resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """YAML's rules for what a word is, without those that nobody means: 010 is not 8, 1:30 not 90, and no word a date.

    Such words stay text. A setting that is a number then reads 010 as 10, and refuses 1:30.
    """
    kept = {}
    for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items():
        plain = {_INT: _PLAIN_INT, _FLOAT: _PLAIN_FLOAT}
        kept[letter] = [(tag, plain.get(tag, rule)) for tag, rule in rules if tag != _DATE]
    return kept


class _Loader(yaml.SafeLoader):
    """Counts values: aliases and merges could make a small file grow without end ("billion laughs")."""

    yaml_implicit_resolvers = _plain_resolvers()

    def __init__(self, text: str):
        super().__init__(text)
        self._depth, self._values, self._sizes = 0, 0, {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node. Each reference to it counts with all that the node holds."""
        place = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            # A node whose size is not known yet holds a reference to itself.
            self._count(self._sizes.get(id(node), FILE_VALUES + 1), place)
            return node
        self._depth += 1
        if self._depth > FILE_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"values nested more than {FILE_DEPTH} deep", problem_mark=place)
        before = self._values
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._count(1 + (len(node.value) // 100 if isinstance(node, yaml.ScalarNode) else 0), place)
        self._sizes[id(node)] = self._values - before
        return node

    def _count(self, size: int, place: yaml.Mark) -> None:
        self._values += size
        if self._values > FILE_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {FILE_VALUES} values (long texts count as several, aliases as what they stand for)",
                problem_mark=place,
            )

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        """A mapping. A key that stands twice is an error: YAML would silently take the last one."""
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Plain values from YAML text.

    >>> parse_yaml("train: {lr: 0.5}")
    {'train': {'lr': 0.5}}

    Raises:
        yaml.YAMLError: it is not YAML, or it exceeds `FILE_BYTES`, `FILE_VALUES` or `FILE_DEPTH`.
    """
    if len(text) > FILE_BYTES:
        raise yaml.MarkedYAMLError(problem=f"{len(text)} characters, more than the {FILE_BYTES} that are read")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError:
        raise
    except Exception as cause:  # a date of month 13, a number of 10,000 digits, a tag on another kind of value, ...
        problem = "a number of too many digits" if "digits" in str(cause) else "a value that is not what it looks like"
        raise yaml.MarkedYAMLError(problem=problem) from cause


def yaml_problem(cause: yaml.YAMLError) -> str:
    """What is wrong with the text, in one phrase."""
    problem = getattr(cause, "problem", None)
    if problem is None and isinstance(cause, yaml.reader.ReaderError):  # a character that YAML does not allow
        problem = f"{cause.reason} (U+{cause.character:04X})" if isinstance(cause.character, int) else cause.reason
    return (problem or "text that is not YAML").removeprefix("found ")


def read_settings(path: Any, where: str) -> dict[str, Any]:
    """The mapping that a settings file holds.

    Args:
        path: a `Path`, or a packaged file.
        where: how errors name the file.

    Raises:
        ConfigError: no such file, not YAML, or no mapping.
    """
    try:
        values = parse_yaml(read_text(path, FILE_BYTES) if isinstance(path, Path) else path.read_text("utf-8"))
    except yaml.YAMLError as cause:
        mark = getattr(cause, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(
            where + line, yaml_problem(cause), "a YAML mapping of settings", "Correct the file."
        ) from None
    except (OSError, ValueError) as cause:
        problem = getattr(cause, "strerror", None) or str(cause)
        raise ConfigError(where, problem, "a readable YAML file", "Check the path.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            where, f"a YAML {type(values).__name__}", "a mapping such as `epochs: 8`", "Correct the file."
        )
    return values
