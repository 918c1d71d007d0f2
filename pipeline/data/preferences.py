"""Files of what people prefer: pairs of responses, or texts with a rating."""

import math
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.files import DataError, Row, csv_rows, jsonl_rows

PAIR_COLUMNS = ("prompt", "chosen", "rejected")
RATING_COLUMNS = ("text", "rating")
NEEDED = f"{', '.join(PAIR_COLUMNS)} or {', '.join(RATING_COLUMNS)}"


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
