"""A recipe's text as settings: each value is read as the command line would read it, and not as YAML guesses.

YAML takes `no` for false, `1e-4` for text, `010` for eight and `1:30` for ninety. Here the setting's own type decides.
"""

import argparse
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from pipeline.errors import UserError

NULL = "tag:yaml.org,2002:null"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the numbers of YAML 1.2: an exponent needs no point."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+|\d*\.\d+|\d+\.)[eE][-+]?\d+$"), list("-+.0123456789")
)


def recipe_keys(path: str) -> set[str]:
    """The names of the settings in a recipe; raises `UserError` where it cannot be read."""
    return {key.value for key, _ in _compose(path)[1].value}


def read_recipe(path: str, actions: Mapping[str, argparse.Action], hints: Mapping[str, object]) -> dict[str, object]:
    """The settings in a recipe, each of its own type.

    Args:
        actions: the parser's action for each setting: what the command line makes of a text.
        hints: the type of each setting.

    Raises:
        UserError: the file cannot be read, is not YAML or holds no settings; a key is unknown or stands there twice; a
            value is missing or of the wrong type. The message names file, line and key.
    """
    loader, node = _compose(path)
    settings = {}
    unknown = [key.value for key, _ in node.value if key.value not in hints]
    if unknown:
        raise UserError(f"{path}: there is no setting {', '.join(unknown)}.")
    for key, value in node.value:
        try:
            settings[key.value] = _value(loader, value, actions[key.value], hints[key.value])
        except (ValueError, TypeError, argparse.ArgumentTypeError, yaml.YAMLError) as error:
            written = _as_written(value)
            raise UserError(f"{path}, line {_line(key)}: {key.value}={written} {_why(error)}.") from error
    return settings


def _compose(path: str) -> tuple[yaml.SafeLoader, yaml.MappingNode]:
    """The tree of a recipe whose keys are different texts, and what makes values of it."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path} is not text in UTF-8 ({error.reason}); save it as UTF-8.") from error
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode) or not node.value:
            raise UserError(f"--config {path} must hold settings, one `name: value` a line.")
        _check_keys(path, node)
        loader.flatten_mapping(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        tab = mark is not None and "\t" in text.splitlines()[mark.line][: mark.column + 1]
        why = "a tab stands where YAML wants spaces" if tab else getattr(error, "problem", None) or error
        raise UserError(f"--config {path}{where} is not YAML: {' '.join(str(why).split())}.") from error
    return loader, node


def _check_keys(path: str, mapping: yaml.MappingNode) -> None:
    """Raise `UserError` where a key of a mapping, or of one inside it, is not a text or stands there twice."""
    first: dict[str, int] = {}
    for key, _ in mapping.value:
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"--config {path}, line {_line(key)}: a key must be the name of a setting.")
        if key.value == "config":
            raise UserError(f"{path}: there is no setting config; one recipe cannot name another.")
        if key.value in first:
            raise UserError(
                f"--config {path}: {key.value} stands there twice, in lines {first[key.value]} and {_line(key)}; "
                f"remove one of them."
            )
        first[key.value] = _line(key)
    for inner in _mappings(value for _, value in mapping.value):
        _check_keys(path, inner)


def _mappings(nodes: typing.Iterable[yaml.Node]) -> Iterator[yaml.MappingNode]:
    for node in nodes:
        if isinstance(node, yaml.MappingNode):
            yield node
        elif isinstance(node, yaml.SequenceNode):
            yield from _mappings(node.value)


def _value(loader: yaml.SafeLoader, node: yaml.Node, action: argparse.Action, hint: object) -> object:
    kinds = set(_kinds(hint))
    if node.tag == NULL:
        if type(None) not in kinds:
            raise ValueError("has no value; give it one, or leave the line out")
        return None
    if isinstance(node, yaml.ScalarNode):
        value = _scalar(loader, node, action, kinds)
        return [value] if action.nargs == "+" else value  # a list of one may be written as it is
    if isinstance(node, yaml.SequenceNode):
        if list not in kinds:
            raise ValueError("is a list; the setting takes one value")
        if action.nargs != "+":  # one value or several, which the setting sorts out itself
            return loader.construct_object(node, deep=True)
        if any(not isinstance(item, yaml.ScalarNode) or item.tag == NULL for item in node.value):
            raise ValueError("must be a list of single values")
        return [_scalar(loader, item, action, kinds) for item in node.value]
    if dict not in kinds:
        raise ValueError("is a group of settings; the setting takes one value")
    return loader.construct_object(node, deep=True)


def _scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode, action: argparse.Action, kinds: set[object]) -> object:
    """What the command line makes of the text; a truth value may also be YAML's on and off."""
    if bool in kinds and isinstance(value := loader.construct_object(node), bool):
        return value
    value = node.value if action.type is None else action.type(node.value)
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"is not one of {', '.join(map(str, action.choices))}")
    return value


def _kinds(hint: object) -> Iterator[object]:
    """The plain types a hint allows: list for list[str], str and NoneType for str | None."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            yield from _kinds(option)
    else:
        yield origin or hint


def _as_written(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value) if node.tag != NULL else "null"
    return " ".join(yaml.serialize(node).split())


def _why(error: Exception) -> str:
    """What is wrong with a value, as the rest of a sentence that begins with it."""
    told = str(error)
    if told.startswith(("is ", "has ", "must ")):
        return told
    if "invalid literal for int" in told:
        return "is not a whole number"
    if "could not convert string to float" in told:
        return "is not a number"
    if isinstance(error, argparse.ArgumentTypeError):
        return "is not true or false"
    return f"cannot be used: {' '.join(told.split())}"


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
