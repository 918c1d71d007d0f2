"""The live picture of a run on a terminal: its bars and its figures, drawn for whatever width there is."""

import math
import time
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

WIDEST = 100  # columns; a bar of more tells no more
RAMP, ASCII_RAMP = "▁▂▃▄▅▆▇█", "_.-=+*#@"


def sparkline(values: Sequence[float], width: int, ramp: str = RAMP) -> str:
    """`values` as at most `width` characters of `ramp` from the lowest to the highest; NaN and infinities left out.

    Where there are more values than characters, each is the mean of its part of them.
    """
    values = [value for value in values if math.isfinite(value)]
    count = min(len(values), width)
    parts = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(ramp) - 1) / (high - low) if high > low else 0.0
    return "".join(ramp[round((mean - low) * scale)] for mean in means)


class _Sparkline:
    """As wide as its column."""

    def __init__(self, values: Sequence[float]):
        self._values = values

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ramp = ASCII_RAMP if options.ascii_only else RAMP
        yield Text(sparkline(self._values, options.max_width, ramp), style="cyan", no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)


class Display:
    """A bar for the run, one for the phase it is in, and a line a figure: all steps as a sparkline, the last in digits.

    It draws what it was told last, whenever it is asked to: another thread may do so.
    """

    def __init__(self, steps: int):
        self._steps, self._done = steps, 0
        self._started = time.monotonic()
        self._ends: float | None = None  # when the last step will be done, as far as one knows
        self._phase, self._phase_started = "", self._started
        self._took: dict[str, float] = {}  # seconds of each phase when it was last gone through
        self._history: dict[str, list[float]] = {}
        self._shown: dict[str, tuple[str, str]] = {}  # the last value in digits, and what it is to be held against

    def phase(self, name: str) -> None:
        """Another phase begins; its bar goes by how long it took the last time."""
        now = time.monotonic()
        self._took[self._phase] = now - self._phase_started
        self._phase, self._phase_started = name, now

    def remember(self, figures: dict[str, float]) -> None:
        """Add a step's figures to the sparklines."""
        for name, value in figures.items():
            self._history.setdefault(name, []).append(value)

    def step(self, step: int, shown: dict[str, tuple[str, str]], seconds_left: float) -> None:
        """`step` (from 1) is done; `shown` has for each figure its value in digits and a note."""
        self._done, self._shown, self._ends = step, shown, time.monotonic() + seconds_left

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now = time.monotonic()
        table = Table.grid(padding=(0, 1))
        table.width = min(options.max_width, WIDEST)
        table.add_column(no_wrap=True, min_width=10)  # as wide as what comes into them, so that nothing jumps
        table.add_column(ratio=1)
        table.add_column(no_wrap=True, min_width=7, justify="right")
        table.add_column(no_wrap=True, min_width=16)
        left = "" if self._ends is None else f", left {format_seconds(max(0.0, self._ends - now))}"
        times = f"{format_seconds(now - self._started)}{left}"
        table.add_row("PPO", ProgressBar(self._steps, self._done), f"{self._done}/{self._steps}", times)
        if self._phase:
            spent, usual = now - self._phase_started, self._took.get(self._phase)
            bar = ProgressBar(usual or 1, min(spent, usual or 0), pulse=usual is None)
            usually = "" if usual is None else f"of about {usual:.1f} s"
            table.add_row(self._phase, bar, f"{spent:.1f} s", usually, style="dim")
        for name, (value, note) in self._shown.items():
            table.add_row(name, _Sparkline(self._history.get(name, ())), Text(value, "bold"), Text(note, "dim"))
        yield Padding(table, (1, 0, 0, 0))


def format_seconds(seconds: float) -> str:
    """12 -> 0:12, 3700 -> 1:01:40."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
