"""What every command shares: reading a recipe and naming itself."""

import dataclasses
import shlex
import sys
import typing
from collections.abc import Collection, Sequence
from importlib import import_module
from typing import NoReturn

from trl import TrlParser

from pipeline.errors import UserError
from pipeline.runtime.recipes import read_recipe, recipe_keys

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
        # The parser rewrites the fields' own types, so the annotations are read afresh.
        hints = {name: hint for kind in dataclass_types for name, hint in typing.get_type_hints(kind).items()}
        settings = settings_in(dataclass_types)
        _check_program(recipe, settings)
        actions = {name: parser._option_string_actions[f"--{name}"] for name in settings}
        parser.set_defaults(**read_recipe(recipe, actions, {name: hints[name] for name in actions}))
    try:
        *parsed, from_line = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    if from_line:
        raise UserError(f"unknown on the command line: {' '.join(from_line)}. --help lists the settings.")
    return tuple(parsed[: len(dataclass_types)])


def split_recipe(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Take `--config PATH` or `--config=PATH` out of the arguments: (the others, PATH or None).

    Raises:
        UserError: `--config` without a path, or twice.
    """
    others, recipes = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            recipes.append(next(rest, ""))
        elif argument.startswith("--config="):
            recipes.append(argument.removeprefix("--config="))
        else:
            others.append(argument)
    if "" in recipes:
        raise UserError("--config needs the path of a recipe.")
    if len(recipes) > 1:
        raise UserError(f"--config is given {len(recipes)} times ({', '.join(recipes)}); name one recipe.")
    return others, recipes[0] if recipes else None


def settings_in(dataclass_types: Sequence[type]) -> set[str]:
    """The names that a recipe of these dataclasses may have."""
    return {field.name for kind in dataclass_types for field in dataclasses.fields(kind) if field.init}


def _check_program(path: str, settings: Collection[str]) -> None:
    """Raise `UserError` where a recipe is another program's."""
    named = recipe_keys(path)
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
