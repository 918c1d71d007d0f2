"""One batch of experience: sample responses, then read log-probs, values and reference log-probs."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.data.prompts import PromptBatch
from pipeline.models.packing import Layout, Packed, pack
from pipeline.models.policy import Policy, Reference
from pipeline.rollout.decoding import decode
from pipeline.rollout.sampling import SamplingOptions


@dataclass(frozen=True)
class Responses:
    """Prompts and what was sampled after them. Masks come from lengths: padding may be EOS."""

    prompt_tokens: Tensor  # (N, P) left-padded
    prompt_mask: Tensor  # (N, P)
    response_tokens: Tensor  # (N, R) right-padded
    response_mask: Tensor  # (N, R) up to and with the first EOS

    @property
    def tokens(self) -> Tensor:  # (N, P + R)
        return torch.cat([self.prompt_tokens, self.response_tokens], 1)

    @property
    def mask(self) -> Tensor:  # (N, P + R)
        return torch.cat([self.prompt_mask, self.response_mask], 1)

    def lengths(self) -> np.ndarray:
        """Tokens of each prompt and each response, (N, 2), on the host: waits for the device."""
        return torch.stack([self.prompt_mask.sum(1), self.response_mask.sum(1)], 1).cpu().numpy()

    def __len__(self) -> int:
        return len(self.prompt_tokens)


@dataclass(frozen=True)
class Rollout(Responses):
    """Responses with all that PPO needs of them, zero on padding."""

    logprobs: Tensor  # (N, R) under the policy that sampled
    ref_logprobs: Tensor  # (N, R)
    values: Tensor  # (N, R)
    entropy: Tensor  # (N, R) of the policy, nats
    scores: Tensor  # (N,)

    def take(self, index: Tensor | slice) -> "Rollout":
        """The samples at `index`, in that order."""
        return replace(self, **{field.name: getattr(self, field.name)[index] for field in fields(self)})


def sample_responses(
    model: torch.nn.Module,
    prompts: PromptBatch,
    uniforms: Tensor,
    lengths: Tensor,
    *,
    microbatch_size: int,
    eos_token_id: int,
    pad_token_id: int,
    options: SamplingOptions,
) -> Responses:
    """Sample a response to each prompt: uniforms (n, R), lengths (n,) as in `decode`; on the model's device."""
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(prompts), microbatch_size):
        part = prompts.slice(start, start + microbatch_size)
        tokens, mask = part.tokens.to(device), part.mask.to(device)
        responses, response_mask = decode(
            model,
            tokens,
            mask,
            uniforms[start : start + microbatch_size].to(device),
            lengths[start : start + microbatch_size].to(device),
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            options=options,
        )
        parts.append(Responses(tokens, mask, responses, response_mask))
    return Responses(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Responses)))


@torch.no_grad()
def policy_outputs(
    policy: Policy, responses: Responses, *, temperature: float, microbatch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, values and entropy of the responses under the policy, each (n, R), zero on padding."""
    parts = []
    for packed in _microbatches(responses, policy.layout, microbatch_size):
        outputs = policy(packed, temperature, with_entropy=True)
        parts.append([packed.unpack(x) for x in (outputs.logprobs, outputs.values, outputs.entropy)])
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def reference_logprobs(
    reference: Reference, responses: Responses, *, temperature: float, microbatch_size: int
) -> Tensor:
    """Log-probs of the responses under the reference, (n, R), zero on padding."""
    return torch.cat(
        [
            packed.unpack(reference.logprobs(packed, temperature))
            for packed in _microbatches(responses, reference.layout, microbatch_size)
        ]
    )


def _microbatches(responses: Responses, layout: Layout, size: int) -> Iterator[Packed]:
    lengths = responses.lengths()
    for start in range(0, len(responses), size):
        part = slice(start, start + size)
        yield pack(responses.tokens[part], lengths[part], responses.response_tokens.shape[1], layout)


def response_texts(responses: Responses, prompt_texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What follows each prompt as text. Decoded with the prompt, since decoders may drop a leading space."""
    texts = []
    for tokens, mask, prompt_mask, prompt in zip(
        responses.tokens, responses.mask, responses.prompt_mask, prompt_texts, strict=True
    ):
        whole = tokenizer.decode(tokens[mask], skip_special_tokens=True)
        if whole.startswith(prompt):
            texts.append(whole[len(prompt) :])
        else:
            kept = mask.clone()
            kept[: len(prompt_mask)] = False
            texts.append(tokenizer.decode(tokens[kept], skip_special_tokens=True))
    return texts
