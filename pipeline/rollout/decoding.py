"""Autoregressive decoding with a fixed-shape KV cache and given noise."""

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from pipeline.models.forward import accepts, causal_lm, position_ids
from pipeline.rollout.sampling import SamplingOptions, next_tokens


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: Tensor,
    prompt_mask: Tensor,
    uniforms: Tensor,
    lengths: Tensor,
    *,
    eos_token_id: int,
    pad_token_id: int,
    options: SamplingOptions,
) -> tuple[Tensor, Tensor]:
    """Continue each prompt until EOS or until its own length.

    Args:
        model: causal LM; its forward runs under the caller's autocast and adapter state.
        prompts, prompt_mask: (B, P), left-padded.
        uniforms: (B, R) in [0, 1), one a token.
        lengths: (B,) largest number of response tokens of each sample, at most R.
        options: how to draw. With `greedy` the result equals `generate(do_sample=False)`.

    Returns:
        response tokens (B, R), `pad_token_id` after the end, and their mask (B, R): True up to and with the first EOS.
    """
    batch, prompt_length = prompts.shape
    response_length = uniforms.shape[1]
    mask = torch.cat([prompt_mask, prompt_mask.new_ones(batch, response_length)], 1)
    positions = position_ids(mask)
    takes_positions = accepts(model, "position_ids")
    cache = _new_cache(causal_lm(model), prompt_length + response_length)
    responses = prompts.new_full((batch, response_length), pad_token_id)
    response_mask = prompt_mask.new_zeros(batch, response_length)
    running = lengths > 0
    current, start = prompts, 0
    for step in range(response_length):
        end = prompt_length + step
        inputs = {"position_ids": positions[:, start:end]} if takes_positions else {}
        logits = model(
            input_ids=current,
            attention_mask=mask[:, :end].long(),
            past_key_values=cache,
            use_cache=True,
            **({"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}),
            **inputs,
        ).logits[:, -1]
        tokens = next_tokens(logits, uniforms[:, step], step, eos_token_id, options)
        tokens = torch.where(running, tokens, pad_token_id)
        responses[:, step], response_mask[:, step] = tokens, running
        running = running & (tokens != eos_token_id) & (step + 1 < lengths)
        if not running.any():
            break
        current, start = tokens.unsqueeze(1), end
    return responses, response_mask


def _new_cache(model: nn.Module, length: int):
    """A static cache where the architecture allows one, else a growing one.

    Under autocast rotary models make keys of float32 and values of less, which a static cache, of one type, refuses.
    """
    if getattr(model, "_can_compile_fullgraph", False) and not torch.is_autocast_enabled(model.device.type):
        return StaticCache(config=model.config, max_cache_len=length)
    return DynamicCache(config=model.config)
