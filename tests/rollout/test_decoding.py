"""Decoding: `generate`'s greedy tokens, the same samples in any batch, and responses that end where they should."""

from contextlib import contextmanager

import pytest
import torch
from conftest import SHAPES, random_causal_lm

from pipeline.data.prompts import PromptBatch
from pipeline.models.forward import position_ids
from pipeline.models.policy import Policy
from pipeline.rollout.decoding import DecodeGraphs, _Steps, decode
from pipeline.rollout.rollout import policy_outputs, sample_responses
from pipeline.rollout.sampling import SamplingOptions

PROMPTS = torch.tensor([[5, 6, 7, 8], [0, 0, 0, 9], [0, 10, 11, 12], [0, 0, 13, 14]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1]]).bool()
LENGTH = 12
EOS, PAD = 99, 98


def run(model, *, rows=slice(None), uniforms=None, lengths=None, eos=EOS, pad=PAD, **options):
    count = len(PROMPTS)
    uniforms = torch.zeros(count, LENGTH) if uniforms is None else uniforms
    lengths = torch.full((count,), uniforms.shape[1]) if lengths is None else torch.tensor(lengths)
    decoded = decode(
        model,
        PROMPTS[rows],
        MASK[rows],
        uniforms[rows],
        lengths[rows],
        eos_token_id=eos,
        pad_token_id=pad,
        options=SamplingOptions(**options),
    )
    return decoded.tokens, decoded.mask


@contextmanager
def changed_logits(model, change):
    """The model with `change(logits (B, V), call)` applied to what its head says at the last position."""
    calls = []

    def hook(_module, _inputs, logits):
        calls.append(1)
        return torch.cat([logits[:, :-1], change(logits[:, -1].clone(), len(calls) - 1).unsqueeze(1)], 1)

    handle = model.get_output_embeddings().register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def saying(script):
    """A change of logits after which row i says script[i][call] for certain."""

    def change(logits, call):
        logits[:] = -float("inf")
        for row, tokens in enumerate(script):
            logits[row, tokens[call]] = 0.0
        return logits

    return change


@pytest.fixture(scope="module")
def gpt2(tokenizer):
    return random_causal_lm("gpt2", tokenizer)


@pytest.mark.parametrize("architecture", SHAPES)
def test_greedy_tokens_equal_generate(architecture, tokenizer):
    model = random_causal_lm(architecture, tokenizer)
    plain, _ = run(model, greedy=True)
    eos = plain[0, 4].item()  # a token that ends at least one response early
    tokens, mask = run(model, greedy=True, eos=eos)
    generated = model.generate(
        PROMPTS,
        attention_mask=MASK.long(),
        do_sample=False,
        max_new_tokens=LENGTH,
        eos_token_id=eos,
        pad_token_id=PAD,
    )[:, PROMPTS.shape[1] :]
    width = generated.shape[1]
    assert torch.equal(tokens[:, :width], generated)
    assert (tokens[:, width:] == PAD).all()
    assert mask[0].sum() <= 5
    assert len(tokens.unique()) > 4  # the comparison is not of one token repeated


@pytest.mark.parametrize("architecture", SHAPES)
def test_decoding_in_bfloat16_follows_the_forward_over_the_whole_sequence(architecture, tokenizer):
    model = random_causal_lm(architecture, tokenizer)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        tokens, mask = run(model, greedy=True)
        whole = torch.cat([MASK, mask], 1)
        logits = model(
            torch.cat([PROMPTS, tokens], 1), attention_mask=whole.long(), position_ids=position_ids(whole)
        ).logits[:, PROMPTS.shape[1] - 1 : -1]
    chosen = logits.float().gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert (logits.float().amax(-1) - chosen)[mask].max() < 0.25  # the two differ by rounding only


@pytest.mark.parametrize("architecture", SHAPES)
def test_samples_are_the_same_in_any_batch(architecture, tokenizer):
    model = random_causal_lm(architecture, tokenizer)
    uniforms = torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(0))
    lengths = [12, 3, 7, 12]
    tokens, mask = run(model, uniforms=uniforms, lengths=lengths)
    for parts in ([[0], [1], [2], [3]], [[0, 1, 2], [3]], [[3, 1], [2, 0]]):
        for part in parts:
            part_tokens, part_mask = run(model, rows=part, uniforms=uniforms, lengths=lengths)
            assert torch.equal(part_tokens, tokens[part]) and torch.equal(part_mask, mask[part])
    assert not torch.equal(run(model, uniforms=uniforms.flip(1), lengths=lengths)[0], tokens)


def test_a_sample_does_not_depend_on_how_far_its_prompt_is_padded(gpt2):
    uniforms = torch.rand(1, LENGTH, generator=torch.Generator().manual_seed(1))
    wide, narrow = (
        decode(
            gpt2,
            PROMPTS[3:, start:],
            MASK[3:, start:],
            uniforms,
            torch.tensor([LENGTH]),
            eos_token_id=EOS,
            pad_token_id=PAD,
            options=SamplingOptions(),
        ).tokens
        for start in (0, 2)
    )
    assert torch.equal(wide, narrow)


def test_each_token_follows_the_distribution_the_plain_model_gives(gpt2):
    uniforms = torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(2))
    tokens, _ = run(gpt2, uniforms=uniforms, temperature=0.8)
    for i in range(4):
        sequence = PROMPTS[i][MASK[i]].tolist()
        for t in range(LENGTH):
            with torch.no_grad():
                probabilities = (gpt2(torch.tensor([sequence])).logits[0, -1].double() / 0.8).softmax(-1)
            token = tokens[i, t].item()
            below = probabilities[:token].sum().item()
            assert below - 1e-5 <= uniforms[i, t] <= below + probabilities[token].item() + 1e-5
            sequence.append(token)


def test_lengths_are_respected_without_eos(gpt2):
    def never(logits, _call):
        logits[:, EOS] = -float("inf")
        return logits

    with changed_logits(gpt2, never) as calls:
        tokens, mask = run(gpt2, lengths=[1, 4, 9, 2])
    assert mask.sum(1).tolist() == [1, 4, 9, 2]
    assert mask.int().diff(dim=1).max() <= 0  # no hole
    assert (tokens[~mask] == PAD).all() and (tokens[mask] != EOS).all()
    assert len(calls) == 9  # and no forward after the longest has ended


def test_eos_at_once_is_kept_as_the_whole_response(gpt2):
    def at_once(logits, _call):
        logits[:, EOS] += 1e4
        return logits

    with changed_logits(gpt2, at_once) as calls:
        tokens, mask = run(gpt2, uniforms=torch.full((4, LENGTH), 0.5))
    assert (tokens[:, 0] == EOS).all() and (tokens[:, 1:] == PAD).all()
    assert mask.sum(1).tolist() == [1] * 4 and mask[:, 0].all()
    assert len(calls) == 1


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_responses_end_with_their_first_eos_also_where_padding_is_eos(gpt2, pad):
    script = [[1, EOS, 3, EOS, 5], [1, 2, 3, 4, EOS], [1, 2, 3, 4, 5], [1, 2, EOS, 4, 5]]
    with changed_logits(gpt2, saying(script)):
        tokens, mask = run(gpt2, uniforms=torch.full((4, 5), 0.5), lengths=[5, 5, 5, 3], pad=pad)
    assert tokens.tolist() == [
        [1, EOS, pad, pad, pad],
        [1, 2, 3, 4, EOS],
        [1, 2, 3, 4, 5],
        [1, 2, EOS, pad, pad],
    ]
    assert mask.sum(1).tolist() == [2, 5, 5, 3]


def test_a_sampled_pad_token_that_is_not_eos_is_real(gpt2):
    script = [[1, PAD, 2]] * 4
    with changed_logits(gpt2, saying(script)):
        tokens, mask = run(gpt2, uniforms=torch.full((4, 3), 0.5))
    assert tokens.tolist() == script and mask.all()


def test_min_tokens_keeps_eos_away(gpt2):
    def wants_to_end(logits, _call):
        logits[:, EOS] += 1e4
        return logits

    with changed_logits(gpt2, wants_to_end):
        _, mask = run(gpt2, uniforms=torch.full((4, LENGTH), 0.5), min_tokens=3)
    assert mask.sum(1).tolist() == [4] * 4


@pytest.mark.parametrize("architecture", SHAPES)
def test_what_is_kept_of_decoding_is_what_a_forward_says_to_rounding(architecture, tokenizer):
    policy = Policy(random_causal_lm(architecture, tokenizer)).eval()
    torch.nn.init.normal_(policy.value_head.weight)
    prompts = PromptBatch(PROMPTS, MASK, [""] * 4)
    uniforms, lengths = torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(3)), torch.tensor([12, 3, 7, 12])
    options = {
        "microbatch_size": 3,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "options": SamplingOptions(temperature=0.8),
    }
    responses, kept = sample_responses(
        policy.model, prompts, uniforms, lengths, value_head=policy.value_head, **options
    )
    expected = policy_outputs(policy, responses, temperature=0.8, microbatch_size=4)
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(kept, name), value, atol=2e-5, rtol=2e-5, msg=name)
    again, nothing = sample_responses(policy.model, prompts, uniforms, lengths, **options)
    assert nothing is None and torch.equal(again.response_tokens, responses.response_tokens)


def test_without_a_gpu_graphs_are_not_tried(gpt2):
    graphs = DecodeGraphs()
    uniforms = torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(1))
    arguments = (gpt2, PROMPTS, MASK, uniforms, torch.full((4,), LENGTH))
    options = {"eos_token_id": EOS, "pad_token_id": PAD, "options": SamplingOptions()}
    with_graphs = decode(*arguments, **options, graphs=graphs)
    assert torch.equal(with_graphs.tokens, decode(*arguments, **options).tokens) and graphs.failure is None


def test_a_step_over_fixed_buffers_can_be_repeated_after_they_are_put_back(gpt2):
    # What a captured graph relies on: the step reads and writes these buffers only.
    steps = _Steps(gpt2, PROMPTS, torch.zeros(4, LENGTH), EOS, PAD, SamplingOptions(), None)
    assert steps.fixed
    uniforms = torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(1))
    results = []
    for _ in range(2):
        steps.start(PROMPTS, MASK, uniforms, torch.full((4,), LENGTH))
        before = steps.buffers()
        kept = [buffer.clone() for buffer in before]
        steps.step()
        first = steps.tokens.clone()
        for buffer, value in zip(before, kept, strict=True):
            buffer.copy_(value)
        for _ in range(LENGTH - 1):
            steps.step()
        assert torch.equal(steps.tokens[:, :2], first[:, :2])
        assert [b.data_ptr() for b in steps.buffers()] == [b.data_ptr() for b in before]
        results.append(steps.result().tokens)
    assert torch.equal(*results) and torch.equal(results[0], run(gpt2, uniforms=uniforms)[0])
