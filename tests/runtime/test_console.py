"""The console of a run that is not on a terminal: plain lines; and of the other workers: nothing."""

import pytest

from pipeline.runtime.console import Console, format_seconds

FIGURES = {"reward": "+0.250", "KL": "1.50"}


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def show(console: Console) -> None:
    with console:
        console.say("A run [bold]of[/bold] x.")
        console.step(1, FIGURES, 75)
        console.step(10, FIGURES, 0)
        console.samples([("the\nfilm", " was [bold]good[/bold]\n:smile:", 0.5)])
        console.table("Before and after", [["", "before", "after"], ["reward [x]", "0.1", "0.2"]])


def test_without_a_terminal_steps_are_plain_lines(capsys):
    show(Console(10, enabled=True))
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[:4] == [
        "A run [bold]of[/bold] x.",
        "step  1/10  reward +0.250  KL 1.50  left 1:15",
        "step 10/10  reward +0.250  KL 1.50  left 0:00",
        "    the film | was [bold]good[/bold] :smile:  [+0.50]",
    ]
    assert lines[4].strip() == "Before and after"
    assert "reward [x]" in out
    assert "\x1b" not in out
    assert "\r" not in out


def test_long_lines_are_not_broken(capsys):
    Console(1, enabled=True).say("word " * 100)
    assert capsys.readouterr().out == "word " * 100 + "\n"


def test_tables_show_all_of_their_cells(capsys):
    Console(1, enabled=True).table("Samples", [["prompt", "", "after", ""], ["word " * 60, "0.1", "end", "0.2"]])
    out = capsys.readouterr().out
    assert out.count("word") == 60
    assert max(map(len, out.splitlines())) <= 140
    assert "…" not in out


def test_a_disabled_console_shows_nothing(capfd):
    show(Console(10, enabled=False))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (12.4, "0:12"), (59.6, "1:00"), (3599.6, "1:00:00"), (3700, "1:01:40")]
)
def test_times_are_minutes_and_hours(seconds, text):
    assert format_seconds(seconds) == text
