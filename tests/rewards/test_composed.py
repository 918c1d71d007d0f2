"""Composed rewards: each component's own value, their weighted sum, and what the evaluation is told."""

import math

import pytest
import torch

from pipeline.models.building import build_policy_and_reference
from pipeline.rewards.composed import Component, ComposedReward
from pipeline.rewards.protocol import RewardError
from pipeline.rewards.reading import Length, Reading, coherence, fluency, read
from pipeline.rewards.repetition import Repetition
from pipeline.rewards.scaling import RunningMoments
from pipeline.rollout.rollout import Responses

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
READING = Reading(MASK, torch.tensor([[-1.0, -2.0, -6.0, 0.0], [-4.0, 0.0, 0.0, 0.0]]),
                  torch.tensor([[-2.0, -2.0, -8.0, 0.0], [-1.0, 0.0, 0.0, 0.0]]))  # fmt: skip


def words(prompts, responses):
    return [len(response.split()) for response in responses]


class Scales:
    """A reward with several scales, as a classifier's."""

    scale = "log_odds"

    def measures(self, prompts, responses):
        odds = torch.tensor([float(len(response)) for response in responses])
        return {"probability": odds.sigmoid(), "log_odds": odds}

    def __call__(self, prompts, responses):
        return self.measures(prompts, responses)["log_odds"]


def test_fluency_is_the_mean_log_probability_of_the_responses_own_tokens():
    assert fluency(READING).tolist() == [-3.0, -4.0]


def test_coherence_is_what_the_prompt_adds_to_it():
    assert coherence(READING).tolist() == [1.0, -3.0]


def test_length_costs_the_tokens_that_are_missing_or_too_many():
    mask = torch.arange(10) < torch.tensor([[1], [3], [5], [6], [10]])
    assert Length(3, 5)(Reading(mask, mask.float(), None)).tolist() == [-2.0, 0.0, 0.0, -1.0, -5.0]


def test_repetition_is_the_share_of_ngrams_seen_before_in_the_response():
    texts = ["so good so good so good", "A fine, fine film", "two words", ""]
    assert Repetition(3)([""] * 4, texts) == [0.5, 0.0, 0.0, 0.0]  # so good so, good so good, twice each
    assert Repetition(1)([""] * 4, texts) == pytest.approx([4 / 6, 1 / 5, 0.0, 0.0])


def test_responses_are_read_with_and_without_their_prompts(tiny_lm, tokenizer):
    _, reference = build_policy_and_reference(tiny_lm, lora=None, device="cpu")
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(tokenizer), (3, 9), generator=draw)
    responses = Responses(
        tokens[:, :4], torch.arange(4) >= torch.tensor([[0], [2], [3]]),
        tokens[:, 4:], torch.arange(5) < torch.tensor([[5], [1], [3]]),
    )  # fmt: skip
    bos = tokenizer.eos_token_id
    reading = read(reference, responses, unprompted=True, start_ids=(bos,), temperature=1.0, microbatch_size=2)
    with reference.activated() as model, torch.no_grad():
        for i, length in enumerate((5, 1, 3)):
            response = responses.response_tokens[i, :length]
            for start, found in (
                (responses.prompt_tokens[i][responses.prompt_mask[i]], reading.logprobs),
                (torch.tensor([bos]), reading.unprompted),
            ):
                logits = model(input_ids=torch.cat([start, response])[None]).logits[0]
                expected = logits.log_softmax(-1)[len(start) - 1 : -1].gather(1, response[:, None])[:, 0]
                torch.testing.assert_close(found[i, :length], expected, atol=1e-5, rtol=1e-5)
                assert (found[i, length:] == 0).all()
    assert read(reference, responses, reading.logprobs, unprompted=False, start_ids=(bos,), temperature=1.0,
                microbatch_size=2).logprobs is reading.logprobs  # fmt: skip


def test_the_reward_is_the_weighted_sum_in_the_order_of_the_components():
    reward = ComposedReward([Component("words", 2.0, words), Component("fluency", 0.5, of_reading=fluency)])
    raw = reward.raw(reward.text_scores(["", ""], ["one two", "three"]), READING)
    assert raw.tolist() == [[2.0, -3.0], [1.0, -4.0]]
    assert reward.weighted(raw).tolist() == [[4.0, -1.5], [2.0, -2.0]]
    assert reward.reads and not reward.unprompted and reward.is_sum


def test_whitening_is_by_all_scores_so_far():
    reward = ComposedReward([Component("words", 2.0, words)], whitening=True)
    moments = [RunningMoments()]
    assert reward.weighted(torch.tensor([[1.0], [3.0]]), moments).tolist() == [[-2.0], [2.0]]
    # of 1, 3, 5, 7: mean 4, deviation sqrt 5
    again = reward.weighted(torch.tensor([[5.0], [7.0]]), moments)
    assert again[:, 0].tolist() == pytest.approx([2 / math.sqrt(5), 6 / math.sqrt(5)])
    assert reward.weighted(torch.tensor([[4.0]]), [RunningMoments()]).tolist() == [[0.0]], "equal scores do not divide"


def test_an_evaluation_hears_of_every_component_and_of_the_sum():
    reward = ComposedReward([Component("sentiment", 1.0, Scales()), Component("words", -1.0, words),
                             Component("coherence", 2.0, of_reading=coherence, unprompted=True)])  # fmt: skip
    measures = reward.measures(["", ""], ["ab", "a b c"], READING)
    assert list(measures) == ["probability", "log_odds", "words", "coherence", "reward"]
    assert measures["reward"].tolist() == [2.0 - 1.0 + 2.0, 5.0 - 3.0 - 6.0]
    assert reward.measure == "reward" and reward.unprompted


@pytest.mark.parametrize(
    ("component", "whitening", "measure", "names"),
    [
        (Component("sentiment", 1.0, Scales()), False, "log_odds", ["probability", "log_odds"]),
        (Component("toxic", 1.0, Scales()), False, "log_odds", ["probability", "log_odds"]),
        (Component("sentiment", 2.0, Scales()), False, "reward", ["probability", "log_odds", "reward"]),
        (Component("sentiment", 2.0, Scales()), True, "log_odds", ["probability", "log_odds"]),
        (Component("words", 1.0, words), False, "score", ["score"]),
        (Component("fluency", 1.0, of_reading=fluency), False, "fluency", ["fluency"]),
    ],
)
def test_a_reward_of_one_component_is_judged_by_its_own_scale(component, whitening, measure, names):
    reward = ComposedReward([component], whitening)
    assert list(reward.measures(["", ""], ["a", "b"], READING)) == names
    assert reward.measure == measure


def test_measures_beside_the_score_leave_the_score_what_is_judged():
    class Counts:
        def measures(self, prompts, responses):
            return {"words": words(prompts, responses)}

        def __call__(self, prompts, responses):
            return [float(len(response)) for response in responses]

    reward = ComposedReward([Component("counts", 1.0, Counts())])
    measures = reward.measures([""], ["a bc"], None)
    assert {name: values.tolist() for name, values in measures.items()} == {"score": [4.0], "words": [2.0]}
    assert reward.measure == "score"


def test_a_component_that_is_no_number_is_named():
    nan = Reading(MASK, READING.logprobs * math.nan, None)
    with pytest.raises(RewardError, match="the reward fluency returned nan for response 0"):
        ComposedReward([Component("fluency", 1.0, of_reading=fluency)]).raw({}, nan)
    broken = ComposedReward([Component("words", 1.0, words), Component("few", 1.0, lambda prompts, responses: [1.0])])
    with pytest.raises(RewardError, match=r"returned shape \(1,\) for 2 responses"):
        broken.text_scores(["", ""], ["a", "b"])
