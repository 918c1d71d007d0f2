"""One forward pass of any causal LM over prompt and response, read at the response only."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def position_ids(mask: Tensor) -> Tensor:
    """Positions (B, T) that count real tokens only, so that left padding shifts nothing."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the causal LM's forward takes `argument` (not every architecture has position ids)."""
    return argument in inspect.signature(causal_lm(model).forward).parameters


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model itself, inside PEFT's wrapper or not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def captured_head_input(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the language-model head reads: the trunk's last hidden state at the positions kept, (B, K, H).

    A hook gives it for every architecture, final norm included, without keeping the other layers' hidden states.
    """
    captured: list[Tensor] = []
    handle = (
        causal_lm(model)
        .get_output_embeddings()
        .register_forward_pre_hook(lambda _module, inputs: captured.append(inputs[0]))
    )
    try:
        yield captured
    finally:
        handle.remove()


def response_logits(model: nn.Module, tokens: Tensor, mask: Tensor, response_length: int) -> tuple[Tensor, Tensor]:
    """Logits and hidden states at the positions before each response token.

    Args:
        model: a transformers causal LM, or PEFT's wrapper of one.
        tokens, mask: (B, P + R): left-padded prompts followed by right-padded responses.
        response_length: R.

    Returns:
        logits (B, R, V) in the forward's type, and the head's input (B, R, H).
    """
    inputs = {"input_ids": tokens, "attention_mask": mask.long(), "use_cache": False}
    if accepts(model, "position_ids"):
        inputs["position_ids"] = position_ids(mask)
    keep = response_length + 1  # the last position predicts what follows the response; dropped below
    if accepts(model, "logits_to_keep"):
        inputs["logits_to_keep"] = keep
    with captured_head_input(model) as captured:
        logits = model(**inputs).logits
    return logits[:, -keep:-1], captured[0][:, -keep:-1]


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `tokens`, in float32: logits (B, R, V), tokens (B, R) -> (B, R)."""
    logits = logits.float() / temperature
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


@torch.no_grad()
def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature) in nats, in float32: (B, R, V) -> (B, R)."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)
