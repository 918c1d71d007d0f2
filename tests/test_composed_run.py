"""Runs with a reward of several components: one worker or two, their figures, their evaluation, their frontier."""

import json

import pytest
from launching import figures, launch, metrics, run_here

from pipeline import evaluate, frontier, train

MINE = "def shouts(prompts, responses):\n    return [response.count('!') for response in responses]\n"
REWARD = [
    "sentiment=2.0",
    "fluency=0.3",
    "coherence=0.2",
    "repetition:1=-0.5",
    "length:4-8=0.1",
    "composed_mine:shouts=-1",
]
NAMES = ["sentiment", "fluency", "coherence", "repetition_1", "length", "shouts"]
WEIGHTS = [2.0, 0.3, 0.2, -0.5, 0.1, -1.0]


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder with a reward function of the user's."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "composed_mine.py").write_text(MINE)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_recipe, mine):
    """The same run on one worker and on two."""
    runs = []
    for workers in (1, 2):
        run = tmp_path_factory.mktemp("composed") / str(workers)
        command = ["-m", "pipeline.train", "--config", tiny_recipe, "--output_dir", str(run), "--reward", *REWARD]
        done = launch(workers, command, env={"PYTHONPATH": f"{mine}:."})
        assert done.returncode == 0, done.stdout + done.stderr
        runs.append(run)
    return runs


def test_one_worker_or_two_the_components_are_the_same(runs):
    alone, shared = map(figures, runs)
    for mine, theirs in zip(alone, shared, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4, rel=1e-4)


def test_each_component_is_logged_raw_and_weighted_and_they_add_up(runs):
    for step in metrics(runs[0]):
        for name, weight in zip(NAMES, WEIGHTS, strict=True):
            raw, weighted = step[f"reward/{name}/raw_mean"], step[f"reward/{name}/weighted_mean"]
            assert weighted == pytest.approx(weight * raw, rel=1e-5, abs=1e-7)
        total = sum(step[f"reward/{name}/weighted_mean"] for name in NAMES)
        assert step["reward/mean"] == pytest.approx(total, abs=1e-5)
        assert step["reward/fluency/raw_mean"] < 0 <= step["reward/repetition_1/raw_mean"] < 1


def test_the_evaluation_has_every_component_and_their_sum(runs):
    result = json.loads((runs[0] / "evaluation.json").read_text())
    assert result["reward"]["name"] == "reward"
    for side in ("before", "after"):
        means = {name: result[side][name]["mean"] for name in ["logit", *NAMES[1:]]}
        total = sum(weight * mean for weight, mean in zip(WEIGHTS, means.values(), strict=True))
        assert result["reward"][side]["mean"] == pytest.approx(total, abs=1e-5)
    shared = json.loads((runs[1] / "evaluation.json").read_text())
    assert shared["reward"]["after"]["mean"] == pytest.approx(result["reward"]["after"]["mean"], abs=1e-4)


def test_the_run_can_be_evaluated_again_against_a_frontier_of_its_own(runs, tiny_recipe, mine, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(mine)
    file = tmp_path / "own.json"
    small = ("--frontier_prompts", 4, "--frontier_samples", 24, "--frontier", file)
    assert run_here(frontier.main, "--config", tiny_recipe, "--reward", *REWARD, *small) == 0
    assert run_here(evaluate.main, runs[0], "--trust", "--frontier", file) == 0
    result = json.loads((runs[0] / "evaluation.json").read_text())
    assert result["frontier"]["reward"] == pytest.approx(result["reward"]["after"]["mean"], abs=1e-6)


def test_a_whitened_reward_is_judged_by_its_first_component_and_has_no_frontier(tiny_recipe, tmp_path, capsys):
    whitened = ("--config", tiny_recipe, "--reward", "sentiment", "repetition:1=-0.5", "--reward_whitening", "true")
    run = tmp_path / "run"
    assert run_here(train.main, *whitened, "--output_dir", run) == 0
    first = metrics(run)[0]
    assert first["reward/mean"] == pytest.approx(0, abs=1e-5) and first["reward/std"] > 0.5
    assert first["reward/repetition_1/raw_mean"] > 0
    figures = json.loads((run / "evaluation.json").read_text())
    assert figures["reward"]["name"] == "logit"
    # The way over the plane is on the scale of its ends, which the whitened rewards are not.
    way = [point["reward"] for point in figures["way"]]
    assert way == pytest.approx([step["reward/sentiment/raw_mean"] for step in metrics(run)], abs=1e-6)
    assert run_here(frontier.main, *whitened, "--frontier", tmp_path / "f.json") == 2
    assert "reward_whitening=True" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reward", "fault"),
    [
        (["sentiment", "fluent"], "reward='fluent' is none of"),
        (["sentiment", "sentiment=2"], "stands there twice"),
        (["fluency", "classifier:no/such:toxic"], "'no/such' cannot be opened"),
        (["fluency", "http://127.0.0.1:9/score"], "did not answer in"),
    ],
)
def test_what_cannot_be_rewarded_is_said_before_the_policy_is_loaded(
    tiny_recipe, tmp_path, capsys, monkeypatch, reward, fault
):
    monkeypatch.setattr("pipeline.rewards.remote.WAITS", ())
    monkeypatch.setattr("pipeline.models.building.load_causal_lm", lambda _path: pytest.fail("weights were loaded"))
    assert run_here(train.main, "--config", tiny_recipe, "--output_dir", tmp_path / "run", "--reward", *reward) == 2
    assert fault in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
