"""The console of a run: a live picture on a terminal, plain lines elsewhere, and of the other workers nothing."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT

from pipeline.runtime.console import Console

SHOWN = {"reward": ("+0.250", "first +0.100"), "KL": ("1.50", "guard 15")}


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def show(console: Console) -> None:
    with console:
        console.say("A run [bold]of[/bold] x.")
        console.phase("sample")
        console.remember({"reward": 0.1, "KL": 0.0})
        console.step(1, SHOWN, 75)
        console.remember({"reward": 0.25, "KL": 1.5})
        console.step(10, SHOWN, 0)
        console.samples([("the\nfilm", " was [bold]good[/bold]\x1b[2J\x00:smile:", "+0.50")])
        console.table("Before and after", [["", "before", "after"], ["reward [x]", "0.1", "0.2"]])
        console.warn("too little")
        console.say("The end.", always=True)


def test_without_a_terminal_steps_are_plain_lines(capsys):
    show(Console(10, enabled=True))
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[:4] == [
        "A run [bold]of[/bold] x.",
        "step  1/10  reward +0.250  KL 1.50  left 1:15",
        "step 10/10  reward +0.250  KL 1.50  left 0:00",
        "    the film | was [bold]good[/bold] [2J :smile:  [+0.50]",
    ]
    assert lines[4].strip() == "Before and after"
    assert "reward [x]" in out
    assert "\x1b" not in out
    assert "\r" not in out


def test_colours_that_are_forced_do_not_make_a_log_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    show(Console(10, enabled=True))
    out = capsys.readouterr().out
    assert "step  1/10  reward +0.250" in out and "━" not in out.split("Before and after")[0]


def test_a_quiet_run_says_what_it_must(capsys):
    show(Console(10, enabled=True, quiet=True))
    assert capsys.readouterr().out.splitlines() == ["warning: too little", "The end."]


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


def test_on_a_terminal_a_live_picture_shows_bars_and_figures_below_the_lines(terminal):
    with terminal, Console(10, enabled=True) as console:
        console.say("A run.")
        for name in ("sample", "update", "sample"):
            console.phase(name)
        for step, reward in ((1, 0.1), (2, 0.25)):
            console.remember({"reward": reward, "KL": 1.5})
            console.step(step, SHOWN, 75)
        time.sleep(1.2)
        seen = terminal.text()
        console.samples([("the film", " was good", "+0.50")])
        above = terminal.text().removeprefix(seen)
    frame = seen[seen.rindex("PPO ") :].splitlines()
    assert re.fullmatch(r"PPO +━+ +━* +2/10 0:\d\d, left 1:\d\d *", frame[0].replace("╸", "━ ").replace("╺", " ━"))
    assert re.fullmatch(r"sample +━+ +\d\.\d s of about \d\.\d s *", frame[1])
    assert re.fullmatch(r"reward +▁█ +\+0\.250 first \+0\.100 *", frame[2])
    assert re.fullmatch(r"KL +▁▁ +1\.50 guard 15 *", frame[3])
    assert "step  1/10" not in seen, "the picture says it"
    assert "step  2/10  reward +0.250  KL 1.50  left 1:15" in above and "the film | was good  [+0.50]" in above


@pytest.mark.parametrize("size", [(30, 6), (5, 2), (1, 1), (0, 0), (300, 100)])
def test_a_terminal_of_any_size_that_changes_under_way_is_no_fault(terminal, size):
    with terminal, Console(10, enabled=True) as console:
        console.remember({"reward": 0.1, "KL": 0.0})
        console.step(1, SHOWN, 75)
        terminal.resize(*size)
        console.say("line " * 30)
        terminal.resize(80, 24)
        console.say("A last word.")
    assert "A last word." in terminal.text()


def test_a_terminal_that_hangs_up_silences_the_console_and_not_the_run(terminal, capsys):
    with terminal, Console(10, enabled=True) as console:
        terminal.hang_up()
        console.say("Nobody hears.")
        show(console)
    assert capsys.readouterr().err.count("the console failed") == 1


def test_a_simple_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with terminal:
        show(Console(10, enabled=True))
    text = terminal.text()
    assert "step  1/10  reward +0.250" in text and "PPO" not in text


def script(tmp_path: Path) -> list[str]:
    path = tmp_path / "script.py"
    path.write_text(
        "import sys\n"
        "from pipeline.runtime.console import Console\n"
        "with Console(3000, enabled=True) as console:\n"
        "    for step in range(1, 3001):\n"
        "        console.step(step, {'reward': ('a smile ☺', '')}, 1)\n"
        "sys.stderr.write('trained')\n"
    )
    return [sys.executable, str(path)]


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        script(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read().endswith("trained") and process.wait() == 0


def test_a_terminal_without_a_character_shows_its_code(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(script(tmp_path), capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "step    1/3000  reward a smile \\u263a  left 0:01" in done.stdout
