"""The words of the `reward` setting: what they mean, and what is refused."""

import pytest

from pipeline.rewards.protocol import RewardError
from pipeline.rewards.terms import length_range, parse_terms


def test_names_and_weights_are_read_and_a_weight_left_out_is_one():
    terms = parse_terms(
        ["sentiment", "fluency=0.3", "repetition:2=-5e-1", "length:8-16=.1", "my.rewards:politeness=-1"]
    )
    assert [(t.kind, t.name, t.weight) for t in terms] == [
        ("sentiment", "sentiment", 1.0),
        ("fluency", "fluency", 0.3),
        ("repetition", "repetition_2", -0.5),
        ("length", "length", 0.1),
        ("function", "politeness", -1.0),
    ]
    assert length_range(terms[3].source) == (8, 16)


def test_paths_and_addresses_keep_their_colons_and_equal_signs():
    terms = parse_terms(["classifier:/models/v:2/toxic=bert:Very Toxic=-2", "http://localhost:8000/score?model=large",
                         "https://host/score?seed=3=0.5"])  # fmt: skip
    assert [t.source for t in terms] == [
        "classifier:/models/v:2/toxic=bert:Very Toxic",
        "http://localhost:8000/score?model=large",
        "https://host/score?seed=3",
    ]
    assert [t.weight for t in terms] == [-2.0, 1.0, 0.5]
    assert [t.kind for t in terms] == ["classifier", "remote", "remote"]
    assert [t.name for t in terms] == ["very_toxic", "localhost_8000_score", "host_score"]
    both = parse_terms(["http://host/score?version==2", "http://host/score?version=2=1", "http://host=2"])
    assert [(t.source, t.weight) for t in both] == [
        ("http://host/score?version=", 2.0), ("http://host/score?version=2", 1.0), ("http://host", 2.0),
    ]  # fmt: skip


def test_a_components_name_has_nothing_of_an_addresss_query():
    terms = parse_terms(["http://host/score?token=sekrit", "http://host/score?token=other#part", "http://host/@me/x"])
    assert [term.name for term in terms] == ["host_score", "host_score_2", "host_me_x"]
    assert terms[0].source == "http://host/score?token=sekrit"


def test_components_of_one_name_are_told_apart():
    names = [t.name for t in parse_terms(["a:calm", "b:calm", "c:calm", "length:1-2", "length:3-4"])]
    assert names == ["calm", "calm_2", "calm_3", "length", "length_2"]


def test_no_component_is_called_what_the_evaluation_calls_something_else():
    names = [t.name for t in parse_terms(["mine:reward", "mine:probability", "mine:perplexity"])]
    assert names == ["reward_2", "probability_2", "perplexity_2"]


@pytest.mark.parametrize(
    ("reward", "fault"),
    [
        ([], "reward is empty"),
        (["sentimental"], "reward='sentimental' is none of sentiment, fluency"),
        (["fluency:3"], "reward='fluency:3' is none of"),
        (["repetition:0"], "reward='repetition:0' is none of"),
        (["length"], "reward='length' is none of"),
        (["length:8"], "reward='length:8' is none of"),
        (["length:9-8"], "the smaller number first"),
        (["length:0-8"], "at least 1 token"),
        (["classifier:bert"], "reward='classifier:bert' is none of"),
        (["my_module"], "reward='my_module' is none of"),
        (["http://"], "reward='http://' is none of"),
        (["sentiment=0"], "other than 0"),
        (["sentiment=nan"], "other than 0"),
        (["sentiment=inf"], "other than 0"),
        (["sentiment=much"], "reward='sentiment=much' is none of"),
        (["=0.5"], "is none of"),
        (["fluency=1", "fluency=2"], "'fluency' stands there twice"),
        (["repetition=-1", "repetition:3=-2"], "'repetition:3' stands there twice"),
        (["repetition:10=-1"], "repetition:N (1 to 9)"),
        (["http://user:hunter2@host/score"], "set REWARD_TOKEN in the environment"),
        (["https://token@host"], "set REWARD_TOKEN in the environment"),
        (["http://host/score?version=2"], "Write http://host/score?version==2 or http://host/score?version=2=1"),
    ],
)
def test_what_makes_no_sense_is_named_with_what_would(reward, fault):
    with pytest.raises(RewardError) as caught:
        parse_terms(reward)
    assert fault in str(caught.value)
