"""Autoregressive decoding over buffers that stay where they are: fixed-shape KV cache, noise given, no host in it.

On CUDA the step that makes one token is a graph, captured once for each shape (`rollout/graphs.py`). Elsewhere, and for
models that want another cache or mask, the same step runs as a plain loop.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from pipeline.models.forward import accepts, captured_head_input, causal_lm, longest_by_mask, position_ids
from pipeline.models.head import logits_logprobs
from pipeline.rollout.graphs import DecodeGraphs
from pipeline.rollout.sampling import SamplingOptions, goes_on, next_tokens

TOKENS_BETWEEN_CHECKS = 8  # whether all samples have ended: a CUDA device would wait for the question each time


@dataclass(frozen=True)
class Decoded:
    """What was sampled; and what the policy says of it, where it was asked for a value head. Zero on padding."""

    tokens: Tensor  # (B, R), the padding token after the end
    mask: Tensor  # (B, R) True up to and with the first EOS
    logprobs: Tensor | None  # (B, R) float32
    values: Tensor | None  # (B, R)
    entropy: Tensor | None  # (B, R)


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: Tensor,
    prompt_mask: Tensor,
    uniforms: Tensor,
    lengths: Tensor,
    *,
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    options: SamplingOptions,
    value_head: nn.Module | None = None,
    graphs: DecodeGraphs | None = None,
) -> Decoded:
    """Continue each prompt until EOS or until its own length.

    Args:
        model: causal LM; its forward runs under the caller's autocast and adapter state.
        prompts, prompt_mask: (B, P), left-padded.
        uniforms: (B, R) in [0, 1), one a token.
        lengths: (B,) largest number of response tokens of each sample, at most R.
        eos_token_id: what ends a response: one token, or several of which any does.
        options: how to draw. With `greedy` the result equals `generate(do_sample=False)`.
        value_head: keep log-probs, values and entropy of the tokens, as this forward gives them.
        graphs: where CUDA graphs of earlier calls are.
    """
    steps = _Steps(model, prompts, uniforms, eos_token_id, pad_token_id, options, value_head)
    if graphs is not None:
        steps = graphs.find(steps)
    steps.start(prompts, prompt_mask, uniforms, lengths)
    advance = steps.step if graphs is None else graphs.captured(steps)
    often = 1 if prompts.device.type == "cpu" else TOKENS_BETWEEN_CHECKS
    for step in range(1, uniforms.shape[1]):
        if step % often == 0 and not steps.running.any():
            break
        advance()
    return steps.result()


@torch.no_grad()
def decode_stepwise(
    model: nn.Module,
    prompts: Tensor,
    prompt_mask: Tensor,
    uniforms: Tensor,
    lengths: Tensor,
    *,
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    options: SamplingOptions,
) -> Iterator[Decoded]:
    """As `decode`, for those who watch: gives what there is after each token.

    Each step runs under the autocast and adapter state of the `next` that asks for it, so the original and the tuned
    model can take turns.
    """
    steps = _Steps(model, prompts, uniforms, eos_token_id, pad_token_id, options, None)
    steps.start(prompts, prompt_mask, uniforms, lengths)
    yield steps.result()
    while steps.running.any():
        steps.step()
        yield steps.result()


class _Steps:
    """The buffers of one batch and the step over them."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Tensor,
        uniforms: Tensor,
        eos_token_id: int | Sequence[int],
        pad_token_id: int,
        options: SamplingOptions,
        value_head: nn.Module | None,
    ):
        (batch, self.prompt_length), length = prompts.shape, uniforms.shape[1]
        self.model, self.value_head, self.options = model, value_head, options
        self.eos = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
        self.pad = pad_token_id
        total = self.prompt_length + length
        lm, device = causal_lm(model), prompts.device
        self.cache, self.fixed = _new_cache(lm, total, by_mask=total <= longest_by_mask(model))
        self.takes_positions = accepts(model, "position_ids")
        self.keeps_one = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
        self.tokens = prompts.new_full((batch, length), pad_token_id)
        self.uniforms, self.lengths = torch.empty_like(uniforms), prompts.new_zeros(batch)
        self.running = torch.zeros(batch, dtype=torch.bool, device=device)
        self.mask = torch.zeros(batch, length, dtype=torch.bool, device=device)
        self.allowed = torch.zeros(batch, total, dtype=torch.bool, device=device)  # positions that may be looked at
        self.current, self.position = prompts.new_zeros(batch, 1), prompts.new_zeros(batch, 1)
        self.at = prompts.new_zeros(1)  # response tokens so far
        self.kept = [torch.zeros(batch, length, device=device) for _ in range(3)] if value_head is not None else []
        self.causal = torch.ones(self.prompt_length, total, dtype=torch.bool, device=device).tril()

    @property
    def shape(self) -> tuple[object, ...]:
        """What of this batch a captured step depends on."""
        return (*self.tokens.shape, self.prompt_length, self.eos, self.pad, self.options)

    def start(self, prompts: Tensor, prompt_mask: Tensor, uniforms: Tensor, lengths: Tensor) -> None:
        """Read the prompts and draw the first tokens."""
        self.uniforms.copy_(uniforms)
        self.lengths.copy_(lengths)
        self.running.copy_(self.lengths > 0)
        self.tokens.fill_(self.pad)
        self.mask.zero_()
        self.allowed.zero_()
        self.allowed[:, : self.prompt_length] = prompt_mask
        self.at.zero_()
        for kept in self.kept:
            kept.zero_()
        self.cache.reset()
        positions = position_ids(prompt_mask)
        self.position.copy_(positions[:, -1:])
        mask = prompt_mask.long()
        if self.fixed:  # padding may look at itself: a row without anything to look at would be NaN
            mask = (self.allowed.unsqueeze(1) & self.causal) | self.causal.triu()
            mask = mask.unsqueeze(1)
        self._forward(prompts, positions, mask)

    def step(self) -> None:
        """Read the last tokens and draw the next ones."""
        self.position += 1
        self.allowed.index_fill_(1, self.prompt_length + self.at - 1, True)
        mask = self.allowed[:, None, None]
        if not self.fixed:  # a cache that grows
            mask = self.allowed[:, : self.prompt_length + int(self.at)].long()
        self._forward(self.current, self.position, mask)

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> None:
        inputs = {"position_ids": positions} if self.takes_positions else {}
        with captured_head_input(self.model) if self.kept else nullcontext([]) as captured:
            logits = self.model(
                input_ids=tokens,
                attention_mask=mask,
                past_key_values=self.cache,
                use_cache=True,
                **self.keeps_one,
                **inputs,
            ).logits[:, -1]
        uniforms = self.uniforms.index_select(1, self.at).squeeze(1)
        drawn = next_tokens(logits, uniforms, self.at, self.eos, self.options)
        if self.kept:
            logprobs, entropy = logits_logprobs(logits, drawn, self.options.temperature, with_entropy=True)
            values = self.value_head(captured[0][:, -1].float()).squeeze(-1)
            for kept, new in zip(self.kept, (logprobs, values, entropy), strict=True):
                kept.index_copy_(1, self.at, torch.where(self.running, new, 0.0).unsqueeze(1))
        drawn = torch.where(self.running, drawn, self.pad)
        self.tokens.index_copy_(1, self.at, drawn.unsqueeze(1))
        self.mask.index_copy_(1, self.at, self.running.unsqueeze(1))
        self.at += 1
        self.running &= goes_on(drawn, self.eos) & (self.at < self.lengths)
        self.current.copy_(drawn.unsqueeze(1))

    def buffers(self) -> list[Tensor]:
        """All that a step changes, once the prompts are read."""
        own = [self.running, self.tokens, self.mask, self.allowed, self.current, self.position, self.at]
        cached = [x for layer in self.cache.layers for x in (layer.keys, layer.values, layer.cumulative_length)]
        return own + self.kept + cached

    def result(self) -> Decoded:
        """What was sampled, out of the buffers."""
        logprobs, values, entropy = (x.clone() for x in self.kept) if self.kept else (None, None, None)
        return Decoded(self.tokens.clone(), self.mask.clone(), logprobs, values, entropy)


class _FixedCache(StaticCache):
    """A static cache of one type: under autocast rotary models make keys of float32 and values of less."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        device = key_states.device.type
        if torch.is_autocast_enabled(device):
            lowered = torch.get_autocast_dtype(device)
            key_states, value_states = key_states.to(lowered), value_states.to(lowered)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _new_cache(lm: nn.Module, length: int, *, by_mask: bool) -> tuple[StaticCache | DynamicCache, bool]:
    """A cache of fixed shape where the architecture allows one and a mask of our own; else a growing one, and False."""
    if by_mask and getattr(lm, "_can_compile_fullgraph", False):
        cache = _FixedCache(config=lm.config, max_cache_len=length)
        if all(type(layer) is StaticLayer for layer in cache.layers):
            return cache, True
    return DynamicCache(config=lm.config), False
