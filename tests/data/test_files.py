"""Files of texts: every character of a path is meant, every row is there as it stands, or its line is named."""

import codecs
import datetime
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from pipeline.data.files import csv_rows
from pipeline.data.preferences import read_preferences
from pipeline.data.sources import DataError, Reviews, load_reviews


def saved(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def parquet(path: Path, **columns: list) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def refusal(path: str, **settings: object) -> str:
    with pytest.raises(DataError) as caught:
        load_reviews(path, **settings)
    assert f"dataset={path!r}" in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["reviews[1]", "reviews*", "review?1", "{a,b}", "re views", "réviews"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "txt", "parquet"])
def test_every_character_of_a_path_is_meant(tmp_path, name, suffix):
    for stem, text in ((name, "wanted"), ("reviews1", "another"), ("a", "another")):
        path = tmp_path / f"{stem}.{suffix}"
        row = json.dumps({"text": text})
        content = {"txt": text, "jsonl": row, "json": f"[{row}]"}.get(suffix, f"text\n{text}\n")
        if suffix == "parquet":
            parquet(path, text=[text])
        else:
            saved(path, content)
    assert load_reviews(str(tmp_path / f"{name}.{suffix}")).texts == ["wanted"]


def test_every_character_of_a_preferences_file_is_meant(tmp_path):
    saved(tmp_path / "pairs1.csv", "prompt,chosen,rejected\nother,a,b\n")
    saved(tmp_path / "pairs[1].csv", "prompt,chosen,rejected\nwanted,a,b\n")
    assert read_preferences(tmp_path / "pairs[1].csv").prompts == ["wanted"]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.csv", 'id,text\n1,a\n2,"an open quote\n3,b\n4,"another one\n', "line 3: a quote"),
        ("a.csv", 'id,text\n1,a\n2,"never closed\n3,b\n', "line 3: a quote"),
        ("a.csv", 'text;id\n"never; closed;1\nb;2\n', "line 2: a quote"),
        ("a.tsv", 'text\tid\n"half" a quote\t1\nb\t2\n', "line 2: a quote"),
        ("a.csv", 'text,id\n"a \\"quoted\\" word",1\n', "line 2: a quote"),
        ("a.csv", 'text,id\r"a"b,1\rc,2\r', "line 2: a quote"),
        ("a.csv", "id,text\n1,a\n2\n3,c\n", "line 3: the row has fewer fields than the header, 1 and not 2"),
        ("a.tsv", "id\ttext\n1\ta\n2\n", "line 3: the row has fewer fields"),
        ("a.csv", 'id,text\n"1\n1",a\n2,b,c\n', "line 4: the row has more fields than the header, 3 and not 2"),
        ("a.csv", "text,text\na,b\n", "line 1: the column 'text' stands there twice"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n', "line 2: the key 'text' stands twice"),
        ("a.json", '[{"text": "a"},\n{"text": }]', "line 2 is not JSON (Expecting value, column 10)"),
        ("a.json", '["a", "b"]', "row 1 is 'a', not an object"),
        ("a.csv", "text\na\0b\n", "line 2 holds a NUL byte"),
        ("a.txt", "a\nb\0\n", "line 2 holds a NUL byte"),
        ("a.csv", "text\nabc\n".encode("utf-16"), "is in UTF-16; save it as UTF-8"),
        ("a.txt", "text\nabc\n".encode("utf-16"), "is in UTF-16"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "is in UTF-16"),
        ("a.csv", "text\na\ncaf\u00e9\n".encode("latin-1"), "line 3: the byte 0xe9 is not UTF-8"),
        ("a.jsonl", '{"text": "a\\ud83d"}\n', "line 1: text holds half of a character"),
        ("a.csv.gz", b"\x1f\x8b", "files with texts end in .csv"),
        ("a", "text\na\n", "files with texts end in .csv"),
    ],
)
def test_what_is_no_row_is_refused_by_its_line(tmp_path, name, content, fault):
    assert fault in refusal(saved(tmp_path / name, content))


def test_json_too_deep_to_be_read_is_refused(tmp_path):
    assert "too deep" in refusal(saved(tmp_path / "a.json", "[" * 100_000))


def test_a_directory_and_a_path_that_is_not_there_are_no_names_on_the_hub(tmp_path):
    (tmp_path / "data.csv").mkdir()
    assert "is a directory here" in refusal(str(tmp_path))
    assert "is a directory here" in refusal(str(tmp_path / "data.csv"))
    for missing in (str(tmp_path / "none"), "./none", "~/reviews", "a/b/c"):
        assert "there is no such file" in refusal(missing)


ROWS = [("a, b", 1), ('say "no"\nor; yes', 0), ("NA", 1), ("null", 0), ("2020-01-01", 1)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("name", "delimiter"), [("a.CSV", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_rows_are_read_as_they_stand_whatever_ends_and_parts_them(tmp_path, end, name, delimiter):
    quoted = [f'"{text.replace(chr(34), chr(34) * 2)}"{delimiter}{label}' for text, label in ROWS]
    content = end.join([f"text{delimiter}label", *quoted, ""])
    read = load_reviews(saved(tmp_path / name, codecs.BOM_UTF8 + content.encode()))
    assert read == Reviews(["a, b", 'say "no" or; yes', "NA", "null", "2020-01-01"], [1, 0, 1, 0, 1])


def test_quotes_inside_a_field_that_has_none_around_it_stay(tmp_path):
    assert load_reviews(saved(tmp_path / "a.csv", 'text\nhe said "no" twice\n')).texts == ['he said "no" twice']


def test_json_rows_may_differ_in_their_keys_and_stand_in_a_list_or_in_lines(tmp_path):
    rows = ['{"text": "a", "label": 1}', '{"title": "b"}', '{"label": 0, "text": "c"}']
    lists = f"\n [{', '.join(rows)}]"
    for name, content in (("a.jsonl", "\n\n".join(rows)), ("a.json", "\r\n".join(rows)), ("b.json", lists)):
        read = load_reviews(saved(tmp_path / name, codecs.BOM_UTF8 + content.encode()))
        assert read == Reviews(["a", "c"], [1, 0])
        assert read.notes == [f"1 of 3 rows of {tmp_path / name} have no text and are left out."]


def test_a_field_of_hundreds_of_lines_is_one_text_and_that_is_said(tmp_path):
    lines = "\n".join(f"line {i}" for i in range(300))
    path = saved(tmp_path / "a.csv", f'text,n\nfirst,1\n"{lines}",2\n"two\nlines",3\nlast,4\n')
    read = load_reviews(path)
    assert [len(text) for text in read.texts] == [5, len(lines), 9, 4]
    told = f"2 of 4 rows of {path} go over several lines inside quotes, the longest from line 3 to 302; where that is"
    assert read.notes[0].startswith(told)
    assert [line for line, _ in csv_rows(Path(path))] == [2, 3, 303, 305]


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (CHAT, "messages"),
        (CHAT[0], "messages"),
        ([{"from": "human", "value": "hi"}], "messages"),
        (str(CHAT), "messages"),
        (json.dumps(CHAT), "messages"),
        (["a"], "lists"),
        ({"a": 1}, "objects"),
        (1, "numbers"),
        (1.5, "numbers"),
        (True, "true and false"),
    ],
    ids=repr,
)
def test_a_column_that_holds_anything_but_texts_is_refused_and_those_that_hold_them_are_named(tmp_path, value, kind):
    rows = [{"it": None, "title": "a"}, {"it": value, "title": "b", "n": 1}]
    error = refusal(saved(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))), text_column="it")
    assert f"line 2: text_column='it' holds {kind}, " in error and "(columns that hold strings: title" in error
    assert ("Chats are not trained on yet" in error) is (kind == "messages")


@pytest.mark.parametrize("value", [b"a", datetime.date(2020, 1, 1), CHAT, 3], ids=repr)
def test_a_parquet_column_that_holds_anything_but_texts_is_refused(tmp_path, value):
    path = parquet(tmp_path / "a.parquet", it=[None, value], title=["a", "b"], n=[1, 2])
    error = refusal(path, text_column="it")
    assert "row 2: text_column='it' holds " in error and "(columns that hold strings: title)" in error


@pytest.mark.parametrize("values", ["1 2.5 -3e4", "True false ", "2020-01-01 2021-12-31"])
def test_a_csv_column_of_numbers_dates_or_truth_is_no_column_of_texts(tmp_path, values):
    rows = "\n".join(f"a,{value}" for value in values.split(" "))
    path = saved(tmp_path / "a.csv", f"text,it\n{rows}\n")
    error = refusal(path, text_column="it")
    assert "line 2: text_column='it' holds numbers, dates or true and false, " in error
    assert "(columns that hold strings: text)" in error


def test_everything_left_out_or_changed_is_counted(tmp_path):
    rows = ["one", "", None, "one", "two\n\n  lines<br />here", " two lines here ", "three"]
    path = saved(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": row}) for row in rows))
    read = load_reviews(path)
    assert read.texts == ["one", "two lines here", "three"]
    spaces = "line breaks, runs of spaces or spaces at an end: each became one space, those at the ends none"
    assert read.notes == [
        f"2 of 7 rows of {path} have no text and are left out.",
        f"2 of 7 rows of {path} repeat the text of an earlier one and are left out.",
        f"2 of 7 rows of {path} had {spaces}.",
    ]
    assert load_reviews(saved(tmp_path / "b.txt", "a\nb\n")).notes == [], "nothing to tell"


@pytest.mark.parametrize(
    ("negative", "positive"),
    [("0", "1"), ("0.0", "1.0"), ("false", "true"), ('"0"', '"1"'), ('"False"', '" 1.0"')],
)
def test_labels_that_can_only_mean_0_and_1_are(tmp_path, negative, positive):
    path = saved(tmp_path / "a.jsonl", f'{{"text": "a", "label": {negative}}}\n{{"text": "b", "label": {positive}}}\n')
    read = load_reviews(path, labelled=True)
    assert read.labels == [0, 1] and [type(label) for label in read.labels] == [int, int]


@pytest.mark.parametrize("label", ["0.5", "2", "-1", "NaN", "null", '"yes"', '""', "[1]"])
def test_any_other_label_is_refused_by_its_line(tmp_path, label):
    rows = ['{"text": "a", "label": 0}', '{"text": "b", "label": 1}', f'{{"text": "c", "label": {label}}}']
    assert ", line 3: label=" in refusal(saved(tmp_path / "a.jsonl", "\n".join(rows)), labelled=True)


def test_a_text_with_both_labels_is_counted(tmp_path):
    path = saved(tmp_path / "a.csv", "text,label\na,0\nb,1\na,1\n")
    read = load_reviews(path, labelled=True)
    assert read == Reviews(["a", "b"], [0, 1])
    assert read.notes[-1] == f"1 of 3 rows of {path} repeat a text with the other label: the first is kept."


def test_labels_named_the_other_way_round_are_refused(tmp_path):
    for names, right in ((["neg", "pos"], True), (["positive", "negative"], False)):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        path = tmp_path / f"{names[0]}.parquet"
        Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features).to_parquet(path)
        if right:
            assert load_reviews(str(path), labelled=True).labels == [0, 1]
        else:
            assert "label 0 is called 'positive' and 1 'negative'" in refusal(str(path), labelled=True)
