"""Have people judge: blinded pairs of before and after as a sheet to mark, and the marks back as a win rate."""

import csv
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.data.files import DataError, csv_rows, jsonl_rows
from pipeline.errors import writing
from pipeline.evaluation import EVALUATION_SEED
from pipeline.intervals import wilson_interval
from pipeline.models.card import markdown_table
from pipeline.run_directory import SAMPLES_FILE
from pipeline.runtime.randomness import generator

SHEET_COLUMNS = ("id", "prompt", "response_a", "response_b", "better")
KEY_COLUMNS = ("id", "tuned")
OF_SAMPLES = "samples"  # a further column of the key: which samples the sheet was written from
# Where a spreadsheet may see a cell begin, whichever separator it takes, before what makes a formula of it, also
# behind letters that do not show. Apostrophes there already get one more, so that taking one away gives the text.
_NOT_SEEN = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\xa0\u00ad\u200b-\u200f\u2060\ufeff"
_FORMULA = re.compile(rf"^('*)(?=[\t\r\n])|(^|[,;\t\r\n\"])('*)(?=[{_NOT_SEEN}]*[=+\-@＝＋－＠])")
MARKS = ("a", "b", "tie")
MARKS_FILE = "marks.json"


@dataclass(frozen=True)
class WinRate:
    """How often people preferred the tuned model's response; a tie is half a win."""

    wins: int
    losses: int
    ties: int
    unmarked: int
    win_rate: float
    ci95: tuple[float, float]
    samples: str | None  # `samples_digest` of the run that the sheet was written from, where its key says so
    interval: str = "Wilson"


def samples_digest(run: Path) -> str | None:
    """What tells a run's held-out samples from others; None where it has none."""
    file = run / SAMPLES_FILE
    return f"{zlib.crc32(file.read_bytes()):08x}" if file.is_file() else None


def key_path(sheet: Path) -> Path:
    """Where the key of a sheet is: judge.csv -> judge.key.csv."""
    return sheet.with_name(f"{sheet.stem}.key.csv")


def write_judge_file(run: Path, sheet: Path) -> int:
    """Write the run's held-out samples as a sheet of blinded pairs in random order, and its key; returns how many.

    Order, sides and ids are drawn from a fixed seed and the samples: the same run gives the same sheet, and another
    run's key tells nothing of this one.

    Raises:
        DataError: the run has no samples, the sheet is no .csv, it or its key is there already or cannot be written.
    """
    samples = run / SAMPLES_FILE
    if not samples.is_file():
        raise DataError(f"{run} has no {SAMPLES_FILE}; run python -m pipeline.evaluate {run} first.")
    if sheet.suffix.lower() != ".csv":
        raise DataError(f"{sheet}: the judge file is a .csv; name it so.")
    key = key_path(sheet)
    for path in (sheet, key):
        if path.exists():
            raise DataError(f"{path} is there already, perhaps with marks; give another name or remove it.")
    rows = list(jsonl_rows(samples))
    digest = samples_digest(run)
    draw = generator(EVALUATION_SEED, "judge file", int(digest, 16))
    ids = draw.choice(900_000, len(rows), replace=False) + 100_000  # all of six digits; a spreadsheet keeps them
    tuned_is_b = draw.integers(2, size=len(rows))
    pairs, sides = [], []
    for number, second, at in zip(ids, tuned_is_b, draw.permutation(len(rows)), strict=True):
        line, row = rows[at]
        texts = [row.get(name) for name in ("prompt", "before", "after")]
        if any(not isinstance(text, str) or re.search("[\ud800-\udfff]", text) for text in texts):
            raise DataError(
                f"{samples}, line {line}: prompt, before or after is missing or no text; evaluate the run again."
            )
        responses = (row["before"], row["after"]) if second else (row["after"], row["before"])
        pairs.append([str(number), *map(_as_text, (row["prompt"], *responses)), ""])
        sides.append([str(number), MARKS[second], digest])
    try:
        _write(sheet, SHEET_COLUMNS, pairs)
        _write(key, (*KEY_COLUMNS, OF_SAMPLES), sides)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be written: {error.strerror}; give another place.") from error
    return len(pairs)


def _as_text(cell: str) -> str:
    """The cell with an apostrophe before everything that a spreadsheet would take for a formula.

    A NUL, which no CSV file may hold, becomes its sign.
    """
    return _FORMULA.sub(r"\2'\1\3", cell).replace("\0", "\u2400")


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:  # spreadsheets know UTF-8 by its mark
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def read_marks(sheet: Path) -> WinRate:
    """Read a marked sheet with the key beside it; rows whose `better` is empty are not counted.

    Raises:
        DataError: no sheet or key, a column is missing, a mark is none of a, b and tie, an id is not in the key or is
            there twice, there are no marks.
    """
    marked = list(_checked_rows(sheet, ("id", "better")))
    key = key_path(sheet)
    if not key.is_file():
        raise DataError(f"{key} is missing: it says which response is the tuned model's; put it beside {sheet.name}.")
    sides = [row for _, row in _checked_rows(key, KEY_COLUMNS)]
    tuned = {row["id"].strip(): row["tuned"].strip() for row in sides}
    digest = sides[0].get(OF_SAMPLES) if sides else None
    seen: dict[str, int] = {}
    counts = {"win": 0, "loss": 0, "tie": 0, "": 0}
    for line, row in marked:
        name, mark = row["id"].strip(), row["better"].strip().lower()
        if tuned.get(name) not in ("a", "b"):
            raise DataError(f"{sheet}, line {line}: {key.name} has no id {name!r}; is it the key of this sheet?")
        if name in seen:
            raise DataError(f"{sheet}, line {line}: id {name} was on line {seen[name]} already; keep one of them.")
        if mark not in (*MARKS, ""):
            raise DataError(f"{sheet}, line {line}: better={row['better']!r} is none of a, b, tie or empty; mend it.")
        seen[name] = line
        counts[mark if mark in ("tie", "") else "win" if mark == tuned[name] else "loss"] += 1
    total = counts["win"] + counts["loss"] + counts["tie"]
    if total == 0:
        raise DataError(f"{sheet} has no marks; write a, b or tie into its column better.")
    wins = counts["win"] + counts["tie"] / 2
    interval = wilson_interval(wins, total)
    return WinRate(counts["win"], counts["loss"], counts["tie"], counts[""], wins / total, interval, digest)


def _checked_rows(path: Path, columns: Sequence[str]) -> Iterable[tuple[int, dict[str, str]]]:
    for number, (line, row) in enumerate(csv_rows(path)):
        missing = [name for name in columns if name not in row]
        if number == 0 and missing:
            raise DataError(
                f"{path} has the columns {', '.join(row)} and no {missing[0]}; save it with commas between the columns "
                f"and their names in the first line."
            )
        yield line, row


def marks_table(rate: WinRate) -> list[list[str]]:
    """The win rate as rows of cells, the first row the header."""
    low, high = rate.ci95
    return [
        [f"{rate.wins + rate.losses + rate.ties} marked pairs", "the tuned model's response"],
        ["better", str(rate.wins)],
        ["worse", str(rate.losses)],
        ["tie", str(rate.ties)],
        ["not marked", str(rate.unmarked)],
        [f"win rate, ties half (95 % {rate.interval} interval)", f"{rate.win_rate:.3f} ({low:.3f} to {high:.3f})"],
    ]


def write_marks(rate: WinRate, directory: Path) -> None:
    """Write `marks.json` and `marks.md` into `directory`; raises `WriteError`."""
    path = directory / MARKS_FILE
    with writing(path):
        path.write_text(json.dumps(asdict(rate), indent=2) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(f"# What people marked\n\n{markdown_table(marks_table(rate))}\n", "utf-8")
