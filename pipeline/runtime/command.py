"""What every command shares: reading a recipe and naming itself."""

import dataclasses
import shlex
import sys
from collections.abc import Collection, Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import yaml
from trl import TrlParser

from pipeline.errors import UserError

PROGRAMS = ("train", "sft", "reward_model")  # that take recipes, each with its own SETTINGS


def parse_recipe(
    dataclass_types: Sequence[type], description: str, arguments: Sequence[str] | None = None, **defaults: object
) -> tuple:
    """Read `--config recipe.yaml` and the command line, which wins, into one instance of each dataclass.

    `defaults` replace those of the dataclasses and yield to the recipe.

    Raises:
        UserError: an unknown key, an unreadable file, a value of the wrong type.
    """
    arguments, recipe = split_recipe(sys.argv[1:] if arguments is None else arguments)
    parser = TrlParser(dataclass_types, description=description.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", metavar="RECIPE.yaml", help="Recipe whose keys are the options below.")
    parser.set_defaults(**defaults)
    parser.error = raise_error  # argparse would print all options before the one line that matters
    if recipe is not None:
        _check_recipe(recipe, settings_in(dataclass_types))
        arguments = ["--config", recipe, *arguments]
    try:
        *parsed, from_recipe, from_line = parser.parse_args_and_config(
            arguments, return_remaining_strings=True, separate_remaining_strings=True
        )
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    if from_recipe:
        raise UserError(f"{recipe}: there is no setting {', '.join(from_recipe[::2]).replace('--', '')}.")
    if from_line:
        raise UserError(f"unknown on the command line: {' '.join(from_line)}. --help lists the settings.")
    return tuple(parsed[: len(dataclass_types)])


def split_recipe(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Take `--config PATH` or `--config=PATH` out of the arguments: (the others, PATH or None).

    Raises:
        UserError: `--config` without a path.
    """
    others, recipe = [], None
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            recipe = next(rest, None)
            if recipe is None:
                raise UserError("--config needs the path of a recipe.")
        elif argument.startswith("--config="):
            recipe = argument.removeprefix("--config=")
        else:
            others.append(argument)
    return others, recipe


def settings_in(dataclass_types: Sequence[type]) -> set[str]:
    """The names that a recipe of these dataclasses may have."""
    return {field.name for dataclass in dataclass_types for field in dataclasses.fields(dataclass)}


def _check_recipe(path: str, settings: Collection[str]) -> None:
    """Raise `UserError` where a recipe cannot be read, or is another program's."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold settings, one `name: value` a line.")
    if "config" in content:
        raise UserError(f"{path}: there is no setting config; one recipe cannot name another.")
    named = set(content) - {"env"}  # environment variables, by the parser
    if named <= set(settings):
        return
    for program in PROGRAMS:  # they are above this module, and imported only for this message
        if named <= settings_in(import_module(f"pipeline.{program}").SETTINGS):
            raise UserError(f"{path} is a recipe of {program}: ./launch.sh {program} {path}")


def raise_error(message: str) -> NoReturn:
    """What an argparse parser does on an error here: one line instead of all options."""
    raise UserError(message)


def command_line(module: str) -> str:
    """Return the command that started this program, as one pastes it."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])
