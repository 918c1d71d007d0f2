"""The chunked head: the same numbers and gradients as plain autograd, in chunks of any size."""

import pytest
import torch
from torch import nn

from pipeline.models import head
from pipeline.models.head import head_logprobs, head_loss, token_logprobs

TOKENS, HIDDEN, VOCABULARY, TEMPERATURE = 13, 8, 50, 0.7


@pytest.fixture(params=(1, 4, 13, 100))
def chunk(request, monkeypatch):
    """Tokens a chunk; a CPU works on two of them at a time."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * VOCABULARY * request.param)
    monkeypatch.setattr(head, "CACHED_BYTES", 8 * VOCABULARY)


@pytest.fixture
def case():
    """Head, hidden states and targets; the sum of squared log-probs, each with a weight, is the loss."""
    torch.manual_seed(0)
    linear = nn.Linear(HIDDEN, VOCABULARY)
    return linear, torch.randn(TOKENS, HIDDEN), torch.randint(VOCABULARY, (TOKENS,))


def losses(logprobs, rows):
    return torch.linspace(-1, 1, TOKENS)[rows] * logprobs.square()


@pytest.mark.parametrize("bias", (True, False))
def test_loss_and_gradients_equal_autograds(chunk, case, bias):
    linear, hidden, targets = case
    if not bias:
        linear.bias = None
    results = []
    for fused in (True, False):
        linear.zero_grad()
        states = hidden.clone().requires_grad_()
        if fused:
            loss, logprobs = head_loss(linear, states, targets, losses, TEMPERATURE, scale=0.3)
        else:
            logprobs = token_logprobs(linear(states), targets, TEMPERATURE)
            loss = 0.3 * losses(logprobs, slice(None)).sum()
        assert not (fused and logprobs.requires_grad)
        (2 * loss).backward()
        results.append([loss, logprobs, states.grad, linear.weight.grad, *([linear.bias.grad] if bias else [])])
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)


def test_logprobs_and_entropy_equal_the_whole_tables(chunk, case):
    linear, hidden, targets = case
    logprobs, entropy = head_logprobs(linear, hidden, targets, TEMPERATURE, with_entropy=True)
    table = (linear(hidden) / TEMPERATURE).log_softmax(-1)
    torch.testing.assert_close(logprobs, table[range(TOKENS), targets].detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(-1).detach(), atol=1e-5, rtol=1e-5)
    assert not logprobs.requires_grad and head_logprobs(linear, hidden, targets)[1] is None


def test_a_frozen_head_costs_no_gradient_and_the_hidden_states_get_theirs(case):
    linear, hidden, targets = case
    linear.requires_grad_(False)
    states = hidden.clone().requires_grad_()
    loss, _ = head_loss(linear, states, targets, losses)
    loss.backward()
    assert linear.weight.grad is None and states.grad.abs().sum() > 0


def test_bfloat16_logits_are_those_of_the_module_and_gradients_follow_autograds(case):
    linear, hidden, targets = case
    gradients = []
    for fused in (True, False):
        linear.zero_grad()
        states = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            if fused:
                loss, logprobs = head_loss(linear, states, targets, losses)
                torch.testing.assert_close(logprobs, head_logprobs(linear, states, targets)[0], atol=0.02, rtol=0)
            else:
                loss = losses(token_logprobs(linear(states), targets), slice(None)).sum()
        loss.backward()
        gradients.append((states.grad, linear.weight.grad))
    for fused, plain in zip(*gradients, strict=True):
        assert fused.dtype == torch.float32
        torch.testing.assert_close(fused, plain, atol=0.05, rtol=0.02)


def test_nothing_of_tokens_times_vocabulary_is_kept_for_backward():
    torch.manual_seed(0)
    linear, hidden = nn.Linear(4, 4000, bias=False), torch.randn(300, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss, _ = head_loss(linear, hidden, torch.zeros(300, dtype=torch.long), losses_of_one)
    kept = [x for x in loss.grad_fn.gradients if x is not None]
    assert {tuple(x.shape) for x in kept} == {(300, 4), (4000, 4)}
    assert all(x.numel() <= 4 * 4000 for x in saved)


def losses_of_one(logprobs, _rows):
    return -logprobs
