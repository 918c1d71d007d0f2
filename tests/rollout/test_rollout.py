"""What a rollout says of its responses: texts, log-probs, values, whatever the microbatches."""

import pytest
import torch
from conftest import random_causal_lm
from transformers import AutoTokenizer

from pipeline.data.prompts import PromptBatch, pad_prompts
from pipeline.models.policy import Policy, Reference
from pipeline.rollout.rollout import (
    Responses,
    Rollout,
    policy_outputs,
    reference_logprobs,
    response_texts,
    sample_responses,
    sample_text,
)
from pipeline.rollout.sampling import SamplingOptions

COUNT, WIDTH, LENGTH = 7, 4, 6


@pytest.fixture(scope="module")
def policy(tokenizer):
    policy = Policy(random_causal_lm("gpt2", tokenizer)).eval()
    torch.manual_seed(3)
    torch.nn.init.normal_(policy.value_head.weight)
    return policy


@pytest.fixture(scope="module")
def prompts(tokenizer, reviews) -> PromptBatch:
    openings = torch.tensor([tokenizer(text).input_ids[:WIDTH] for text in reviews.texts[:COUNT]])
    return pad_prompts(openings, torch.tensor([4, 1, 2, 3, 4, 1, 2]), tokenizer, tokenizer.pad_token_id)


def sample(policy, prompts, tokenizer, microbatch_size) -> Responses:
    return sample_responses(
        policy.model,
        prompts,
        torch.rand(COUNT, LENGTH, generator=torch.Generator().manual_seed(0)),
        torch.tensor([6, 1, 4, 6, 2, 5, 6]),
        microbatch_size=microbatch_size,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        options=SamplingOptions(),
    )[0]


@pytest.fixture(scope="module")
def responses(policy, prompts, tokenizer) -> Responses:
    return sample(policy, prompts, tokenizer, 3)


def test_responses_are_the_same_for_any_microbatch_size(policy, prompts, tokenizer, responses):
    assert torch.equal(responses.prompt_tokens, prompts.tokens) and torch.equal(responses.prompt_mask, prompts.mask)
    assert len(responses) == COUNT and responses.tokens.shape == responses.mask.shape == (COUNT, WIDTH + LENGTH)
    for size in (1, 7, 100):
        other = sample(policy, prompts, tokenizer, size)
        assert torch.equal(other.tokens, responses.tokens) and torch.equal(other.mask, responses.mask)


def test_policy_and_reference_outputs_do_not_depend_on_the_microbatch_size_and_are_zero_on_padding(policy, responses):
    reference = Reference(policy.model)

    def everything(size):
        outputs = policy_outputs(policy, responses, temperature=0.8, microbatch_size=size)
        ref = reference_logprobs(reference, responses, temperature=0.8, microbatch_size=size)
        return vars(outputs) | {"reference": ref}

    whole, padding = everything(COUNT), ~responses.response_mask
    assert padding.any()
    for name, tensor in whole.items():
        assert tensor.shape == (COUNT, LENGTH) and not tensor.requires_grad
        assert (tensor[padding] == 0).all() and (tensor[~padding] != 0).all(), name
    assert torch.equal(whole["logprobs"], whole["reference"])
    for size in (1, 3, 100):
        for name, tensor in everything(size).items():
            torch.testing.assert_close(tensor, whole[name], atol=1e-5, rtol=1e-5)


def test_logprobs_of_a_ragged_rollout_are_the_plain_models_on_each_sample_alone(policy, prompts, responses):
    logprobs = policy_outputs(policy, responses, temperature=1.0, microbatch_size=3).logprobs
    for i in range(COUNT):
        sequence = prompts.tokens[i][prompts.mask[i]].tolist()
        response = responses.response_tokens[i][responses.response_mask[i]].tolist()
        with torch.no_grad():
            plain = policy.model(torch.tensor([sequence + response])).logits[0].log_softmax(-1)
        before = range(len(sequence) - 1, len(sequence) + len(response) - 1)
        torch.testing.assert_close(logprobs[i, : len(response)], plain[before, response], atol=1e-5, rtol=1e-5)


def test_prompt_and_response_text_make_the_whole_text(prompts, responses, tokenizer):
    texts = response_texts(responses, prompts.text, tokenizer)
    for i, text in enumerate(texts):
        assert prompts.text[i] + text == tokenizer.decode(responses.tokens[i][responses.mask[i]])


def written(prompt, response, tokenizer, *, end=False) -> Responses:
    """One sample made from token ids, with padding at both ends."""
    response = [*response, tokenizer.eos_token_id] if end else response
    tensors = ([0, *prompt], [0] + [1] * len(prompt), [*response, 0], [1] * len(response) + [0])
    a, b, c, d = (torch.tensor([x]) for x in tensors)
    return Responses(a, b.bool(), c, d.bool())


def test_response_text_keeps_its_leading_space_and_drops_eos_and_padding(tokenizer):
    prompt, response = tokenizer("the film").input_ids, tokenizer(" was great").input_ids
    for end in (False, True):
        assert response_texts(written(prompt, response, tokenizer, end=end), ["the film"], tokenizer) == [" was great"]
    assert response_texts(written(prompt, [], tokenizer, end=True), ["the film"], tokenizer) == [""]


def test_a_prompt_cut_inside_a_character_gives_the_responses_own_text(tokenizer):
    ids = tokenizer("caféxyz").input_ids
    cut = next(n for n in range(len(ids)) if tokenizer.decode(ids[:n]).endswith("�"))
    prompt = tokenizer.decode(ids[:cut])
    (text,) = response_texts(written(ids[:cut], ids[cut:], tokenizer), [prompt], tokenizer)
    assert text == tokenizer.decode(ids[cut:]) and text.endswith("xyz")


def test_take_reorders_every_field(responses):
    numbers = torch.arange(COUNT, dtype=torch.float32)
    columns = numbers.unsqueeze(1).expand(-1, LENGTH)
    rollout = Rollout(
        **vars(responses),
        logprobs=columns,
        ref_logprobs=columns,
        values=columns,
        entropy=columns,
        parts=columns[:, :2],
        weighted=columns[:, :2] / 2,
    )
    taken = rollout.take(torch.tensor([5, 2]))
    assert len(taken) == 2 and taken.scores.tolist() == [5, 2]
    assert torch.equal(taken.tokens, responses.tokens[[5, 2]]) and torch.equal(taken.mask, responses.mask[[5, 2]])
    for name in ("logprobs", "ref_logprobs", "values", "entropy"):
        assert getattr(taken, name)[:, 0].tolist() == [5, 2]


def test_a_sample_of_a_prompt_cut_inside_a_character_is_the_text_of_all_its_tokens():
    tokenizer = AutoTokenizer.from_pretrained("assets/gpt2-imdb-mini")
    tokens = torch.tensor([tokenizer("great \U0001f3ac film", add_special_tokens=False).input_ids])
    everything = torch.ones_like(tokens, dtype=torch.bool)
    for cut in range(1, tokens.shape[1]):
        parts = (tokens[:, :cut], everything[:, :cut], tokens[:, cut:], everything[:, cut:])
        prompt, response = sample_text(Responses(*parts), 0, tokenizer)
        assert prompt + response == "great \U0001f3ac film" and "\ufffd" not in prompt + response
