"""Agreement with people: figures by hand, likelihoods from plain transformers, files refused, blinded judging."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import launch, run_here
from scipy.stats import binomtest
from test_judging import as_text
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks import human_ratings
from pipeline import evaluate, train
from pipeline.data.preferences import read_preferences
from pipeline.data.sources import DataError
from pipeline.errors import UserError
from pipeline.intervals import rank_agreement, rank_figures, wilson_interval
from pipeline.judging import KEY_COLUMNS, OF_SAMPLES, SHEET_COLUMNS, key_path, read_marks, write_judge_file
from pipeline.preferences import Readings, preference_figures, preferences_table, preferred, read_once, tokenized
from pipeline.rewards.sentiment import SentimentReward

# Figures from numbers.


@pytest.mark.parametrize(
    ("scores", "ratings", "expected"),
    [
        ([1, 2, 3, 4], [1, 3, 2, 4], (0.8, 4 / 6, 5 / 6)),
        ([4, 3, 2, 1], [1, 2, 3, 4], (-1, -1, 0)),
        ([1, 1, 2], [1, 2, 3], (1.5 / 3**0.5, 2 / 6**0.5, 2.5 / 3)),  # equal scores count half
        ([1, 2, 3], [1, 1, 2], (1.5 / 3**0.5, 2 / 6**0.5, 1)),  # equal ratings ask nothing
    ],
)
def test_rank_agreement_by_hand(scores, ratings, expected):
    assert rank_agreement(np.array(scores), np.array(ratings)) == pytest.approx(expected)


def test_pairwise_accuracy_is_what_counting_all_pairs_gives():
    rng = np.random.default_rng(1)
    scores, ratings = rng.integers(0, 6, 40), rng.integers(0, 5, 40)
    right = [
        0.5 if scores[i] == scores[j] else float((scores[i] > scores[j]) == (ratings[i] > ratings[j]))
        for i in range(40)
        for j in range(i)
        if ratings[i] != ratings[j]
    ]
    assert rank_agreement(scores, ratings)[2] == pytest.approx(np.mean(right))


def test_the_interval_of_a_rank_correlation_holds_it_and_is_as_wide_as_theory_says():
    rng = np.random.default_rng(2)
    x = rng.normal(size=400)
    figure = rank_figures(x, x + rng.normal(size=400))["spearman"]
    low, high = figure["ci95"]
    assert low < figure["value"] < high
    width = 2 * 1.96 * (1 - figure["value"] ** 2) * (1 + figure["value"] ** 2 / 2) ** 0.5 / 400**0.5  # Bonett 2000
    assert high - low == pytest.approx(width, rel=0.2)


def test_equal_scores_have_no_rank_correlation():
    with np.errstate(all="raise"):
        assert set(rank_figures(np.zeros(4), np.arange(4.0)).values()) == {None}
        assert set(rank_figures(np.arange(4.0), np.ones(4)).values()) == {None}


@pytest.mark.parametrize(("wins", "total"), [(0, 7), (7, 7), (3, 7), (250, 400)])
def test_wilsons_interval_is_scipys(wins, total):
    expected = binomtest(wins, total).proportion_ci(method="wilson")
    assert wilson_interval(wins, total) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_of_a_pair_the_larger_wins_and_equal_ones_count_half():
    assert preferred(np.array([[2, 1], [1, 2], [3, 3]])).tolist() == [1, 0, 0.5]


def test_equal_items_are_read_once_and_get_one_value():
    values = read_once(["a", "b", "a"], lambda items: torch.arange(2.0 * len(items)).view(2, -1))
    assert values.tolist() == [[0, 1, 0], [2, 3, 2]]


def readings(scores, tuned, original, lengths) -> Readings:
    return Readings(*(torch.tensor(x, dtype=torch.float32) for x in (scores, tuned, original)), torch.tensor(lengths))


def test_figures_of_pairs_by_hand():
    read = readings(
        [[1, 0], [0, 1], [2, 2], [1, 0]],
        [[-5, -6], [-5, -6], [-7, -6], [0, 0]],  # prefers chosen, chosen, rejected
        [[-9, -8], [-4, -6], [-9, -6], [0, 0]],  # rejected, chosen, rejected; log-ratio: chosen, rejected, chosen
        [8, 9, 10, 11],  # the last is too long for the models
    )
    figures = preference_figures(read, None, context=10)
    assert (figures["kind"], figures["rows"]) == ("pairs", 4)
    assert figures["reward"]["value"] == 2.5 / 4 and figures["reward"]["ties"] == 1
    likelihood = figures["likelihood"]
    assert (likelihood["rows"], likelihood["left_out"]) == (3, 1)
    values = {name: likelihood[name]["value"] for name in ("tuned", "original", "log_ratio", "gain")}
    assert values == pytest.approx({"tuned": 2 / 3, "original": 1 / 3, "log_ratio": 2 / 3, "gain": 1 / 3})
    low, high = likelihood["log_ratio"]["ci95"]
    assert (low, high) == (0, 1), "of three rows resampled"
    assert any("1 of 4" in row for row in preferences_table(figures | {"reward_name": "sentiment"}))


def test_figures_of_ratings_by_hand():
    read = readings([[1], [2], [3], [0]], [[-1], [-2], [-3], [0]], [[-1], [-1], [-1], [0]], [2, 2, 2, 99])
    figures = preference_figures(read, [1, 2, 3, -4], context=10)
    assert figures["reward"]["spearman"]["value"] == pytest.approx(1)
    assert figures["likelihood"]["log_ratio"]["spearman"]["value"] == pytest.approx(-1), "over the three that fit"
    unmoved = preference_figures(readings([[1], [2]], [[-1], [-2]], [[-1], [-2]], [2, 2]), [1, 2], context=10)
    assert unmoved["likelihood"]["log_ratio"]["spearman"] is None
    assert "undefined" in str(preferences_table(unmoved | {"reward_name": "sentiment"}))


# Tokens.


def test_a_row_is_cut_at_one_token_and_put_together_is_the_whole_text(tokenizer):
    prompts = ["the film", "the fil", "", "a great"]
    responses = [(" was good", " was bad"), ("m was good", "m"), ("a story", "bad"), ("", "")]
    responses[3] = (" actor", " actor who laughs")
    rows = tokenized(tokenizer, prompts, responses)
    for (prompt_tokens, tokens), prompt, texts in zip(rows, prompts, responses, strict=True):
        for own, text in zip(tokens, texts, strict=True):
            whole = tokenizer(prompt + text).input_ids
            assert list(prompt_tokens + own if prompt else own) == whole
    assert tokenizer.decode(rows[0][0]) == "the film"
    assert tokenizer.decode(rows[1][0]) == "the", "' film' is one token, so the cut is before it"
    assert rows[2][0] == (tokenizer.eos_token_id,)


def test_a_token_across_the_cut_of_one_response_moves_the_cut_of_the_other(tokenizer):
    for responses in [("m was good", " was bad"), (" was bad", "m was good")]:
        ((prompt, tokens),) = tokenized(tokenizer, ["the fil"], [responses])
        assert tokenizer.decode(prompt) == "the"
        assert [tokenizer.decode(own) for own in tokens] == [" fil" + response for response in responses]


# The command, on a short run of the tiny models.

PAIRS = [
    {"prompt": "the film", "chosen": " was a great story", "rejected": " was bad"},
    {"prompt": "a story", "chosen": " who laughs", "rejected": " with an awful actor the the the"},
    {"prompt": "", "chosen": "good", "rejected": "awful awful"},
    {"prompt": "the fil", "chosen": "m was good", "rejected": " was bad"},
    {"prompt": "an actor", "chosen": " laughs", "rejected": " laughs"},
]
LONG = {"prompt": "the film", "chosen": " was good" * 60, "rejected": " was bad"}


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory):
    """A finished run whose policy has moved."""
    directory = tmp_path_factory.mktemp("preferences") / "run"
    assert run_here(train.main, "--config", tiny_recipe, "--output_dir", directory, "--learning_rate", "0.02") == 0
    return directory


def agreement(run: Path, file: Path, *settings: str) -> dict:
    assert run_here(evaluate.main, run, "--preferences", file, *settings) == 0
    return json.loads((run / "preferences.json").read_text())


@torch.no_grad()
def log_likelihood(model, tokenizer, prompt: str, text: str) -> float:
    """Of the whole text after EOS or, where there is a prompt, after its first token, from transformers alone.

    What a pair's texts share does not change which is likelier, so this needs no cut.
    """
    ids = tokenizer(prompt + text).input_ids if prompt else [tokenizer.eos_token_id, *tokenizer(text).input_ids]
    tokens = torch.tensor([ids])
    logits = model(tokens).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, tokens[0, 1:, None]).sum().item()


def test_shares_of_pairs_are_those_of_plain_transformers(run, tmp_path, tiny_lm, tiny_classifier):
    figures = agreement(run, write_jsonl(tmp_path / "pairs.jsonl", [*PAIRS, LONG]))
    tokenizer, original = AutoTokenizer.from_pretrained(tiny_lm), AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    tuned = AutoModelForCausalLM.from_pretrained(run).eval()
    margins = {
        name: [
            log_likelihood(model, tokenizer, row["prompt"], row["chosen"])
            - log_likelihood(model, tokenizer, row["prompt"], row["rejected"])
            for row in PAIRS
        ]
        for name, model in (("tuned", tuned), ("original", original))
    }
    margins["log_ratio"] = [a - b for a, b in zip(margins["tuned"], margins["original"], strict=True)]
    likelihood = figures["likelihood"]
    assert (likelihood["rows"], likelihood["left_out"], likelihood["context_tokens"]) == (5, 1, 64)
    for name, values in margins.items():
        assert min(abs(value) for value in values[:4]) > 1e-3, "too near to tell"
        expected = np.mean([0.5 if abs(value) < 1e-6 else float(value > 0) for value in values])
        assert likelihood[name]["value"] == pytest.approx(expected), name
    assert figures["reward"]["ties"] == 1
    scores = classifier_scores(
        tiny_classifier, [row["prompt"] + row[side] for row in (*PAIRS, LONG) for side in ("chosen", "rejected")]
    )
    assert figures["reward"]["value"] == pytest.approx(preferred(scores.reshape(-1, 2)).mean())
    assert f"{figures['reward']['value']:.3f}" in (run / "preferences.md").read_text()


@torch.no_grad()
def classifier_scores(path: str, texts: list[str]) -> np.ndarray:
    """POSITIVE logits one by one, from transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForSequenceClassification.from_pretrained(path)
    encoded = [tokenizer(text, return_tensors="pt", truncation=True, max_length=64) for text in texts]
    return np.array([model.eval()(**one).logits[0, 1].item() for one in encoded])


RATED = [("a great good film", 4.0), ("good", 2.5), ("the story", 0.0), ("an awful bad film", -3.0), ("bad", -1.5)]
RATED += [("a good story with a great actor", 3.0), ("the actor who laughs", 1.0)]


def test_rank_correlations_of_ratings_are_those_of_plain_transformers_however_the_texts_are_batched(
    run, tmp_path, tiny_lm, tiny_classifier
):
    file = tmp_path / "ratings.csv"
    with file.open("w", newline="") as handle:
        csv.writer(handle).writerows([("text", "rating"), *RATED])
    figures = agreement(run, file)
    texts, ratings = [text for text, _ in RATED], np.array([rating for _, rating in RATED])
    expected = rank_agreement(classifier_scores(tiny_classifier, texts), ratings)
    assert [figures["reward"][name]["value"] for name in figures["reward"]] == pytest.approx(expected)
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tuned, original = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (run, tiny_lm))
    ratio = [
        log_likelihood(tuned, tokenizer, "", text) - log_likelihood(original, tokenizer, "", text) for text in texts
    ]
    found = figures["likelihood"]["log_ratio"]["spearman"]["value"]
    assert found == pytest.approx(rank_agreement(np.array(ratio), ratings)[0])
    alone = agreement(run, file, "--rollout_microbatch_size", "1")
    assert alone == figures


def test_two_workers_share_an_odd_number_of_pairs_and_find_the_same(run, tmp_path):
    file = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    expected = agreement(run, file)
    (run / "preferences.json").unlink()
    done = launch(2, ["-m", "pipeline.evaluate", str(run), "--preferences", str(file)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run / "preferences.json").read_text()) == expected
    assert done.stdout.count("Agreement with people") == 1


def test_of_two_workers_one_writes_the_judge_file_and_both_end(run, tmp_path):
    sheet = tmp_path / "judge.csv"
    done = launch(2, ["-m", "pipeline.evaluate", str(run), "--judge-file", str(sheet)])
    assert done.returncode == 0, done.stdout + done.stderr
    samples = (run / "evaluation_samples.jsonl").read_text().count("\n")
    assert done.stdout.count(f"{samples} pairs written") == 1
    assert len(table(sheet)) == len(table(key_path(sheet))) == samples


# Files that are refused.


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("no.jsonl", None, "no such file"),
        ("a.txt", "text\n", ".jsonl or .csv"),
        ("a.jsonl", "", "has no rows"),
        ("a.csv", "prompt,chosen,rejected\n", "has no rows"),
        (
            "a.csv",
            "prompt,chosen\na,b\n",
            "columns prompt, chosen; prompt, chosen, rejected or text, rating are needed",
        ),
        ("a.jsonl", '{"text": "a", "rating": 1}\n{"text": "b"}\n', "line 2: rating=None is not a finite number"),
        ("a.jsonl", '{"text": "a", "rating": 1}\n\n{"text": \n', "line 3 is not JSON"),
        ("a.jsonl", '{"text": "a", "rating": 1}\n[1]\n', "line 2 is '[1]', not an object"),
        ("a.csv", "text,rating\na,1\nb,good\n", "line 3: rating='good' is not a finite number"),
        ("a.csv", "text,rating\na,1\nb,nan\n", "line 3: rating='nan'"),
        ("a.csv", "text,rating\na,1\nb,1\n", "every rating is 1"),
        ("a.csv", "text,rating\na, b,1\n", "line 2: the row has more fields"),
        ("a.csv", "text,rating\na\n", "line 2: the row has fewer fields"),
        ("a.csv", "prompt,chosen,rejected\na,b, \n", "line 2: rejected is empty"),
        ("a.jsonl", '{"prompt": "a", "chosen": ["b"], "rejected": "c"}\n', "line 1: chosen=['b'] is not a text"),
        ("a.csv", b"text,rating\n\xff\xfe,1\n", "line 2: the byte 0xff is not UTF-8"),
        ("a.csv", 'text,rating\na,1\n"b"c,1\n', "line 3: "),
        ("a.jsonl", '{"text": "a", "rating": true}\n', "line 1: rating=True is not a finite number"),
        ("a.csv", "text,rating\na,1_0\n", "line 2: rating='1_0' is not a finite number"),
        ("a.jsonl", f'{{"text": "a", "rating": 1{"0" * 400}}}\n', "line 1: rating="),
        ("a.jsonl", '{"text": "a\\ud83d", "rating": 1}\n', "line 1: text holds half of a character"),
    ],
)
def test_a_file_that_cannot_serve_is_refused_by_name_and_line(tmp_path, name, content, fault):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        read_preferences(path)
    assert str(path) in str(error.value) and fault in str(error.value)


def test_a_bad_file_ends_the_command_before_a_model_is_loaded(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.evaluate.make_reward", lambda *_: pytest.fail("models were loaded"))
    assert run_here(evaluate.main, run, "--preferences", tmp_path / "no.csv") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'no.csv'}: there is no such file")


def test_only_one_of_the_files_may_be_named(run, capsys):
    assert run_here(evaluate.main, run, "--preferences", "a.csv", "--judge-file", "b.csv") == 2
    assert "not allowed with" in capsys.readouterr().err
    assert run_here(evaluate.main, run, "--judge-file") == 2
    assert "expected one argument" in capsys.readouterr().err


def test_what_spreadsheets_write_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text;rating;by\r\n"good; really\r\nso";1.5;me\r\nbad;-2;me\r\n', encoding="utf-8-sig", newline="")
    read = read_preferences(path)
    assert read.responses == [("good; really\r\nso",), ("bad",)] and read.ratings == [1.5, -2]
    assert read.prompts == ["", ""]


# Judging.


@pytest.fixture
def judged(tmp_path) -> Path:
    """A run's directory with 400 samples."""
    rows = [{"prompt": f"p{i}", "before": f"old {i}", "after": f"new {i}"} for i in range(400)]
    write_jsonl(tmp_path / "evaluation_samples.jsonl", rows)
    return tmp_path


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_the_judge_file_hides_which_is_which_and_the_key_tells(judged):
    sheet = judged / "judge.csv"
    assert write_judge_file(judged, sheet) == 400
    rows, key = table(sheet), {row["id"]: row["tuned"] for row in table(key_path(sheet))}
    assert tuple(rows[0]) == SHEET_COLUMNS and tuple(table(key_path(sheet))[0]) == (*KEY_COLUMNS, OF_SAMPLES)
    tuned_is_b = np.array([row["response_b"].startswith("new") for row in rows])
    assert [key[row["id"]] == "b" for row in rows] == tuned_is_b.tolist()
    assert {row["better"] for row in rows} == {""}
    ids, places = (np.array([int(row[name].strip("p")) for row in rows]) for name in ("id", "prompt"))
    assert sorted(places) == list(range(400)) and len(set(ids)) == 400
    # Side, id, place in the sheet and place among the samples: none tells another (r has a deviation of .05).
    for one, other in [(tuned_is_b, ids), (tuned_is_b, places), (tuned_is_b, np.arange(400)), (ids, places),
                       (ids, np.arange(400)), (places, np.arange(400))]:  # fmt: skip
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.16
    assert abs(tuned_is_b.mean() - 0.5) < 0.08
    assert abs((tuned_is_b[1:] == tuned_is_b[:-1]).mean() - 0.5) < 0.08, "nor does the row before"


def test_the_same_run_gives_the_same_judge_file_and_another_run_other_sides(judged):
    write_judge_file(judged, judged / "one.csv")
    write_judge_file(judged, judged / "two.csv")
    assert (judged / "one.csv").read_bytes() == (judged / "two.csv").read_bytes()
    samples = judged / "evaluation_samples.jsonl"
    samples.write_text(samples.read_text().replace("new 7", "newer 7"))
    write_judge_file(judged, judged / "three.csv")
    sides = [[row["tuned"] for row in table(judged / f"{name}.key.csv")] for name in ("one", "three")]
    assert sides[0] != sides[1]
    ids = [{row["id"] for row in table(judged / f"{name}.key.csv")} for name in ("one", "three")]
    assert ids[0] != ids[1]


def marked(judged: Path, marks: list[str]) -> Path:
    """The first rows of a sheet marked for the tuned model ("win"), against it ("loss"), or as they are."""
    sheet = judged / "judge.csv"
    if not sheet.exists():
        write_judge_file(judged, sheet)
    rows, key = table(sheet), {row["id"]: row["tuned"] for row in table(key_path(sheet))}
    for row, mark in zip(rows, marks, strict=False):
        own = key[row["id"]]
        row["better"] = {"win": own, "loss": "ab".replace(own, "")}.get(mark, mark)
    rows.reverse()  # a spreadsheet may have been sorted
    with sheet.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, SHEET_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return sheet


def test_marks_come_back_as_the_win_rate_of_the_tuned_model(judged):
    rate = read_marks(marked(judged, ["win"] * 6 + ["loss"] * 2 + ["tie", " Tie "]))
    assert (rate.wins, rate.losses, rate.ties, rate.unmarked) == (6, 2, 2, 390)
    assert rate.win_rate == 0.7
    assert rate.ci95 == wilson_interval(7, 10) and rate.ci95[0] < 0.5 < 0.7 < rate.ci95[1]


def test_marks_that_cannot_be_read_are_refused(judged):
    sheet = marked(judged, [])
    with pytest.raises(DataError, match="has no marks; write a, b or tie"):
        read_marks(sheet)
    with pytest.raises(DataError, match=r"judge.csv, line 401: better='A!' is none of a, b, tie"):
        read_marks(marked(judged, ["A!"]))
    text = sheet.read_text(encoding="utf-8-sig").splitlines()
    sheet.write_text("\n".join([*text[:3], text[2]]) + "\n")
    with pytest.raises(DataError, match="was on line 3 already"):
        read_marks(sheet)
    sheet.write_text("id,verdict\n1,a\n")
    with pytest.raises(DataError, match="has the columns id, verdict and no better"):
        read_marks(sheet)
    sheet.write_text("id,better\n1,a\n")
    with pytest.raises(DataError, match="has no id '1'; is it the key of this sheet"):
        read_marks(sheet)
    key_path(sheet).unlink()
    with pytest.raises(DataError, match=r"judge.key.csv is missing"):
        read_marks(sheet)


def test_a_judge_file_never_overwrites_marks_nor_does_without_samples(judged):
    sheet = marked(judged, ["win"])
    with pytest.raises(DataError, match="is there already"):
        write_judge_file(judged, sheet)
    with pytest.raises(DataError, match="name it so"):
        write_judge_file(judged, judged / "judge.txt")
    with pytest.raises(DataError, match="cannot be written"):
        write_judge_file(judged, judged / "no/such/folder.csv")
    (judged / "evaluation_samples.jsonl").unlink()
    with pytest.raises(DataError, match=r"run python -m pipeline.evaluate .* first"):
        write_judge_file(judged, judged / "other.csv")


def test_the_commands_write_a_judge_file_and_read_its_marks_back(run, tmp_path, capsys):
    sheet = tmp_path / "judge.csv"
    assert run_here(evaluate.main, run, "--judge-file", sheet) == 0
    assert "Keep " + str(tmp_path / "judge.key.csv") in capsys.readouterr().out
    samples = {row["prompt"]: row for row in map(json.loads, (run / "evaluation_samples.jsonl").open())}
    key = {row["id"]: row["tuned"] for row in table(key_path(sheet))}
    for row in table(sheet):
        assert as_text(row[f"response_{key[row['id']]}"]) == samples[as_text(row["prompt"])]["after"]
    assert run_here(evaluate.main, run, "--read-marks", sheet) == 2
    sheet.write_text(sheet.read_text(encoding="utf-8-sig").replace(",\n", ",a\n"))
    assert run_here(evaluate.main, run, "--read-marks", sheet) == 0
    found = json.loads((run / "marks.json").read_text())
    assert found["wins"] == sum(side == "a" for side in key.values()) and found["wins"] + found["losses"] == len(key)
    assert f"{found['win_rate']:.3f}" in (run / "marks.md").read_text()
    assert "was not written from the samples" not in capsys.readouterr().out
    key = key_path(sheet).read_text(encoding="utf-8-sig")
    key_path(sheet).write_text(key.replace(found["samples"], "0000abcd"))
    assert run_here(evaluate.main, run, "--read-marks", sheet) == 0
    assert f"was not written from the samples that {run} has now" in capsys.readouterr().out


# The real set.


def test_the_shipped_classifier_agrees_with_people_on_snippets_it_was_not_trained_on():
    try:
        human_ratings.PLACE.mkdir(parents=True, exist_ok=True)
        archive = human_ratings.fetch()
    except UserError as error:
        pytest.skip(str(error))
    rows = human_ratings.snippets(archive)
    assert len(rows) == 10_605 and all(-4 <= row["rating"] <= 4 for row in rows)
    assert all(np.mean(row["ratings"]) == pytest.approx(row["rating"], abs=1e-6) for row in rows)
    new = human_ratings.unseen(rows)
    assert 2_500 < len(new) < 3_500, "about 7,600 of the snippets are sentences of the training set"
    some = new[::10]
    reward = SentimentReward("assets/distilbert-imdb-mini", scale="log_odds")
    scores = reward([""] * len(some), [row["text"] for row in some]).double().numpy()
    figures = rank_figures(scores, np.array([row["rating"] for row in some]))
    assert figures["spearman"]["ci95"][0] > 0.3
    assert human_ratings.one_against_the_others(some)["spearman"]["value"] > figures["spearman"]["value"]
