"""What a person sees while a run goes on: a live bar on a terminal, plain lines in a log."""

import sys

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

LOG_WIDTH = 140  # characters of a table that goes to a file


class Console:
    """Progress of a run of `steps` steps; nothing at all unless `enabled` (rank zero)."""

    def __init__(self, steps: int, *, enabled: bool):
        width = None if sys.stdout.isatty() else LOG_WIDTH
        self._rich = RichConsole(highlight=False, soft_wrap=True, quiet=not enabled, width=width)
        self._steps = steps
        self._live = enabled and self._rich.is_terminal
        self._progress = Progress(
            TextColumn("PPO"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._rich,
            disable=not self._live,
        )
        self._task = self._progress.add_task("PPO", total=steps, figures="")

    def __enter__(self) -> "Console":
        self._progress.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self._rich.print(Text(text))

    def step(self, step: int, figures: dict[str, str], seconds_left: float) -> None:
        """Show the figures of a finished step (counted from 1)."""
        line = "  ".join(f"{name} {value}" for name, value in figures.items())
        if self._live:
            self._progress.update(self._task, completed=step, figures=line)
        else:
            self.say(f"step {step:>{len(str(self._steps))}}/{self._steps}  {line}  left {format_seconds(seconds_left)}")

    def samples(self, rows: list[tuple[str, str, float]]) -> None:
        """Show (prompt, response, score) rows."""
        for prompt, response, score in rows:
            line = Text("    ")
            line.append(prompt.replace("\n", " "), style="dim")
            line.append(" |" + response.replace("\n", " "))
            line.append(f"  [{score:+.2f}]", style="bold")
            self._rich.print(line)

    def table(self, title: str, rows: list[list[str]]) -> None:
        """Show rows of cells, the first row the header."""
        table = Table(title=title, title_justify="left", show_lines=len(rows[0]) > 3)
        for name in rows[0]:
            table.add_column(name, overflow="fold")
        for row in rows[1:]:
            table.add_row(*map(Text, row))
        self._rich.print(table, soft_wrap=False)


def format_seconds(seconds: float) -> str:
    """12 -> 0:12, 3700 -> 1:01:40."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
