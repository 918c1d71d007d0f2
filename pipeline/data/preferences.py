"""Files of what people prefer: pairs of responses, or texts with a rating."""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.sources import DataError

PAIR_COLUMNS = ("prompt", "chosen", "rejected")
RATING_COLUMNS = ("text", "rating")
NEEDED = f"{', '.join(PAIR_COLUMNS)} or {', '.join(RATING_COLUMNS)}"

Row = Mapping[str, object]


@dataclass(frozen=True)
class Preferences:
    """n rows of k responses to one prompt: (chosen, rejected), or (text,) with an empty prompt and a rating."""

    prompts: list[str]  # [n]
    responses: list[tuple[str, ...]]  # [n], k each
    ratings: list[float] | None  # [n]; None for pairs

    def __len__(self) -> int:
        return len(self.prompts)


def read_preferences(path: Path) -> Preferences:
    """Read a .jsonl or .csv file of rows prompt, chosen, rejected or of rows text, rating; other columns are ignored.

    Raises:
        DataError: no such file, no rows, neither set of columns, an empty text, a rating that is no finite number,
            ratings that are all equal; the message names file, line and remedy.
    """
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise DataError(
            f"{path}: preferences are read from .jsonl or .csv, not {path.suffix or 'a file without end'!r}."
        )
    reader = csv_rows if path.suffix.lower() == ".csv" else jsonl_rows
    rows = list(reader(path))
    if not rows:
        raise DataError(f"{path} has no rows; give a file with {NEEDED}.")
    first = rows[0][1]
    if set(PAIR_COLUMNS) <= set(first):
        texts = [[_text(path, line, row, name) for name in PAIR_COLUMNS] for line, row in rows]
        return Preferences([prompt for prompt, *_ in texts], [tuple(pair) for _, *pair in texts], None)
    if set(RATING_COLUMNS) <= set(first):
        responses = [(_text(path, line, row, "text"),) for line, row in rows]
        ratings = [_rating(path, line, row) for line, row in rows]
        if len(set(ratings)) == 1:
            raise DataError(f"{path}: every rating is {ratings[0]:g}, so there is no order to agree with; add others.")
        return Preferences([""] * len(rows), responses, ratings)
    raise DataError(f"{path} has the columns {', '.join(first)}; {NEEDED} are needed. Rename or add them.")


def csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Each row of a CSV file with a header, and the line it ends on.

    Fields are separated by commas, or by semicolons where the header has only those: many spreadsheets write them.

    Raises:
        DataError: it cannot be read, or a row has more or fewer fields than the header.
    """
    csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets mark their files as UTF-8
            header = file.readline()
            file.seek(0)
            delimiter = ";" if ";" in header and "," not in header else ","
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    many = "more" if None in row else "fewer"
                    raise DataError(
                        f"{path}, line {reader.line_num}: the row has {many} fields than the header; put texts with "
                        f"commas, quotes or line breaks in double quotes."
                    )
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num + 1}: {error}; mend the row.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def jsonl_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Each object of a file with one JSON object a line, and its line; empty lines are skipped.

    Raises:
        DataError: it cannot be read, or a line is not an object.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}, line {number} is not JSON ({error}); mend or remove it.") from error
                if not isinstance(row, dict):
                    raise DataError(f"{path}, line {number} is {line.strip()[:40]!r}, not an object {{…}}; mend it.")
                yield number, row
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: there is no such file; give the path of one.")
    why = getattr(error, "strerror", None) or str(error)
    return DataError(f"{path} cannot be read: {why}. Save it as UTF-8 text, one row a line or quoted.")


def _text(path: Path, line: int, row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise DataError(f"{path}, line {line}: {name}={value!r} is not a text; every row needs one.")
    if name != "prompt" and not value.strip():
        raise DataError(f"{path}, line {line}: {name} is empty; remove the row or fill it.")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(f"{path}, line {line}: {name} holds half of a character (a cut emoji?); remove or mend it.")
    return value


def _rating(path: Path, line: int, row: Row) -> float:
    value = row.get("rating")
    try:
        rating = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        rating = math.nan
    if not math.isfinite(rating):
        raise DataError(f"{path}, line {line}: rating={value!r} is not a finite number; remove the row or mend it.")
    return rating
