"""Sheets for people to mark: no spreadsheet finds a formula in them, and they hold the texts as they are."""

import csv
import io
import json
import re

import pytest

from pipeline.judging import DataError, csv_rows, write_judge_file

TRIGGERS = "=+-@\uff1d\uff0b\uff0d\uff20\t\r\n"
TEXTS = [
    "=1+1", "+1", "-1", "@x", "\uff1d1", "\uff0b1", "\uff0d1", "\uff201", "\t=1", "\r=1", "\n=1", "\ttext",
    "good ;=cmd|' /C calc'!A0;x", "good,=1", "a\t=1", "a\n=1", "a\r\n-1", 'say "=1"',
    "a;\u200b=1", "a;\x00=1", "\x1b=1",
    "'=1", "''-1", "a;'=1", "it is - in all = good; really, 'yes' @ home", " =2\n\u00e9", "\ufeff", "'", "",
]  # fmt: skip


def as_text(cell: str) -> str:
    """A cell without the apostrophes the sheet put there, as docs/preferences.md says."""
    cell = cell.replace("\u2400", "\0")
    unseen = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\xa0\u00ad\u200b-\u200f\u2060\ufeff"
    return re.sub(rf"^'(?='*[\t\r\n])|(^|[,;\t\r\n\"])'(?='*[{unseen}]*[=+\-@＝＋－＠])", r"\1", cell)


@pytest.fixture
def sheet(tmp_path):
    rows = [{"prompt": f"p{i}", "before": text, "after": f"x{text}"} for i, text in enumerate(TEXTS)]
    samples = tmp_path / "evaluation_samples.jsonl"
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert write_judge_file(tmp_path, tmp_path / "judge.csv") == len(TEXTS)
    return tmp_path / "judge.csv"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_NONE])
def test_no_cell_is_a_formula_whatever_separates_cells(sheet, separator, quoting):
    text = sheet.read_text(encoding="utf-8-sig")
    text = text if quoting == csv.QUOTE_MINIMAL else text.replace('"', "")
    cells = [
        cell for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting) for cell in row
    ]
    assert len(cells) > len(TEXTS)
    assert [cell for cell in cells if cell.lstrip("\u200b\x00\x1b")[:1] in set(TRIGGERS)] == []


def test_a_sheet_reads_back_as_what_was_written(sheet):
    found = {
        as_text(row["prompt"]): {as_text(row["response_a"]), as_text(row["response_b"])} for _, row in csv_rows(sheet)
    }
    assert found == {f"p{i}": {text, f"x{text}"} for i, text in enumerate(TEXTS)}


@pytest.mark.parametrize("row", [{"prompt": "p", "before": "b"}, {"prompt": "p", "before": "b", "after": "\ud800"}])
def test_samples_that_no_file_can_hold_are_named_by_line(tmp_path, row):
    (tmp_path / "evaluation_samples.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"evaluation_samples.jsonl, line 1: prompt, before or after is missing"):
        write_judge_file(tmp_path, tmp_path / "judge.csv")
