"""What a column holds: texts, or labels 0 and 1; what it holds instead is said, and nothing is made of it."""

import re
from collections.abc import Sequence

from pipeline.data.files import DataError, Table

LABELS_WANTED = "0 (negative) and 1 (positive) are expected"
_CHAT = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")
_HALF = re.compile("[\ud800-\udfff]")
_NO_TEXT = re.compile(
    r"\s*([+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|true|false|nan|\d{4}-\d\d-\d\d([ T][\d:.+Z-]+)?)\s*", re.IGNORECASE
)
_WHOLE = re.compile(r"[+-]?\d+(\.0*)?")


def texts_of(table: Table, column: str, name: str) -> list[str | None]:
    """The texts of a column, verbatim; None where a row has none.

    Raises:
        DataError: no such column; it holds chat messages, lists, objects, numbers, …; half of a character.
    """
    if column not in table.columns:
        columns = ", ".join(other if len(other) < 40 else f"{other[:40]}…" for other in table.columns)
        raise DataError(f"{name} has no column {column!r}; its columns are {columns}. Set text_column to one of them.")
    values = table.values[column]
    for number, value in zip(table.rows, values, strict=True):
        if value is None:
            continue
        if not isinstance(value, str) or _CHAT.match(value):
            raise DataError(_held_instead(table, column, name, number, value))
        if _HALF.search(value):
            raise DataError(
                f"{name}, {table.unit} {number}: {column} holds half of a character (a cut emoji?); remove or mend it."
            )
    written = (value for value in values if value and value.strip())
    first = next(written, None)
    if first is not None and len(table.columns) > 1 and all(map(_NO_TEXT.fullmatch, (first, *written))):
        raise DataError(_held_instead(table, column, name, table.rows[values.index(first)], first))
    return values


def _held_instead(table: Table, column: str, name: str, number: int, value: object) -> str:
    kind = _kind(value)
    others = [other for other in table.of_strings if other != column]
    shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}…"
    strings = f"columns that hold strings: {', '.join(others)}" if others else "no other column holds strings"
    chats = " Chats are not trained on yet: write each as one string." if kind == "messages" else ""
    return (
        f"{name}, {table.unit} {number}: text_column={column!r} holds {kind}, {shown}, not texts.{chats} Set "
        f"text_column to a column of strings ({strings})."
    )


def _kind(value: object) -> str:
    parts = value if isinstance(value, list) else [value]
    if parts and all(isinstance(part, dict) and ({"role", "content"} <= set(part) or {"from", "value"} <= set(part))
                     for part in parts):  # fmt: skip
        return "messages"
    if isinstance(value, str):
        return "messages" if _CHAT.match(value) else "numbers, dates or true and false"
    kinds = {list: "lists", dict: "objects", bytes: "bytes", bool: "true and false", int: "numbers", float: "numbers"}
    return kinds.get(type(value), f"values of the type {type(value).__name__}")


def as_label(value: object) -> object:
    """A label as an integer where it can mean nothing else: true, 1, 1.0, "1", "1.0" and "true" are 1."""
    if isinstance(value, str):
        text = value.strip().lower()
        if text in ("true", "false"):
            return int(text == "true")
        return int(text.split(".")[0]) if _WHOLE.fullmatch(text) else value
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    return value


def check_labels(table: Table, column: str, name: str, labels: Sequence[object]) -> None:
    """Raise `DataError` unless all are 0 or 1, both are there and mean negative and positive.

    Args:
        labels: [n] the column's values after `as_label`.
    """
    for number, value, label in zip(table.rows, table.values[column], labels, strict=True):
        if label not in (0, 1):
            raise DataError(f"{name}, {table.unit} {number}: {column}={value!r}; {LABELS_WANTED}. Mend or remove it.")
    if len(set(labels)) < 2:
        raise DataError(f"{name}: every {column} is {labels[0]}; {LABELS_WANTED}, both present.")
    called = [text.lower() for text in table.class_names.get(column, ())]
    if called and (called[0].startswith("pos") or called[1].startswith("neg")):
        raise DataError(
            f"{name}: its {column} 0 is called {called[0]!r} and 1 {called[1]!r}; {LABELS_WANTED}. Turn them round."
        )
