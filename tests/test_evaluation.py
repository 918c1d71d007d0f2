"""The comparison before/after: its figures by hand, from plain transformers, and the file they end in."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import evaluation
from pipeline.assembly import build_parts, open_data, parse_config
from pipeline.evaluation import distinct, evaluate, repeated, samples_table, write_evaluation
from pipeline.foreign_text import markdown_text
from pipeline.intervals import bootstrap_interval
from pipeline.rewards.composed import Component, ComposedReward
from pipeline.runtime.distributed import make_accelerator


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b c d"], 1, 1.0),
        (["a a a a"], 1, 1 / 4),
        (["a b a b"], 2, 2 / 3),  # a b, b a, a b
        (["a b", "b a"], 2, 1.0),  # no bigram across texts
        (["a b", "a b"], 2, 1 / 2),
        (["The the"], 1, 1 / 2),
        (["good, good!"], 1, 3 / 4),  # good , good !
        (["it's it's"], 1, 1 / 2),
        (["a"], 2, 0.0),
        (["", " "], 1, 0.0),
        ([], 2, 0.0),
    ],
)
def test_distinct_is_the_share_of_different_ngrams_of_words(texts, n, expected):
    assert distinct(texts, n) == pytest.approx(expected)


@pytest.mark.parametrize(
    "texts, n, expected",
    [
        (["a good film", "a good film"], 3, 0.0),  # once in each
        (["so good so good so good"], 3, 0.5),
        (["So good, so good, so!"], 1, 4 / 8),
        (["two words"], 3, 0.0),
        ([], 3, 0.0),
    ],
)
def test_repeated_is_the_share_of_ngrams_that_stood_in_their_text_before(texts, n, expected):
    assert repeated(texts, n) == pytest.approx(expected)


@pytest.fixture(scope="module")
def normal() -> np.ndarray:
    return np.random.default_rng(0).normal(3, 2, 1000)


def test_the_interval_holds_the_mean_and_is_that_of_normal_theory(normal):
    low, high = bootstrap_interval(normal)
    error = normal.std() / math.sqrt(1000)
    assert low == pytest.approx(normal.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(normal.mean() + 1.96 * error, abs=0.1 * error)


def test_the_interval_shrinks_with_the_root_of_the_number_of_values(normal):
    few, many = (np.subtract(*bootstrap_interval(normal[:n])[::-1]) for n in (50, 800))
    assert few / many == pytest.approx(4, rel=0.25)


def test_the_interval_is_the_same_every_time_and_a_point_for_equal_values(normal):
    assert bootstrap_interval(normal[:20]) == bootstrap_interval(normal[:20])
    assert bootstrap_interval(np.full(5, 2.5)) == (2.5, 2.5)
    low, high = bootstrap_interval(normal[:50], level=0.5)
    assert bootstrap_interval(normal[:50])[0] < low < high < bootstrap_interval(normal[:50])[1]


# A run's evaluation on the tiny models.


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory):
    """(config, data, parts) with a policy that is still its reference."""
    output = tmp_path_factory.mktemp("evaluation")
    config = parse_config("", ["--config", tiny_recipe, "--output_dir", str(output)])
    data = open_data(config)
    return config, data, build_parts(config, data, torch.device("cpu"))


def evaluated(run, **rollout):
    config, data, parts = run
    config = replace(config, rollout=replace(config.rollout, **rollout))
    return evaluate(
        make_accelerator(), parts.policy, parts.reference, parts.reward, data.tokenizer, data.held_out, config
    )


@pytest.fixture(scope="module")
def untrained(run):
    return evaluated(run)


def test_both_models_are_sampled_by_graphs_of_their_own(run, untrained, captured):
    assert evaluated(run).figures == untrained.figures
    assert len(captured) == len(set(captured)) == 2


@pytest.fixture
def trained(run):
    """The run with a policy that has moved."""
    policy = run[2].policy
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    yield run
    policy.load_state_dict(before)


def test_a_policy_that_is_its_reference_changes_no_figure_and_has_no_kl(untrained):
    assert untrained.figures["before"] == untrained.figures["after"]
    assert untrained.figures["kl"] == 0.0
    assert untrained.figures["kl_ci95"] == [0.0, 0.0]
    assert all(row["before"] == row["after"] for row in untrained.rows)


def test_a_policy_that_moved_has_other_responses_and_a_kl(trained, untrained):
    moved = evaluated(trained)
    assert moved.figures["kl"] > 0
    assert moved.figures["before"] == untrained.figures["before"], "the reference has not moved"
    assert moved.figures["after"] != moved.figures["before"]


def test_the_file_holds_what_readers_of_it_expect(trained, tmp_path):
    result = evaluated(trained)
    write_evaluation(result, tmp_path)
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert figures == result.figures
    assert figures.keys() >= {"before", "after", "kl", "prompts"}
    assert figures["prompts"] == len(result.rows) == min(8, len(trained[1].held_out))
    for side in (figures["before"], figures["after"]):
        assert side.keys() >= {"probability", "logit", "distinct_1", "distinct_2", "repeated_3", "perplexity"}
        for measure in (side["probability"], side["logit"]):
            assert measure.keys() == {"mean", "median", "ci95"}
            low, high = measure["ci95"]
            assert low < measure["mean"] < high
        assert 0 < side["probability"]["mean"] < 1
        assert 0 < side["distinct_1"] <= side["distinct_2"] <= 1
        assert side["perplexity"] > 1
    report = (tmp_path / "evaluation.md").read_text()
    assert f"{figures['before']['probability']['mean']:.3f}" in report
    assert markdown_text(result.rows[0]["after"]) in report
    assert figures["reward"]["after"] == figures["after"][figures["reward"]["name"]]


def test_scores_are_those_of_the_texts_shown(trained):
    _, _, parts = trained
    result = evaluated(trained)
    for side in ("before", "after"):
        scores = parts.reward.measures(*([row[name] for row in result.rows] for name in ("prompt", side)), None)
        shown = [row[f"{side}_score"] for row in result.rows]
        assert shown == pytest.approx(scores["probability"].tolist(), abs=1e-6)
        assert result.figures[side]["probability"]["mean"] == pytest.approx(np.mean(shown), abs=1e-6)
        assert result.figures[side]["logit"]["median"] == pytest.approx(np.median(scores["logit"]), abs=1e-6)


@torch.no_grad()
def log_likelihood(model, responses) -> torch.Tensor:
    """(N,) log-probabilities of the responses, one by one, without padding, from transformers alone."""
    totals = []
    for i in range(len(responses)):
        prompt = responses.prompt_tokens[i][responses.prompt_mask[i]]
        response = responses.response_tokens[i][responses.response_mask[i]]
        logits = model(torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        totals.append(logits.log_softmax(-1).gather(1, response.unsqueeze(1)).sum())
    return torch.stack(totals)


def test_perplexity_and_kl_are_those_of_plain_transformers(trained, tiny_lm, monkeypatch):
    sampled = []

    def recording(*arguments, **options):
        sampled.append(genuine(*arguments, **options))
        return sampled[-1]

    genuine = evaluation.sample_responses
    monkeypatch.setattr(evaluation, "sample_responses", recording)
    figures = evaluated(trained).figures
    original = AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    (before, _), (after, _) = sampled
    for name, responses in (("before", before), ("after", after)):
        tokens = responses.response_mask.sum().item()
        expected = math.exp(-log_likelihood(original, responses).sum().item() / tokens)
        assert figures[name]["perplexity"] == pytest.approx(expected, rel=1e-4)
    gain = log_likelihood(trained[2].policy.model, after) - log_likelihood(original, after)
    assert figures["kl"] == pytest.approx(gain.mean().item(), abs=1e-4)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_the_microbatch_size_changes_nothing(trained, size):
    expected, actual = evaluated(trained), evaluated(trained, rollout_microbatch_size=size)
    assert [row["after"] for row in actual.rows] == [row["after"] for row in expected.rows]
    for name in ("before", "after"):
        ours, theirs = actual.figures[name], expected.figures[name]
        assert ours["logit"]["ci95"] == pytest.approx(theirs["logit"]["ci95"], abs=1e-5)
        assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-5)
    assert actual.figures["kl"] == pytest.approx(expected.figures["kl"], abs=1e-4)


def test_the_seed_of_the_run_does_not_change_what_it_is_compared_on(run, untrained):
    config, data, parts = run
    other = (replace(config, run=replace(config.run, seed=99)), data, parts)
    assert evaluated(other).figures == untrained.figures


def test_a_users_reward_is_reported_as_its_score(run):
    config, data, parts = run
    reward = Component("length", 1.0, of_texts=lambda prompts, responses: [float(len(text)) for text in responses])
    lengths = replace(parts, reward=ComposedReward([reward]))
    result = evaluated((config, data, lengths))
    side = result.figures["after"]
    assert side["score"]["mean"] == pytest.approx(np.mean([len(row["after"]) for row in result.rows]))
    assert not side.keys() & {"probability", "logit"}


def test_tables_show_each_row_on_one_line(untrained):
    table = samples_table(untrained, 3)
    assert len(table) == 4
    assert {len(row) for row in table} == {5}
    assert not any("\n" in cell for row in table for cell in row)


def test_a_bar_in_a_sample_does_not_break_the_table_of_the_report(untrained, tmp_path):
    row = untrained.rows[0] | {"prompt": "a|b", "before": " c |", "after": "d"}
    write_evaluation(replace(untrained, rows=[row]), tmp_path)
    last = (tmp_path / "evaluation.md").read_text().splitlines()[-1]
    assert last.startswith("| a\\|b | c \\| | ")
