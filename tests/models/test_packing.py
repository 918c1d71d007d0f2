"""Rows of samples: every token has its place, next to nothing is padding, and no sample sees another."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SHAPES, random_causal_lm

from pipeline.models.forward import layout_of, response_states
from pipeline.models.packing import Layout, assign_rows, pack

END_TO_END = Layout(end_to_end=True, longest_by_mask=100, plain_head=True)
PROMPTS, RESPONSES = 8, 16  # widths


def ragged(count: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Tokens that are all different, and the lengths of prompts (2 to 8) and responses (1 to 16)."""
    draw = np.random.default_rng(seed)
    lengths = np.stack([draw.integers(2, PROMPTS + 1, count), draw.integers(1, RESPONSES + 1, count)], 1)
    return torch.arange(count * (PROMPTS + RESPONSES)).view(count, -1), lengths


@pytest.mark.parametrize("lengths", ([5], [3, 3, 3], [9, 1, 1, 1, 8, 7, 2], list(range(1, 24)), [0, 4]))
def test_every_sample_is_in_one_row_that_it_fits(lengths):
    rows, width = assign_rows(lengths)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) == width  # one row is full


def test_samples_of_one_length_have_a_row_each():
    assert assign_rows([31] * 16) == ([[i] for i in range(16)], 31)


def test_the_standard_recipes_lengths_waste_less_than_five_percent():
    draw = np.random.default_rng(0)
    for microbatch in (8, 16, 64):
        lengths = draw.integers(2, 9, microbatch) + draw.integers(4, 17, microbatch) - 1
        rows, width = assign_rows(lengths.tolist())
        assert lengths.sum() > 0.95 * len(rows) * width, microbatch


@pytest.mark.parametrize(
    "layout", (END_TO_END, replace(END_TO_END, longest_by_mask=0), replace(END_TO_END, end_to_end=False))
)
def test_tokens_positions_and_places_by_hand(layout):
    tokens = torch.tensor([[0, 11, 12, 13, 14, 0], [0, 0, 21, 22, 0, 0], [31, 32, 33, 34, 35, 36]])
    packed = pack(tokens, np.array([[2, 2], [1, 1], [3, 3]]), 3, layout)
    assert packed.targets.tolist() == [13, 14, 22, 34, 35, 36]
    read = packed.tokens.flatten()[packed.read]
    assert read.tolist() == [12, 13, 21, 33, 34, 35]  # each token is predicted from the one before it
    assert packed.positions.flatten()[packed.read].tolist() == [1, 2, 0, 2, 3, 4]
    assert packed.unpack(torch.arange(1.0, 7)).tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    assert packed.take(packed.unpack(torch.arange(6))).tolist() == list(range(6))
    if layout.end_to_end:
        assert packed.tokens.shape == (1, 9) and (packed.attention is None) == (layout.longest_by_mask == 0)
    else:
        assert packed.tokens.shape == (3, 5) and packed.attention.sum(1).tolist() == [3, 1, 5]


@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize("by_mask", (True, False))
def test_hidden_states_are_those_of_each_sample_alone(architecture, by_mask, tokenizer):
    model = random_causal_lm(architecture, tokenizer)
    layout = layout_of(model)
    assert layout.end_to_end and layout.plain_head and layout.longest_by_mask > 1000
    tokens, lengths = ragged(12)
    tokens = tokens % len(tokenizer)
    packed = pack(tokens, lengths, RESPONSES, replace(layout, longest_by_mask=100 if by_mask else 0))
    assert packed.tokens.shape[0] < 12 and (packed.attention is not None) == by_mask
    with torch.no_grad():
        states = response_states(model, packed)
        at = 0
        for row, (prompt, response) in zip(tokens, lengths, strict=True):
            alone = row[PROMPTS - prompt : PROMPTS + response].unsqueeze(0)
            expected = model(alone, output_hidden_states=True).hidden_states[-1][0, prompt - 1 : -1]
            torch.testing.assert_close(states[at : at + response], expected, atol=1e-5, rtol=1e-5)
            at += response


@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize("by_mask", (True, False))
def test_rows_wide_as_a_gpu_likes_them_change_no_state_and_no_place(architecture, by_mask, tokenizer):
    model = random_causal_lm(architecture, tokenizer)
    layout = replace(layout_of(model), longest_by_mask=100 if by_mask else 0)
    # One of many samples, of one, of all the model's 64 positions and next to nothing, and of three tokens.
    for lengths in (ragged(12)[1], ragged(1)[1], np.array([[8, 56], [2, 1]]), np.array([[2, 2]])):
        count, width = len(lengths), PROMPTS + max(RESPONSES, lengths[:, 1].max())
        tokens = torch.arange(count * width).view(count, width) % len(tokenizer)
        response = tokens.shape[1] - PROMPTS
        plain, wide = (pack(tokens, lengths, response, layout, multiple=multiple) for multiple in (None, 16))
        assert plain.tokens.shape[1] % 16 and wide.tokens.shape[1] % 16 == 0
        assert 0 < wide.tokens.shape[1] - plain.tokens.shape[1] < 16 and len(wide.tokens) == len(plain.tokens)
        assert torch.equal(wide.targets, plain.targets) and torch.equal(wide.slots, plain.slots)
        assert wide.positions.max() < lengths.sum(1).max(), "padding has no positions that the model may lack"
        with torch.no_grad():
            states = [response_states(model, packed) for packed in (plain, wide)]
        torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)


def test_a_row_a_sample_is_never_wider_than_the_longest():
    tokens, lengths = ragged(4)
    packed = pack(tokens, lengths, RESPONSES, replace(END_TO_END, end_to_end=False), multiple=16)
    assert packed.tokens.shape == (4, lengths.sum(1).max() - 1)


def test_a_sample_without_a_response_may_be_in_a_wide_row():
    tokens, lengths = ragged(3)
    lengths[1, 1] = 0
    packed = pack(tokens, lengths, RESPONSES, END_TO_END, multiple=16)
    assert packed.tokens.shape[1] % 16 == 0 and len(packed.targets) == lengths[:, 1].sum()
    nothing = pack(tokens, np.array([[2, 0]] * 3), RESPONSES, END_TO_END, multiple=16)
    assert len(nothing.targets) == 0


def test_a_model_that_does_not_keep_samples_apart_is_found_out(tokenizer):
    model = random_causal_lm("gpt2", tokenizer)
    forward = model.transformer.forward

    def blind(*args, **inputs):
        """As models whose mask does not see that positions start again."""
        tokens = args[0] if args else inputs["input_ids"]
        return forward(*args, **inputs | {"attention_mask": torch.ones_like(tokens)})

    model.transformer.forward = blind
    layout = layout_of(model)
    assert not layout.end_to_end and layout.plain_head


def test_a_model_that_scales_its_logits_is_found_out(tokenizer):
    model = random_causal_lm("gpt2", tokenizer)
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits)
    assert layout_of(model).plain_head
    forward = model.forward

    def capped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    model.forward = capped
    assert not layout_of(model).plain_head


def test_longer_samples_than_a_sliding_window_are_told_apart_by_their_positions(tokenizer):
    model = random_causal_lm("gpt2", tokenizer)
    model.config.sliding_window = 6
    assert layout_of(model).longest_by_mask == 6
