"""Settings that check themselves: dataclasses whose values are held against their annotations."""

import math
import types
import typing
from dataclasses import field
from typing import Literal

from pipeline.errors import UserError


class ConfigError(UserError, ValueError):
    """A setting cannot be used; the message names it, the value and the remedy."""


def setting(default: object, help: str):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


class Checked:
    """Checks each value against its annotation: a YAML file can hold anything."""

    def __post_init__(self):
        # The parser rewrites the fields' own types, so the annotations are read afresh.
        for name, annotation in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, str) and annotation in (list[str], list[str] | None):
                value = [value]  # a recipe may write one as it is
                setattr(self, name, value)
            if not _fits(value, annotation):
                raise ConfigError(f"{name}={value!r} is not {_describe(annotation)}.")
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` where a value makes no sense."""


def _fits(value: object, annotation: object) -> bool:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(annotation))
    if origin is Literal:
        return value in typing.get_args(annotation)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, typing.get_args(annotation)[0]) for v in value)
    if annotation is type(None) or annotation is None:
        return value is None
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _describe(annotation: object) -> str:
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(annotation)))
    return f"of type {getattr(annotation, '__name__', annotation)}" if isinstance(annotation, type) else str(annotation)


def require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{name}={value!r}: {rule}.")


def require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raise `ConfigError` with the nearest sizes that would do unless `value` is a multiple of `divisor`."""
    if value % divisor:
        lower, upper = value // divisor * divisor, (value // divisor + 1) * divisor
        would_do = f"{lower} or {upper}" if lower else str(upper)
        raise ConfigError(f"{name}={value} is not a multiple of {divisor_name}={divisor}; {would_do} would do.")
