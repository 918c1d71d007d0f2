"""Rows of files, each with the line it begins on: CSV, TSV, JSON, JSON lines, Parquet, plain text.

No character of a path is a pattern, and nothing is repaired: what is no row is refused by its line.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

import datasets
import pyarrow
import pyarrow.parquet

from pipeline.errors import UserError

Row = Mapping[str, object]


class DataError(UserError, ValueError):
    """The data cannot be used as asked; the message names the value and the remedy."""


@dataclass(frozen=True)
class Table:
    """Columns of a file or a dataset, as they stand there."""

    columns: list[str]  # the names of all
    of_strings: list[str]  # the names of those that hold nothing but strings
    values: dict[str, list[object]]  # [n] by name, of the columns asked for that exist
    rows: Sequence[int]  # [n] the number of each row, from 1
    unit: str  # what `rows` counts: lines or rows
    class_names: dict[str, list[str]] = field(default_factory=dict)  # what 0, 1, … of a column are called
    notes: tuple[str, ...] = ()  # what a person should know of how it was read


def read_table(path: Path, name: str, wanted: Sequence[str]) -> Table:
    """Read the columns `wanted` of a file of one of the kinds in `READERS`; a text file has the column `text`.

    Args:
        name: what messages call the file.

    Raises:
        DataError: it is missing, empty, of another kind or malformed; the message says in which line.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        raise DataError(f"{name} is a directory here; give one of the files in it.")
    if suffix not in READERS:
        kinds = ", ".join(READERS)
        raise DataError(f"{name}: files with texts end in {kinds}; this one does not. Unpack, convert or rename it.")
    if not path.is_file():
        raise DataError(f"{name}: there is no such file. Give a path that exists or a Hub name.")
    if path.stat().st_size == 0:
        raise DataError(f"{name} is empty; give a file with reviews.")
    table = READERS[suffix](path, name, wanted)
    if not table.rows:
        raise DataError(f"{name} has no review: there are no rows in it.")
    return table


def csv_rows(path: Path, name: str | None = None, delimiter: str | None = None) -> Iterator[tuple[int, Row]]:
    """Each row of a CSV file with a header, and the line it begins on.

    Fields are separated by commas, or by semicolons where the header has only those: many spreadsheets write them.

    Raises:
        DataError: it cannot be read, a column stands there twice, a quote does not end with its field, or a row has
            more or fewer fields than the header.
    """
    for first, _last, row in _csv_rows(path, name or str(path), delimiter):
        yield first, row


def jsonl_rows(path: Path, name: str | None = None) -> Iterator[tuple[int, Row]]:
    """Each object of a file with one JSON object a line, and its line; empty lines are skipped.

    Raises:
        DataError: it cannot be read, or a line is not an object.
    """
    name = name or str(path)
    with _opened(path, name) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row = _json(line.rstrip(), name, number)
                if not isinstance(row, dict):
                    raise DataError(f"{name}, line {number} is {line.strip()[:40]!r}, not an object {{…}}; mend it.")
                yield number, row


@contextmanager
def _opened(path: Path, name: str, newline: str | None = None) -> Iterator[TextIO]:
    """A text file; what is wrong with its bytes becomes a `DataError` that says where."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:  # spreadsheets mark their files as UTF-8
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{name}: there is no such file; give the path of one.") from error
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path.read_bytes(), name)) from error


def _not_utf8(content: bytes, name: str) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return f"{name} is in UTF-16; save it as UTF-8."
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = len((content[: error.start] + b".").splitlines())
        return f"{name}, line {line}: the byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8."
    return f"{name} changed while it was read; start again."


def _without_nul(lines: Iterable[str], name: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise DataError(f"{name}, line {number} holds a NUL byte, which no text has; save the file as UTF-8 text.")
        yield line


def _csv_rows(path: Path, name: str, delimiter: str | None) -> Iterator[tuple[int, int, dict[str, str]]]:
    """(first line, last line, row) of each row."""
    csv.field_size_limit(2**31 - 1)
    with _opened(path, name, newline="") as file:
        header = file.readline()
        file.seek(0)
        delimiter = delimiter or (";" if ";" in header and "," not in header else ",")
        rows = csv.reader(_without_nul(file, name), delimiter=delimiter, strict=True)
        columns, first = None, 1
        try:
            for row in rows:
                where = f"{name}, line {first}"
                if columns is None:
                    columns = _columns(row, where)
                elif row and len(row) != len(columns):
                    many = "more" if len(row) > len(columns) else "fewer"
                    raise DataError(
                        f"{where}: the row has {many} fields than the header, {len(row)} and not {len(columns)}; put "
                        f"texts with {delimiter!r}, quotes or line breaks in double quotes."
                    )
                elif row:
                    yield first, rows.line_num, dict(zip(columns, row, strict=True))
                first = rows.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{name}, line {first}: a quote in the row that begins there is not closed at its field's end "
                f"({error}); put the whole field in double quotes and write those within it twice."
            ) from error


def _columns(header: list[str], where: str) -> list[str]:
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise DataError(f"{where}: the column {twice[0]!r} stands there twice; rename one of them.")
    return header


def _json(text: str, name: str, first: int = 1) -> object:
    """The JSON in `text`, which begins on line `first`."""

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            where = name if first == 1 else f"{name}, line {first}"
            raise DataError(f"{where}: the key {twice!r} stands twice in one object; remove one of them.")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        line, why = first - 1 + error.lineno, f"{error.msg}, column {error.colno}"
        raise DataError(f"{name}, line {line} is not JSON ({why}); mend or remove it.") from error
    except RecursionError as error:
        raise DataError(f"{name}, line {first}: its lists and objects are too deep; mend or remove it.") from error


def _json_rows(path: Path, name: str) -> tuple[Iterator[tuple[int, Row]], str]:
    """The rows of a file that holds one list of objects, or an object a line; and what counts them."""
    with _opened(path, name) as file:
        start = next((line for line in file if line.strip()), "").lstrip()
        if not start.startswith("["):
            return jsonl_rows(path, name), "line"
        file.seek(0)
        content = _json(file.read().removeprefix("\ufeff"), name)
    for number, row in enumerate(content, 1):
        if not isinstance(row, dict):
            raise DataError(f"{name}, row {number} is {repr(row)[:40]}, not an object {{…}}; mend it.")
    return iter(enumerate(content, 1)), "row"


def _table(rows: Iterable[tuple[int, Row]], wanted: Sequence[str], unit: str) -> Table:
    columns, other, numbers = {}, set(), []
    values: dict[str, list[object]] = {name: [] for name in wanted}
    for number, row in rows:
        numbers.append(number)
        for name, value in row.items():
            columns.setdefault(name)
            if value is not None and not isinstance(value, str):
                other.add(name)
        for name in values:
            values[name].append(row.get(name))
    of_strings = [name for name in columns if name not in other]
    return Table(list(columns), of_strings, {n: v for n, v in values.items() if n in columns}, numbers, unit)


def _read_csv(path: Path, name: str, wanted: Sequence[str], delimiter: str | None = None) -> Table:
    long: list[tuple[int, int]] = []

    def rows() -> Iterator[tuple[int, Row]]:
        for first, last, row in _csv_rows(path, name, delimiter):
            if last > first:
                long.append((first, last))
            yield first, row

    table = _table(rows(), wanted, "line")
    if not long:
        return table
    first, last = max(long, key=lambda lines: lines[1] - lines[0])
    note = (
        f"{len(long)} of {len(table.rows)} rows of {path} go over several lines inside quotes, the longest from line "
        f"{first} to {last}; where that is no single text, a quote is missing."
    )
    return Table(**{**vars(table), "notes": (note,)})


def _read_json(path: Path, name: str, wanted: Sequence[str]) -> Table:
    rows, unit = _json_rows(path, name)
    return _table(rows, wanted, unit)


def _read_text(path: Path, name: str, wanted: Sequence[str]) -> Table:
    with _opened(path, name) as file:
        lines = ((number, {"text": line.removesuffix("\n")}) for number, line in enumerate(_without_nul(file, name), 1))
        return _table(lines, wanted, "line")


def _read_parquet(path: Path, name: str, wanted: Sequence[str]) -> Table:
    try:
        with path.open("rb") as file:
            content = pyarrow.parquet.ParquetFile(file)
            schema = content.schema_arrow
            columns = _columns(schema.names, name)
            found = content.read(columns=[column for column in dict.fromkeys(wanted) if column in columns])
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{name} is no Parquet file that can be read: {str(error).splitlines()[0]}") from error
    features = datasets.Features.from_arrow_schema(schema)
    values = {column: found[column].to_pylist() for column in found.column_names}
    return table_of(columns, features, values, content.metadata.num_rows)


def table_of(columns: list[str], features: datasets.Features, values: dict[str, list[object]], rows: int) -> Table:
    """A table whose columns say by `features` what they hold."""
    strings = [column for column in columns if getattr(features[column], "dtype", None) in ("string", "large_string")]
    names = {column: kind.names for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    return Table(columns, strings, values, range(1, rows + 1), "row", names)


READERS: dict[str, Callable[[Path, str, Sequence[str]], Table]] = {
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
