"""What every command shares: reading a recipe and naming itself."""

import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

import yaml
from trl import TrlParser

from pipeline.errors import UserError


def parse_recipe(
    dataclass_types: Sequence[type], description: str, arguments: Sequence[str] | None = None, **defaults: object
) -> tuple:
    """Read `--config recipe.yaml` and the command line, which wins, into one instance of each dataclass.

    `defaults` replace those of the dataclasses and yield to the recipe.

    Raises:
        UserError: an unknown key, an unreadable file, a value of the wrong type.
    """
    parser = TrlParser(dataclass_types, description=description.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", metavar="RECIPE.yaml", help="Recipe whose keys are the options below.")
    parser.set_defaults(**defaults)
    parser.error = _raise  # argparse would print all options before the one line that matters
    try:
        return parser.parse_args_and_config(arguments)[: len(dataclass_types)]
    except UserError:
        raise
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        raise UserError(str(error)) from error


def _raise(message: str) -> NoReturn:
    raise UserError(message)


def command_line(module: str) -> str:
    """Return the command that started this program, as one pastes it."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])
