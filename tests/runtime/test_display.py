"""The live picture: what it shows at each width."""

import io
import math

import pytest
from rich.console import Console

from pipeline.runtime.display import Display, format_seconds, sparkline


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([3, 1], 8, "█▁"),
        ([0, 2, 5, 9, 14, 14], 3, "▁▄█"),  # means of pairs: 1, 7, 14
        ([1, math.nan, math.inf, 2], 8, "▁█"),
        ([5, 5, 5], 8, "▁▁▁"),
        ([math.nan], 8, ""),
        ([], 8, ""),
        ([1, 2], 0, ""),
    ],
)
def test_a_sparkline_goes_from_the_lowest_to_the_highest(values, width, drawn):
    assert sparkline(values, width) == drawn


@pytest.fixture
def display(monkeypatch):
    """Half way through a run, in its second phase for the second time."""
    clock = iter([0.0])
    monkeypatch.setattr("pipeline.runtime.display.time.monotonic", lambda: now[0])
    now = [next(clock)]
    display = Display(20)
    for step in range(1, 11):
        for phase, seconds in (("sample", 2.0), ("update", 3.0)):
            display.phase(phase)
            now[0] += seconds
        figures = {"reward": step / 10, "KL": step / 2}
        display.remember(figures)
        display.step(step, {"reward": (f"{step / 10:+.3f}", "first +0.100"), "KL": (f"{step / 2:.2f}", "target 6")}, 50)
    display.phase("sample")
    now[0] += 1.0
    return display


def rendered(display: Display, width: int, encoding: str = "utf-8") -> list[str]:
    """The lines on a terminal of this width and encoding."""
    written = io.BytesIO()
    file = io.TextIOWrapper(written, encoding=encoding)
    Console(file=file, width=width, force_terminal=True, color_system=None).print(display)
    file.flush()
    return [line.rstrip() for line in written.getvalue().decode(encoding).splitlines() if line.strip()]


@pytest.mark.parametrize(("width", "bar"), [(80, 44), (140, 64)])
def test_bars_figures_and_what_they_are_held_against_stand_in_columns(display, width, bar):
    run, phase, reward, kl = rendered(display, width)
    assert max(map(len, (run, phase, reward, kl))) <= min(width, 100)
    assert run.startswith("PPO ") and run.endswith("10/20 0:51, left 0:49")
    assert phase.startswith("sample ") and phase.endswith("1.0 s of about 2.0 s")
    assert reward.startswith("reward ") and reward.endswith("+1.000 first +0.100") and "▁▂▃▃▄▅▆▆▇█" in reward
    assert kl.startswith("KL ") and kl.endswith("5.00 target 6")
    assert {line.index(value) + len(value) for line, value in
            ((run, "10/20"), (phase, "1.0 s"), (reward, "+1.000"), (kl, "5.00"))} == {11 + bar + 1 + 7}  # fmt: skip


def test_a_bar_is_as_long_as_its_part_is_done(display, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")  # without colours what is left to do is blank
    run, phase, *_ = rendered(display, 80)
    assert run.count("━") == pytest.approx(44 / 2, abs=1) and phase.count("━") == pytest.approx(44 / 2, abs=1)


def test_a_terminal_without_unicode_gets_ascii(display):
    _run, _phase, reward, _kl = rendered(display, 80, encoding="latin-1")
    assert "_.--=+**#@" in reward


@pytest.mark.parametrize("width", [1, 2, 8, 20, 30])
def test_too_narrow_a_terminal_is_no_fault(display, width):
    assert max(map(len, rendered(display, width))) <= width


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (12.4, "0:12"), (59.6, "1:00"), (3599.6, "1:00:00"), (3700, "1:01:40")]
)
def test_times_are_minutes_and_hours(seconds, text):
    assert format_seconds(seconds) == text
