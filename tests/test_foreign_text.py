"""Text of others cannot act on a terminal, a page or a Markdown file, and credentials are in none of them."""

import pytest
from launching import run_here

from pipeline.errors import STATUS_FILE_VARIABLE, UserError, leave, user_errors
from pipeline.foreign_text import markdown_block, markdown_code, markdown_text, plotly_text, without_secrets
from pipeline.models.card import markdown_table
from pipeline.runtime.console import Console

HOSTILE = "a\x1b]0;TITLE\x07\x1b[2J\x1b]52;c;ZXZpbA==\x07\u202eb\r\x9b31m"
VISIBLE = r"a\x1b]0;TITLE\x07\x1b[2J\x1b]52;c;ZXZpbA==\x07\u202eb\r\x9b31m"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://user:hunter2@host/score: refused", "http://***@host/score: refused"),
        ("http://user:hun/t?er#2@host/x", "http://***@host/x"),
        ("['https://h/s?token=sekrit&model=large', 'x']", "['https://h/s?token=***&model=***', 'x']"),
        ("--reward 'http://h/s?sekrit' --seed 3", "--reward 'http://h/s?***' --seed 3"),
        ("--reward 'http://h/s?t=sek'\"'\"'rit'", "--reward 'http://h/s?t=***'"),
        ("http://h/s?token=sekrit=0.5", "http://h/s?token=***=0.5"),
        ("http://h/s?version==2", "http://h/s?version==2"),
        ("HTTP://h/s?a=b (see http://h/docs).", "HTTP://h/s?a=*** (see http://h/docs)."),
        ("what? a=b user:pass@host", "what? a=b user:pass@host"),
    ],
)
def test_addresses_are_shown_without_user_password_and_the_values_of_their_query(text, masked):
    assert without_secrets(text) == masked == without_secrets(masked)
    assert without_secrets({"reward": [text], "seed": 3}) == {"reward": [masked], "seed": 3}


def test_an_error_line_shows_control_characters_and_hides_credentials(monkeypatch, tmp_path, capsys):
    def failing():
        with user_errors():
            raise UserError(f"http://u:p@host/?t=sekrit answered {HOSTILE}")

    line = rf"error: http://***@host/?t=*** answered {VISIBLE}" + "\n"
    assert run_here(failing) == 2
    assert capsys.readouterr().err == line
    monkeypatch.setenv(STATUS_FILE_VARIABLE, str(tmp_path / "status"))
    with pytest.raises(SystemExit):
        leave(2, UserError(f"http://u:p@host/?t=sekrit answered {HOSTILE}"))
    assert (tmp_path / "status").read_text() == f"2\n{line}", "what launch.sh tells"


def test_the_console_shows_control_characters_of_messages_and_headers(capsys):
    console = Console(1, enabled=True)
    console.say(HOSTILE)
    console.warn(f"http://host/?t=sekrit {HOSTILE}")
    console.table("Figures", [[f"[red]{HOSTILE}", "x"], ["1", "2"]])
    said = capsys.readouterr().out
    assert said.startswith(f"{VISIBLE}\nwarning: http://host/?t=*** {VISIBLE}\n")
    assert all(letter.isprintable() or letter == "\n" for letter in said) and "[red]a" in said


def test_a_markdown_cell_holds_no_markup_and_no_further_column():
    cell = "<img src=x>![p](http://evil/q.png) `code` \\| next\nline *b*"
    assert markdown_text(cell) == r"\<img src=x\>!\[p\](http://evil/q.png) \`code\` \\\| next line \*b\*"
    assert markdown_table([["a"], ["x\\|y"]]).splitlines()[2] == r"| x\\\|y |"


def test_code_in_markdown_ends_where_it_was_meant_to():
    assert markdown_code("a`b``c") == "``` a`b``c ```"
    assert markdown_code("mit\n\n## Injected") == "`mit ## Injected`"
    assert markdown_block("x\n```\n<script>").splitlines() == ["````", "x", "```", "<script>", "````"]


def test_texts_of_a_figure_are_no_tags():
    figure = {"data": [{"name": '<a href="https://evil/x">', "x": [1, "a&lt;b"]}]}
    assert plotly_text(figure) == {"data": [{"name": '&lt;a href="https://evil/x">', "x": [1, "a&amp;lt;b"]}]}
