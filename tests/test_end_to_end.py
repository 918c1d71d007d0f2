"""The main job in small, on the shipped models: the reward must rise, and everything promised must be written."""

import json
import sys

import pytest
import torch
import yaml
from launching import ROOT, metrics
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks import runs, seeds, sweep
from pipeline import evaluate, train

REQUIRED = {
    "step",
    "episodes",
    "reward/mean",
    "reward/std",
    "kl/sequence_k1",
    "kl/sequence_k3",
    "kl/token_k1",
    "kl/token_k3",
    "kl/coef",
    "ppo/entropy",
    "ppo/ratio_mean",
    "ppo/ratio_max",
    "ppo/first_minibatch_ratio_deviation",
    "ppo/policy_clip_fraction",
    "ppo/value_clip_fraction",
    "ppo/value_explained_variance",
    "response/length_mean",
    "response/eos_fraction",
    "ppo/learning_rate",
    "ppo/gradient_norm",
    "time/sample_seconds",
    "time/score_seconds",
    "time/reference_seconds",
    "time/update_seconds",
    "time/step_seconds",
    "throughput/samples_per_second",
    "throughput/tokens_per_second",
    "memory/peak_gigabytes",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run of the quickstart recipe."""
    run = tmp_path_factory.mktemp("end_to_end") / "quickstart"
    argv = ["train", "--config", str(ROOT / "recipes/quickstart.yaml"), "--output_dir", str(run)]
    argv += ["--steps", "10", "--rollout_batch_size", "256", "--minibatch_size", "64", "--evaluation_prompts", "128"]
    argv += ["--profile", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", argv)
        train.main()
    return run


def test_the_reward_rises_on_held_out_prompts(finished):
    evaluation = json.loads((finished / "evaluation.json").read_text())
    before, after = evaluation["before"]["probability"], evaluation["after"]["probability"]
    assert after["ci95"][0] > before["ci95"][1]
    assert 0 < evaluation["kl"] < 40


def test_every_promised_metric_is_logged_and_the_first_minibatch_is_on_policy(finished):
    steps = metrics(finished)
    assert [step["step"] for step in steps] == list(range(1, 11))
    for step in steps:
        assert set(step) >= REQUIRED
        assert step["ppo/first_minibatch_ratio_deviation"] < 1e-4
    assert steps[0]["kl/sequence_k1"] == pytest.approx(0, abs=1e-4)


def test_the_step_that_was_to_be_profiled_left_its_trace_and_table(finished):
    assert sorted(path.name for path in (finished / "profile").iterdir()) == ["step_2.json", "step_2.txt"]
    assert "aten::" in (finished / "profile/step_2.txt").read_text()


def test_the_saved_model_loads_with_plain_transformers_and_continues_a_prompt(finished, monkeypatch):
    monkeypatch.chdir(ROOT)  # the adapter names the model it belongs to as the recipe does
    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    original = AutoModelForCausalLM.from_pretrained("assets/gpt2-imdb-mini")
    inputs = tokenizer("This movie", return_tensors="pt")
    with torch.no_grad():
        assert (model(**inputs).logits - original(**inputs).logits).abs().max() > 0.1
    assert GenerationConfig.from_pretrained(finished).do_sample
    assert len(tokenizer.decode(model.generate(**inputs, max_new_tokens=8)[0])) > len("This movie")


def test_the_resolved_recipe_is_written_and_evaluating_again_gives_the_same_figures(finished, monkeypatch):
    written = yaml.safe_load((finished / "config.yaml").read_text())
    assert written["steps"] == 10 and written["kl_coef"] > 0 and written["output_dir"] == str(finished)
    before = json.loads((finished / "evaluation.json").read_text())
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["evaluate", str(finished)])
    evaluate.main()
    again = json.loads((finished / "evaluation.json").read_text())
    assert again["after"]["probability"]["mean"] == pytest.approx(before["after"]["probability"]["mean"], abs=1e-5)
    assert again["kl"] == pytest.approx(before["kl"], abs=1e-3)
    assert again["settings"] == {}
    assert (finished / "evaluation.md").read_text().count("\n|") > 25


def test_benchmarks_read_a_finished_run(finished, tmp_path):
    figures = runs.row(finished)
    assert figures["kl"] > 0 and figures["way"][-1]["step"] == 10
    table = runs.table("seed", [("0", runs.cells(figures))])
    assert f"{figures['after']:.3f}" in table and table.count("\n") == 2
    seeds.draw(tmp_path / "seeds.png", [{"seed": 0, **figures}], None)
    assert (tmp_path / "seeds.png").stat().st_size > 10_000
    unknown = {"kl_overspend": None, "beyond_frontier": False}
    assert runs.cells(figures | unknown)[2] == "unknown"
    assert runs.cells(figures | unknown | {"beyond_frontier": True})[2] == "beyond what is known"
    averaged = sweep.mean([figures, figures | {"after": figures["after"] + 0.1}])
    assert averaged["after"] == pytest.approx(figures["after"] + 0.05) and len(averaged["ci95"]) == 2
