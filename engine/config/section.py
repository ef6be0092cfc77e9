"""`Section`, the base of every group of settings, and the types that settings have."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from engine.errors import ConfigError
from engine.vocabulary import MODALITIES

# No sensible setting comes near these limits. Without them a mistyped digit asks for terabytes.
WIDEST = 1 << 14
LONGEST = 100_000
MOST_EPOCHS = 1_000_000
TRUE_AS_NUMBER = "true_as_number"


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # pydantic publishes it under no name of its own


@contextlib.contextmanager
def one_line(section: Any, task: str | None = None) -> Iterator[None]:
    """Turn pydantic's error into a `ConfigError`."""
    from engine.config.problems import translate

    try:
        yield
    except ValidationError as cause:
        raise translate(cause, section, task) from None


class _OneLine(ModelMetaclass):
    """Turns pydantic's errors into `ConfigError` where a section is made by a call, as in `DataConfig(clip=-1)`."""

    def __call__(cls, *places: Any, **values: Any) -> Any:
        from engine.config.problems import short

        if places and cls.__init__ is BaseModel.__init__:
            found = f"{short(places[0])} ({type(places[0]).__name__})"
            do = f"Write {cls.__name__}(name=value) or {cls.__name__}(**mapping)."
            raise ConfigError(cls.__name__, found, "settings by name", do)
        with one_line(cls, values.get("task")):
            return super().__call__(*places, **values)


class Section(BaseModel, metaclass=_OneLine):
    """A group of settings. Making one, loading a file and assigning to a field raise `ConfigError` alike.

    >>> class Mine(Section):
    ...     width: int = 64
    >>> Mine(width=32)
    Mine(width=32)
    """

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        str_max_length=4096,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `yes` and `true` for numbers: they would count as 1. `no` and `false` are 0, as they should be."""
        annotation = cls.model_fields[info.field_name].annotation if info.field_name else None
        plain = value if isinstance(value, (list, tuple)) else [value]
        if isinstance(value, dict) and get_origin(annotation) is dict:
            plain = value.values()
        if any(one is True for one in plain) and not _takes_true(annotation):
            expected = "a number, or text in quotes (YAML takes yes and on for true)"
            raise PydanticCustomError(TRUE_AS_NUMBER, f"Input should be {expected}")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get(name)
        try:
            super().__setattr__(name, value)
        except ValidationError as cause:
            from engine.config.problems import translate

            raise translate(cause, type(self)) from None
        except ConfigError:
            self.__dict__[name] = before  # a refused value must not stay behind
            raise


def _takes_true(annotation: Any) -> bool:
    """Whether `True` is a value of this type. A type that names neither numbers nor text decides for itself."""
    named = _types_within(annotation)
    return not named & {int, float, str} or bool(named & {bool, Any, object})


def _types_within(annotation: Any) -> set[Any]:
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return set(map(type, parts))
    if parts:
        return set().union(*map(_types_within, parts))
    return {annotation} if isinstance(annotation, Hashable) else set()


def is_section(annotation: Any) -> bool:
    """Whether a setting of this type is a group of settings."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


# -- shorthand: what people write for a value -------------------------------------------------------


def _dashed(value: Any) -> Any:
    """A list written with dashes: "9-60" is [9, 60]. A single number is a list of one."""
    if isinstance(value, str):
        return value.split("-")
    return [value] if isinstance(value, (int, float)) else value


def _modalities(value: Any) -> Any:
    """Each name once, in the order text, audio, vision. "audio-vision" and "audio,vision" are lists too."""
    if isinstance(value, str):
        value = [name.strip() for name in re.split("[-,]", value)]
    if isinstance(value, (list, tuple)) and set(map(str, value)) <= set(MODALITIES):
        return [name for name in MODALITIES if name in value]
    return value


def spread(n: int) -> BeforeValidator:
    """A single number stands for n equal ones."""
    return BeforeValidator(lambda value: [value] * n if isinstance(value, (int, float, str)) else value)


dashed = BeforeValidator(_dashed)
as_modalities = BeforeValidator(_modalities)
as_names = BeforeValidator(lambda value: [n.strip() for n in value.split(",")] if isinstance(value, str) else value)
one_or_many = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)

# YAML reads a bare `off` or `no` as false, and knows no lower-case `none`. People write all three.
off = BeforeValidator(lambda value: "off" if value is False else value)
no = BeforeValidator(lambda value: "no" if value is False else value)
none = BeforeValidator(lambda value: None if isinstance(value, str) and value.lower() == "none" else value)

COMMON = {"common": True}
"""Marks a setting that `engine train --help` shows."""

# -- types ------------------------------------------------------------------------------------------

Positive = Annotated[int, Field(ge=1, le=MOST_EPOCHS)]
Probability = Annotated[float, Field(ge=0, lt=1)]
