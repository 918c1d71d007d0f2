"""What a reward function may return, what it may not, and how one is found by its name."""

import sys

import numpy as np
import pytest
import torch

from pipeline.rewards.loading import load_function
from pipeline.rewards.protocol import RewardError, checked_measures, checked_scores

PROMPTS, RESPONSES = ["a", "b", "c"], [" x", " y", " z"]


def check(result: object) -> torch.Tensor:
    """The checked scores of a reward that returns `result`."""

    def my_reward(prompts, responses):
        return result

    return checked_scores(my_reward, PROMPTS, RESPONSES)


@pytest.mark.parametrize(
    "result",
    [
        [1.0, 2.0, -3.0],
        [1, 2, -3],
        (1, 2.0, -3),
        torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64),
        torch.tensor([1.0, 2.0, -3.0], requires_grad=True),
        torch.tensor([1, 2, -3]),
        np.array([1.0, 2.0, -3.0]),
        np.array([1, 2, -3]),
        [np.float32(1), np.float64(2), np.int64(-3)],
        [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(-3.0)],
    ],
    ids=["floats", "ints", "tuple", "float64", "grad", "long", "numpy", "numpy ints", "numpy scalars", "scalars"],
)
def test_scores_of_any_numeric_kind_become_plain_float32(result):
    scores = check(result)
    assert scores.tolist() == [1.0, 2.0, -3.0]
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, float("nan"), 2.0], "returned nan for response 1 (prompt 'b', response ' y')"),
        ([1.0, 2.0, float("inf")], "returned inf for response 2 (prompt 'c', response ' z')"),
        ([-float("inf"), 2.0, 1.0], "returned -inf for response 0"),
        ([1e300, 2.0, 1.0], "must be finite"),
        ([1.0, 2.0], "returned shape (2,) for 3 responses"),
        ([1.0] * 4, "returned shape (4,) for 3 responses"),
        ([], "returned shape (0,) for 3 responses"),
        (0.5, "returned shape () for 3 responses"),
        (torch.zeros(3, 1), "returned shape (3, 1) for 3 responses"),
        (np.zeros((3, 2)), "returned shape (3, 2) for 3 responses"),
        (["good", "bad", "ugly"], "returned list, not numbers"),
        ("abc", "returned str, not numbers"),
        (None, "returned NoneType, not numbers"),
        ([1.0, None, 2.0], "returned list, not numbers"),
        ([1.0, 10**400, 2.0], "returned list, not numbers"),
        ({"score": 1.0}, "returned dict, not numbers"),
        ([[1.0], [2.0, 3.0], []], "returned list, not numbers"),
    ],
)
def test_anything_else_is_an_error_that_names_function_and_fault(result, message):
    with pytest.raises(RewardError) as caught:
        check(result)
    assert "my_reward" in str(caught.value)
    assert message in str(caught.value)


def test_a_reward_that_raises_is_named_with_what_it_raised():
    def failing(prompts, responses):
        raise KeyError("lexicon")

    place = r"\(.*test_protocol.py, line \d+\)"
    with pytest.raises(RewardError, match=f"failing raised KeyError: 'lexicon' {place}") as caught:
        checked_scores(failing, PROMPTS, RESPONSES)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("error", [ValueError("one\nof two lines"), SystemExit("done")])
def test_whatever_a_reward_raises_is_one_line_under_its_name_in_the_recipe(error):
    def failing(prompts, responses):
        raise error

    with pytest.raises(RewardError, match=f"the reward calm_2 raised {type(error).__name__}") as caught:
        checked_scores(failing, PROMPTS, RESPONSES, "calm_2")
    assert "\n" not in str(caught.value)


def test_a_reward_object_is_named_by_its_class():
    class Lexicon:
        def __call__(self, prompts, responses):
            return []

    with pytest.raises(RewardError, match="Lexicon"):
        checked_scores(Lexicon(), PROMPTS, RESPONSES)


def test_a_reward_cannot_change_the_prompts_of_the_run():
    prompts, responses = ["a", "b"], ["x", "y"]

    def greedy(prompts, responses):
        scores = [1.0] * len(prompts)
        prompts.clear()
        responses.clear()
        return scores

    assert checked_scores(greedy, prompts, responses).tolist() == [1.0, 1.0]
    assert (prompts, responses) == (["a", "b"], ["x", "y"])


def test_prompts_and_responses_arrive_in_order():
    def lengths(prompts, responses):
        return [10 * len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]

    assert checked_scores(lengths, ["a", "bb"], ["ccc", ""]).tolist() == [13.0, 20.0]


def test_a_plain_function_is_measured_by_its_score():
    measures = checked_measures(lambda prompts, responses: [1, 2, 3], PROMPTS, RESPONSES)
    assert {name: values.tolist() for name, values in measures.items()} == {"score": [1.0, 2.0, 3.0]}


def test_measures_are_held_to_the_same_contract():
    class Broken:
        def measures(self, prompts, responses):
            return {"fine": [1.0, 2.0, 3.0], "broken": [1.0, float("nan"), 3.0]}

    with pytest.raises(RewardError, match=r"Broken\.broken returned nan for response 1"):
        checked_measures(Broken(), PROMPTS, RESPONSES)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_function_is_loaded_from_the_working_directory(here):
    (here / "my_score.py").write_text(
        "def words(prompts, responses):\n    return [len(r.split()) for r in responses]\n"
    )
    assert load_function("my_score:words")(["a", "b"], ["one two", ""]) == [2, 0]


def test_a_function_is_loaded_from_a_package(here):
    (here / "my_scores").mkdir()
    (here / "my_scores" / "__init__.py").touch()
    (here / "my_scores" / "inner.py").write_text("def zero(prompts, responses):\n    return [0] * len(responses)\n")
    assert load_function("my_scores.inner:zero")(["a"], ["b"]) == [0]


@pytest.mark.parametrize("name", ["my_score", "my_score:", ":words", ":", ""])
def test_a_name_of_the_wrong_form_is_named_with_the_right_form(name):
    with pytest.raises(RewardError, match=r"package\.module:function") as caught:
        load_function(name)
    assert f"reward={name!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("no_such_module:score", "No module named 'no_such_module'"),
        ("raises:score", "importing raises raised ZeroDivisionError"),
        ("typo:score", "importing typo raised SyntaxError"),
        ("lacks:score", "the module lacks has no function 'score'"),
        ("lacks:number", "the module lacks has no function 'number'"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_named_with_the_reason(here, name, fault):
    (here / "raises.py").write_text("1 / 0\n")
    (here / "typo.py").write_text("def score(:\n")
    (here / "lacks.py").write_text("number = 3\n")
    with pytest.raises(RewardError) as caught:
        load_function(name)
    assert f"reward={name!r}" in str(caught.value)
    assert fault in str(caught.value)
