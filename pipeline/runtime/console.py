"""What a person sees while a run goes on: a live picture on a terminal, plain lines in a log."""

import sys
from collections.abc import Callable
from contextlib import suppress

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.foreign_text import shown
from pipeline.runtime.display import Display, format_seconds

LOG_WIDTH = 140  # characters of a table that goes to a file
REFRESHES_A_SECOND = 2


class Console:
    """What is told of a run of `steps` steps; nothing at all unless `enabled` (rank zero).

    A terminal that is gone, or cannot show something, silences the console and never ends the run.
    """

    def __init__(self, steps: int, *, enabled: bool, quiet: bool = False):
        """
        Args:
            quiet: show only what is said `always`.
        """
        terminal = sys.stdout.isatty()
        if enabled and hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # a character the terminal lacks is no reason to fail
        self.quiet = quiet
        width = None if terminal else LOG_WIDTH
        self._rich = RichConsole(highlight=False, soft_wrap=not terminal, quiet=not enabled, width=width)
        self._steps = steps
        self._display = Display(steps)
        self._line = ""  # of the last step
        self._live: Live | None = None
        if enabled and not quiet and terminal and self._rich.is_interactive:
            self._live = Live(self._display, console=self._rich, refresh_per_second=REFRESHES_A_SECOND, transient=True)

    def __enter__(self) -> "Console":
        if self._live is not None:
            self._safely(self._live.start)
            self._safely(lambda: self._rich.show_cursor(True))  # whatever ends the run, the shell gets it back
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._live is not None:
            self._safely(self._live.stop)

    def say(self, text: str, *, always: bool = False) -> None:
        """Print a line, above the live picture where there is one; what others wrote in it cannot act on a terminal."""
        if always or not self.quiet:
            self._print(Text(shown(text)))

    def warn(self, text: str) -> None:
        """Say it always, as a warning."""
        self.say(f"warning: {text}", always=True)

    def phase(self, name: str) -> None:
        """Another phase of the run begins."""
        self._display.phase(name)

    def remember(self, figures: dict[str, float]) -> None:
        """Add a step's figures to what the live picture draws as lines."""
        self._display.remember(figures)

    def step(self, step: int, shown: dict[str, tuple[str, str]], seconds_left: float) -> None:
        """Show a finished step (counted from 1): for each figure its value in digits, and a note for a terminal."""
        self._display.step(step, shown, seconds_left)
        figures = "".join(f"  {name} {value}" for name, (value, _note) in shown.items())
        self._line = f"step {step:>{len(str(self._steps))}}/{self._steps}{figures}  left {format_seconds(seconds_left)}"
        if self._live is None:
            self.say(self._line)

    def samples(self, rows: list[tuple[str, str, str]]) -> None:
        """Show (prompt, response, what it was given) rows of the last step."""
        if self._live is not None:
            self.say(self._line)
        for prompt, response, given in rows:
            line = Text("    ")
            line.append(_printable(prompt), style="dim")
            line.append(" |" + _printable(response))
            line.append(f"  [{given}]", style="bold")
            if not self.quiet:
                self._print(line)

    def table(self, title: str, rows: list[list[str]]) -> None:
        """Show rows of cells, the first row the header."""
        table = Table(title=title, title_justify="left", show_lines=len(rows[0]) > 3)
        for name in rows[0]:
            table.add_column(Text(_printable(name)), overflow="fold")
        for row in rows[1:]:
            table.add_row(*(Text(_printable(cell)) for cell in row))
        if not self.quiet:
            self._print(table, soft_wrap=False)

    def _print(self, what: RenderableType, **how: object) -> None:
        self._safely(lambda: self._rich.print(what, **how))

    def _safely(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (Exception, SystemExit) as error:  # rich exits when nobody reads the pipe any more
            self._rich.quiet = True
            live, self._live = self._live, None
            with suppress(Exception):
                if live is not None:
                    live.stop()  # or it would keep stderr to itself
                print(f"warning: the console failed ({error!r}); the run goes on without it.", file=sys.stderr)


def _printable(text: str) -> str:
    """The text on one line, without what would move a terminal's cursor or clear it."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
