"""What every command shares: reading a recipe and naming itself."""

import shlex
import sys
from collections.abc import Sequence

from trl import TrlParser


def parse_recipe(
    dataclass_types: Sequence[type], description: str, arguments: Sequence[str] | None = None, **defaults: object
) -> tuple:
    """Read `--config recipe.yaml` and the command line, which wins, into one instance of each dataclass.

    `defaults` replace those of the dataclasses and yield to the recipe.

    An unknown key, an unreadable file or a value of the wrong type ends the program with one line and exit code 2.
    """
    parser = TrlParser(dataclass_types, description=description.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", metavar="RECIPE.yaml", help="Recipe whose keys are the options below.")
    parser.set_defaults(**defaults)
    try:
        return parser.parse_args_and_config(arguments)[: len(dataclass_types)]
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def command_line(module: str) -> str:
    """Return the command that started this program, as one pastes it."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])
