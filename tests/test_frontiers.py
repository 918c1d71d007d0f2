"""A recipe's frontier: made, kept, refused where it is another's, and the evaluation held against it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from launching import launch, run_here

from pipeline import frontier as command
from pipeline import train
from pipeline.config import ConfigError
from pipeline.frontier_samples import more_samples
from pipeline.frontiers import Frontier, check_belongs, load_frontier, overspend, overspend_cell


def curves(prompts=64, seed=0, trusted=8):
    """Frontiers of the form reward = .5 + .1 kl, a little different for each prompt."""
    rng = np.random.default_rng(seed)
    kls = np.linspace(0, 4.5, 10)[None] * rng.uniform(0.9, 1.1, (prompts, 1))
    rewards = 0.5 + 0.1 * np.linspace(0, 4.5, 10)[None] + np.zeros((prompts, 1))
    effective = np.where(np.arange(10) < trusted, 100.0, 2.0) * np.ones((prompts, 1))
    return Frontier(np.logspace(1, -1, 10), rewards, kls, effective, 200, {"reward": ["sentiment"]})


def test_the_kl_a_reward_needs_is_read_off_the_curve_with_an_interval():
    needed, low, high = curves().kl_needed(0.7)
    assert needed == pytest.approx(2.0, abs=0.05) and low < needed < high and high - low < 0.2
    assert curves().kl_needed(0.4)[0] == 0.0


def test_beyond_the_samples_nothing_is_said_and_the_reason_is():
    assert np.isnan(curves().kl_needed(0.9)[0])
    figures = overspend(curves(), np.full(50, 0.9), np.full(50, 6.0))
    assert "kl_overspend" not in figures and "0.900 is at or beyond 0.850" in figures["beyond"]


def test_overspend_is_the_ratio_with_the_uncertainty_of_both():
    rng = np.random.default_rng(1)
    figures = overspend(curves(), 0.7 + rng.normal(0, 0.05, 400), 6 + rng.normal(0, 1, 400))
    low, high = figures["kl_overspend_ci95"]
    assert figures["kl_overspend"] == pytest.approx(3.0, abs=0.15) and low < figures["kl_overspend"] < high
    same = overspend(curves(), 0.7 + rng.normal(0, 0.05, 400), 2 + rng.normal(0, 0.1, 400))
    assert same["kl_overspend"] == pytest.approx(1.0, abs=0.1)


def test_an_overspend_without_bound_is_said_so():
    # As good as the original, which needs no KL: the point or its interval divides by next to nothing.
    figures = overspend(curves(), np.full(50, float(curves().rewards.mean(0)[0])), np.full(50, 2.0))
    assert overspend_cell(figures["kl_overspend"]) == "over 1000" and overspend_cell(2.345) == "2.35"


def test_further_samples_go_where_the_optimum_has_few(monkeypatch):
    monkeypatch.setattr("pipeline.frontier_samples.ENOUGH_SAMPLES", 10.0)
    shares = np.array([0.5, 0.5, 0.25, 0.25, 0.1, 0.1, 0.05, 0.05, 0.05, 0.001])  # effective ones, at a low price
    taken = np.full(10, 32)
    effective = np.maximum(1.0, 32 * np.stack([np.ones(10), shares, shares**4]))
    # 12 effective ones are aimed at: 1.6 of 32 take 208 more, which 320 does not buy thrice; all is shared out evenly.
    assert np.bincount(more_samples(effective, taken, 320)).tolist() == [32] * 10
    effective = np.maximum(1.0, 100 * np.stack([np.ones(10), shares]))
    more = np.bincount(more_samples(effective, np.full(10, 100), 1000))
    assert more.tolist() == [40, 40, 40, 40, 60, 60, 180, 180, 180, 180]
    # Who has had more already gets less: 240 are wanted of the hard ones, no more than that of the hardest.
    taken = np.array([100] * 6 + [200, 240, 300, 400])
    more = np.bincount(more_samples(taken * np.stack([np.ones(10), shares]), taken, 80), minlength=10)
    assert more.tolist() == [0, 0, 0, 0, 20, 20, 40, 0, 0, 0]


def test_it_is_saved_and_read_back_to_five_digits(tmp_path):
    whole = curves()
    whole.save(tmp_path / "a" / "frontier.json")
    again = load_frontier(tmp_path / "a" / "frontier.json")
    assert np.allclose(again.kls, whole.kls, rtol=1e-4) and again.samples == 200 and again.identity == whole.identity
    assert (again.trusted == whole.trusted).all()


def test_a_file_that_is_none_is_refused_with_the_command_that_makes_one(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    for name in ("x.json", "missing.json"):
        with pytest.raises(ConfigError, match=r"python -m pipeline\.frontier"):
            load_frontier(tmp_path / name)


def test_another_recipes_frontier_is_refused_by_what_differs():
    with pytest.raises(ConfigError, match=r"reward is \['sentiment'\] there and \['mine:score'\] here"):
        check_belongs(curves(), {"reward": ["mine:score"]}, "f.json")


def test_a_frontier_of_other_texts_under_the_same_name_is_refused_and_one_of_before_fingerprints_is_not():
    name = "fingerprint of held-out openings"
    check_belongs(curves(), {name: "a1"}, "f.json")
    with_one = replace(curves(), identity={**curves().identity, name: "b2"})
    check_belongs(with_one, {name: "b2"}, "f.json")
    with pytest.raises(ConfigError, match=f"{name} is 'b2' there and 'a1' here"):
        check_belongs(with_one, {name: "a1"}, "f.json")


@pytest.fixture
def run(tiny_recipe, capfd):
    """Run a command with the tiny recipe: (exit code, what it printed)."""

    def run(module, *settings):
        code = run_here(module.main, "--config", tiny_recipe, *settings)
        return code, "".join(capfd.readouterr())

    return run


def test_from_the_command_to_the_evaluation_and_not_to_another_recipes(run, tmp_path, tiny_recipe):
    path = tmp_path / "frontier.json"
    few = ("--frontier_prompts", "5", "--frontier_samples", "64", "--frontier", path)
    code, said = run(command, *few)
    assert code == 0 and "The best reward at each KL" in said
    one = load_frontier(path)
    assert one.rewards.shape == (5, 60) and one.samples == 64
    marks = {name for name in one.identity if name.startswith("fingerprint of ")}
    assert marks == {"fingerprint of held-out openings", "fingerprint of reward_model_path"}
    assert (np.diff(one.rewards.mean(0)) > -1e-9).all() and (np.diff(one.kls.mean(0)) > -1e-9).all()

    code, said = run(train, "--frontier", path, "--output_dir", tmp_path / "run", "--steps", "1")
    figures = json.loads((tmp_path / "run" / "evaluation.json").read_text())["frontier"]
    assert code == 0 and "kl" in figures and ("kl_overspend" in figures or "beyond" in figures)
    assert (tmp_path / "run" / "plane.png").stat().st_size > 10_000
    lora = ("--use_peft", "true", "--lora_r", "4", "--output_dir", tmp_path / "lora", "--steps", "1")
    assert run(train, "--frontier", path, *lora)[0] == 0  # the same reference, inside an adapter's wrapper

    other = ("--frontier", path, "--response_max_tokens", "9", "--output_dir", tmp_path / "other")
    code, said = run(train, *other)
    assert code == 2 and "response_max_tokens is 10 there and 9 here" in said

    script = ["-m", "pipeline.frontier", "--config", tiny_recipe, *map(str, few[:-1]), str(tmp_path / "two.json")]
    done = launch(2, script)
    assert done.returncode == 0, done.stderr
    assert np.allclose(load_frontier(tmp_path / "two.json").kls, one.kls, rtol=1e-3, atol=1e-5)


def test_a_missing_file_ends_a_training_before_a_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.assembly.open_reward", lambda *_: pytest.fail("the classifier was loaded"))
    code, said = run(train, "--frontier", tmp_path / "missing.json", "--output_dir", tmp_path / "run")
    assert code == 2 and "missing.json' cannot be read" in said and not (tmp_path / "run").exists()


def test_without_a_name_it_is_kept_where_runs_of_its_recipe_find_it(run, tmp_path, tiny_recipe, monkeypatch, captured):
    monkeypatch.setattr("pipeline.frontiers.DIRECTORIES", (tmp_path / "made", tmp_path / "shipped"))
    monkeypatch.setattr("pipeline.frontier.DIRECTORIES", (tmp_path / "made",))
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a.json").write_text("no frontier")
    code, _ = run(command, "--frontier_prompts", "4", "--frontier_samples", "32", "--output_dir", tmp_path / "tiny")
    assert code == 0 and (tmp_path / "made" / "tiny.json").is_file()
    assert len(captured) == 1, "one graph for all rounds of sampling"

    def evaluated(name, *settings):
        code, said = run(train, "--output_dir", tmp_path / name, "--steps", "1", *settings)
        assert code == 0, said
        return json.loads((tmp_path / name / "evaluation.json").read_text())

    assert "frontier" in evaluated("same", "--kl_coef", "0.5")
    assert "frontier" not in evaluated("none", "--frontier", "none")
    assert "frontier" not in evaluated("other", "--temperature", "0.9")
    changed = json.loads((tmp_path / "made" / "tiny.json").read_text())
    changed["identity"]["reference_weights"] = "others"
    (tmp_path / "made" / "tiny.json").write_text(json.dumps(changed))
    assert "frontier" not in evaluated("weights")


def test_with_none_there_is_nothing_to_write(run):
    code, said = run(command, "--frontier", "none")
    assert code == 2 and "name the file to write" in said
