"""One batch of experience: sample responses, then read log-probs, values and reference log-probs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.data.prompts import PromptBatch
from pipeline.data.tokens import prompt_text
from pipeline.models.kernels import many_forwards
from pipeline.models.packing import Layout, Packed, pack
from pipeline.models.policy import Policy, Reference
from pipeline.rollout.decoding import decode
from pipeline.rollout.graphs import DecodeGraphs
from pipeline.rollout.sampling import SamplingOptions

T = TypeVar("T")


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
class PolicyOutputs:
    """What the policy that sampled says of its responses, zero on padding."""

    logprobs: Tensor  # (N, R)
    values: Tensor  # (N, R)
    entropy: Tensor  # (N, R) nats


@dataclass(frozen=True)
class Scored(Responses):
    """Responses with what others say of them, zero on padding."""

    ref_logprobs: Tensor  # (N, R)
    parts: Tensor  # (N, K) raw scores of the reward's K components


@dataclass(frozen=True)
class Rollout(PolicyOutputs, Scored):
    """All that PPO needs."""

    weighted: Tensor  # (N, K) the components as they are added up

    @property
    def scores(self) -> Tensor:  # (N,)
        return self.weighted.sum(1)

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
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    options: SamplingOptions,
    value_head: torch.nn.Module | None = None,
    graphs: DecodeGraphs | None = None,
) -> tuple[Responses, PolicyOutputs | None]:
    """Sample a response to each prompt: uniforms (n, R), lengths (n,) as in `decode`; on the model's device.

    With a value head also what the policy says of them, from the same forwards.
    """
    device = next(model.parameters()).device
    parts, outputs = [], []
    with many_forwards(model, keep=graphs is not None and graphs.failure is None):
        for start in range(0, len(prompts), microbatch_size):
            part = prompts.slice(start, start + microbatch_size)
            tokens, mask = part.tokens.to(device), part.mask.to(device)
            decoded = decode(
                model,
                tokens,
                mask,
                uniforms[start : start + microbatch_size].to(device),
                lengths[start : start + microbatch_size].to(device),
                eos_token_id=eos_token_id,
                pad_token_id=pad_token_id,
                options=options,
                value_head=value_head,
                graphs=graphs,
            )
            parts.append(Responses(tokens, mask, decoded.tokens, decoded.mask))
            outputs.append(PolicyOutputs(decoded.logprobs, decoded.values, decoded.entropy))
    return concatenated(parts), None if value_head is None else concatenated(outputs)


def concatenated(parts: Sequence[T]) -> T:
    """One record of tensors from several, along the first dimension."""
    return type(parts[0])(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(parts[0])))


@torch.no_grad()
def policy_outputs(policy: Policy, responses: Responses, *, temperature: float, microbatch_size: int) -> PolicyOutputs:
    """What the policy says of the responses, from a forward over them; padding is zero."""
    parts = []
    for packed in _microbatches(responses, policy.layout, microbatch_size):
        outputs = policy(packed, temperature, with_entropy=True)
        parts.append(PolicyOutputs(*(packed.unpack(x) for x in (outputs.logprobs, outputs.values, outputs.entropy))))
    return concatenated(parts)


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


def sample_text(responses: Responses, index: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Prompt and response of one sample as text."""
    one = Responses(*(getattr(responses, field.name)[index : index + 1] for field in fields(Responses)))
    prompt = prompt_text(tokenizer, one.prompt_tokens[one.prompt_mask])
    return prompt, response_texts(one, [prompt], tokenizer)[0]


def response_texts(responses: Responses, prompt_texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What follows each prompt as text. Decoded with the prompt, since decoders may drop a leading space."""
    texts = []
    rows = (x.cpu() for x in (responses.tokens, responses.mask, responses.prompt_mask))
    for tokens, mask, prompt_mask, prompt in zip(*rows, prompt_texts, strict=True):
        whole = tokenizer.decode(tokens[mask], skip_special_tokens=True)
        if whole.startswith(prompt):
            texts.append(whole[len(prompt) :])
        else:
            kept = mask.clone()
            kept[: len(prompt_mask)] = False
            texts.append(tokenizer.decode(tokens[kept], skip_special_tokens=True))
    return texts
